use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;

use super::super::Namespace;
use super::*;
use crate::chunk::ChunkKey;

/// A namespace's directory with nothing in it.
struct Ground {
    _root: tempfile::TempDir,
    directory: NamespaceDirectory,
}

impl Ground {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(root.path(), &namespace);
        directory.make(false).unwrap();
        Self {
            _root: root,
            directory,
        }
    }

    /// Puts a file in a chunk's place.
    fn put(&self, index: u64) -> (Place, PathBuf) {
        let (place, path) = self.place(index);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "bad").unwrap();
        (place, path)
    }

    fn place(&self, index: u64) -> (Place, PathBuf) {
        let key = ChunkKey::from_bytes(&index.to_be_bytes()).unwrap();
        ((0, 0.into(), key), self.directory.chunk(0, 0.into(), &key))
    }

    fn quarantine(&self) -> PathBuf {
        self.directory.path().join(QUARANTINE_NAME)
    }

    fn folder(&self) -> Folder {
        self.directory
            .open()
            .unwrap()
            .folder(QUARANTINE_NAME)
            .unwrap()
    }

    fn aside(&self, place: &Place, inode: Option<u64>) -> SetAside {
        set_aside(&self.directory, place, inode, "page 3 is bad").unwrap()
    }
}

#[test]
fn a_chunk_is_kept_with_its_reason_and_a_newer_one_is_spared() {
    let ground = Ground::new();
    let (place, path) = ground.put(1);
    let inode = std::fs::metadata(&path).unwrap().ino();
    assert_eq!(ground.aside(&place, Some(inode + 1)), SetAside::NotThere);
    assert!(path.exists());
    assert_eq!(ground.aside(&place, Some(inode)), SetAside::Kept);
    assert!(!path.exists());
    let kept = list(&ground.folder()).unwrap();
    assert_eq!((kept.len(), kept[0].place), (1, place));
    let reason = read_reason(&ground.folder(), &kept[0]).unwrap();
    assert_eq!(reason.reason, "page 3 is bad");
    assert_eq!(reason.process, std::process::id());
    assert_eq!(ground.aside(&place, None), SetAside::NotThere);
    assert_eq!(ground.aside(&ground.place(2).0, None), SetAside::NotThere);
}

#[test]
fn the_quarantine_is_bounded_and_forgets_the_oldest_with_their_reasons() {
    let ground = Ground::new();
    let places: Vec<Place> = (0..QUARANTINE_MAX as u64 + 20)
        .map(|index| {
            let (place, path) = ground.put(index);
            assert_eq!(ground.aside(&place, None), SetAside::Kept);
            assert!(!path.exists());
            place
        })
        .collect();
    let kept: Vec<Place> = list(&ground.folder())
        .unwrap()
        .iter()
        .map(|name| name.place)
        .collect();
    assert_eq!(kept, places[20..]);
    let files = std::fs::read_dir(ground.quarantine()).unwrap().count();
    assert_eq!(files, 2 * QUARANTINE_MAX);
    // A reason alone goes when it is old, a chunk alone is none of a reason to keep.
    let orphan = QuarantineName {
        nanoseconds: 5,
        place: places[0],
    };
    std::fs::write(ground.quarantine().join(format!("{orphan}.json")), "{}").unwrap();
    std::fs::write(ground.quarantine().join("notes.txt"), "mine").unwrap();
    assert_eq!(ground.aside(&ground.put(999).0, None), SetAside::Kept);
    let files = std::fs::read_dir(ground.quarantine()).unwrap().count();
    assert_eq!(files, 2 * QUARANTINE_MAX + 1, "what is not ours stays");
}

#[test]
fn what_cannot_be_removed_neither_blocks_the_quarantine_nor_a_key() {
    let ground = Ground::new();
    // Folders that are not empty, oldest of all, as many as fit.
    std::fs::create_dir(ground.quarantine()).unwrap();
    for index in 0..QUARANTINE_MAX as u64 {
        let name = QuarantineName {
            nanoseconds: index,
            place: ground.place(index).0,
        };
        std::fs::create_dir_all(ground.quarantine().join(name.to_string()).join("full")).unwrap();
    }
    let (place, path) = ground.put(1);
    assert_eq!(ground.aside(&place, None), SetAside::Removed);
    assert!(!path.exists());
    let (place, path) = ground.place(2);
    std::fs::create_dir_all(path.join("full")).unwrap();
    assert_eq!(ground.aside(&place, None), SetAside::Kept);
    assert!(!path.exists());
}

