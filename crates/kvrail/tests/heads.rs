//! What ranks of one tensor-parallel size stored, ranks of another one load, byte by byte.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};

use common::{LIMIT, chunk, config, key, namespace, noise, open_as};
use kvrail::config::{PathSharding, StoreConfig};
use kvrail::{
    HeadRange, KvCache, KvLayout, LayerSpan, LoadChunk, LoadReport, Part, Region, Store, StoreChunk,
};
use proptest::prelude::*;

/// A KV cache of all heads: bytes of one head in a block, by layer; blocks outermost or not.
#[derive(Debug, Clone)]
struct Model {
    heads: u16,
    head_bytes: Vec<usize>,
    blocks_per_chunk: usize,
    block_outermost: bool,
}

/// One rank: its store, and its memory.
struct Rank {
    store: Store,
    model: Model,
    heads: Range<usize>,
    region: Region,
    spans: Vec<LayerSpan>,
    kv_cache: KvCache,
}

const BLOCKS: usize = 8;

fn part(heads: &Range<u16>) -> Part {
    Part::of_heads(0, HeadRange::new(heads.start, heads.end).unwrap())
}

/// The bytes of one head of one block of one layer, of the chunk with this seed.
fn content(seed: u64, block: usize, layer: usize, head: usize, bytes: usize) -> Vec<u8> {
    let place = (block as u64) << 8 | (layer as u64) << 16 | (head as u64) << 24;
    noise(seed << 32 ^ place ^ 0x77, bytes)
}

impl Rank {
    /// A store of its own: that of another rank has staging buffers for its own chunks.
    fn open(config: &StoreConfig, model: &Model, heads: &Range<u16>) -> Self {
        let store = open_as(config);
        let sizes: Vec<usize> = model
            .head_bytes
            .iter()
            .map(|one| one * heads.len())
            .collect();
        let row: usize = sizes.iter().sum();
        let mut offset = 0;
        let spans: Vec<LayerSpan> = sizes
            .iter()
            .map(|&block_bytes| {
                let (block_stride, next) = match model.block_outermost {
                    true => (row, block_bytes),
                    false => (block_bytes + 8, (block_bytes + 8) * BLOCKS),
                };
                let span = LayerSpan {
                    region: 0,
                    offset,
                    block_stride,
                    block_bytes,
                };
                offset += next;
                span
            })
            .collect();
        let bytes = if model.block_outermost {
            row * BLOCKS
        } else {
            offset
        };
        let region = Region::zeroed(bytes).unwrap();
        let layout = KvLayout::new(spans.clone(), BLOCKS, &[region.bytes()]).unwrap();
        let regions = vec![region.clone()];
        let kv_cache = store
            .attach(0, part(heads), layout, regions, model.blocks_per_chunk)
            .unwrap();
        Self {
            store,
            model: model.clone(),
            heads: heads.start.into()..heads.end.into(),
            region,
            spans,
            kv_cache,
        }
    }

    /// Goes over all pieces of a chunk in the first blocks: where each is, and what it shall be.
    fn pieces(&self, seed: u64, first: usize) -> Vec<(usize, Vec<u8>)> {
        let mut pieces = Vec::new();
        for block in 0..self.model.blocks_per_chunk - first {
            for (layer, (span, bytes)) in self.spans.iter().zip(&self.model.head_bytes).enumerate()
            {
                for (index, head) in self.heads.clone().enumerate() {
                    let at = span.offset + block * span.block_stride + index * bytes;
                    pieces.push((at, content(seed, first + block, layer, head, *bytes)));
                }
            }
        }
        pieces
    }

    fn save(&self, index: u64) {
        for (at, bytes) in self.pieces(index, 0) {
            self.region.copy_in(at, &bytes).unwrap();
        }
        let stored = StoreChunk {
            chunk: chunk(index),
            blocks: (0..self.model.blocks_per_chunk).collect(),
        };
        let report = self.kv_cache.store(&[stored]).unwrap().wait(LIMIT).unwrap();
        assert_eq!(report.stored, 1, "{report:?}");
    }

    /// Loads a chunk from a block on into the first blocks.
    fn load(&self, index: u64, first_block: usize) -> LoadReport {
        let load = LoadChunk {
            chunk: chunk(index),
            first_block,
            blocks: (0..self.model.blocks_per_chunk - first_block).collect(),
        };
        self.kv_cache.load(vec![load]).unwrap().wait(LIMIT).unwrap()
    }

