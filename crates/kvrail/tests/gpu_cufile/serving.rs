//! A serving engine at work: forwards, stores and loads under way at the same time, on a GPU that
//! does its work as late as can be, or at its own pace.

use std::collections::BTreeSet;

use kvrail::{LoadTicket, StoreTicket};
use kvrail_cuda::Stream;
use kvrail_testing::{Random, fresh_seed};

use super::*;
use crate::gpu_cache::BLOCKS;

/// What the engine does at least, and how many chunks must have been stored, and loaded, by then.
const ROUNDS: usize = 300;
const MOVED: usize = 10;
const ROUNDS_MAX: usize = 100 * ROUNDS;

/// Which way a chunk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Cufile,
    Posix,
}

/// A chunk that was, or may have been, stored, and what must come back.
struct Stored {
    name: u64,
    content: [Vec<u8>; 2],
    /// Its blocks may have been others while cuFile read them in place, and have had the same bytes
    /// again before they were looked at: then its checksums tell, and it is a miss.
    may_be_bad: bool,
}

/// What the engine knows: what each block holds once the compute stream has done all it was given.
struct Serving<'a> {
    cache: &'a Cache,
    kind: Kind,
    random: Random,
    compute: Stream,
    blocks: Vec<Vec<u8>>,
    /// What forwards wrote, in memory that stays until the GPU has read it.
    written: Vec<Vec<u8>>,
    stores: Vec<(StoreTicket, Stored, Option<[usize; 2]>)>,
    stored: Vec<Stored>,
    loads: Vec<(LoadTicket, [usize; 2], bool)>,
    /// Blocks that loads have.
    taken: BTreeSet<usize>,
    names: u64,
    loaded: usize,
}

impl<'a> Serving<'a> {
    fn new(cache: &'a Cache, kind: Kind, seed: u64) -> Self {
        let memory = cache.read();
        let blocks = (0..BLOCKS).map(|one| block(kind, &memory, one)).collect();
        Self {
            cache,
            kind,
            random: Random::new(seed),
            compute: cache.context.stream(Priority::Low).unwrap(),
            blocks,
            written: Vec::new(),
            stores: Vec::new(),
            stored: Vec::new(),
            loads: Vec::new(),
            taken: BTreeSet::new(),
            names: 0,
            loaded: 0,
        }
    }

    fn stream(&self) -> ComputeStream {
        // SAFETY: the stream lives as long as this, and all tickets are waited for before.
        unsafe { ComputeStream::from_raw(self.compute.raw()) }
    }

    /// Two blocks that no load has, and no store for whose end the engine waits.
    fn two_free(&mut self) -> Option<[usize; 2]> {
        let kept = self.stores.iter().filter_map(|(_, _, kept)| *kept);
        let busy: BTreeSet<usize> = kept.flatten().chain(self.taken.iter().copied()).collect();
        let free: Vec<usize> = (0..BLOCKS).filter(|one| !busy.contains(one)).collect();
        let first = free.get(self.random.below(free.len().max(1) as u64) as usize)?;
        let others: Vec<usize> = free.iter().copied().filter(|one| one != first).collect();
        (!others.is_empty()).then(|| [*first, *self.random.pick(&others)])
    }

    /// A step of the engine writes to two blocks, some time.
    fn forward(&mut self) {
        let Some(both) = self.two_free() else {
            return;
        };
        self.write(both);
    }

    fn write(&mut self, both: [usize; 2]) {
        for one in both {
            let content = noise(self.random.number(), self.blocks[one].len());
            self.cache
                .put_block(&self.compute, self.kind, one, &content);
            self.blocks[one].clone_from(&content);
            self.written.push(content);
        }
    }

    fn store(&mut self) {
        let Some(both) = self.two_free() else {
            return;
        };
        self.names += 1;
        let name = self.names;
        let wanted = StoreChunk {
            chunk: chunk(name),
            blocks: both.to_vec(),
        };
        let content = both.map(|one| self.blocks[one].clone());
        let ticket = self
            .cache
            .kv_cache
            .store_after(&[wanted], self.stream())
            .unwrap();
        // Others are written to while they are stored: a request that ended, or was aborted.
        let kept = self.random.chance(0.7).then_some(both);
        let in_place = self.cache.kv_cache.routes() == [Route::InPlace];
        let stored = Stored {
            name,
            content,
            may_be_bad: in_place && kept.is_none(),
        };
        self.stores.push((ticket, stored, kept));
    }

