//! The DRAM tier that processes share (`local_cpu_shared`): what it serves, to whom, and what it
//! never does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::known::{get, put, remove_file};
use common::small_file_system::SmallFileSystem;
use common::{Cache, Geometry, LIMIT, config, namespace};
use kvrail::config::StoreConfig;
use kvrail::{Access, ErrorKind, Namespace, OpenOptions, Store};

const FILE_BYTES: usize = common::FILE_BYTES as usize;
const CHILD_PATH: &str = "KVRAIL_SHARED_TIER_PATH";
const CHILD_MEMORY: &str = "KVRAIL_SHARED_TIER_MEMORY";
/// Slots of a segment begin here (docs/performance.md).
const SLOTS_OFFSET: u64 = 2 << 20;

/// A directory of chunks, and one in memory for the tier; `None`, and why, without a tmpfs.
fn folders() -> Option<(tempfile::TempDir, tempfile::TempDir)> {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(memory) => Some((tempfile::tempdir().unwrap(), memory)),
        Err(error) => {
            eprintln!("skipped: /dev/shm cannot be written here: {error}");
            None
        }
    }
}

/// Settings with a shared tier for so many chunks.
fn settings(path: &Path, memory: &Path, chunks: usize) -> StoreConfig {
    let mut config = config(path);
    config.local_cpu = true;
    config.max_local_cpu_size_gb = (chunks * FILE_BYTES) as f64 / 1e9;
    config.local_cpu_shared = Some(memory.join("tier"));
    config
}

fn open_as(config: &StoreConfig, namespace: Namespace) -> (Store, Cache) {
    let store = Store::open(config, namespace, OpenOptions::default()).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    (store, cache)
}

fn open(config: &StoreConfig) -> (Store, Cache) {
    open_as(config, namespace())
}

/// Opens a store once nobody uses its segment any more: no thread of a store is joined when it is
/// dropped, and one that still copies a chunk has the segment for a moment.
fn open_alone(config: &StoreConfig) -> (Store, Cache) {
    let start = Instant::now();
    loop {
        let (store, cache) = open(config);
        let said = store.take_notices();
        if said.is_empty() {
            return (store, cache);
        }
        assert!(start.elapsed() < LIMIT, "{said:?}");
        drop((store, cache));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Returns how many loads came from memory.
fn from_memory(store: &Store) -> u64 {
    store.metrics().local_cpu_chunks_loaded
}

/// Waits until a chunk that was loaded is in memory: it is copied there when the load has ended.
fn wait_for_memory(store: &Store, cache: &Cache, index: u64) {
    let (start, before) = (Instant::now(), from_memory(store));
    while from_memory(store) == before {
        assert!(start.elapsed() < LIMIT, "chunk {index} never was in memory");
        assert!(get(cache, index));
    }
}

fn segments(memory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(memory.join("tier")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_one_store_keeps_the_others_have_also_when_it_is_gone() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 8);
    let (first, cache) = open(&settings);
    let (second, other) = open(&settings);
    (0..3).for_each(|index| put(&cache, index));
    (0..3).for_each(|index| remove_file(folder.path(), index));
    assert!((0..3).all(|index| get(&other, index)));
    assert_eq!(from_memory(&second), 3);
    // Only the second block, and nothing else is written.
    other.fill(30, 77);
    let before = other.block(31);
    assert_eq!(other.load(&[(2, 1, vec![30])]).loaded, 1);
    other.fill(40, 5);
    assert_eq!(other.block(30), other.block(40));
    assert_eq!(other.block(31), before);
    drop((first, cache, second, other));

    let (third, cache) = open(&settings);
    assert!((0..3).all(|index| get(&cache, index)), "it outlives them");
    assert_eq!(from_memory(&third), 3);
    let [segment] = segments(memory.path()).try_into().unwrap();
    let mode = std::fs::metadata(&segment).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_was_loaded_whole_is_kept_and_a_part_is_not() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let (first, cache) = open(&config(folder.path()));
    (0..2).for_each(|index| put(&cache, index));
    drop((first, cache));
    let (store, cache) = open(&settings(folder.path(), memory.path(), 8));
    assert!(get(&cache, 0));
    assert_eq!(cache.load(&[(1, 1, vec![12])]).loaded, 1);
    wait_for_memory(&store, &cache, 0);
    (0..2).for_each(|index| remove_file(folder.path(), index));
    assert!(get(&cache, 0));
    assert!(!get(&cache, 1));
}

#[test]
fn models_do_not_see_each_others_chunks_and_memory_that_nobody_uses_goes() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 8);
    let model = |name| Namespace::new(name, serde_json::Map::new()).unwrap();
    let (first, cache) = open_as(&settings, model("first"));
    put(&cache, 0);
    let (second, other) = open_as(&settings, model("second"));
    assert!(!get(&other, 0));
    assert_eq!(segments(memory.path()).len(), 2, "both are in use");
    drop((first, cache));
    assert_eq!(segments(memory.path()).len(), 2, "it may come back");
    let (third, _) = open_as(&settings, model("third"));
    assert_eq!(segments(memory.path()).len(), 2, "the first one is gone");
    put(&other, 1);
    std::fs::remove_dir_all(folder.path().join(model("second").directory_name())).unwrap();
    assert!(get(&other, 1), "the second one was not");
    drop((second, third));
}