    fn holds(&self, index: u64, first_block: usize) -> bool {
        self.pieces(index, first_block)
            .into_iter()
            .all(|(at, expected)| {
                let mut found = vec![0; expected.len()];
                self.region.copy_out(at, &mut found).unwrap();
                found == expected
            })
    }
}

fn hits(store: &Store, parts: &[Part], count: u64) -> usize {
    let ticket = store.lookup(0, parts, (0..count).map(key).collect());
    ticket.wait(LIMIT).unwrap()
}

fn path(root: &Path, heads: &Range<u16>, index: u64) -> PathBuf {
    let name = key(index).to_string();
    root.join(namespace().directory_name())
        .join(format!("g0r{}", part(heads)))
        .join(&name[..3])
        .join(format!("{name}.safetensors"))
}

/// Cuts of `0..heads` into ranges.
fn split(heads: u16, cuts: &[prop::sample::Index]) -> Vec<Range<u16>> {
    let mut at: Vec<u16> = cuts
        .iter()
        .map(|cut| cut.index(heads.into()) as u16)
        .collect();
    at.extend([0, heads]);
    at.sort_unstable();
    at.dedup();
    at.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    proptest::collection::vec(any::<prop::sample::Index>(), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any geometry, stored by any split of the heads and loaded by any other.
    #[test]
    fn any_split_loads_what_any_other_stored(
        heads in 1_u16..9,
        head_bytes in proptest::collection::vec(1_usize..9000, 1..4),
        equal in any::<bool>(),
        blocks_per_chunk in 1_usize..4,
        block_outermost in any::<bool>(),
        stored in cuts(), loaded in cuts(), first in 0_usize..4, damage in any::<Option<prop::sample::Index>>(),
    ) {
        let head_bytes = if equal { vec![head_bytes[0]; head_bytes.len()] } else { head_bytes };
        let model = Model { heads, head_bytes, blocks_per_chunk, block_outermost };
        let root = tempfile::tempdir().unwrap();
        let (stored, loaded) = (split(model.heads, &stored), split(model.heads, &loaded));
        let config = config(root.path());
        for heads in &stored {
            Rank::open(&config, &model, heads).save(0);
        }
        let store = open_as(&config);
        let parts: Vec<Part> = loaded.iter().map(part).collect();
        prop_assert_eq!(hits(&store, &parts, 2), 1, "of two chunks one was stored");
        let first = first % blocks_per_chunk;
        // One byte of one file: whoever needs that file has a miss, the others do not care.
        let victim = damage.map(|index| &stored[index.index(stored.len())]);
        if let Some(victim) = victim {
            let file = path(root.path(), victim, 0);
            let mut bytes = std::fs::read(&file).unwrap();
            let last = 4096 + model.head_bytes.iter().sum::<usize>() * victim.len() * blocks_per_chunk - 1;
            bytes[last] ^= 1;
            std::fs::write(&file, bytes).unwrap();
        }
        for heads in &loaded {
            let rank = Rank::open(&config, &model, heads);
            let report = rank.load(0, first);
            // The last byte of a file is of its last head: who wants that reads its page for sure.
            let needs_damage = victim.is_some_and(|victim| heads.contains(&(victim.end - 1)));
            if needs_damage {
                prop_assert_eq!(report.loaded, 0, "{:?} of {:?}", heads, stored);
            } else if victim.is_none() {
                prop_assert_eq!(report.loaded, 1, "{:?} of {:?}: {:?}", heads, stored, report);
            }
            if report.loaded == 1 {
                prop_assert!(rank.holds(0, first), "{:?} of {:?}", heads, stored);
            }
            let assembled = rank.store.metrics().chunks_assembled;
            let others = report.loaded as u64 * u64::from(!stored.contains(heads));
            prop_assert_eq!(assembled, others, "what is there under its own name is taken as it is");
        }
    }
}

fn model(head_bytes: usize) -> Model {
    Model {
        heads: 4,
        head_bytes: vec![head_bytes; 2],
        blocks_per_chunk: 2,
        block_outermost: false,
    }
}

#[test]
fn a_lost_part_is_a_miss_for_all_and_a_damaged_one_is_set_aside_alone() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    let model = model(3000);
    for heads in [0..2, 2..4] {
        let rank = Rank::open(&config, &model, &heads);
        (0..3).for_each(|index| rank.save(index));
    }
    let rank = Rank::open(&config, &model, &(0..4));
    let all = part(&(0..4));
    assert_eq!(hits(&rank.store, &[all], 3), 3);
    // The second chunk loses a part, the third has a damaged one.
    std::fs::remove_file(path(root.path(), &(2..4), 1)).unwrap();
    let damaged = path(root.path(), &(0..2), 2);
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[5000] ^= 0x10;
    std::fs::write(&damaged, bytes).unwrap();
    assert_eq!(hits(&rank.store, &[all], 3), 1);
    let low = part(&(0..2));
    assert_eq!(hits(&rank.store, &[low], 3), 3, "its own are all there");
    assert_eq!(rank.load(0, 0).loaded, 1);
    assert!(rank.holds(0, 0));
    assert_eq!(rank.load(1, 0).failed, [0]);
    assert_eq!(rank.load(2, 0).failed, [0]);
    let metrics = rank.store.metrics();
    let counts = (
        metrics.chunks_missing,
        metrics.chunks_damaged,
        metrics.chunks_set_aside,
    );
    assert_eq!(counts, (1, 1, 1));
    assert!(!damaged.exists() && path(root.path(), &(2..4), 2).exists());
    // What this rank stores itself is used from then on, and not put together.
    rank.save(1);
    assert_eq!(rank.load(1, 0).loaded, 1);
    assert_eq!(rank.store.metrics().chunks_assembled, 1);
}

