//! What a use does to the stamps of chunks.
//!
//! A chunk's stamp is always older than that of the chunk before it in its prompt, by 10 ms at
//! least: eviction, which goes by age, takes a prompt's tail before its head. So a stored chunk gets
//! the time of now or 10 ms before its predecessor's, whichever is earlier; and a use makes all
//! chunks before it young, also those that were not read because the serving engine had them in its
//! own memory. That is decided in memory at once, and told to the files when the job has ended
//! (`pending_use.rs`), the first of the prompt first. A stamp is changed once in a minute at most.

use std::os::fd::AsFd;

use rustix::fs::AtFlags;

use super::chain::Link;
use super::stamp::Stamp;
use crate::chunk::{ChunkKey, ChunkRef, Part};
use crate::io::IoFile;
use crate::store::cache_shared::CacheShared;
use crate::store::directory::Location;
use crate::store::mount::Mount;
use crate::store::present::Place;
use crate::store::shared::StoreShared;
use crate::store::watch::Watched;

/// Decides the stamp of a chunk that is handed over to be stored (`is_new`) or loaded: in memory
/// only, in the order of the prompt. Returns when it was used where its file is to be told, which may
/// be written to and did not hear of a use lately.
pub(in crate::store) fn plan_use(
    store: &StoreShared,
    cache: &CacheShared,
    chunk: &ChunkRef,
    is_new: bool,
) -> Option<i64> {
    let now = now_on_path(store, cache.part, &chunk.key)?;
    let place = cache.place(&chunk.key);
    let chains = &store.capacity.chains;
    chains.plan(place, chunk.parent, now, is_new).then_some(now)
}

/// Returns the time on a chunk's path in milliseconds since 1970, `None` where nothing may be written.
pub(in crate::store) fn now_on_path(
    store: &StoreShared,
    part: Part,
    key: &ChunkKey,
) -> Option<i64> {
    let path = store.capacity.of(&store.mount(part, key).root)?;
    Some(path.room.now_milliseconds())
}

/// Returns whether the file of the chunk before one is still to be told of a use.
pub(in crate::store) fn is_parent_pending(
    store: &StoreShared,
    (group, part, _): Place,
    chunk: &ChunkRef,
) -> bool {
    let parent = chunk.parent.map(|parent| (group, part, parent));
    parent
        .and_then(|parent| store.capacity.chains.get(&parent))
        .is_some_and(|link| link.is_pending)
}

/// A job's use of a chunk.
///
/// The chunks before it may lie on other paths. Such a path is asked nothing while it is out of use,
/// and when it hangs it is that path which the watch blames, not the one of the job.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Use<'a> {
    pub(in crate::store) store: &'a StoreShared,
    /// The KV cache group, and whose file of it.
    pub(in crate::store) group: u32,
    pub(in crate::store) part: Part,
    pub(in crate::store) chunk: &'a ChunkRef,
    pub(in crate::store) watched: &'a Watched,
    /// When it was used. Not when its file is told: telling takes its time, and is not to begin anew.
    pub(in crate::store) at: i64,
}