#[test]
fn a_directory_without_the_tier_is_a_warning() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let mut settings = settings(folder.path(), memory.path(), 1);
    settings.local_cpu = false;
    let (store, _) = open(&settings);
    let said = store.take_notices();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0]
            .message
            .starts_with("extra_config.local_cpu_shared has no effect")
    );
    assert!(!memory.path().join("tier").exists());
}

#[test]
fn one_chunk_is_room_enough() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let (store, cache) = open(&settings(folder.path(), memory.path(), 1));
    assert_eq!(store.take_notices(), Vec::new());
    (0..3).for_each(|index| put(&cache, index));
    remove_file(folder.path(), 2);
    assert!(get(&cache, 2));
    assert_eq!(from_memory(&store), 1);
}

#[test]
fn it_is_bounded_for_all_together_and_one_pass_leaves_those_that_are_used_again() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 40);
    let (store, cache) = open(&settings);
    let (second, other) = open(&settings);
    (0..10).for_each(|index| put(&cache, index));
    for _ in 0..3 {
        assert!((0..10).all(|index| get(&cache, index)));
    }
    // Many times what the tier holds, each once; the ten stay in use.
    for index in 0..300 {
        put(&other, 100 + index);
        assert!(get(&cache, index % 10));
        let most = (40 * FILE_BYTES) as u64 + SLOTS_OFFSET;
        assert!(second.metrics().local_cpu_bytes <= most);
    }
    let before = from_memory(&store);
    assert!((0..10).all(|index| get(&cache, index)));
    let kept = from_memory(&store) - before;
    println!("{kept} of 10 chunks in use stayed in memory");
    assert!(kept >= 8);
    assert_eq!(store.metrics().local_cpu_inserts_failed, 0);
    let status = std::fs::metadata(&segments(memory.path())[0]).unwrap();
    assert!(status.len() <= (40 * FILE_BYTES) as u64 + SLOTS_OFFSET);
}

#[test]
fn memory_that_went_bad_is_never_served_and_its_file_is_read_instead() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 8);
    let (store, cache) = open(&settings);
    put(&cache, 0);
    assert!(get(&cache, 0));
    assert_eq!(from_memory(&store), 1);
    // One bit of each slot's payload.
    let segment = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&segments(memory.path())[0])
        .unwrap();
    for slot in 0..8 {
        let offset = SLOTS_OFFSET + slot * FILE_BYTES as u64 + 5000;
        let mut byte = [0];
        segment.read_exact_at(&mut byte, offset).unwrap();
        segment.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }
    assert!(get(&cache, 0), "from its file");
    assert_eq!(from_memory(&store), 1);
    assert_eq!(store.metrics().chunks_damaged, 1);
    assert_eq!(store.metrics().chunks_set_aside, 0, "the file is good");
    wait_for_memory(&store, &cache, 0);
}

