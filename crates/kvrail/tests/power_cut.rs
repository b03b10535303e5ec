//! `durability: full` survives a power failure at any moment.
//!
//! What a store does to its directory is recorded, change by change. A model of a file system that
//! keeps no more than it must (a file's bytes after its fsync, a folder's names after the folder's)
//! then makes every directory that could be found after a failure behind each step, or a seeded
//! choice where they are many, and a store is opened there.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{Cache, Geometry, chunk_path, config, key, namespace};
use kvrail::config::{Durability, StoreConfig};
use kvrail::io::{
    Folder, FolderRules, IoEngine, IoHandle, IoRequest, Observer, Operation, PosixEngine, Step,
};
use kvrail::store::inspect;
use kvrail::{OpenOptions, Store};

/// Random crash states behind each step, beside the one that lost all and the one that lost nothing.
const CHOICES: u64 = 4;
const SEED: u64 = 0x5eed;

/// A change, with paths below the directory of the test.
#[derive(Debug, Clone, PartialEq)]
enum Event {
    MakeFolder(PathBuf),
    CreateFile(PathBuf),
    Write(PathBuf, usize, Vec<u8>),
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncFolder(PathBuf),
    /// The caller was told that this chunk is stored.
    Acknowledged(u64),
    /// Somebody removed this chunk.
    Gone(u64),
}

#[derive(Debug, Clone)]
struct Recorder {
    base: PathBuf,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Recorder {
    fn new(base: &Path) -> Self {
        Self {
            base: base.to_path_buf(),
            events: Arc::default(),
        }
    }

    fn push(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    fn below(&self, path: &Path) -> Option<PathBuf> {
        path.strip_prefix(&self.base).ok().map(Path::to_path_buf)
    }

    fn observer(&self) -> Observer {
        let recorder = self.clone();
        Observer::new(move |step| {
            let below = |path: &Path| recorder.below(path).unwrap();
            recorder.push(match step {
                Step::MakeFolder(path) => Event::MakeFolder(below(path)),
                Step::CreateFile(path) => Event::CreateFile(below(path)),
                Step::WriteFile { path, bytes, .. } => Event::Write(below(path), 0, bytes.to_vec()),
                Step::SyncFile(path) => Event::SyncFile(below(path)),
                Step::Rename { source, target } => Event::Rename(below(source), below(target)),
                Step::Remove(path) => Event::Remove(below(path)),
                // The test's own directory and what is above it were there before.
                Step::SyncFolder(path) => match recorder.below(path) {
                    Some(path) => Event::SyncFolder(path),
                    None => return,
                },
                _ => panic!("a step that the model does not know: {step:?}"),
            });
        })
    }
}

/// Records what is written through it.
#[derive(Debug)]
struct RecordingEngine {
    inner: PosixEngine,
    recorder: Recorder,
}

impl IoEngine for RecordingEngine {
    fn name(&self) -> &'static str {
        "recording"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        if request.operation == Operation::Write {
            let path = self.recorder.below(request.file.path()).unwrap();
            let bytes = request.buffer.as_slice().to_vec();
            let offset = usize::try_from(request.offset).unwrap();
            self.recorder.push(Event::Write(path, offset, bytes));
        }
        self.inner.submit(request)
    }
}

fn settings(path: &Path, durability: Durability) -> StoreConfig {
    let mut config = config(path);
    config.durability = durability;
    // One thread: what is recorded is in the order in which it was done.
    config.disk_io_threads = 1;
    config.use_direct_io = Some(false);
    config
}

fn store(recorder: &Recorder, durability: Durability) -> (Store, Cache) {
    let engine = Arc::new(RecordingEngine {
        inner: PosixEngine::new(1, Arc::new(|| ())).unwrap(),
        recorder: recorder.clone(),
    });
    let options = OpenOptions {
        observer: Some(recorder.observer()),
        ..OpenOptions::default()
    };
    let path = recorder.base.join("made/kv");
    let config = settings(&path, durability);
    let store = Store::open_with_engine(&config, namespace(), options, engine).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    (store, cache)
}

/// Fills two blocks with what belongs to chunk `index` in all runs.
fn fill(cache: &Cache, index: u64, block: usize) -> Vec<usize> {
    cache.fill(block, 2 * index);
    cache.fill(block + 1, 2 * index + 1);
    vec![block, block + 1]
}

fn put(recorder: &Recorder, cache: &Cache, index: u64) {
    let blocks = fill(cache, index, 0);
    assert_eq!(cache.store(&[(index, blocks)]).stored, 1);
    recorder.push(Event::Acknowledged(index));
}

/// Returns two chunks whose files share a folder, and one in another.
fn chunks() -> [u64; 3] {
    let fan_out = |index: &u64| key(*index).to_string()[..3].to_owned();
    let mut seen = BTreeMap::new();
    for index in 0.. {
        if let Some(first) = seen.insert(fan_out(&index), index) {
            let other = (0..)
                .find(|other| fan_out(other) != fan_out(&index))
                .unwrap();
            return [first, index, other];
        }
    }
    unreachable!()
}

/// A life of a store: made from nothing, chunks in new and old folders, a folder that a janitor
/// removes, one that an instance without durability makes, and a restart.
fn record(durability: Durability) -> Vec<Event> {
    let base = tempfile::tempdir().unwrap();
    let recorder = Recorder::new(base.path());
    let [first, second, other] = chunks();
    {
        let (_store, cache) = store(&recorder, durability);
        put(&recorder, &cache, first);
        put(&recorder, &cache, other);
        // A janitor removes the chunk and its folder, while the store runs.
        let rules = FolderRules {
            observer: Some(recorder.observer()),
            ..FolderRules::default()
        };
        let path = chunk_path(&base.path().join("made/kv"), 0, first);
        let folder = path.parent().unwrap();
        let open = |path: &Path| Folder::open(path, rules.clone()).unwrap();
        recorder.push(Event::Gone(first));
        open(folder).remove_file(path.file_name().unwrap()).unwrap();
        let parent = open(folder.parent().unwrap());
        parent.remove_folder(folder.file_name().unwrap()).unwrap();
        // Somebody else makes the folder again and syncs nothing.
        parent.make(folder.file_name().unwrap(), false).unwrap();
        put(&recorder, &cache, second);
    }
    let (_store, cache) = store(&recorder, durability);
    put(&recorder, &cache, first);
    put(&recorder, &cache, 1_000_000);
    recorder.events.lock().unwrap().clone()
}

#[derive(Debug, Clone)]
enum Node {
    Folder {
        durable: BTreeMap<String, usize>,
        /// Names given (a node) and taken away since the last sync, in order.
        pending: Vec<(String, Option<usize>)>,
        now: BTreeMap<String, usize>,
    },
    File {
        /// `None` before the first sync: nothing need be there.
        durable: Option<Vec<u8>>,
        now: Vec<u8>,
    },
}

/// The model: nodes, of which number 0 is the directory of the test.
#[derive(Debug)]
struct Model(Vec<Node>);

impl Model {
    fn new() -> Self {
        Self(vec![Self::folder()])
    }