    fn load(&mut self) {
        if self.stored.is_empty() {
            return;
        }
        let Some(both) = self.two_free() else {
            return;
        };
        let index = self.random.below(self.stored.len() as u64) as usize;
        let chosen = &self.stored[index];
        let may_be_bad = chosen.may_be_bad;
        let wanted = LoadChunk {
            chunk: chunk(chosen.name),
            first_block: 0,
            blocks: both.to_vec(),
        };
        for (one, content) in both.iter().zip(&chosen.content) {
            self.blocks[*one].clone_from(content);
        }
        let stream = self.stream();
        let ticket = self.cache.kv_cache.load_after(vec![wanted], stream);
        self.taken.extend(both);
        self.loads.push((ticket.unwrap(), both, may_be_bad));
    }

    fn end_one_store(&mut self) {
        if self.stores.is_empty() {
            return;
        }
        let (ticket, stored, _) = self.stores.remove(0);
        // One whose blocks were written to meanwhile, or for which no buffer was free, is dropped.
        if ticket.wait(LIMIT).unwrap().stored == 1 {
            self.stored.push(stored);
        }
    }

    /// Waits for a load. What is done next with its blocks, on the compute stream, finds it there.
    fn end_one_load(&mut self) {
        if self.loads.is_empty() {
            return;
        }
        let (ticket, both, may_be_bad) = self.loads.remove(0);
        let loaded = ticket.wait(LIMIT).unwrap().loaded;
        for one in both {
            self.taken.remove(&one);
        }
        if loaded == 0 {
            assert!(may_be_bad, "a chunk that was stored is a miss");
            // What they hold is nothing; the engine computes it.
            self.write(both);
            return;
        }
        self.loaded += 1;
        for one in both {
            let found = self.cache.get_block(&self.compute, self.kind, one);
            self.assert_block(one, &found);
        }
    }

    fn assert_block(&self, one: usize, found: &[u8]) {
        assert!(
            found == self.blocks[one],
            "block {one} is not what was loaded or computed last"
        );
    }

    fn run(&mut self) {
        for round in 0..ROUNDS_MAX {
            if round >= ROUNDS && self.stored.len().min(self.loaded) >= MOVED {
                break;
            }
            match self.random.below(8) {
                0..3 => self.forward(),
                3 | 4 => self.store(),
                5 => self.load(),
                6 => self.end_one_store(),
                _ => self.end_one_load(),
            }
        }
        while !self.stores.is_empty() || !self.loads.is_empty() {
            self.end_one_store();
            self.end_one_load();
        }
        self.compute.synchronize().unwrap();
        let memory = self.cache.read();
        for one in 0..BLOCKS {
            self.assert_block(one, &block(self.kind, &memory, one));
        }
    }
}

/// Runs an engine, and loads in another process's stead all that it stored.
fn serve(bench: &Bench, kind: Kind, way: Way, seed: u64) {
    let what = format!("{kind:?}, {way:?}, {:?}, seed {seed}", bench.copy_method);
    println!("{what}");
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(bench, &store, 0, kind).unwrap();
    let mut serving = Serving::new(&cache, kind, seed);
    serving.run();
    let (stored, loaded) = (std::mem::take(&mut serving.stored), serving.loaded);
    assert!(
        stored.len().min(loaded) >= MOVED,
        "{what}: {} stored, {loaded} loaded",
        stored.len()
    );
    let metrics = store.metrics();
    let by_cufile = metrics.cufile_chunks_stored + metrics.cufile_chunks_loaded;
    assert_eq!(by_cufile > 0, way == Way::Cufile, "{what}");
    assert_eq!(metrics.cufile_fallbacks, 0, "{what}");
    let is_bad = |stored: &Stored| stored.may_be_bad;
    if !stored.iter().any(is_bad) {
        assert_eq!(metrics.chunks_damaged, 0, "{what}");
    }
    drop(serving);
    let other = bench.open(folder.path());
    let target = Cache::attach(bench, &other, 1, kind).unwrap();
    for Stored {
        name,
        content,
        may_be_bad,
    } in &stored
    {
        if target.load(*name, 0, &[0, 1]).loaded == 0 {
            assert!(may_be_bad, "{what}: chunk {name} is a miss");
            continue;
        }
        let memory = target.read();
        for (one, content) in content.iter().enumerate() {
            assert!(
                block(kind, &memory, one) == *content,
                "{what}: chunk {name}"
            );
        }
    }
}

fn serve_by_all_ways(own_pace: bool) {
    let mut bench = Bench::start();
    bench.mocks.own_pace(own_pace);
    for kind in KINDS {
        for way in [Way::Cufile, Way::Posix] {
            bench.config.use_cufile = way == Way::Cufile;
            for method in CopyMethod::ALL {
                bench.copy_method = Some(method);
                serve(&bench, kind, way, fresh_seed());
            }
        }
    }
    bench.assert_balance();
}

#[test]
fn a_serving_engine_computes_on_what_it_should_on_a_gpu_that_is_late() {
    serve_by_all_ways(false);
}

#[test]
fn a_serving_engine_computes_on_what_it_should_on_a_gpu_at_its_own_pace() {
    serve_by_all_ways(true);
}
