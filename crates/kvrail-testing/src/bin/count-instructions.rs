//! `count-instructions`: what the inner loops of a chunk cost, as valgrind's callgrind counts it.
//!
//! `make instructions-check` counts each loop and fails when one takes more than its limit. Counts do
//! not move with the load of the machine, so a guard by them can be tight where one by time cannot.
//!
//! A loop is run as often as it is told and twice as often, each time in a process of its own under
//! callgrind; the difference is what one turn costs. (The harness gungraun does more, but each
//! machine would first compile its runner, for minutes; and this program is built as the wheel is,
//! with no dependency that only tests have.)
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a benchmark that meets an error has failed, and prints what it found"
)]

use std::hint::black_box;
use std::process::{Command, ExitCode};

use kvrail::chunk::{
    ChunkFormat, ChunkHead, HeadFields, PAGE_BYTES, PageTable, first_bad_page, hash_pages,
    root_checksum,
};
use kvrail::layout::TransferPlan;
use kvrail::memory::{Scatter, gather};
use kvrail::{ChunkKey, ChunkRef, KvLayout, LayerSpan, Region};

/// A loop: its name, the most instructions that one turn may take, and what makes it ready.
struct Loop {
    name: &'static str,
    limit: u64,
    prepare: fn() -> Box<dyn FnMut()>,
}

/// The limits are a tenth above what was counted when they were written (with AVX2): little enough that
/// no change of a loop passes that a user could notice, and more than another C library makes of it.
const LOOPS: [Loop; 8] = [
    Loop {
        name: "hash 64 pages",
        limit: 94_000,
        prepare: || {
            let pages = content(64 * PAGE_BYTES);
            let mut table = vec![0; 64];
            Box::new(move || hash_pages(black_box(&pages), &mut table))
        },
    },
    Loop {
        name: "verify 64 pages",
        limit: 94_000,
        prepare: || {
            let pages = content(64 * PAGE_BYTES);
            let mut table = vec![0; 64];
            hash_pages(&pages, &mut table);
            Box::new(move || assert_eq!(first_bad_page(black_box(&pages), &table), None))
        },
    },
    Loop {
        name: "write a head",
        limit: 17_400,
        prepare: || {
            let head = head();
            let mut page = vec![0; PAGE_BYTES];
            Box::new(move || head.encode_into(black_box(&mut page)).unwrap())
        },
    },
    Loop {
        name: "check a head",
        limit: 28_000,
        prepare: || {
            let head = head();
            let mut page = vec![0; PAGE_BYTES];
            head.encode_into(&mut page).unwrap();
            Box::new(move || {
                let root = ChunkHead::check(black_box(&page), &head.fields, &head.format);
                assert_eq!(root.unwrap(), head.root);
            })
        },
    },
    Loop {
        name: "write a page table",
        limit: 72_000,
        prepare: || {
            let format = format();
            let table = PageTable::new(&format);
            let mut bytes = vec![0; format.table_bytes()];
            Box::new(move || table.encode_into(black_box(&mut bytes)))
        },
    },
    Loop {
        name: "check a page table",
        limit: 105_000,
        prepare: || {
            let format = format();
            let mut bytes = vec![0; format.table_bytes()];
            PageTable::new(&format).encode_into(&mut bytes);
            Box::new(move || {
                black_box(root_checksum(black_box(&bytes)));
                black_box(PageTable::decode(&format, &bytes).unwrap());
            })
        },
    },
    Loop {
        name: "plan a chunk",
        limit: 19_200,
        prepare: || {
            let (layout, _, blocks) = ground();
            Box::new(move || {
                black_box(TransferPlan::new(black_box(&layout), &blocks).unwrap());
            })
        },
    },
    Loop {
        name: "gather and scatter a chunk",
        limit: 75_000,
        prepare: || {
            let (layout, regions, blocks) = ground();
            let plan = TransferPlan::new(&layout, &blocks).unwrap();
            let mut image = vec![0; plan.bytes()];
            Box::new(move || {
                gather(&plan, &regions, black_box(&mut image)).unwrap();
                let mut scatter = Scatter::new(&plan, &regions);
                scatter.write(&image).unwrap();
                assert!(scatter.is_complete());
            })
        },
    },
];