#[test]
fn heads_that_were_swapped_between_files_are_not_taken() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    let model = model(2000);
    for heads in [0..2, 2..4] {
        Rank::open(&config, &model, &heads).save(0);
    }
    let [low, high] = [0..2, 2..4].map(|heads| path(root.path(), &heads, 0));
    let swap = root.path().join("swap");
    std::fs::rename(&low, &swap).unwrap();
    std::fs::rename(&high, &low).unwrap();
    std::fs::rename(&swap, &high).unwrap();
    let rank = Rank::open(&config, &model, &(0..4));
    let failed = rank.load(0, 0).failed;
    assert_eq!(failed, [0], "each file says which heads it has");
    assert_eq!(rank.store.metrics().chunks_damaged, 1);
}

#[test]
fn files_larger_than_a_window_and_than_a_staging_buffer_are_read_in_pieces() {
    let root = tempfile::tempdir().unwrap();
    // 12 MiB for all heads, of which a rank of one head has 3 MiB.
    let model = model(786_432);
    let mut config = config(root.path());
    config.buffer_mib = 16;
    Rank::open(&config, &model, &(0..4)).save(0);
    config.buffer_mib = 4;
    for head in 0..4 {
        let rank = Rank::open(&config, &model, &(head..head + 1));
        for first in [0, 1] {
            assert_eq!(rank.load(0, first).loaded, 1);
            assert!(rank.holds(0, first), "head {head} from block {first}");
        }
        assert_eq!(rank.store.metrics().chunks_assembled, 2);
    }
}

#[test]
fn parts_lie_on_several_paths_and_stages_are_kept_apart() {
    for sharding in [PathSharding::ByHash, PathSharding::ByGpu] {
        let root = tempfile::tempdir().unwrap();
        let mut config = config(root.path());
        config.gds_path = ["a", "b", "c"].map(|name| root.path().join(name)).to_vec();
        config.gds_path_sharding = sharding;
        let model = model(3000);
        for heads in [0..1, 1..2, 2..3, 3..4] {
            Rank::open(&config, &model, &heads).save(0);
        }
        let rank = Rank::open(&config, &model, &(0..4));
        let ask = |part: Part| {
            let ticket = rank.store.lookup_each(0, &[part], vec![key(0)]);
            ticket.wait(LIMIT).unwrap()
        };
        assert_eq!(ask(part(&(0..4))), [true]);
        let next_stage = Part::of_heads(1, HeadRange::new(0, 4).unwrap());
        assert_eq!(ask(next_stage), [false], "another stage has other layers");
        assert_eq!(rank.load(0, 0).loaded, 1);
        assert!(rank.holds(0, 0));
    }
}

#[test]
fn blocks_that_cannot_be_divided_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = open_as(&config(root.path()));
    let region = Region::zeroed(8192).unwrap();
    let span = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: 100,
        block_bytes: 100,
    };
    let layout = KvLayout::new(vec![span], 4, &[region.bytes()]).unwrap();
    let error = store
        .attach(0, part(&(0..3)), layout, vec![region], 1)
        .unwrap_err();
    assert!(error.to_string().contains("3 heads"), "{error}");
}
