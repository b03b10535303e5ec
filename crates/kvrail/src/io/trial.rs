//! A file that is written, read back and compared, to see how long that takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Folder, IoEngine, IoFile, IoRequest, OpenMode, Operation};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::StagingRange;

/// Where and how files are written, and until when.
pub(super) struct Trial<'a> {
    pub(super) folder: &'a Folder,
    pub(super) file_name: &'a str,
    pub(super) direct: bool,
    pub(super) deadline: Instant,
    /// Asked before each transfer: who does not need the answer any more ends it that way.
    pub(super) goes_on: &'a dyn Fn() -> bool,
}

/// What one file took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    pub(super) write: Duration,
    pub(super) read: Duration,
}

impl Times {
    pub(super) fn sum(self) -> Duration {
        self.write + self.read
    }
}

impl Trial<'_> {
    /// Writes and reads `bytes` bytes of the buffer, and compares them. Returns the times, and the
    /// buffer. The file is gone afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] when other bytes were read than were written, [`ErrorKind::Closed`]
    /// when it shall not go on, and what else writing and reading says.
    pub(super) fn round_trip(
        &self,
        engine: &dyn IoEngine,
        buffer: StagingRange,
        bytes: usize,
    ) -> Result<(Times, StagingRange)> {
        let result = self.try_round_trip(engine, buffer, bytes);
        drop(self.folder.remove_file(self.file_name));
        result
    }

    fn try_round_trip(
        &self,
        engine: &dyn IoEngine,
        mut buffer: StagingRange,
        bytes: usize,
    ) -> Result<(Times, StagingRange)> {
        let mut image = buffer.split_to(bytes);
        let start = Instant::now();
        image = self.transfer(engine, Operation::Write, OpenMode::CreateNew, image)?;
        let write = start.elapsed();
        // A few bytes of each page, so that what is not read shows.
        poison(image.as_mut_slice());
        let start = Instant::now();
        image = self.transfer(engine, Operation::Read, OpenMode::Read, image)?;
        let read = start.elapsed();
        if !is_filled(image.as_slice()) {
            let message = format!("{}: what was read is not what was written", engine.name());
            let path = self.folder.path().join(self.file_name);
            return Err(Error::new(ErrorKind::Damaged, message).with_path(&path));
        }
        image.rejoin(buffer).map_err(|_| lost(engine))?;
        Ok((Times { write, read }, image))
    }

    /// Moves an image whole, as the store does.
    fn transfer(
        &self,
        engine: &dyn IoEngine,
        operation: Operation,
        mode: OpenMode,
        mut image: StagingRange,
    ) -> Result<StagingRange> {
        if !(self.goes_on)() {
            let message = "given up before the next transfer";
            return Err(Error::new(ErrorKind::Closed, message).with_path(self.folder.path()));
        }
        let file = IoFile::open_in(self.folder, self.file_name, mode, self.direct)?;
        let file = Arc::new(file);
        let mut requests = Vec::new();
        let mut offset = 0;
        while !image.is_empty() {
            let buffer = image.split_to(engine.request_bytes(operation));
            let bytes = buffer.len() as u64;
            requests.push(IoRequest {
                operation,
                file: Arc::clone(&file),
                offset,
                buffer,
            });
            offset += bytes;
        }
        let mut moved: Option<StagingRange> = None;
        for handle in engine.submit_all(requests) {
            let part = handle.wait(self.deadline)?;
            match &mut moved {
                None => moved = Some(part),
                Some(moved) => moved.rejoin(part).map_err(|_| lost(engine))?,
            }
        }
        moved.ok_or_else(|| lost(engine))
    }
}

fn lost(engine: &dyn IoEngine) -> Error {
    let message = format!("{} gave back another buffer", engine.name());
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Marks each page with its number, behind bytes that no device compresses to nothing.
pub(super) fn fill(buffer: &mut [u8]) {
    let mut state = 1_u64;
    for bytes in buffer.chunks_exact_mut(8) {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        bytes.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    mark(buffer, |number| number);
}

fn poison(buffer: &mut [u8]) {
    mark(buffer, |number| !number);
}

fn mark(buffer: &mut [u8], what: impl Fn(u64) -> u64) {
    for (number, page) in buffer.chunks_exact_mut(PAGE_BYTES).enumerate() {
        if let Some(first) = page.first_chunk_mut() {
            *first = what(number as u64).to_le_bytes();
        }
    }
}

fn is_filled(buffer: &[u8]) -> bool {
    let mut pages = buffer.chunks_exact(PAGE_BYTES).enumerate();
    pages.all(|(number, page)| page.first_chunk() == Some(&(number as u64).to_le_bytes()))
}
