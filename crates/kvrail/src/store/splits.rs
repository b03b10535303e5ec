//! Which ranges of heads there are files of, and which of them make up another range together.
//!
//! Instances of other tensor-parallel sizes split the heads in other ways. Each range that anybody
//! stored has a folder in the namespace's directory, so one look at its names tells, and they
//! hardly ever change. It is taken when a chunk is missing under the range that is asked for, and
//! again after a while.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::directory::parse_part_name;
use super::mount::Mount;
use super::present::Place;
use super::publish::is_missing;
use super::shared::StoreShared;
use super::watch::Watched;
use crate::chunk::{HeadRange, Part};
use crate::error::Result;
use crate::sync::{Mutex, PoisonError};

/// How long a look at the names holds: what another kind of instance begins to store is found so
/// much later.
const HOLDS: Duration = Duration::from_secs(10);
/// Names looked at, and ranges remembered, of each path: far above any real number of them.
const NAMES_MAX: usize = 4096;

/// The ranges of heads that were ever stored, on each path.
#[derive(Debug)]
pub(super) struct Splits {
    paths: Vec<Mutex<Listing>>,
}

/// What the last look found.
#[derive(Debug, Default)]
struct Listing {
    /// When it began; `None` before the first.
    began: Option<Instant>,
    /// Group and part of each folder; `None` until a look has ended.
    found: Option<Vec<(u32, Part)>>,
}

impl Splits {
    pub(super) fn new(paths: usize) -> Self {
        Self {
            paths: (0..paths).map(|_| Mutex::default()).collect(),
        }
    }

    /// Returns the ranges on a path that could help with a part, other than itself.
    fn others(&self, index: usize, mount: &Mount, place: &Place) -> Result<Vec<Part>> {
        let Some(listing) = self.paths.get(index) else {
            return Ok(Vec::new());
        };
        let lock = || listing.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = {
            let mut listing = lock();
            let is_due = listing.began.is_none_or(|began| began.elapsed() >= HOLDS);
            // One thread looks again, the others go by what is known; at first all have to.
            if is_due {
                listing.began = Some(Instant::now());
            }
            is_due || listing.found.is_none()
        };
        if is_due {
            let found = list(mount)?;
            lock().found = Some(found);
        }
        let (group, part, _) = place;
        let could_help = |(one, other): &&(u32, Part)| {
            let common = part.heads().zip(other.heads());
            one == group
                && other != part
                && other.rank() == part.rank()
                && common.is_some_and(|(ours, theirs)| ours.common(theirs).is_some())
        };
        let listing = lock();
        let found = listing.found.iter().flatten().filter(could_help);
        Ok(found.map(|(_, other)| *other).collect())
    }
}

/// Lists the folders of ranges of heads in a namespace's directory.
fn list(mount: &Mount) -> Result<Vec<(u32, Part)>> {
    let folder = match mount.directory.open() {
        Err(error) if is_missing(&error) => return Ok(Vec::new()),
        folder => folder?,
    };
    let mut found = Vec::new();
    for name in folder.names()?.take(NAMES_MAX) {
        let name = name?;
        let part = name.to_str().and_then(parse_part_name);
        found.extend(part.filter(|(_, part)| part.heads().is_some()));
    }
    Ok(found)
}

/// Finds files of other ranges of heads that hold a part of a chunk together, in the order of their
/// heads; `None` where there are none, and for a part that is no range of heads.
///
/// # Errors
/// What `holds`, which is asked whether a file is there, or a look at a directory failed with.
pub(super) fn find(
    store: &StoreShared,
    place: &Place,
    watched: &Watched,
    mut holds: impl FnMut(&Place) -> Result<bool>,
) -> Result<Option<Vec<Part>>> {
    let (group, part, key) = place;
    let Some(wanted) = part.heads() else {
        return Ok(None);
    };
    let mut others = Vec::new();
    for (index, mount) in store.mounts.iter().enumerate() {
        if mount.health.is_out() {
            continue;
        }
        watched.is_at(index);
        let here = store.splits.others(index, mount, place)?;
        let is_here = |other: &Part| store.mount_index(*other, key) == index;
        others.extend(here.into_iter().filter(is_here));
    }
    let found = cover(wanted, &others, |other| {
        watched.is_at(store.mount_index(*other, key));
        holds(&(*group, *other, *key))
    });
    watched.is_at(store.mount_index(*part, key));
    found
}

