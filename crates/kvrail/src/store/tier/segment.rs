//! Images of chunks in memory that all processes of a machine share, and which of them stay.
//!
//! The file is `| header | four words for each slot | slots |`. A chunk may lie in any slot of one
//! set, which its tag names. A slot's words are written by who holds its lock, but for the age, which
//! everybody may change: it decides only what goes first. Nothing here is trusted: the tag says
//! where to look, and head and checksums of the image say whether that is the chunk.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::memory::{SharedSlots, SlotRead, SlotWrite, SlotsLayout};
use crate::store::present::Place;

/// Slots of one set: with 16, few sets are full while others are empty, and looking through one is
/// a handful of cache lines.
const WAYS: usize = 16;
/// Words of the header, a page less what nobody needs: the slots' words begin behind it.
pub(super) const HEADER_WORDS: usize = 512;
/// Words of a slot: two of its tag, its age, the second of its last touch.
const SLOT_WORDS: usize = 4;
/// Slots begin at a multiple of this, the size of a huge page.
const ALIGNMENT: u64 = 2 << 20;

/// Ages as in "static re-reference interval prediction" with two bits (Jaleel and others, ISCA
/// 2010): what is new is one step from going, what is hit has three, so that one pass over many
/// chunks drives out its own.
const AGE_HIT: u64 = 0;
const AGE_NEW: u64 = 2;
const AGE_OLD: u64 = 3;

/// A chunk's 128 bits; never zero, which is that of an empty slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag(u64, u64);

impl Tag {
    /// Returns the tag of a chunk of a namespace.
    pub(super) fn new(namespace: &str, (group, part, key): &Place) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&group.to_le_bytes());
        for text in [namespace, part.to_string().as_str()] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(key.as_bytes());
        let mut low = [0; 8];
        let mut high = [0; 8];
        let mut output = hasher.finalize_xof();
        output.fill(&mut low);
        output.fill(&mut high);
        Self(u64::from_le_bytes(low), u64::from_le_bytes(high) | 1)
    }
}

/// How a segment's slots are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrangement {
    pub(super) slot_bytes: usize,
    pub(super) sets: usize,
    pub(super) ways: usize,
}

impl Arrangement {
    /// Arranges `slots` slots, one or more; a few of many may be left out.
    pub(super) fn of(slots: usize, slot_bytes: usize) -> Self {
        let sets = (slots / WAYS).max(1);
        Self {
            slot_bytes,
            sets,
            ways: slots / sets,
        }
    }

    /// Returns the layout of the file; `None` for numbers that no file has.
    pub(super) fn layout(self) -> Option<SlotsLayout> {
        let slots = self.sets.checked_mul(self.ways)?;
        let words = slots.checked_mul(SLOT_WORDS)?.checked_add(HEADER_WORDS)?;
        let slots_offset = u64::try_from(words).ok()?.checked_mul(8)?;
        Some(SlotsLayout {
            words,
            slots_offset: slots_offset.checked_next_multiple_of(ALIGNMENT)?,
            slot_bytes: self.slot_bytes,
            slots,
        })
    }
}

/// The slots of a segment as a cache.
#[derive(Debug)]
pub(super) struct Segment {
    slots: Arc<SharedSlots>,
    sets: usize,
    ways: usize,
}

/// The words of a slot.
struct Entry<'a> {
    tag: (&'a AtomicU64, &'a AtomicU64),
    age: &'a AtomicU64,
    touched: &'a AtomicU64,
}

impl Entry<'_> {
    fn holds(&self, tag: Tag) -> bool {
        self.tag() == tag
    }

    fn tag(&self) -> Tag {
        Tag(
            self.tag.0.load(Ordering::Acquire),
            self.tag.1.load(Ordering::Acquire),
        )
    }

    /// For who holds the slot's lock for itself.
    fn set_tag(&self, tag: Tag) {
        self.tag.0.store(tag.0, Ordering::Release);
        self.tag.1.store(tag.1, Ordering::Release);
    }

    /// Returns the age of what is there; more than any where nothing is.
    fn age(&self) -> u64 {
        match self.tag() {
            EMPTY => AGE_OLD + 1,
            _ => self.age.load(Ordering::Relaxed).min(AGE_OLD),
        }
    }
}

const EMPTY: Tag = Tag(0, 0);

impl Segment {
    /// Takes mapped slots as a cache of an arrangement that is theirs.
    pub(super) fn new(slots: SharedSlots, arrangement: Arrangement) -> Self {
        Self {
            slots: Arc::new(slots),
            sets: arrangement.sets,
            ways: arrangement.ways,
        }
    }

    /// Returns the bytes of memory that the segment takes.
    pub(super) fn bytes(&self) -> u64 {
        self.slots.resident_bytes()
    }