/// Layers, blocks of a chunk, and bytes of a block in a layer: few bytes, so that what is counted is
/// the way to them and not the C library's copy.
const LAYERS: usize = 32;
const BLOCKS: usize = 16;
const BLOCK_BYTES: usize = 64;
/// Turns of the shorter run.
const TURNS: u64 = 20;

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 % 251) as u8).collect()
}

fn format() -> ChunkFormat {
    // 32 MiB: a chunk of llama-3.1-8b.
    ChunkFormat::new([16, 32, 65_536]).unwrap()
}

fn head() -> ChunkHead {
    let key = ChunkKey::from_bytes(&[0xa5; 32]).unwrap();
    let parent = ChunkKey::from_bytes(&[0x5a; 32]).unwrap();
    ChunkHead {
        fields: HeadFields {
            namespace: "0123456789abcdef".to_owned(),
            group: 0,
            rank: 1.into(),
            tokens: 256,
            chunk: ChunkRef {
                key,
                parent: Some(parent),
            },
        },
        format: format(),
        root: 0x1234_5678_9abc_def0,
    }
}

/// A KV cache whose blocks lie apart from each other.
fn ground() -> (KvLayout, [Region; 1], Vec<usize>) {
    let blocks = 2 * BLOCKS;
    let layer_bytes = blocks * BLOCK_BYTES;
    let layers = (0..LAYERS)
        .map(|layer| LayerSpan {
            region: 0,
            offset: layer * layer_bytes,
            block_stride: BLOCK_BYTES,
            block_bytes: BLOCK_BYTES,
        })
        .collect();
    let region = Region::zeroed(LAYERS * layer_bytes).unwrap();
    let layout = KvLayout::new(layers, blocks, &[region.bytes()]).unwrap();
    (
        layout,
        [region],
        (0..BLOCKS).map(|block| 2 * block).collect(),
    )
}

/// Counts the instructions of a process of this program that takes so many turns of a loop.
fn count(name: &str, turns: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args(["--turns", &turns.to_string(), name])
        .output();
    let output = output.unwrap_or_else(|error| {
        panic!("valgrind: {error} (install the package of that name)");
    });
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {text}");
    let collected = text.lines().find_map(|line| {
        let (_, number) = line.split_once("Collected : ")?;
        number.trim().parse().ok()
    });
    collected.unwrap_or_else(|| panic!("{name}: callgrind counted nothing: {text}"))
}

/// Returns whether hashing and copying use 32 bytes at a time here, also under valgrind.
fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let Some(at) = words.iter().position(|word| word == "--turns") {
        let turns: u64 = words[at + 1].parse().unwrap();
        let found = LOOPS.iter().find(|one| one.name == words[at + 2]);
        let mut turn = (found.unwrap().prepare)();
        (0..turns).for_each(|_| turn());
        return ExitCode::SUCCESS;
    }
    if !has_avx2() {
        println!("skipped: the limits are those of a processor with AVX2, and this one has none");
        return ExitCode::SUCCESS;
    }
    println!("{:<28} {:>14} {:>10}", "LOOP", "INSTRUCTIONS", "LIMIT");
    let mut good = true;
    for Loop { name, limit, .. } in LOOPS {
        let instructions = (count(name, 2 * TURNS) - count(name, TURNS)) / TURNS;
        let verdict = match instructions <= limit {
            true => "",
            false => "  TOO MANY",
        };
        good &= instructions <= limit;
        println!("{name:<28} {instructions:>14} {limit:>10}{verdict}");
    }
    match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
