//! Slots of equal size in a file that lies in memory, for all processes that open it.
//!
//! A slot is read and written under a lock that the kernel gives back when its holder dies. What is
//! read lies in the mapping itself; what is written goes through the file, so that memory that is
//! not to be had is an error and not the end of the process.
#![expect(unsafe_code, reason = "reads memory that locks keep from changing")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use super::byte_lock::{LockKind, try_lock, unlock};
use super::file_use::reopen;
use super::shared_mapping::{SharedBytes, SharedWords};

/// Where slots lie in their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotsLayout {
    /// Words at the file's start, which all processes access by atomic operations.
    pub words: usize,
    /// Bytes in front of the first slot, a multiple of the page size; the words lie there.
    pub slots_offset: u64,
    /// Bytes of a slot, a multiple of 4096.
    pub slot_bytes: usize,
    /// Number of slots.
    pub slots: usize,
}

impl SlotsLayout {
    /// Returns the bytes of all slots; `None` for more than an address space has.
    pub fn slots_total(&self) -> Option<usize> {
        self.slot_bytes.checked_mul(self.slots)
    }

    /// Returns the bytes of the file; `None` for more than a file can have.
    pub fn file_bytes(&self) -> Option<u64> {
        let slots = u64::try_from(self.slots_total()?).ok()?;
        self.slots_offset.checked_add(slots)
    }
}

/// Slots of a file, mapped. A process keeps each of them locked only while it reads or writes it.
#[derive(Debug)]
pub struct SharedSlots {
    words: SharedWords,
    bytes: SharedBytes,
    file: File,
    layout: SlotsLayout,
    /// Openings of the file, each for one lock at a time.
    handles: Mutex<Vec<File>>,
}

impl SharedSlots {
    /// Maps the slots of a file that is open for reading and writing.
    ///
    /// # Errors
    /// The system's, and `InvalidInput` for a layout that the file is too short for.
    pub fn new(file: File, layout: SlotsLayout) -> io::Result<Self> {
        let words_fit = (layout.words as u64).checked_mul(8) <= Some(layout.slots_offset);
        let file_fits = layout.file_bytes() <= Some(file.metadata()?.len());
        let (Some(bytes), Some(_), true, true) = (
            layout.slots_total(),
            layout.file_bytes(),
            words_fit,
            file_fits,
        ) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(Self {
            words: SharedWords::new(file.as_fd(), layout.words)?,
            bytes: SharedBytes::new(file.as_fd(), layout.slots_offset, bytes)?,
            file,
            layout,
            handles: Mutex::default(),
        })
    }

    /// Returns a word; `None` behind the last one.
    pub fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.words.get(index)
    }

    /// Returns the bytes of memory that the file takes, its words included.
    pub fn resident_bytes(&self) -> u64 {
        self.file
            .metadata()
            .map_or(0, |status| status.blocks() * 512)
    }

    /// Locks a slot for reading; `None` where somebody writes it, or no lock is to be had.
    pub fn try_read(self: &Arc<Self>, slot: usize) -> Option<SlotRead> {
        let lock = SlotLock::take(self, slot, LockKind::Read)?;
        Some(SlotRead { lock })
    }

    /// Locks a slot for writing; `None` where somebody uses it, or no lock is to be had.
    pub fn try_write(self: &Arc<Self>, slot: usize) -> Option<SlotWrite> {
        let lock = SlotLock::take(self, slot, LockKind::Write)?;
        Some(SlotWrite { lock })
    }
}

/// The lock of a slot, given back when dropped.
#[derive(Debug)]
struct SlotLock {
    slots: Arc<SharedSlots>,
    slot: usize,
    handle: Option<File>,
}

impl SlotLock {
    fn take(slots: &Arc<SharedSlots>, slot: usize, kind: LockKind) -> Option<Self> {
        if slot >= slots.layout.slots {
            return None;
        }
        let handle = {
            let mut handles = slots.handles.lock().unwrap_or_else(PoisonError::into_inner);
            handles.pop()
        };
        let handle = match handle {
            Some(handle) => handle,
            None => reopen(&slots.file).ok()?,
        };
        let is_free = try_lock(handle.as_fd(), slot as u64, kind);
        let lock = Self {
            slots: Arc::clone(slots),
            slot,
            handle: Some(handle),
        };
        matches!(is_free, Ok(true)).then_some(lock)
    }