    fn folder() -> Node {
        Node::Folder {
            durable: BTreeMap::new(),
            pending: Vec::new(),
            now: BTreeMap::new(),
        }
    }

    fn find(&self, path: &Path) -> usize {
        path.iter().fold(0, |node, name| match &self.0[node] {
            Node::Folder { now, .. } => now[name.to_str().unwrap()],
            Node::File { .. } => panic!("{} is below a file", path.display()),
        })
    }

    fn name(&mut self, path: &Path, target: Option<usize>) {
        let parent = self.find(path.parent().unwrap());
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Node::Folder { pending, now, .. } = &mut self.0[parent] else {
            panic!("{} is in a file", path.display());
        };
        match target {
            Some(target) => now.insert(name.clone(), target),
            None => now.remove(&name),
        };
        pending.push((name, target));
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::MakeFolder(path) => {
                self.0.push(Self::folder());
                self.name(path, Some(self.0.len() - 1));
            }
            Event::CreateFile(path) => {
                let (durable, now) = (None, Vec::new());
                self.0.push(Node::File { durable, now });
                self.name(path, Some(self.0.len() - 1));
            }
            Event::Write(path, offset, bytes) => {
                let node = self.find(path);
                let Node::File { now, .. } = &mut self.0[node] else {
                    panic!("{} is no file", path.display());
                };
                now.resize(now.len().max(offset + bytes.len()), 0);
                now[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Event::SyncFile(path) => {
                let node = self.find(path);
                if let Node::File { durable, now } = &mut self.0[node] {
                    *durable = Some(now.clone());
                }
            }
            Event::Rename(source, target) => {
                let node = self.find(source);
                self.name(source, None);
                self.name(target, Some(node));
            }
            Event::Remove(path) => self.name(path, None),
            Event::SyncFolder(path) => {
                let node = self.find(path);
                if let Node::Folder {
                    durable,
                    pending,
                    now,
                } = &mut self.0[node]
                {
                    *durable = now.clone();
                    pending.clear();
                }
            }
            Event::Acknowledged(_) | Event::Gone(_) => {}
        }
    }

    /// Makes what is found after a failure; `choose` says which of so many outcomes each part has.
    fn crash(&self, node: usize, at: &Path, choose: &mut impl FnMut(usize) -> usize) {
        match &self.0[node] {
            Node::Folder {
                durable, pending, ..
            } => {
                let mut names = durable.clone();
                for (name, target) in pending {
                    match (choose(2), target) {
                        (0, _) => None,
                        (_, Some(target)) => names.insert(name.clone(), *target),
                        (_, None) => names.remove(name),
                    };
                }
                std::fs::create_dir_all(at).unwrap();
                for (name, child) in names {
                    self.crash(child, &at.join(name), choose);
                }
            }
            Node::File { durable, now } => {
                let old = durable.clone().unwrap_or_default();
                let bytes = match choose(4) {
                    0 => old,
                    1 => now.clone(),
                    // The length got through and the bytes did not, or half of them.
                    2 if old != *now => vec![0; now.len()],
                    3 if old != *now => now[..now.len() / 2].to_vec(),
                    _ => now.clone(),
                };
                std::fs::write(at, bytes).unwrap();
            }
        }
    }
}

/// What was wrong in a directory found after a failure.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wrong {
    Bad,
    Lost,
    Unusable,
}

/// Opens a store there. Returns what is wrong with what was published and acknowledged.
fn check(at: &Path, acknowledged: &BTreeSet<u64>) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let path = at.join("made/kv");
    let config = settings(&path, Durability::None);
    let Ok(store) = Store::open(&config, namespace(), OpenOptions::default()) else {
        return vec![Wrong::Unusable];
    };
    let cache = Cache::attach(&store, 0, Geometry::default());
    let found = inspect::namespaces(&path).unwrap();
    let manifest = found[0].manifest.as_ref().unwrap();
    for file in inspect::chunks(&found[0].directory) {
        if inspect::verify_chunk(&file.unwrap(), manifest).is_err() {
            wrong.push(Wrong::Bad);
        }
    }
    for index in acknowledged {
        let loaded = cache.load(&[(*index, 0, vec![20, 21])]).loaded == 1;
        fill(&cache, *index, 10);
        let same = [20, 21].map(|block| cache.block(block) == cache.block(block - 10));
        if loaded {
            assert_eq!(same, [true; 2], "chunk {index} is not what was stored");
        } else {
            wrong.push(Wrong::Lost);
        }
    }
    wrong
}

