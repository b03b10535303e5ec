//! The chains of chunks that this process uses: which chunk comes before which, and when it was
//! last used.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::stamp::{RENEWED_AFTER_MILLISECONDS, Stamp};
use crate::chunk::ChunkKey;
use crate::store::present::Place;

/// Chunks remembered: about 8 MB.
const CHUNKS_MAX: usize = 65_536;

/// A chunk's predecessor and stamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) parent: Option<ChunkKey>,
    /// When it was last used, in milliseconds since 1970.
    pub(super) milliseconds: i64,
    /// Whether the file does not say so yet.
    pub(super) is_pending: bool,
}

/// What is remembered of chains.
#[derive(Debug, Default)]
pub(super) struct Chains {
    links: Mutex<Links>,
}

/// A link, and when its stamp was decided on. A stamp says an earlier time, the earlier the further
/// behind in its prompt a chunk is: by it alone the end of a long prompt would never be young.
#[derive(Debug, Clone, Copy)]
struct Known {
    link: Link,
    decided: i64,
}

type Links = HashMap<Place, Known>;

impl Chains {
    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, place: Place, link: Link) {
        let mut links = self.lock();
        // A file that says what was decided on was decided on then; another one knows better.
        let decided = match links.get(&place) {
            Some(known) if link.milliseconds >= known.link.milliseconds => {
                known.decided.max(link.milliseconds)
            }
            _ => link.milliseconds,
        };
        insert(&mut links, place, Known { link, decided });
    }

    pub(super) fn get(&self, place: &Place) -> Option<Link> {
        self.lock().get(place).map(|known| known.link)
    }

    /// Decides the stamp of a chunk that is about to be stored or used, after those of all known
    /// chunks before it. Chunks of one call are decided on in their order, whatever order the
    /// threads work in. What was used a moment ago keeps its stamp, unless it `is_new`; returns whether
    /// it was not.
    pub(super) fn plan(
        &self,
        place: Place,
        parent: Option<ChunkKey>,
        now: i64,
        is_new: bool,
    ) -> bool {
        let mut links = self.lock();
        let before = parent.map(|parent| (place.0, place.1, parent));
        if let Some(before) = before {
            renew(&mut links, before, now);
        }
        let is_fresh = links.get(&place).is_some_and(|known| !is_stale(known, now));
        if is_fresh && !is_new {
            return false;
        }
        let of_parent =
            before.and_then(|before| links.get(&before).map(|known| known.link.milliseconds));
        let link = Link {
            parent,
            milliseconds: Stamp::first(now, of_parent).milliseconds(),
            is_pending: false,
        };
        insert(&mut links, place, Known { link, decided: now });
        true
    }

    /// Decides the stamps of `place` and of all known chunks before it that were not used for a
    /// while. Returns those whose files are to be told, the first of the prompt first; each only
    /// once.
    pub(super) fn take_pending(&self, place: Place, now: i64) -> Vec<(Place, Link)> {
        let mut links = self.lock();
        renew(&mut links, place, now);
        let mut found = Vec::new();
        let mut next = Some(place);
        while let Some(place) = next {
            let known = links.get_mut(&place).map(|known| &mut known.link);
            let Some(link) = known.filter(|link| link.is_pending) else {
                break;
            };
            // So that a circle, which no prompt makes, ends.
            link.is_pending = false;
            next = link.parent.map(|parent| (place.0, place.1, parent));
            found.push((place, *link));
        }
        found.reverse();
        found
    }

    /// Notes chunks whose files were not told after all.
    pub(super) fn set_pending(&self, places: impl Iterator<Item = Place>) {
        let mut known = self.lock();
        for place in places {
            if let Some(known) = known.get_mut(&place) {
                known.link.is_pending = true;
            }
        }
    }
}

fn is_stale(known: &Known, now: i64) -> bool {
    known.decided < now.saturating_sub(RENEWED_AFTER_MILLISECONDS)
}

fn insert(links: &mut Links, place: Place, known: Known) {
    if links.len() >= CHUNKS_MAX && !links.contains_key(&place) {
        // What is forgotten is read from the files again, one chunk at a time.
        links.clear();
    }
    links.insert(place, known);
}

