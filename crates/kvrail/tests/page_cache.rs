//! What loads and stores have to do with the page cache, by the setting `page_cache`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Cache, FILE_BYTES, Geometry, chunk_path, config, fault_engine, open_as, open_with};
use kvrail::Store;
use kvrail::config::{Durability, PageCache, StoreConfig};
use kvrail::io::{IoFile, OpenMode};
use kvrail::store::NoticeLevel;
use rustix::fs::{Advice, fadvise};

const PAGE: usize = 4096;
const ALL: [PageCache; 3] = [PageCache::Auto, PageCache::Keep, PageCache::Bypass];

fn config_with(path: &Path, page_cache: PageCache) -> StoreConfig {
    StoreConfig {
        page_cache,
        ..config(path)
    }
}

/// Opens a store, or says why this machine cannot show anything of the page cache.
fn open_direct(config: &StoreConfig) -> Option<Store> {
    let store = open_as(config);
    let report = store.describe().remove(0);
    if !report.direct {
        eprintln!(
            "skipped: no O_DIRECT for temporary files: {}",
            report.reason
        );
        return None;
    }
    let file = IoFile::open(&config.gds_path[0], OpenMode::Read, false).unwrap();
    if let Err(error) = file.cached_bytes(0, 1) {
        eprintln!("skipped: no cachestat(2) here: {error}");
        return None;
    }
    Some(store)
}

/// Returns which pages of a file are in the page cache.
fn cached_pages(path: &Path) -> Vec<bool> {
    let file = IoFile::open(path, OpenMode::Read, false).unwrap();
    let pages = file.regular_bytes().unwrap().unwrap() as usize / PAGE;
    let holds = |page| {
        file.cached_bytes((page * PAGE) as u64, PAGE as u64)
            .unwrap()
            > 0
    };
    (0..pages).map(holds).collect()
}

/// Has the page cache hold these pages of a file, and no others.
fn cache_only(path: &Path, pages: &[usize]) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    fadvise(&file, 0, None, Advice::Random).unwrap();
    for page in pages {
        file.read_exact_at(&mut [0], (page * PAGE) as u64).unwrap();
    }
}

/// Tries something about the page cache again: the system may empty it at any time, and so may others
/// on this machine.
fn eventually(mut attempt: impl FnMut() -> Result<(), String>) {
    let mut failures = Vec::new();
    while let Err(failure) = attempt() {
        failures.push(failure);
        assert!(failures.len() < 5, "five times in a row: {failures:?}");
    }
}

fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    holds.then_some(()).ok_or_else(what)
}

/// Stores the first chunk, from blocks 0 and 1.
fn store_one(store: &Store) -> Cache {
    let cache = Cache::attach(store, 0, Geometry::default());
    (0..2).for_each(|block| cache.fill(block, 7 + block as u64));
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    cache
}

/// Loads it to other blocks, and checks what came.
fn load_one(cache: &Cache) {
    (10..12).for_each(|block| cache.fill(block, 99));
    assert_eq!(cache.load(&[(0, 0, vec![10, 11])]).loaded, 1);
    assert_eq!(cache.block(10), cache.block(0));
    assert_eq!(cache.block(11), cache.block(1));
}

#[test]
fn only_keep_leaves_what_was_stored_in_the_page_cache() {
    for durability in [Durability::None, Durability::Full] {
        for page_cache in ALL {
            eventually(|| {
                let directory = tempfile::tempdir().unwrap();
                let mut config = config_with(directory.path(), page_cache);
                config.durability = durability;
                let Some(store) = open_direct(&config) else {
                    return Ok(());
                };
                let cache = store_one(&store);
                let file = chunk_path(directory.path(), 0, 0);
                let kept = page_cache == PageCache::Keep;
                let found = cached_pages(&file);
                check(found == [kept; 5], || format!("{page_cache:?}: {found:?}"))?;
                load_one(&cache);
                let counted = store.metrics().page_cache_bytes_loaded;
                let expected = if kept { FILE_BYTES } else { 0 };
                check(counted == expected, || format!("{page_cache:?}: {counted}"))?;
                let found = cached_pages(&file);
                check(found == [kept; 5], || format!("after a load: {found:?}"))?;
                assert_eq!(store.take_notices(), []);
                Ok(())
            });
        }
    }
}

#[test]
fn what_others_left_in_the_page_cache_is_taken_from_there_unless_it_is_bypassed() {
    for page_cache in ALL {
        eventually(|| {
            let directory = tempfile::tempdir().unwrap();
            let Some(store) = open_direct(&config_with(directory.path(), page_cache)) else {
                return Ok(());
            };
            let cache = store_one(&store);
            // Somebody reads the file, as tools and stores without O_DIRECT do.
            std::fs::read(chunk_path(directory.path(), 0, 0)).unwrap();
            load_one(&cache);
            let expected = match page_cache {
                PageCache::Bypass => 0,
                _ => FILE_BYTES,
            };
            let counted = store.metrics().page_cache_bytes_loaded;
            check(counted == expected, || format!("{page_cache:?}: {counted}"))
        });
    }
}