/// Chooses, of `parts`, files that hold the heads `wanted` together, each from where the one before
/// it ends. As few as there can be, and the smaller of two that reach equally far.
fn cover(
    wanted: HeadRange,
    parts: &[Part],
    mut holds: impl FnMut(&Part) -> Result<bool>,
) -> Result<Option<Vec<Part>>> {
    let ranges = parts.iter().filter_map(|part| Some((part.heads()?, part)));
    let mut left: Vec<(HeadRange, &Part)> = ranges.collect();
    left.sort_by_key(|(heads, _)| (Reverse(heads.end().min(wanted.end())), heads.count()));
    let (mut chosen, mut at) = (Vec::new(), wanted.first());
    while at < wanted.end() {
        let reaches = |(heads, _): &(HeadRange, &Part)| heads.first() <= at && at < heads.end();
        // Asked about once: what is not there, or was taken, is none of those that are left.
        let mut next = None;
        while let Some(index) = left.iter().position(reaches) {
            let (heads, part) = left.remove(index);
            if holds(part)? {
                next = Some((heads, part));
                break;
            }
        }
        let Some((heads, part)) = next else {
            return Ok(None);
        };
        chosen.push(*part);
        at = heads.end();
    }
    Ok(Some(chosen))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn heads(first: u16, end: u16) -> HeadRange {
        HeadRange::new(first, end).unwrap()
    }

    fn part(first: u16, end: u16) -> Part {
        Part::of_heads(0, heads(first, end))
    }

    proptest! {
        /// Against all subsets: a cover is found when there is one, and it is one.
        #[test]
        fn a_cover_is_found_when_there_is_one(
            ranges in proptest::collection::vec((0_u16..8, 1_u16..5, any::<bool>()), 0..7),
            first in 0_u16..8, count in 1_u16..6,
        ) {
            let wanted = heads(first, first + count);
            let there: Vec<(Part, bool)> =
                ranges.iter().map(|&(first, count, is)| (part(first, first + count), is)).collect();
            let parts: Vec<Part> = there.iter().map(|(part, _)| *part).collect();
            let mut asked = 0;
            let found = cover(wanted, &parts, |one| {
                asked += 1;
                Ok(there.iter().any(|(part, is)| part == one && *is))
            })
            .unwrap();
            prop_assert!(asked <= parts.len(), "each is asked about once at most");
            let all_there = |head: usize| there.iter().any(|(part, is)| {
                *is && (part.heads().unwrap().first()..part.heads().unwrap().end()).contains(&head)
            });
            let possible = (wanted.first()..wanted.end()).all(all_there);
            prop_assert_eq!(found.is_some(), possible);
            let mut at = wanted.first();
            for part in found.unwrap_or_default() {
                prop_assert!(there.contains(&(part, true)), "it is there");
                let heads = part.heads().unwrap();
                prop_assert!(heads.first() <= at && at < heads.end(), "no gap, and each is needed");
                at = heads.end();
            }
            prop_assert!(!possible || at >= wanted.end());
        }
    }

    #[test]
    fn few_files_are_read_and_the_smaller_of_equals() {
        let parts = [part(0, 2), part(2, 4), part(0, 8), part(0, 4)];
        let all = |_: &Part| Ok(true);
        assert_eq!(
            cover(heads(0, 4), &parts, all).unwrap(),
            Some(vec![part(0, 4)])
        );
        let not_the_best = |one: &Part| Ok(*one != part(0, 4) && *one != part(0, 8));
        assert_eq!(
            cover(heads(0, 4), &parts, not_the_best).unwrap(),
            Some(vec![part(0, 2), part(2, 4)])
        );
        assert_eq!(cover(heads(4, 9), &parts, all).unwrap(), None);
    }
}