impl Use<'_> {
    /// Stamps the chunk's file, which is about to be published.
    pub(in crate::store) fn stored(&self, file: &IoFile) {
        let planned = self.known(&self.chunk.key);
        let at = planned.map_or(self.at, |link| link.milliseconds.min(self.at));
        let stamp = Stamp::first(at, self.time_of_parent(self.chunk));
        if self.set(file.as_fd(), None, stamp) {
            self.note(self.chunk, stamp);
        }
    }

    /// Renews the stamps of the known chunks before this one, the first of them first, and then its
    /// own. Goes on while `goes_on` says so, but does one at least. Returns whether some are left.
    pub(in crate::store) fn tell(&self, goes_on: impl Fn() -> bool) -> bool {
        let mut is_left = false;
        if let Some(parent) = self.chunk.parent {
            let chains = &self.store.capacity.chains;
            let mut pending = chains
                .take_pending(self.place(&parent), self.at)
                .into_iter();
            for (place, link) in pending.by_ref() {
                let ancestor = ChunkRef {
                    key: place.2,
                    parent: link.parent,
                };
                if let Some(stamp) = self.stamp_of(&ancestor.key) {
                    self.renew(&ancestor, stamp);
                }
                if !goes_on() {
                    break;
                }
            }
            is_left = pending.len() > 0;
            chains.set_pending(pending.map(|(place, _)| place));
        }
        if !is_left && let Some(stamp) = self.stamp_of(&self.chunk.key) {
            self.renew(self.chunk, stamp);
        }
        is_left
    }

    /// Does `work` on the path of a chunk, for which the watch knows where the job is meanwhile.
    /// `None` where the path is out of use.
    fn on_path_of<R>(&self, key: &ChunkKey, work: impl FnOnce(&Mount) -> Option<R>) -> Option<R> {
        let (store, part) = (self.store, self.part);
        let mount = store.mount(part, key);
        if mount.health.is_out() {
            return None;
        }
        let before = self.watched.is_at(store.mount_index(part, key));
        let done = work(mount);
        self.watched.is_at(before);
        done
    }

    /// Renews one stamp if it is old enough, and counts the use.
    fn renew(&self, chunk: &ChunkRef, stamp: Stamp) {
        let planned = self.known(&chunk.key);
        let at = planned.map_or(self.at, |link| link.milliseconds.min(self.at));
        let Some(renewed) = stamp.renewed(at, self.time_of_parent(chunk)) else {
            return self.note(chunk, stamp);
        };
        let done = self.on_path_of(&chunk.key, |mount| {
            let location = Location::chunk(self.group, self.part, &chunk.key);
            let namespace = mount.directory.open();
            let folder = namespace
                .and_then(|namespace| namespace.folder(location.folder.as_deref().unwrap_or(".")));
            // None when it was evicted meanwhile, and its folder removed.
            let folder = folder.ok()?;
            Some(self.set(folder.as_fd(), Some(&location.name), renewed))
        });
        let done = done.unwrap_or_default();
        if done {
            self.store.metrics.chunks_touched.add(1);
            self.note(chunk, renewed);
        }
    }

    fn place(&self, key: &ChunkKey) -> Place {
        (self.group, self.part, *key)
    }

    fn known(&self, key: &ChunkKey) -> Option<Link> {
        self.store.capacity.chains.get(&self.place(key))
    }

    fn note(&self, chunk: &ChunkRef, stamp: Stamp) {
        let link = Link {
            parent: chunk.parent,
            milliseconds: stamp.milliseconds(),
            is_pending: false,
        };
        let place = self.place(&chunk.key);
        self.store.capacity.chains.insert(place, link);
    }

    /// Returns the time of the stamp of the chunk before, `None` when there is none.
    fn time_of_parent(&self, chunk: &ChunkRef) -> Option<i64> {
        let parent = chunk.parent?;
        self.known(&parent)
            .map(|link| link.milliseconds)
            .or_else(|| self.stamp_of(&parent).map(Stamp::milliseconds))
    }

    /// Reads a chunk's stamp, `None` when it is not there.
    fn stamp_of(&self, key: &ChunkKey) -> Option<Stamp> {
        self.on_path_of(key, |mount| {
            let location = Location::chunk(self.group, self.part, key);
            let namespace = mount.directory.open().ok()?;
            let status = namespace.status(location.below()).ok()??;
            Some(Stamp::of_status(&status))
        })
    }

    /// Sets a file's modification time: of the open file, or of the one called `name` in a folder.
    ///
    /// Another user's file takes no time but now, and that only where we may write to it.
    fn set(&self, file: impl AsFd, name: Option<&str>, stamp: Stamp) -> bool {
        let times = stamp.timestamps();
        let done = match name {
            None => rustix::fs::futimens(file, &times),
            Some(name) => rustix::fs::utimensat(file, name, &times, AtFlags::SYMLINK_NOFOLLOW),
        };
        if done.is_err() {
            self.store.metrics.touches_failed.add(1);
        }
        done.is_ok()
    }
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
        open_on(&[root])
    }

    fn open_on(roots: &[&std::path::Path]) -> (Store, KvCache) {
        let config = StoreConfig {
            min_free: MinFree::Bytes(0),
            buffer_mib: 1,
            gds_path: roots.iter().map(|&root| root.into()).collect(),
            ..StoreConfig::with_path(roots[0])
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

    /// Files are told of a load's use when nobody waits for it any more.
    fn wait_until_told(store: &Store, count: u64) {
        let start = std::time::Instant::now();
        while store.metrics().chunks_touched < count {
            assert!(start.elapsed() < LIMIT, "{:?}", store.metrics());
            std::thread::sleep(Duration::from_millis(1));
        }
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
        wait_until_told(&store, 7);
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
        wait_until_told(&store, 9);
        assert!((0..9).all(|index| stamp(&store, index).milliseconds() >= now - 1000));
        assert_eq!(store.metrics().touches_failed, 0);
    }

    #[test]
    fn a_path_that_is_out_of_use_is_not_asked_about_the_chunks_before() {
        let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (store, cache) = open_on(&[roots[0].path(), roots[1].path()]);
        let shared = &store.running.shared;
        let mount_of = |index: u8| shared.mount_index(0.into(), &chunk(index).key);
        // A prompt whose last chunk lies on the other path than its first.
        let last = (1..100)
            .find(|&index| mount_of(index) != mount_of(0))
            .unwrap();
        let long_ago = milliseconds(SystemTime::now()) - 600_000;
        for index in 0..=last {
            let stored = StoreChunk {
                chunk: chunk(index),
                blocks: vec![0],
            };
            cache.store(&[stored]).unwrap().wait(LIMIT).unwrap();
        }
        for index in 0..=last {
            let then = Stamp::new(long_ago - 10 * i64::from(index), 0);
            let link = Link {
                parent: chunk(index).parent,
                milliseconds: then.milliseconds(),
                is_pending: false,
            };
            let path =
                shared.mounts[mount_of(index)]
                    .directory
                    .chunk(0, 0.into(), &chunk(index).key);
            rustix::fs::utimensat(CWD, path, &then.timestamps(), AtFlags::empty()).unwrap();
            let place = (0, 0.into(), chunk(index).key);
            shared.capacity.chains.insert(place, link);
        }
        let out = &shared.mounts[mount_of(0)];
        out.health.note_hung(&out.root, "a test".to_owned());
        let load = LoadChunk {
            chunk: chunk(last),
            first_block: 0,
            blocks: vec![1],
        };
        let report = cache.load(vec![load]).unwrap().wait(LIMIT).unwrap();
        assert_eq!(report.loaded, 1);
        let on_its_path = |index: &u8| mount_of(*index) == mount_of(last);
        wait_until_told(&store, (0..=last).filter(on_its_path).count() as u64);
        let touched = (0..=last).filter(|&index| {
            let mount = &shared.mounts[mount_of(index)];
            let path = mount.directory.chunk(0, 0.into(), &chunk(index).key);
            Stamp::of(&rustix::fs::lstat(path).unwrap()).uses() == 1
        });
        let expected = (0..=last).filter(on_its_path);
        let (touched, expected): (Vec<_>, Vec<_>) = (touched.collect(), expected.collect());
        assert_eq!(touched, expected);
    }
}
