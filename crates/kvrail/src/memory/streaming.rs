//! A copy that goes past the CPU's caches.
//!
//! A usual store of the CPU first reads the cache line that it writes. A load of KV cache writes
//! megabytes that nobody looks at before they have left the cache again, so a third of what it moves
//! over the memory bus would be for nothing.
#![expect(unsafe_code, reason = "streaming stores are instructions of their own")]

/// Bytes of a copy from which that pays: below, the wait for the writes at its end is noticed.
const STREAMED_BYTES_MIN: usize = 4096;

/// Copies `bytes` bytes, past the caches where they are many and the processor can do that.
///
/// What was written is visible to whoever learns of it from this thread afterwards, as with any
/// other copy.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`]: `source` is valid for reads of so many bytes and
/// `target` for writes, and the two do not overlap.
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= STREAMED_BYTES_MIN {
        // SAFETY: the caller's promise is the same.
        unsafe { streamed(source, target, bytes) };
        return;
    }
    // SAFETY: the caller's promise is the same.
    unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
}

/// A cache line: what is written of it at once goes to memory in one piece.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// # Safety
/// As of [`copy`].
#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "what makes one of these addresses sound makes all of them"
)]
unsafe fn streamed(source: *const u8, target: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const PART_BYTES: usize = size_of::<__m128i>();

    let head = target.align_offset(LINE_BYTES).min(bytes);
    let lines = (bytes - head) / LINE_BYTES;
    let tail = head + lines * LINE_BYTES;
    // SAFETY: `head`, the lines and the rest behind `tail` are parts of the caller's `bytes`, and so
    // is each address below. `target + head` is at the start of a line unless there are no lines,
    // and so aligned as streaming stores ask for. SSE2 belongs to every processor of this kind.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        for line in 0..lines {
            let from = source.add(head + line * LINE_BYTES).cast::<__m128i>();
            let to = target.add(head + line * LINE_BYTES).cast::<__m128i>();
            // All of the line is read before it is written, so that the writes follow each other.
            let parts: [__m128i; LINE_BYTES / PART_BYTES] =
                std::array::from_fn(|part| _mm_loadu_si128(from.add(part)));
            for (part, value) in parts.into_iter().enumerate() {
                _mm_stream_si128(to.add(part), value);
            }
        }
        std::ptr::copy_nonoverlapping(source.add(tail), target.add(tail), bytes - tail);
        // Streaming stores are not ordered with what follows them unless that is asked for.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_arrives_and_no_other_is_touched(
            from in 0_usize..80,
            to in 0_usize..80,
            bytes in prop_oneof![0_usize..300, STREAMED_BYTES_MIN - 70..STREAMED_BYTES_MIN + 300],
        ) {
            let source: Vec<u8> = (0..from + bytes).map(|at| (at * 31 % 251) as u8).collect();
            let mut target = vec![0xee_u8; to + bytes + 80];
            let (read, written) = (&source[from..], &mut target[to..]);
            // SAFETY: both have so many bytes, and the vectors are apart.
            unsafe { copy(read.as_ptr(), written.as_mut_ptr(), bytes) };
            prop_assert!(target[..to].iter().all(|byte| *byte == 0xee));
            prop_assert_eq!(&target[to..to + bytes], &source[from..]);
            prop_assert!(target[to + bytes..].iter().all(|byte| *byte == 0xee));
        }
    }
}
