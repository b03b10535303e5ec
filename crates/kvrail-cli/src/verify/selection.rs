//! Which chunks are checked, in the order of namespace, group, rank and key.

use std::collections::BinaryHeap;

use kvrail::store::inspect::{ChunkFile, NamespaceInfo, chunks, chunks_after};
use kvrail::{ChunkKey, Error, Part};

use crate::amount::Sample;
use crate::store_directory;

/// A chunk to check and the namespace that it belongs to.
#[derive(Debug)]
pub(super) struct Task {
    /// Index into the list of namespaces.
    pub(super) namespace: usize,
    pub(super) chunk: ChunkFile,
}

/// Where a run goes on: behind this chunk of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct After {
    pub(super) namespace: String,
    pub(super) place: (u32, Part, ChunkKey),
}

/// What is checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Selection {
    /// `None` is everything.
    pub(super) sample: Option<Sample>,
    /// Decides which chunks a sample takes.
    pub(super) seed: u64,
}

/// One step of the walk: a chunk, or something that could not be read.
pub(super) type Selected<'a> = Box<dyn Iterator<Item = Result<Task, Error>> + Send + 'a>;

impl Selection {
    /// Walks the chunks; in memory is one folder at a time, or the sample where it is a number.
    pub(super) fn walk<'a>(
        &self,
        namespaces: &'a [NamespaceInfo],
        after: Option<After>,
    ) -> Selected<'a> {
        let all = walk(namespaces, after.clone());
        let seed = self.seed;
        match self.sample {
            None => all,
            Some(Sample::Share(share)) => Box::new(all.filter(move |task| {
                task.as_ref()
                    .map_or(true, |task| draw(seed, task) % 1_000_000 < u64::from(share))
            })),
            // The whole is drawn from and cut afterwards, so that a run that goes on has the same
            // sample as the one before it.
            Some(Sample::Count(count)) => {
                let drawn = smallest(walk(namespaces, None), seed, count);
                Box::new(drawn.into_iter().filter(move |task| match (&after, task) {
                    (Some(after), Ok(task)) => behind(namespaces, task, after),
                    _ => true,
                }))
            }
        }
    }
}

fn behind(namespaces: &[NamespaceInfo], task: &Task, after: &After) -> bool {
    let name = namespaces.get(task.namespace).map(store_directory::name);
    let here = (name.unwrap_or_default(), task.chunk.place());
    here > (after.namespace.clone(), after.place)
}

fn walk<'a>(namespaces: &'a [NamespaceInfo], after: Option<After>) -> Selected<'a> {
    let each = namespaces.iter().enumerate();
    Box::new(each.flat_map(move |(index, namespace)| {
        // What has no manifest cannot be checked; the caller counts it.
        let readable = namespace.manifest.is_ok();
        let name = store_directory::name(namespace);
        let found: Box<dyn Iterator<Item = Result<ChunkFile, Error>> + Send> = match &after {
            _ if !readable => Box::new(std::iter::empty()),
            Some(after) if after.namespace > name => Box::new(std::iter::empty()),
            Some(after) if after.namespace == name => {
                Box::new(chunks_after(&namespace.directory, after.place))
            }
            _ => Box::new(chunks(&namespace.directory)),
        };
        found.map(move |chunk| {
            let chunk = chunk?;
            Ok(Task {
                namespace: index,
                chunk,
            })
        })
    }))
}

/// Returns the `count` chunks with the smallest draws, in order, and every error of the walk.
fn smallest(all: Selected<'_>, seed: u64, count: usize) -> Vec<Result<Task, Error>> {
    let mut kept: BinaryHeap<(u64, usize)> = BinaryHeap::with_capacity(count.min(1024));
    let mut tasks = std::collections::HashMap::new();
    let mut errors = Vec::new();
    for (order, task) in all.enumerate() {
        match task {
            Ok(task) => {
                kept.push((draw(seed, &task), order));
                tasks.insert(order, task);
            }
            Err(error) => errors.push(Err(error)),
        }
        if kept.len() > count
            && let Some((_, dropped)) = kept.pop()
        {
            tasks.remove(&dropped);
        }
    }
    let mut tasks: Vec<(usize, Task)> = tasks.into_iter().collect();
    tasks.sort_unstable_by_key(|(order, _)| *order);
    errors.extend(tasks.into_iter().map(|(_, task)| Ok(task)));
    errors
}

/// Returns a number that is the same whenever the same chunk is drawn for with the same seed.
fn draw(seed: u64, task: &Task) -> u64 {
    let (group, rank, key) = task.chunk.place();
    let numbers = [group, rank.rank()].map(u32::to_le_bytes);
    let heads = rank.heads().map(|heads| [heads.first(), heads.end()]);
    let heads = heads.into_iter().flatten().flat_map(usize::to_le_bytes);
    let heads: Vec<u8> = heads.collect();
    let bytes = numbers.iter().flatten().chain(&heads);
    let bytes = bytes.chain(key.as_bytes());
    // FNV-1a, and the end of MurmurHash3 for what FNV leaves alike.
    let mut state = bytes.fold(seed ^ 0xcbf2_9ce4_8422_2325, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    state ^= state >> 33;
    state = state.wrapping_mul(0xff51_afd7_ed55_8ccd);
    state ^= state >> 33;
    state.wrapping_mul(0xc4ce_b9fe_1a85_ec53) >> 11
}