#[test]
fn a_request_of_which_a_page_is_missing_goes_to_the_engine_whole() {
    let directory = tempfile::tempdir().unwrap();
    let Some(store) = open_direct(&config(directory.path())) else {
        return;
    };
    let cache = store_one(&store);
    let file = chunk_path(directory.path(), 0, 0);
    let counted = || store.metrics().page_cache_bytes_loaded;
    // One request: it is cached, or it is not.
    for pages in [
        &[0, 1, 3, 4][..],
        &[0, 4],
        &[0, 1, 2, 3],
        &[1, 2, 3, 4],
        &[],
    ] {
        eventually(|| {
            cache_only(&file, pages);
            load_one(&cache);
            assert_eq!(counted(), 0, "{pages:?}");
            let found = cached_pages(&file);
            let is_there = |page: usize| pages.contains(&page);
            let is_same = (0..5).all(|page| is_there(page) == found[page]);
            check(is_same, || format!("{pages:?} became {found:?}"))
        });
    }
    eventually(|| {
        cache_only(&file, &[0, 1, 2, 3, 4]);
        load_one(&cache);
        check(counted() == FILE_BYTES, || "not cached any more".to_owned())
    });
}

/// Makes a chunk of 10 MiB: requests are 4 MiB each, so there are three. Returns the pages of its
/// file.
fn store_large(store: &Store, path: &Path) -> (Cache, usize) {
    let geometry = Geometry {
        layers: 2,
        block_bytes: 5 << 19,
        blocks_per_chunk: 2,
        blocks: 4,
    };
    let cache = Cache::attach(store, 0, geometry);
    (0..2).for_each(|block| cache.fill(block, 3 + block as u64));
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    // Another one, so that no staging buffer has the bytes of the first one left.
    (2..4).for_each(|block| cache.fill(block, 30 + block as u64));
    for index in 1..4 {
        assert_eq!(cache.store(&[(index, vec![2, 3])]).stored, 1);
    }
    let file = chunk_path(path, 0, 0);
    let pages = std::fs::metadata(&file).unwrap().len() as usize / PAGE;
    // The first and the last request are cached, what is between is not.
    let cached: Vec<usize> = (0..1024).chain(2048..pages).collect();
    cache_only(&file, &cached);
    (cache, cached.len())
}

#[test]
fn a_chunk_of_which_some_requests_are_cached_comes_from_both() {
    eventually(|| {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        config.buffer_mib = 32;
        let Some(store) = open_direct(&config) else {
            return Ok(());
        };
        let (cache, cached) = store_large(&store, directory.path());
        let expected = [cache.block(0), cache.block(1)];
        assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).loaded, 1);
        assert_eq!([cache.block(2), cache.block(3)], expected);
        let counted = store.metrics().page_cache_bytes_loaded;
        let bytes = (cached * PAGE) as u64;
        check(counted == bytes, || format!("{counted} of {bytes} bytes"))
    });
}

#[test]
fn damage_in_the_page_cache_is_found_wherever_it_is() {
    for page in 0..5 {
        eventually(|| {
            let directory = tempfile::tempdir().unwrap();
            let Some(store) = open_direct(&config_with(directory.path(), PageCache::Keep)) else {
                return Ok(());
            };
            let cache = store_one(&store);
            let before = cache.block(10);
            let path = chunk_path(directory.path(), 0, 0);
            let file = File::options().read(true).write(true).open(&path).unwrap();
            // Not synced: the device has the good byte, if any, and the page cache the bad one.
            let at = (page * PAGE + 100) as u64;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            assert_eq!(cache.load(&[(0, 0, vec![10, 11])]).failed, [0]);
            assert_eq!(cache.block(10), before, "no bad byte reaches a block");
            let metrics = store.metrics();
            assert_eq!((metrics.chunks_damaged, metrics.chunks_set_aside), (1, 1));
            let counted = metrics.page_cache_bytes_loaded;
            check(counted == FILE_BYTES, || format!("{counted} bytes"))
        });
    }
}

/// Has an engine fail as a script says on what the page cache has not of a chunk. Returns how many
/// requests it had; `None` where files cannot be opened direct.
fn fail_on_the_rest(fault: &str, damaged: u64) -> Option<u64> {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.buffer_mib = 32;
    open_direct(&config)?;
    config.wait_limit_seconds = 5.0;
    let engine = fault_engine(5);
    let store = open_with(&config, engine.clone());
    let (cache, _) = store_large(&store, directory.path());
    engine.set(&format!("read *.safetensors {fault}"));
    assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).failed, [0], "{fault}");
    let hits = engine.hits();
    let metrics = store.metrics();
    assert_eq!(metrics.chunks_damaged, damaged, "{fault}");
    engine.set("");
    Some(hits)
}

#[test]
fn an_engine_that_fails_on_the_rest_of_a_cached_chunk_fails_the_load() {
    for (fault, damaged) in [
        ("error=EIO", 0),
        ("lie", 1),
        ("short", 1),
        ("flip", 1),
        ("zero", 1),
        ("hang", 0),
    ] {
        // The system may take pages back before the load; then there is another chance.
        let mut hits = 0;
        for _ in 0..3 {
            let Some(had) = fail_on_the_rest(fault, damaged) else {
                return;
            };
            hits = had;
            if hits == 1 {
                break;
            }
        }
        assert_eq!(hits, 1, "{fault}: the engine had one of three requests");
    }
}

#[test]
fn a_path_that_cannot_be_bypassed_says_so_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config_with(directory.path(), PageCache::Bypass);
    config.use_direct_io = Some(false);
    let store = open_as(&config);
    let notices = store.take_notices();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(notices[0].level, NoticeLevel::Warning);
    let text = &notices[0].message;
    assert!(text.contains("page_cache is bypass, but"), "{text}");
    assert!(text.contains("use_direct_io is false"), "{text}");
}
