//! Whatever stands at a chunk's name: a load is right or a miss, and bad chunks are set aside.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use common::{Cache, Geometry, LIMIT, chunk_path, key, names, open};
use kvrail::store::inspect;
use proptest::prelude::*;

const VICTIM: u64 = 1;

/// Damages chunk 1 of three, then loads all three. Returns what the load said about chunk 1.
fn load_after(damage: impl FnOnce(&Path)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..6).for_each(|block| cache.fill(block, 7 + block as u64));
    cache.store(&[(0, vec![0, 1]), (1, vec![2, 3]), (2, vec![4, 5])]);
    let path = chunk_path(directory.path(), 0, VICTIM);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "chunks are for the owner only");
    damage(&path);

    let store = open(directory.path());
    let target = Cache::attach(&store, 0, Geometry::default());
    let report = target.load(&[
        (0, 0, vec![10, 11]),
        (1, 0, vec![12, 13]),
        (2, 0, vec![14, 15]),
    ]);
    assert_eq!(report.failed, [1], "{report:?}");
    for (block, source) in [(10, 0), (11, 1), (14, 4), (15, 5)] {
        assert_eq!(
            target.block(block),
            cache.block(source),
            "the others are right"
        );
    }
    assert!(
        target.block(12).iter().all(|byte| *byte == 0),
        "nothing bad was copied"
    );
    assert!(
        std::fs::symlink_metadata(&path).is_err(),
        "it is out of the way"
    );
    assert_eq!(
        store
            .lookup(0, &[0], vec![key(VICTIM)])
            .wait(LIMIT)
            .unwrap(),
        0
    );
    let metrics = store.metrics();
    assert_eq!(metrics.loads_failed, 1);
    let error = report.errors[0].clone();
    if metrics.chunks_missing == 0 {
        assert_eq!((metrics.chunks_damaged, metrics.chunks_set_aside), (1, 1));
        let mut kept = names(directory.path(), "quarantine");
        kept.sort();
        assert_eq!(kept.len(), 2, "the chunk and why: {kept:?}");
        assert_eq!(kept[1], format!("{}.json", kept[0]));
        let namespace = path.ancestors().nth(3).unwrap();
        let aside = inspect::quarantined(namespace).unwrap().remove(0);
        assert_eq!(
            (aside.group, aside.rank, aside.key),
            (0, 0.into(), key(VICTIM))
        );
        let reason = aside.reason.unwrap();
        let age = aside.since.elapsed().unwrap_or_default();
        assert!(error.starts_with(&reason), "{reason:?} for {error:?}");
        assert!(age < LIMIT, "{age:?}");
        let notices = store.take_notices();
        let told = notices.iter().any(|notice| notice.message.contains(&error));
        assert!(told, "{error:?} in {notices:?}");
    }
    // Its key is free again.
    let blocks = vec![2, 3];
    blocks
        .iter()
        .for_each(|block| target.fill(*block, 7 + *block as u64));
    assert_eq!(target.store(&[(VICTIM, blocks)]).stored, 1);
    assert_eq!(target.load(&[(VICTIM, 0, vec![20, 21])]).loaded, 1);
    assert_eq!(target.block(20), cache.block(2));
    error
}

fn flip(at: usize) -> impl FnOnce(&Path) {
    move |path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 0x10;
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    // The file: head 0..4096, payload 4096..16096, padding to 16384, page table to 20480.
    for (at, expected) in [
        (0, "head"),
        (20, "head"),
        (4000, "head"),
        (4096, "page 0 of 3"),
        (9000, "page 1 of 3"),
        (16_095, "page 2 of 3"),
        (16_200, "page 2 of 3"),
        (16_384, "page table"),
        (20_479, "page table"),
    ] {
        let error = load_after(flip(at));
        assert!(error.contains(expected), "byte {at}: {error}");
    }
}

#[test]
fn files_of_a_wrong_length_are_found() {
    let resize = |bytes: u64| {
        move |path: &Path| {
            std::fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(bytes)
                .unwrap();
        }
    };
    for bytes in [0, 1, 4096, 20_479, 20_481, 40_960] {
        let error = load_after(resize(bytes));
        assert!(error.contains("expected 20480 bytes"), "{bytes}: {error}");
    }
}

#[test]
fn another_chunk_under_the_name_is_found() {
    let error = load_after(|path| {
        let other = chunk_path(path.ancestors().nth(4).unwrap(), 0, 2);
        std::fs::copy(other, path).unwrap();
    });
    assert!(error.contains(&key(2).to_string()), "{error}");
}

#[test]
fn what_is_no_file_is_never_followed_or_waited_for() {
    let replace = |with: fn(&Path)| {
        move |path: &Path| {
            std::fs::remove_file(path).unwrap();
            with(path);
        }
    };
    load_after(replace(|path| std::fs::create_dir(path).unwrap()));
    load_after(replace(|path| {
        let outside = path.ancestors().nth(4).unwrap().join("outside");
        std::fs::copy(chunk_path(path.ancestors().nth(4).unwrap(), 0, 0), &outside).unwrap();
        symlink(outside, path).unwrap();
    }));
    load_after(replace(|path| symlink("/nowhere/at/all", path).unwrap()));
    load_after(replace(|path| {
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    }));
}

#[test]
fn a_chunk_that_has_gone_is_a_miss() {
    let error = load_after(|path| std::fs::remove_file(path).unwrap());
    assert!(error.contains("open"), "{error}");
}

#[test]
fn a_folder_in_a_chunk_s_place_does_not_block_its_key() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    let path = chunk_path(directory.path(), 0, 5);
    std::fs::create_dir_all(path.join("full")).unwrap();
    assert_eq!(cache.store(&[(5, vec![0, 1])]).stored, 1);
    assert!(path.is_file());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Random bytes over random places: the load fails, or not one byte was changed.
    #[test]
    fn random_damage_is_never_served(at in 0_usize..20_480, noise in proptest::collection::vec(any::<u8>(), 1..300)) {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let cache = Cache::attach(&store, 0, Geometry::default());
        cache.fill(0, 1);
        cache.fill(1, 2);
        cache.store(&[(0, vec![0, 1])]);
        let path = chunk_path(directory.path(), 0, 0);
        let before = std::fs::read(&path).unwrap();
        let mut after = before.clone();
        after.iter_mut().skip(at).zip(&noise).for_each(|(byte, new)| *byte = *new);
        std::fs::write(&path, &after).unwrap();
        let report = cache.load(&[(0, 0, vec![8, 9])]);
        if before == after {
            prop_assert_eq!(report.loaded, 1);
        } else {
            prop_assert_eq!(report.failed, [0]);
            prop_assert!(cache.block(8).iter().all(|byte| *byte == 0));
        }
    }
}
