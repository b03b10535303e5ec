//! That chunks lie where everybody looks for them, in shares as large as the weights say.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

fn key(number: u64) -> ChunkKey {
    ChunkKey::from_bytes(blake3::hash(&number.to_le_bytes()).as_bytes()).unwrap()
}

fn by_hash(paths: &[(PathBuf, u64)]) -> Placement {
    let paths = paths.iter().map(|(path, weight)| (path.as_path(), *weight));
    Placement::new(PathSharding::ByHash, paths)
}

fn named(paths: &[(&str, u64)]) -> Vec<(PathBuf, u64)> {
    let own = |(path, weight): &(&str, u64)| (PathBuf::from(path), *weight);
    paths.iter().map(own).collect()
}

/// Returns the path of a chunk.
fn path_of<'a>(paths: &'a [(PathBuf, u64)], key: &ChunkKey) -> &'a Path {
    &paths[by_hash(paths).index(0.into(), key)].0
}

/// What the first version did: the largest hash, without weights.
fn unweighted(paths: &[(PathBuf, u64)], key: &ChunkKey) -> usize {
    let hash = |path: &Path| {
        let seed = XxHash3_64::oneshot(path.as_os_str().as_encoded_bytes());
        XxHash3_64::oneshot_with_seed(seed, key.as_bytes())
    };
    let best = paths.iter().enumerate();
    best.max_by_key(|(_, (path, _))| hash(path)).unwrap().0
}

#[test]
fn distances_are_those_of_the_documentation() {
    for (hash, expected) in [
        (0, 18_295_873_486_192_640),
        (1, 17_849_746_203_214_890),
        (2, 17_642_308_829_760_402),
        (0x0123_4567_89AB_CDEF, 2_199_383_878_819_978),
        (u64::MAX / 2, 281_474_976_710_657),
        (u64::MAX / 2 + 1, 281_474_976_710_656),
        (0xDEAD_BEEF_CAFE_F00D, 56_627_214_234_924),
        (u64::MAX - (1 << 20) + 1, 24),
        (u64::MAX, 1),
    ] {
        assert_eq!(distance(hash), expected, "{hash:#x}");
    }
}

#[test]
fn chunks_lie_where_the_documentation_says() {
    let equal = named(&[("/kv/a", 1), ("/kv/b", 1), ("/kv/c", 1)]);
    let weighted = named(&[("/kv/a", 3000), ("/kv/b", 1000), ("/kv/c", 500)]);
    let digits = |paths: &[(PathBuf, u64)]| -> String {
        let place = |number| by_hash(paths).index(0.into(), &key(number)).to_string();
        (0..32).map(place).collect()
    };
    assert_eq!(digits(&equal), "20210011022012001022200201122201");
    assert_eq!(digits(&weighted), "00210000020010000020000000102001");
}

#[test]
fn shares_are_as_large_as_the_weights() {
    const CHUNKS: u64 = 20_000;
    for weights in [
        [1, 1, 1, 1],
        [5, 3, 1, 1],
        [6000, 3000, 500, 500],
        [1, 1, 1, u64::MAX],
    ] {
        let paths = named(&[
            ("/a", weights[0]),
            ("/b", weights[1]),
            ("/mnt/c", weights[2]),
            ("/mnt/d", weights[3]),
        ]);
        let mut counts = [0_u64; 4];
        for number in 0..CHUNKS {
            counts[by_hash(&paths).index(0.into(), &key(number))] += 1;
        }
        let sum: f64 = weights.iter().map(|weight| *weight as f64).sum();
        for (weight, count) in weights.iter().zip(counts) {
            let share = *weight as f64 / sum;
            let expected = CHUNKS as f64 * share;
            // Five standard deviations: by chance, one run in a million.
            let slack = 5.0 * (CHUNKS as f64 * share * (1.0 - share)).sqrt() + 1.0;
            let off = (count as f64 - expected).abs();
            assert!(
                off <= slack,
                "{weights:?}: {counts:?}, expected {expected:.0} ± {slack:.0}"
            );
        }
    }
}

#[test]
fn by_gpu_the_rank_decides_and_weights_do_not() {
    let paths = [
        (Path::new("/a"), 1),
        (Path::new("/b"), 9),
        (Path::new("/c"), 1),
    ];
    let placement = Placement::new(PathSharding::ByGpu, paths);
    let places: Vec<usize> = (0..7)
        .map(|rank| placement.index(rank.into(), &key(rank.into())))
        .collect();
    assert_eq!(places, [0, 1, 2, 0, 1, 2, 0]);
}

/// Two to six paths with weights from 1 to a million.
fn paths() -> impl Strategy<Value = Vec<(PathBuf, u64)>> {
    proptest::collection::btree_map("/[a-d]{1,3}(/[a-z0-9]{1,8})?", 1..1_000_000_u64, 2..=6)
        .prop_map(|map| {
            map.into_iter()
                .map(|(path, weight)| (path.into(), weight))
                .collect()
        })
}

proptest! {
    /// A path that goes leaves the chunks of the others where they are, so one that comes takes
    /// some for itself and moves no others.
    #[test]
    fn only_chunks_of_the_path_that_goes_or_comes_move(paths in paths(), pick in any::<usize>(), number in any::<u64>()) {
        let key = key(number);
        let before = path_of(&paths, &key);
        let mut fewer = paths.clone();
        let (gone, _) = fewer.remove(pick % paths.len());
        if before != gone {
            prop_assert_eq!(path_of(&fewer, &key), before);
        }
    }

    /// A path that is weighted anew gives chunks or takes some, by whether it weighs less or more.
    #[test]
    fn only_chunks_of_the_path_weighted_anew_move(
        paths in paths(), pick in any::<usize>(), weight in 1..2_000_000_u64, number in any::<u64>(),
    ) {
        let key = key(number);
        let (before, mut after) = (path_of(&paths, &key).to_path_buf(), paths.clone());
        let changed = pick % paths.len();
        let was = std::mem::replace(&mut after[changed].1, weight);
        let now = path_of(&after, &key);
        if now != before {
            let changed = &paths[changed].0;
            let (least, most) = (weight.min(was), weight.max(was));
            prop_assert!(least < most, "nothing was changed");
            prop_assert_eq!(if weight > was { now } else { &before }, changed);
        }
    }

    #[test]
    fn the_order_of_the_list_does_not_matter(paths in paths(), turn in any::<usize>(), number in any::<u64>()) {
        let key = key(number);
        let mut other = paths.clone();
        other.rotate_left(turn % paths.len());
        prop_assert_eq!(path_of(&other, &key), path_of(&paths, &key));
        other.reverse();
        prop_assert_eq!(path_of(&other, &key), path_of(&paths, &key));
    }

    /// Chunks that were stored without weights stay where they are.
    #[test]
    fn equal_weights_are_none(paths in paths(), weight in 1..u64::MAX, number in any::<u64>()) {
        let key = key(number);
        let equal: Vec<_> = paths.iter().map(|(path, _)| (path.clone(), weight)).collect();
        prop_assert_eq!(by_hash(&equal).index(0.into(), &key), unweighted(&paths, &key));
    }

    #[test]
    fn a_larger_hash_is_never_further_away(one in any::<u64>(), other in any::<u64>(), bits in 0..64_u32) {
        for (one, other) in [(one, other), (one, one ^ (1 << bits)), (one >> bits, other >> bits)] {
            let (smaller, larger) = (one.min(other), one.max(other));
            prop_assert!(distance(smaller) >= distance(larger));
            prop_assert!(distance(larger) >= 1 && distance(smaller) <= 65 << DIGITS);
        }
    }
}
