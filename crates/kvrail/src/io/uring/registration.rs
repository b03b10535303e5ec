//! Staging memory that the kernel keeps at hand, so that no request has to look its pages up.

use crate::memory::{Arena, HostArena, StagingRange};

/// Bytes of one registered buffer: the kernel's limit is 1 GiB.
const PIECE_BYTES: usize = 1 << 30;

/// An arena as it is registered with a ring: in pieces, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registration {
    /// Which arena: an address may belong to another one later.
    arena: u64,
    /// Where it begins, as a number: nothing is read or written through it here.
    address: usize,
    bytes: usize,
}

impl Registration {
    /// Describes an arena, which must be there while a ring registers it.
    pub(super) fn of(arena: &HostArena) -> Self {
        Self {
            arena: arena.id(),
            address: arena.address().as_ptr().expose_provenance(),
            bytes: arena.bytes(),
        }
    }

    /// Returns the length in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the pieces to register, in the order of their numbers.
    pub(super) fn pieces(&self) -> Vec<libc::iovec> {
        (0..self.bytes)
            .step_by(PIECE_BYTES)
            .map(|start| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(self.address + start),
                iov_len: PIECE_BYTES.min(self.bytes - start),
            })
            .collect()
    }

    /// Returns the number of the piece that holds a range whole, if one does.
    pub(super) fn index_of(&self, range: &StagingRange) -> Option<u16> {
        if range.arena().id() != self.arena || range.is_empty() {
            return None;
        }
        let first = range.arena_offset() / PIECE_BYTES;
        let last = (range.arena_offset() + range.len() - 1) / PIECE_BYTES;
        (first == last).then(|| u16::try_from(first).ok())?
    }
}