#[test]
fn a_quarantine_that_is_not_ours_costs_the_chunk_and_not_its_key() {
    let outside = tempfile::tempdir().unwrap();
    for kind in ["file", "link", "mount"] {
        let ground = Ground::new();
        match kind {
            "file" => std::fs::write(ground.quarantine(), "").unwrap(),
            "link" => symlink(outside.path(), ground.quarantine()).unwrap(),
            _ => {
                std::fs::create_dir(ground.quarantine()).unwrap();
                if !mount_tmpfs(&ground.quarantine()) {
                    eprintln!("skipped: a mount needs root");
                    continue;
                }
            }
        }
        let (place, path) = ground.put(1);
        let outcome = ground.aside(&place, None);
        if kind == "mount" {
            rustix::mount::unmount(ground.quarantine(), rustix::mount::UnmountFlags::empty())
                .unwrap();
        }
        assert_eq!(outcome, SetAside::Removed, "{kind}");
        assert!(!path.exists(), "{kind}");
    }
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

/// Makes a rename there one to another file system (EXDEV).
fn mount_tmpfs(path: &std::path::Path) -> bool {
    use rustix::mount::{MountFlags, mount};
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"size=1m").is_ok()
}

#[test]
fn many_at_once_keep_the_bound_and_lose_none_of_the_others() {
    let ground = Ground::new();
    let threads = 8;
    let each = 60;
    let outcomes: Vec<SetAside> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let ground = &ground;
                scope.spawn(move || {
                    let chunks = (0..each).map(|index| ground.put(thread * each + index));
                    chunks
                        .map(|(place, path)| {
                            let outcome = ground.aside(&place, None);
                            assert!(!path.exists());
                            outcome
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    assert_eq!(outcomes.len() as u64, threads * each);
    assert!(
        outcomes.iter().all(|outcome| *outcome == SetAside::Kept),
        "{outcomes:?}"
    );
    let kept = list(&ground.folder()).unwrap();
    // Each thread may add one between another's look and its own.
    let most = QUARANTINE_MAX + threads as usize;
    assert!(
        (QUARANTINE_MAX..=most).contains(&kept.len()),
        "{}",
        kept.len()
    );
}

#[test]
fn the_same_chunk_found_by_many_is_set_aside_once() {
    let ground = Ground::new();
    for round in 0..50 {
        let (place, path) = ground.put(round);
        let inode = std::fs::metadata(&path).unwrap().ino();
        let outcomes: Vec<SetAside> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| ground.aside(&place, Some(inode))))
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .collect()
        });
        let kept = outcomes
            .iter()
            .filter(|outcome| **outcome == SetAside::Kept)
            .count();
        assert_eq!(kept, 1, "{outcomes:?}");
    }
    let places: HashSet<Place> = list(&ground.folder())
        .unwrap()
        .iter()
        .map(|name| name.place)
        .collect();
    assert_eq!(places.len(), 50);
}

#[test]
fn a_chunk_that_comes_between_look_and_move_goes_back() {
    let ground = Ground::new();
    let (place, path) = ground.put(1);
    let quarantine = quarantine_folder(&ground.directory.open().unwrap(), false).unwrap();
    let location = Location::chunk(0, 0.into(), &place.2);
    let namespace = ground.directory.open().unwrap();
    let folder = namespace.folder(location.folder.unwrap()).unwrap();
    let name = QuarantineName::now(place);
    // The number of no file: as if the good one had come just now.
    assert!(!move_into(&quarantine, &name, &folder, &location.name, 0).unwrap());
    assert!(path.exists());
    assert!(list(&quarantine).unwrap().is_empty());
}

proptest! {
    #[test]
    fn names_have_one_spelling(text in "[0-9]{18,22}-g[0-9]r[0-9]-[0-9a-f]{14,18}\\.safetensors|.{0,40}") {
        if let Some(name) = QuarantineName::parse(&text) {
            prop_assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn reasons_of_any_text_fit_and_bytes_of_any_kind_are_read(text in ".{0,2000}", bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let ground = Ground::new();
        let (place, _) = ground.put(1);
        set_aside(&ground.directory, &place, None, &text).unwrap();
        let name = list(&ground.folder()).unwrap()[0];
        let reason = read_reason(&ground.folder(), &name).unwrap().reason;
        prop_assert_eq!(&reason, &text.chars().take(REASON_CHARACTERS_MAX).collect::<String>());
        let path = ground.quarantine().join(format!("{name}.json"));
        std::fs::write(path, &bytes).unwrap();
        prop_assert_eq!(read_reason(&ground.folder(), &name), Reason::parse(&bytes));
    }
}