/// Makes `place` and the chunks before it young, up to the first that is or that is not known.
fn renew(links: &mut Links, place: Place, now: i64) {
    let mut stale = Vec::new();
    let mut next = Some(place);
    // A chain cannot be longer than all that is known, nor go in circles for ever.
    while let Some(place) = next.filter(|_| stale.len() <= links.len()) {
        let Some(known) = links.get(&place).filter(|known| is_stale(known, now)) else {
            break;
        };
        stale.push(place);
        next = known.link.parent.map(|parent| (place.0, place.1, parent));
    }
    let mut of_parent = next
        .and_then(|place| links.get(&place))
        .map(|known| known.link.milliseconds);
    for place in stale.into_iter().rev() {
        let milliseconds = Stamp::first(now, of_parent).milliseconds();
        if let Some(known) = links.get_mut(&place) {
            known.link.milliseconds = milliseconds;
            known.link.is_pending = true;
            known.decided = now;
        }
        of_parent = Some(milliseconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(index: u64) -> Place {
        (
            0,
            0.into(),
            ChunkKey::from_bytes(&index.to_le_bytes()).unwrap(),
        )
    }

    fn link(parent: Option<u64>, milliseconds: i64) -> Link {
        Link {
            parent: parent.map(|parent| place(parent).2),
            milliseconds,
            is_pending: false,
        }
    }

    const NOW: i64 = 10 * RENEWED_AFTER_MILLISECONDS;

    #[test]
    fn stale_ancestors_are_renewed_in_order_up_to_the_first_fresh_or_unknown_one() {
        let chains = Chains::default();
        assert!(chains.take_pending(place(1), NOW).is_empty());
        chains.insert(place(1), link(None, NOW - 500));
        (2..6).for_each(|index| chains.insert(place(index), link(Some(index - 1), 50)));
        let renewed = chains.take_pending(place(5), NOW);
        let expected = [(2, 510), (3, 520), (4, 530), (5, 540)];
        assert_eq!(
            renewed
                .iter()
                .map(|(place, link)| (*place, link.milliseconds))
                .collect::<Vec<_>>(),
            expected.map(|(index, before)| (place(index), NOW - before))
        );
        assert!(
            chains.take_pending(place(5), NOW).is_empty(),
            "each is told once"
        );
        chains.insert(place(7), link(Some(6), 0));
        assert_eq!(chains.take_pending(place(7), NOW).len(), 1);
        // No prompt makes a circle, but a wrong caller must not hang.
        chains.insert(place(6), link(Some(7), 0));
        chains.insert(place(7), link(Some(6), 0));
        assert!(chains.take_pending(place(7), NOW).len() < 20);
    }

    #[test]
    fn what_was_not_told_is_told_the_next_time() {
        let chains = Chains::default();
        (1..6).for_each(|index| chains.insert(place(index), link(index.checked_sub(1), 50)));
        let told = chains.take_pending(place(5), NOW);
        assert_eq!(told.len(), 5);
        chains.set_pending(told.into_iter().skip(2).map(|(place, _)| place));
        let rest = chains.take_pending(place(5), NOW);
        let places: Vec<Place> = rest.into_iter().map(|(place, _)| place).collect();
        assert_eq!(places, [3, 4, 5].map(place));
        assert!(chains.take_pending(place(5), NOW).is_empty());
    }

    #[test]
    fn the_end_of_a_long_prompt_is_decided_on_once() {
        let chains = Chains::default();
        // Ten times as many as there are steps of 10 ms in the time that a stamp stays young.
        let last: u64 = 60_000;
        for index in 0..=last {
            let parent = index.checked_sub(1).map(|parent| place(parent).2);
            chains.plan(place(index), parent, NOW, false);
        }
        assert!(chains.take_pending(place(last), NOW).is_empty());
        let later = NOW + 2 * RENEWED_AFTER_MILLISECONDS;
        assert_eq!(
            chains.take_pending(place(last), later).len(),
            last as usize + 1
        );
    }

    #[test]
    fn what_is_planned_is_older_than_what_is_before_it() {
        let chains = Chains::default();
        chains.insert(place(0), link(None, 0));
        for index in 1..10 {
            chains.plan(
                place(index),
                Some(place(index - 1).2),
                NOW + index as i64,
                true,
            );
        }
        let time = |index| chains.get(&place(index)).unwrap().milliseconds;
        assert!((1..10).all(|index| time(index) < time(index - 1)));
        assert!(time(9) > NOW - 200);
        // The one that was there before is to be told its file.
        assert_eq!(chains.take_pending(place(0), NOW).len(), 1);
        let before = time(5);
        chains.plan(place(5), Some(place(4).2), NOW + 5000, false);
        assert_eq!(time(5), before);
    }

    #[test]
    fn the_number_is_bounded() {
        let chains = Chains::default();
        (0..2 * CHUNKS_MAX as u64).for_each(|index| chains.insert(place(index), link(None, 0)));
        assert!(chains.lock().len() <= CHUNKS_MAX);
    }
}
