//! The bounded pool of staging buffers between KV cache and files.
#![expect(
    unsafe_code,
    reason = "hands out disjoint parts of host memory as slices"
)]

use std::time::{Duration, Instant};

use kvrail_cuda::DevicePointer;

use super::arena::{Arena, DeviceArena, HostArena};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Condvar, Mutex, PoisonError};

/// A fixed number of equal slots in one arena, allocated once.
///
/// Loads wait for a slot, for a bounded time; stores take one only if enough are left for loads
/// (see [`StagingPool::try_take`]), so a burst of stores never starves a load.
#[derive(Debug)]
pub struct StagingPool<A: Arena = HostArena> {
    shared: Arc<Shared<A>>,
}

impl<A: Arena> Clone for StagingPool<A> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

#[derive(Debug)]
struct Shared<A> {
    arena: A,
    slot_bytes: usize,
    slot_count: usize,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

/// A slot on loan; it goes back when the last range over it is dropped.
#[derive(Debug)]
struct Lease<A> {
    shared: Arc<Shared<A>>,
    slot: usize,
}

impl<A> Drop for Lease<A> {
    fn drop(&mut self) {
        let mut free = self
            .shared
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.push(self.slot);
        self.shared.freed.notify_one();
    }
}

impl StagingPool {
    /// Makes a pool of as many slots of `slot_bytes` as fit in `pool_bytes` of host memory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when not even one fits, `slot_bytes` is no multiple of
    /// [`PAGE_BYTES`], or the system has no such memory.
    pub fn new(pool_bytes: usize, slot_bytes: usize) -> Result<Self> {
        let slot_count = slots(pool_bytes, slot_bytes)?;
        Self::over(HostArena::new(slot_count * slot_bytes)?, slot_bytes)
    }
}

impl<A: Arena> StagingPool<A> {
    /// Makes a pool of as many slots of `slot_bytes` as fit in `arena`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when not even one fits, or `slot_bytes` is no multiple of
    /// [`PAGE_BYTES`].
    pub fn over(arena: A, slot_bytes: usize) -> Result<Self> {
        let slot_count = slots(arena.bytes(), slot_bytes)?;
        let shared = Shared {
            arena,
            slot_bytes,
            slot_count,
            free: Mutex::new((0..slot_count).rev().collect()),
            freed: Condvar::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Returns the memory that the slots are cut from.
    pub fn arena(&self) -> &A {
        &self.shared.arena
    }

    /// Returns the number of slots.
    pub fn slot_count(&self) -> usize {
        self.shared.slot_count
    }

    /// Returns the slots that nobody holds.
    pub fn free_count(&self) -> usize {
        self.shared
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Takes a slot at once if more than `reserve` are free, else returns `None`.
    pub fn try_take(&self, reserve: usize) -> Option<StagingRange<A>> {
        let mut free = self
            .shared
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if free.len() <= reserve {
            return None;
        }
        free.pop().map(|slot| self.range(slot))
    }

    /// Takes a slot, waiting for one until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when none came free in time.
    pub fn take(&self, deadline: Instant) -> Result<StagingRange<A>> {
        self.take_beyond(0, deadline).ok_or_else(|| {
            let message = format!("none of {} staging buffers came free", self.slot_count());
            Error::new(ErrorKind::TimedOut, message)
        })
    }

    /// Takes a slot when more than `reserve` are free, waiting for that until `deadline`.
    pub fn take_beyond(&self, reserve: usize, deadline: Instant) -> Option<StagingRange<A>> {
        let mut free = self
            .shared
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if free.len() > reserve
                && let Some(slot) = free.pop()
            {
                return Some(self.range(slot));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return None;
            }
            let waited = self.shared.freed.wait_timeout(free, left);
            (free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn range(&self, slot: usize) -> StagingRange<A> {
        let bytes = self.shared.slot_bytes;
        StagingRange {
            offset: slot * bytes,
            bytes,
            lease: Arc::new(Lease {
                shared: Arc::clone(&self.shared),
                slot,
            }),
        }
    }
}

/// Returns how many slots fit.
fn slots(bytes: usize, slot_bytes: usize) -> Result<usize> {
    let count = bytes.checked_div(slot_bytes).unwrap_or(0);
    if count > 0 && slot_bytes.is_multiple_of(PAGE_BYTES) {
        return Ok(count);
    }
    let message = format!("{bytes} bytes of staging for slots of {slot_bytes}");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

/// A part of a staging slot that belongs to its holder alone.
///
/// It can be split into smaller ones, like a `BytesMut`; each can be handed to an I/O engine of
/// its own accord. The memory is page-aligned at the slot's start. Host memory is always
/// initialised and can be read as a slice; of a GPU's memory there is only the address.
#[derive(Debug)]
pub struct StagingRange<A: Arena = HostArena> {
    /// Bytes from the arena's start. A range never leaves its slot.
    offset: usize,
    bytes: usize,
    lease: Arc<Lease<A>>,
}

impl<A: Arena> StagingRange<A> {
    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Returns whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Splits off the first `bytes` bytes (at most all of them) and keeps the rest.
    #[must_use]
    pub fn split_to(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        let head = Self {
            offset: self.offset,
            bytes,
            lease: Arc::clone(&self.lease),
        };
        self.offset += bytes;
        self.bytes -= bytes;
        head
    }

    /// Puts a range back together with the one that follows it in memory.
    ///
    /// Gives `next` back when it does not follow this range in the same slot.
    ///
    /// # Errors
    /// The range that does not fit, unchanged.
    pub fn rejoin(&mut self, next: Self) -> Result<(), Self> {
        if self.offset + self.bytes != next.offset || !Arc::ptr_eq(&self.lease, &next.lease) {
            return Err(next);
        }
        self.bytes += next.bytes;
        Ok(())
    }

    /// Returns the arena that the range is a part of.
    pub fn arena(&self) -> &A {
        &self.lease.shared.arena
    }

    /// Returns the bytes between the arena's start and the range.
    pub fn arena_offset(&self) -> usize {
        self.offset
    }
}

impl StagingRange<HostArena> {
    /// Returns the address as GPUs know it, `None` where the memory is not pinned.
    pub fn device_address(&self) -> Option<DevicePointer> {
        Some(self.arena().device_address()? + self.offset as u64)
    }

    /// Returns the bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: offset and length were cut from the arena's own size.
        let start = unsafe { self.arena().address().add(self.offset) };
        // SAFETY: the range is inside a live mapping (the lease keeps it), initialised since the
        // kernel zeroed it, and nobody else holds these bytes.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.bytes) }
    }

    /// Returns the bytes for writing.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: offset and length were cut from the arena's own size.
        let start = unsafe { self.arena().address().add(self.offset) };
        // SAFETY: as in `as_slice`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.bytes) }
    }
}

impl StagingRange<DeviceArena> {
    /// Returns the address of the first byte, as the GPU knows it.
    pub fn address(&self) -> DevicePointer {
        self.arena().address() + self.offset as u64
    }

    /// Returns a second hold of the same bytes, for readers only.
    ///
    /// A write to a file that hangs keeps its range for ever; the bytes can still be read by
    /// others, and the slot goes back when both holds are gone.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            offset: self.offset,
            bytes: self.bytes,
            lease: Arc::clone(&self.lease),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn slots_are_bounded_aligned_and_come_back() {
        let pool = StagingPool::new(3 * 8192 + 100, 8192).unwrap();
        assert_eq!(pool.slot_count(), 3);
        let first = pool.take(soon()).unwrap();
        assert_eq!(first.as_slice().as_ptr() as usize % PAGE_BYTES, 0);
        let _second = pool.try_take(1).unwrap();
        assert!(pool.try_take(1).is_none(), "one slot is kept for loads");
        let _third = pool.take(soon()).unwrap();
        assert_eq!(pool.take(soon()).unwrap_err().kind(), ErrorKind::TimedOut);
        drop(first);
        assert_eq!(pool.free_count(), 1);
    }

    #[test]
    fn a_slot_comes_back_only_with_its_last_part() {
        let pool = StagingPool::new(8192, 8192).unwrap();
        let mut rest = pool.take(soon()).unwrap();
        let mut head = rest.split_to(4096);
        head.as_mut_slice().fill(1);
        rest.as_mut_slice().fill(2);
        assert!(head.as_slice().iter().all(|byte| *byte == 1));
        drop(rest);
        assert_eq!(pool.free_count(), 0);
        drop(head);
        assert_eq!(pool.free_count(), 1);
    }

    #[test]
    fn parts_rejoin_in_order_only() {
        let pool = StagingPool::new(8192, 8192).unwrap();
        let mut rest = pool.take(soon()).unwrap();
        let mut head = rest.split_to(4096);
        head = rest.rejoin(head).unwrap_err();
        head.rejoin(rest).unwrap();
        assert_eq!(head.len(), 8192);
    }

    #[test]
    fn a_pool_smaller_than_one_slot_is_refused() {
        assert!(StagingPool::new(8191, 8192).is_err());
        assert!(StagingPool::new(8192, 1000).is_err());
        assert!(StagingPool::new(8192, 0).is_err());
    }

    #[test]
    fn a_waiting_thread_gets_the_slot_that_is_dropped() {
        let pool = StagingPool::new(4096, 4096).unwrap();
        let held = pool.take(soon()).unwrap();
        std::thread::scope(|scope| {
            let waiting =
                scope.spawn(|| pool.take(Instant::now() + Duration::from_secs(10)).is_ok());
            drop(held);
            assert!(waiting.join().unwrap());
        });
    }
}
