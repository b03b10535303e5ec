//! What a use does to the stamps of chunks.
//!
//! A chunk's stamp is always older than that of the chunk before it in its prompt, by 10 ms at
//! least: eviction, which goes by age, takes a prompt's tail before its head. So a stored chunk gets
//! the time of now or 10 ms before its predecessor's, whichever is earlier; and a use makes all
//! chunks before it young first, also those that were not read because the serving engine had them
//! in its own memory. A stamp is changed once in a minute at most.

use std::os::fd::AsFd;

use rustix::fs::AtFlags;

use super::chain::Link;
use super::stamp::Stamp;
use crate::chunk::{ChunkKey, ChunkRef};
use crate::io::IoFile;
use crate::store::cache_shared::CacheShared;
use crate::store::directory::Location;
use crate::store::shared::StoreShared;

/// Decides the stamp of a chunk that is handed over to be stored (`is_new`) or loaded: in memory
/// only, in the order of the prompt. The file is told by the thread that does the work.
pub(in crate::store) fn plan_use(
    store: &StoreShared,
    cache: &CacheShared,
    chunk: &ChunkRef,
    is_new: bool,
) {
    if let Some(now) = now_of(store, cache, &chunk.key) {
        let place = cache.place(&chunk.key);
        store.capacity.chains.plan(place, chunk.parent, now, is_new);
    }
}

/// Stamps a file that is about to be published.
pub(in crate::store) fn touch_stored(
    store: &StoreShared,
    cache: &CacheShared,
    chunk: &ChunkRef,
    file: &IoFile,
) {
    let Some(now) = now_of(store, cache, &chunk.key) else {
        return;
    };
    renew_before(store, cache, chunk, now);
    let planned = store.capacity.chains.get(&cache.place(&chunk.key));
    let at = planned.map_or(now, |link| link.milliseconds.min(now));
    let stamp = Stamp::first(at, time_of_parent(store, cache, chunk));
    if set(store, file.as_fd(), None, stamp) {
        note(store, cache, chunk, stamp);
    }
}

/// Renews the stamp of a chunk that was loaded from `file`.
pub(in crate::store) fn touch_loaded(
    store: &StoreShared,
    cache: &CacheShared,
    chunk: &ChunkRef,
    file: &IoFile,
) {
    let Some(now) = now_of(store, cache, &chunk.key) else {
        return;
    };
    renew_before(store, cache, chunk, now);
    if let Ok(status) = file.status() {
        renew(
            store,
            cache,
            chunk,
            now,
            Stamp::of_status(&status),
            Some(file),
        );
    }
}

/// Renews the stamp of a chunk that was to be stored and is there.
pub(in crate::store) fn touch_present(store: &StoreShared, cache: &CacheShared, chunk: &ChunkRef) {
    let Some(now) = now_of(store, cache, &chunk.key) else {
        return;
    };
    renew_before(store, cache, chunk, now);
    if let Some(stamp) = stamp_of(store, cache, &chunk.key) {
        renew(store, cache, chunk, now, stamp, None);
    }
}

/// Returns the time on a chunk's path, `None` where nothing may be written.
fn now_of(store: &StoreShared, cache: &CacheShared, key: &ChunkKey) -> Option<i64> {
    let mount = store.mount(cache.part, key);
    let path = store.capacity.of(&mount.root)?;
    Some(path.room.now_milliseconds())
}

/// Renews the stamps of all known chunks before one, the first of them first.
fn renew_before(store: &StoreShared, cache: &CacheShared, chunk: &ChunkRef, now: i64) {
    let Some(parent) = chunk.parent else { return };
    let pending = store
        .capacity
        .chains
        .take_pending(cache.place(&parent), now);
    for (place, link) in pending {
        let ancestor = ChunkRef {
            key: place.2,
            parent: link.parent,
        };
        if let Some(stamp) = stamp_of(store, cache, &ancestor.key) {
            renew(store, cache, &ancestor, now, stamp, None);
        }
    }
}

/// Renews one stamp if it is old enough, and counts the use.
fn renew(
    store: &StoreShared,
    cache: &CacheShared,
    chunk: &ChunkRef,
    now: i64,
    stamp: Stamp,
    file: Option<&IoFile>,
) {
    let planned = store.capacity.chains.get(&cache.place(&chunk.key));
    let at = planned.map_or(now, |link| link.milliseconds.min(now));
    let Some(renewed) = stamp.renewed(at, time_of_parent(store, cache, chunk)) else {
        return note(store, cache, chunk, stamp);
    };
    let done = match file {
        Some(file) => set(store, file.as_fd(), None, renewed),
        None => {
            let location = Location::chunk(cache.group, cache.part, &chunk.key);
            let namespace = store.mount(cache.part, &chunk.key).directory.open();
            let folder = namespace
                .and_then(|namespace| namespace.folder(location.folder.as_deref().unwrap_or(".")));
            match folder {
                Ok(folder) => set(store, folder.as_fd(), Some(&location.name), renewed),
                // Evicted meanwhile, and its folder removed.
                Err(_) => false,
            }
        }
    };
    if done {
        store.metrics.chunks_touched.add(1);
        note(store, cache, chunk, renewed);
    }
}

fn note(store: &StoreShared, cache: &CacheShared, chunk: &ChunkRef, stamp: Stamp) {
    let link = Link {
        parent: chunk.parent,
        milliseconds: stamp.milliseconds(),
        is_pending: false,
    };
    store.capacity.chains.insert(cache.place(&chunk.key), link);
}