    fn start(&self) -> usize {
        self.slot * self.slots.layout.slot_bytes
    }
}

impl Drop for SlotLock {
    fn drop(&mut self) {
        let Some(handle) = self.handle.take() else {
            return;
        };
        // One that keeps its lock is closed instead.
        if unlock(handle.as_fd(), self.slot as u64).is_ok() {
            let handles = self.slots.handles.lock();
            handles.unwrap_or_else(PoisonError::into_inner).push(handle);
        }
    }
}

/// A slot that nobody writes.
#[derive(Debug)]
pub struct SlotRead {
    lock: SlotLock,
}

impl SlotRead {
    /// Returns the slot's first `bytes` bytes, at most all of them.
    pub fn bytes(&self, bytes: usize) -> &[u8] {
        let slots = &self.lock.slots;
        let bytes = bytes.min(slots.layout.slot_bytes);
        // SAFETY: slots are written by `SlotWrite` alone, in every process, which needs the lock
        // for itself; this one is held as long as the slice is borrowed.
        let found = unsafe { slots.bytes.get(self.lock.start(), bytes) };
        found.unwrap_or_default()
    }
}

/// A slot that nobody else uses.
#[derive(Debug)]
pub struct SlotWrite {
    lock: SlotLock,
}

impl SlotWrite {
    /// Writes the slot's first bytes.
    ///
    /// # Errors
    /// `InvalidInput` for more than a slot has; the system's, `StorageFull` where there is no more
    /// memory for the file: what the slot holds then is nobody's.
    pub fn fill(&mut self, bytes: &[u8]) -> io::Result<()> {
        let slots = &self.lock.slots;
        if bytes.len() > slots.layout.slot_bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = slots.layout.slots_offset + self.lock.start() as u64;
        slots.file.write_all_at(bytes, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    const LAYOUT: SlotsLayout = SlotsLayout {
        words: 16,
        slots_offset: 4096,
        slot_bytes: 8192,
        slots: 3,
    };

    fn file(bytes: u64) -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slots");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .unwrap();
        file.set_len(bytes).unwrap();
        (folder, file)
    }

    #[test]
    fn what_one_opening_writes_the_other_reads() {
        let (folder, file) = file(LAYOUT.file_bytes().unwrap());
        let again = File::options()
            .read(true)
            .write(true)
            .open(folder.path().join("slots"))
            .unwrap();
        let first = Arc::new(SharedSlots::new(file, LAYOUT).unwrap());
        let second = Arc::new(SharedSlots::new(again, LAYOUT).unwrap());
        first.word(15).unwrap().store(9, Ordering::Relaxed);
        assert_eq!(second.word(15).unwrap().load(Ordering::Relaxed), 9);
        assert!(first.word(16).is_none());

        let mut write = first.try_write(1).unwrap();
        assert!(second.try_read(1).is_none());
        assert!(second.try_write(1).is_none());
        assert!(second.try_write(2).is_some());
        write.fill(&[7; 8192]).unwrap();
        assert!(write.fill(&[7; 8193]).is_err());
        drop(write);
        let read = second.try_read(1).unwrap();
        assert_eq!(read.bytes(usize::MAX), [7; 8192]);
        assert!(
            first.try_read(1).is_some(),
            "readers do not shut readers out"
        );
        assert!(first.try_write(1).is_none());
        drop(read);
        assert!(first.try_write(1).is_some());
        assert!(first.try_write(3).is_none());
        assert!(first.resident_bytes() > 0);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let (_folder, file) = file(LAYOUT.file_bytes().unwrap() - 1);
        assert!(SharedSlots::new(file, LAYOUT).is_err());
        let too_many_words = SlotsLayout {
            words: 513,
            ..LAYOUT
        };
        let (_folder, file) = self::file(LAYOUT.file_bytes().unwrap());
        assert!(SharedSlots::new(file, too_many_words).is_err());
        let endless = SlotsLayout {
            slots: usize::MAX,
            ..LAYOUT
        };
        let (_folder, file) = self::file(1 << 20);
        assert!(SharedSlots::new(file, endless).is_err());
    }
}