#[test]
fn a_chunk_in_the_slot_of_another_is_found_out() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 2);
    let (store, cache) = open(&settings);
    (0..2).for_each(|index| put(&cache, index));
    let segment = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&segments(memory.path())[0])
        .unwrap();
    // Two whole and right images, exchanged.
    let mut images = [vec![0; FILE_BYTES], vec![0; FILE_BYTES]];
    let offset = |slot: usize| SLOTS_OFFSET + (slot * FILE_BYTES) as u64;
    for (slot, image) in images.iter_mut().enumerate() {
        segment.read_exact_at(image, offset(slot)).unwrap();
    }
    segment.write_all_at(&images[1], offset(0)).unwrap();
    segment.write_all_at(&images[0], offset(1)).unwrap();
    assert!((0..2).all(|index| get(&cache, index)), "from their files");
    assert_eq!(from_memory(&store), 0);
    assert_eq!(store.metrics().chunks_damaged, 2);
}

#[test]
fn a_file_that_is_no_segment_is_made_anew_unless_it_is_in_use() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 8);
    let (store, cache) = open(&settings);
    put(&cache, 0);
    let segment = segments(memory.path()).remove(0);
    drop((store, cache));
    for content in [&b""[..], b"nonsense", &[0; 8192]] {
        std::fs::write(&segment, content).unwrap();
        let (store, cache) = open_alone(&settings);
        assert!(get(&cache, 0));
        wait_for_memory(&store, &cache, 0);
        assert_eq!(store.take_notices(), Vec::new());
    }
    // Another size: taken as it is while somebody uses it.
    let (first, cache) = open(&settings);
    let larger = self::settings(folder.path(), memory.path(), 80);
    let (second, other) = open(&larger);
    let said = second.take_notices();
    assert!(
        said.iter().any(|notice| notice.message.contains("GB, not")),
        "{said:?}"
    );
    assert!(get(&other, 0));
    drop((first, cache, second, other));
    drop(open_alone(&larger));
    // A link in its place leads nowhere.
    std::fs::remove_file(&segment).unwrap();
    let target = memory.path().join("target");
    std::fs::write(&target, "untouched").unwrap();
    let name = segments(memory.path()).pop().unwrap_or(segment);
    std::fs::remove_file(&name).ok();
    std::os::unix::fs::symlink(&target, &name).unwrap();
    let (store, cache) = open(&larger);
    assert!(get(&cache, 0), "without the tier");
    let said = store.take_notices();
    assert!(
        said.iter()
            .any(|notice| notice.message.starts_with("going on without the shared")),
        "{said:?}"
    );
    assert_eq!(std::fs::read(&target).unwrap(), b"untouched");
}