/// Returns the time of the stamp of the chunk before, `None` when there is none.
fn time_of_parent(store: &StoreShared, cache: &CacheShared, chunk: &ChunkRef) -> Option<i64> {
    let parent = chunk.parent?;
    let known = store.capacity.chains.get(&cache.place(&parent));
    known
        .map(|link| link.milliseconds)
        .or_else(|| stamp_of(store, cache, &parent).map(Stamp::milliseconds))
}

/// Reads a chunk's stamp, `None` when it is not there.
fn stamp_of(store: &StoreShared, cache: &CacheShared, key: &ChunkKey) -> Option<Stamp> {
    let location = Location::chunk(cache.group, cache.part, key);
    let namespace = store.mount(cache.part, key).directory.open().ok()?;
    let status = namespace.status(location.below()).ok()??;
    Some(Stamp::of_status(&status))
}

/// Sets a file's modification time: of the open file, or of the one called `name` in a folder.
///
/// Another user's file takes no time but now, and that only where we may write to it.
fn set(store: &StoreShared, file: impl AsFd, name: Option<&str>, stamp: Stamp) -> bool {
    let times = stamp.timestamps();
    let done = match name {
        None => rustix::fs::futimens(file, &times),
        Some(name) => rustix::fs::utimensat(file, name, &times, AtFlags::SYMLINK_NOFOLLOW),
    };
    if done.is_err() {
        store.metrics.touches_failed.add(1);
    }
    done.is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, SystemTime};

    use rustix::fs::CWD;

    use super::*;
    use crate::config::{MinFree, StoreConfig};
    use crate::store::capacity::stamp::milliseconds;
    use crate::store::{KvCache, LoadChunk, Namespace, OpenOptions, Store, StoreChunk};
    use crate::{KvLayout, LayerSpan, Region};

    const LIMIT: Duration = Duration::from_secs(30);

    fn open(root: &std::path::Path) -> (Store, KvCache) {
        let config = StoreConfig {
            min_free: MinFree::Bytes(0),
            buffer_mib: 1,
            ..StoreConfig::with_path(root)
        };
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let store = Store::open(&config, namespace, OpenOptions::default()).unwrap();
        let memory = Region::zeroed(8192).unwrap();
        let layer = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: 4096,
            block_bytes: 4096,
        };
        let layout = KvLayout::new(vec![layer], 2, &[memory.bytes()]).unwrap();
        let cache = store.attach(0, 0, layout, vec![memory], 1).unwrap();
        (store, cache)
    }

    fn chunk(index: u8) -> ChunkRef {
        let key = |index| ChunkKey::from_bytes(&[index; 32]).unwrap();
        ChunkRef {
            key: key(index),
            parent: index.checked_sub(1).map(key),
        }
    }

    fn path(store: &Store, index: u8) -> PathBuf {
        let mount = &store.running.shared.mounts[0];
        mount.directory.chunk(0, 0.into(), &chunk(index).key)
    }

    fn stamp(store: &Store, index: u8) -> Stamp {
        Stamp::of(&rustix::fs::lstat(path(store, index)).unwrap())
    }

    #[test]
    fn a_tail_that_is_used_renews_the_head_that_the_engine_had_itself() {
        let root = tempfile::tempdir().unwrap();
        let (store, cache) = open(root.path());
        for index in 0..10 {
            let stored = StoreChunk {
                chunk: chunk(index),
                blocks: vec![0],
            };
            assert_eq!(
                cache.store(&[stored]).unwrap().wait(LIMIT).unwrap().stored,
                1
            );
        }
        assert!((1..10).all(|index| stamp(&store, index) < stamp(&store, index - 1)));
        assert!((0..10).all(|index| stamp(&store, index).uses() == 0));
        // Ten minutes go by: for the files, and for what this process knows of them.
        let now = milliseconds(SystemTime::now());
        for index in 0..10 {
            let then = Stamp::new(now - 600_000 - 10 * i64::from(index), 0);
            let times = then.timestamps();
            rustix::fs::utimensat(CWD, path(&store, index), &times, AtFlags::empty()).unwrap();
            let link = Link {
                parent: chunk(index).parent,
                milliseconds: then.milliseconds(),
                is_pending: false,
            };
            store
                .running
                .shared
                .capacity
                .chains
                .insert((0, 0.into(), chunk(index).key), link);
        }
        let load = |index| {
            let load = LoadChunk {
                chunk: chunk(index),
                first_block: 0,
                blocks: vec![1],
            };
            assert_eq!(
                cache.load(vec![load]).unwrap().wait(LIMIT).unwrap().loaded,
                1
            );
        };
        load(6);
        assert!((0..7).all(|index| stamp(&store, index).milliseconds() >= now - 1000));
        assert!((0..7).all(|index| stamp(&store, index).uses() == 1));
        assert!((7..10).all(|index| stamp(&store, index).milliseconds() < now - 500_000));
        assert!(
            (1..10).all(|index| stamp(&store, index).milliseconds()
                < stamp(&store, index - 1).milliseconds())
        );
        assert_eq!(store.metrics().chunks_touched, 7);
        load(6);
        load(3);
        assert_eq!(store.metrics().chunks_touched, 7, "once a minute is enough");
        // A chunk that is to be stored and is there was used, too.
        store
            .running
            .shared
            .present
            .remove(&(0, 0.into(), chunk(8).key));
        let stored = StoreChunk {
            chunk: chunk(8),
            blocks: vec![0],
        };
        assert_eq!(
            cache
                .store(&[stored])
                .unwrap()
                .wait(LIMIT)
                .unwrap()
                .already_present,
            1
        );
        assert!((0..9).all(|index| stamp(&store, index).milliseconds() >= now - 1000));
        assert_eq!(store.metrics().touches_failed, 0);
    }
}