    /// Returns the image of a chunk, if it is there and nobody writes it; it cannot be replaced as
    /// long as it is held.
    pub(super) fn get(&self, tag: Tag) -> Option<SharedImage> {
        for slot in self.ways_of(tag) {
            let Some(entry) = self.entry(slot).filter(|entry| entry.holds(tag)) else {
                continue;
            };
            let Some(read) = self.slots.try_read(slot) else {
                continue;
            };
            // It may have been replaced before it was locked.
            if entry.holds(tag) {
                entry.age.store(AGE_HIT, Ordering::Relaxed);
                return Some(SharedImage {
                    read,
                    slots: Arc::clone(&self.slots),
                    slot,
                });
            }
        }
        None
    }

    /// Keeps the image of a chunk, instead of another one where the set is full. What all slots of
    /// the set are in use for is not kept.
    ///
    /// # Errors
    /// The system's: `StorageFull` where there is no more memory for it.
    pub(super) fn insert(&self, tag: Tag, image: &[u8]) -> io::Result<()> {
        let mut slots: Vec<(u64, usize)> = Vec::with_capacity(self.ways);
        for slot in self.ways_of(tag) {
            let Some(entry) = self.entry(slot) else {
                continue;
            };
            if entry.holds(tag) {
                return Ok(());
            }
            slots.push((entry.age(), slot));
        }
        slots.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
        let free = |(age, slot): &(u64, usize)| {
            let write = self.slots.try_write(*slot)?;
            Some((*age, *slot, write))
        };
        let Some((age, slot, write)) = slots.iter().find_map(free) else {
            return Ok(());
        };
        self.make_older(&slots, AGE_OLD.saturating_sub(age));
        self.replace(slot, write, tag, image)
    }

    /// Writes an image to a locked slot. Who dies over it leaves the slot empty.
    fn replace(&self, slot: usize, mut write: SlotWrite, tag: Tag, image: &[u8]) -> io::Result<()> {
        let Some(entry) = self.entry(slot) else {
            return Ok(());
        };
        entry.set_tag(EMPTY);
        write.fill(image)?;
        entry.age.store(AGE_NEW, Ordering::Relaxed);
        entry.touched.store(now(), Ordering::Relaxed);
        entry.set_tag(tag);
        Ok(())
    }

    /// Makes the chunks of a set older by so much as the one that goes was younger than old.
    fn make_older(&self, slots: &[(u64, usize)], by: u64) {
        if by == 0 {
            return;
        }
        for (age, slot) in slots {
            if let Some(entry) = self.entry(*slot) {
                let older = age.saturating_add(by).min(AGE_OLD);
                entry.age.store(older, Ordering::Relaxed);
            }
        }
    }

    /// Lets the image of a chunk go, unless somebody uses it.
    pub(super) fn remove(&self, tag: Tag) {
        for slot in self.ways_of(tag) {
            if let Some(entry) = self.entry(slot).filter(|entry| entry.holds(tag))
                && let Some(_write) = self.slots.try_write(slot)
                && entry.holds(tag)
            {
                entry.set_tag(EMPTY);
            }
        }
    }

    /// Returns the slots that a chunk may be in.
    fn ways_of(&self, tag: Tag) -> std::ops::Range<usize> {
        let set = (tag.0 % self.sets.max(1) as u64) as usize;
        set * self.ways..(set + 1) * self.ways
    }

    fn entry(&self, slot: usize) -> Option<Entry<'_>> {
        entry(&self.slots, slot)
    }
}

fn entry(slots: &SharedSlots, slot: usize) -> Option<Entry<'_>> {
    let first = HEADER_WORDS + slot * SLOT_WORDS;
    Some(Entry {
        tag: (slots.word(first)?, slots.word(first + 1)?),
        age: slots.word(first + 2)?,
        touched: slots.word(first + 3)?,
    })
}

/// Returns the seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The image of a chunk file in the segment, held for reading.
#[derive(Debug)]
pub(in crate::store) struct SharedImage {
    read: SlotRead,
    slots: Arc<SharedSlots>,
    slot: usize,
}

impl SharedImage {
    /// Returns the first `bytes` bytes.
    pub(in crate::store) fn bytes(&self, bytes: usize) -> &[u8] {
        self.read.bytes(bytes)
    }

    /// Returns whether `pause` seconds passed since the chunk's file was made young by a use of this
    /// image, in any process, and takes that for done.
    pub(super) fn is_touch_due(&self, pause: u64) -> bool {
        let Some(entry) = entry(&self.slots, self.slot) else {
            return false;
        };
        let (last, now) = (entry.touched.load(Ordering::Relaxed), now());
        // A clock that was set back does not keep it young for ever.
        if last <= now && now - last < pause {
            return false;
        }
        let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
        entry
            .touched
            .compare_exchange(last, now, success, failure)
            .is_ok()
    }
}