/// Replays the events up to each one, loses what may be lost, and gathers what is wrong then.
fn replay(events: &[Event], from: usize) -> BTreeSet<Wrong> {
    let mut wrong = BTreeSet::new();
    let mut model = Model::new();
    let mut acknowledged = BTreeSet::new();
    let mut states = 0;
    for (index, event) in events.iter().enumerate() {
        model.apply(event);
        match event {
            Event::Acknowledged(chunk) => acknowledged.insert(*chunk),
            Event::Gone(chunk) => acknowledged.remove(chunk),
            _ => false,
        };
        if index < from {
            continue;
        }
        for choice in 0..2 + CHOICES {
            let seed = SEED ^ (index as u64) << 8 ^ choice;
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut choose = |outcomes: usize| match choice {
                0 => 0,
                1 => 1,
                _ => {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 33) as usize % outcomes
                }
            };
            let at = tempfile::tempdir().unwrap();
            model.crash(0, at.path(), &mut choose);
            let found = check(at.path(), &acknowledged);
            states += 1;
            if !found.is_empty() {
                println!("behind step {index} {event:.80?}, seed {seed:#x}: {found:?}");
            }
            wrong.extend(found);
        }
    }
    println!("{} steps, {states} directories: {wrong:?}", events.len());
    wrong
}

#[test]
fn what_full_durability_acknowledged_is_there_and_nothing_published_is_bad() {
    let events = record(Durability::Full);
    let acknowledged = events
        .iter()
        .filter(|event| matches!(event, Event::Acknowledged(_)));
    assert_eq!(acknowledged.count(), 5);
    assert_eq!(replay(&events, 0), BTreeSet::new());
}

#[test]
fn the_model_notices_each_kind_of_sync_that_is_left_out() {
    let events = record(Durability::Full);
    let depth = |path: &Path| path.components().count();
    // made/kv/<namespace>/g0r0/<fan-out>: five parts.
    for (what, parts) in [
        ("fan-out", 5),
        ("rank", 4),
        ("namespace", 3),
        ("root", 2),
        ("parent", 1),
    ] {
        let without: Vec<Event> = events
            .iter()
            .filter(|event| !matches!(event, Event::SyncFolder(path) if depth(path) == parts))
            .cloned()
            .collect();
        assert!(without.len() < events.len(), "no sync of the {what}");
        let wrong = replay(&without, without.len() - 1);
        assert!(
            wrong.contains(&Wrong::Lost),
            "without those of the {what}: {wrong:?}"
        );
    }
    let without: Vec<Event> = events
        .iter()
        .filter(|event| !matches!(event, Event::SyncFile(_)))
        .cloned()
        .collect();
    let wrong = replay(&without, without.len() - 1);
    assert!(
        wrong.contains(&Wrong::Bad) || wrong.contains(&Wrong::Unusable),
        "without those of files: {wrong:?}"
    );
    let none = record(Durability::None);
    assert!(
        !none
            .iter()
            .any(|event| matches!(event, Event::SyncFile(_) | Event::SyncFolder(_)))
    );
    assert!(!replay(&none, none.len() - 1).is_empty());
}