#[test]
fn a_directory_that_cannot_be_it_is_an_error_at_start_for_those_who_write() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let open = |shared: &Path, access| {
        let mut settings = settings(folder.path(), memory.path(), 8);
        settings.local_cpu_shared = Some(shared.to_path_buf());
        let options = OpenOptions {
            access,
            ..OpenOptions::default()
        };
        Store::open(&settings, namespace(), options)
    };
    let refused = |shared: &Path| {
        let error = open(shared, Access::ReadWrite).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        error.to_string()
    };
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let key = "`extra_config.local_cpu_shared` = `";
    let is_tmpfs =
        std::fs::metadata(&disk).unwrap().dev() == std::fs::metadata(memory.path()).unwrap().dev();
    if is_tmpfs {
        eprintln!("skipped: temporary files lie in /dev/shm");
    } else {
        let text = refused(&disk);
        assert!(text.starts_with(key), "{text}");
        assert!(
            text.ends_with("on a tmpfs, such as /dev/shm/kvrail"),
            "{text}"
        );
        assert!(open(&disk, Access::ReadOnly).is_ok(), "who only looks");
    }
    let open_to_all = memory.path().join("all");
    std::fs::create_dir(&open_to_all).unwrap();
    let everybody = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&open_to_all, everybody).unwrap();
    assert!(refused(&open_to_all).ends_with("nobody else can write to"));
    let text = refused(&memory.path().join("not/there"));
    assert!(text.contains("can be made or opened"), "{text}");

    let Some(small) = SmallFileSystem::mount(1) else {
        return;
    };
    let mut settings = settings(folder.path(), small.path(), 1);
    settings.max_local_cpu_size_gb = 0.002;
    let error = Store::open(&settings, namespace(), OpenOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("this one has 0.001 GB"), "{text}");
}

#[test]
fn a_full_tmpfs_costs_the_tier_and_nothing_else() {
    let Some(small) = SmallFileSystem::mount(4) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path(), small.path(), 100);
    let (store, cache) = open(&settings);
    // All but a few chunks' room is somebody else's.
    let other = std::fs::File::create(small.path().join("other")).unwrap();
    let mut bytes = 0;
    while other.write_at(&[1; 4096], bytes).is_ok() {
        bytes += 4096;
    }
    other.set_len(bytes - 4 * FILE_BYTES as u64).unwrap();
    (0..50).for_each(|index| put(&cache, index));
    assert!((0..50).all(|index| get(&cache, index)));
    let metrics = store.metrics();
    assert_eq!((metrics.chunks_stored, metrics.stores_failed), (50, 0));
    assert!(metrics.local_cpu_inserts_failed > 0);
    let said = store.take_notices();
    assert!(
        said.iter().any(|notice| notice
            .message
            .contains("does not fit into the shared DRAM tier")),
        "{said:?}"
    );
}

#[test]
fn processes_that_are_killed_while_they_fill_it_leave_whole_chunks_or_none() {
    let Some((folder, memory)) = folders() else {
        return;
    };
    let settings = settings(folder.path(), memory.path(), 16);
    let (store, cache) = open(&settings);
    for round in 0..15 {
        let mut children: Vec<_> = (0..2)
            .map(|_| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--ignored", "--exact", "child", "--nocapture"])
                    .env(CHILD_PATH, folder.path())
                    .env(CHILD_MEMORY, memory.path())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let until = Instant::now() + Duration::from_millis(40 + round * 7919 % 41);
        while Instant::now() < until {
            (0..32).for_each(|index| {
                get(&cache, index);
            });
        }
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
    let metrics = store.metrics();
    println!(
        "{} loads, {} from memory",
        metrics.chunks_loaded, metrics.local_cpu_chunks_loaded
    );
    assert!(metrics.local_cpu_chunks_loaded > 100);
    assert_eq!(metrics.chunks_damaged, 0);
    // No lock of theirs is left: every slot can be filled.
    (1000..1100).for_each(|index| put(&cache, index));
    (1000..1100).for_each(|index| remove_file(folder.path(), index));
    let there = (1000..1100).filter(|index| get(&cache, *index)).count();
    assert_eq!(there, 16);
}

/// Not a test of its own: stores and loads the same 32 chunks until it is killed.
#[test]
#[ignore = "runs as the child of the test that kills processes"]
fn child() {
    let (Ok(path), Ok(memory)) = (std::env::var(CHILD_PATH), std::env::var(CHILD_MEMORY)) else {
        eprintln!("skipped: only meant to be started by the test that kills processes");
        return;
    };
    let settings = settings(Path::new(&path), Path::new(&memory), 16);
    loop {
        let (_store, cache) = open(&settings);
        for index in 0..32 {
            put(&cache, index);
            assert!(get(&cache, index));
        }
    }
}
