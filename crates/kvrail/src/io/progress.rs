//! How far a transfer has come, and what becomes of it: the one rule for all engines.
//!
//! The system may move less than it was asked to. What was moved counts and the rest is asked for
//! again; nothing moved at all ends the transfer with an error.

use super::{IoFile, Operation};
use crate::error::{Error, ErrorKind};

/// A transfer between a buffer and a range of a file, up to what is done of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    operation: Operation,
    offset: u64,
    bytes: usize,
    done: usize,
}

/// What comes after a call of the system.
#[derive(Debug)]
pub(super) enum Step {
    /// All bytes are moved.
    Done,
    /// The rest is to be asked for.
    More,
    /// It has failed.
    Failed(Error),
}

impl Progress {
    /// A transfer of `bytes` bytes, of which nothing is done yet.
    pub(super) fn new(operation: Operation, offset: u64, bytes: usize) -> Self {
        Self {
            operation,
            offset,
            bytes,
            done: 0,
        }
    }

    /// Returns the bytes that are moved.
    pub(super) fn done(&self) -> usize {
        self.done
    }

    /// Returns where in the file the rest begins.
    pub(super) fn rest_offset(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// Takes note of what a call moved: bytes, or the system's error.
    pub(super) fn advance(
        &mut self,
        moved: Result<usize, rustix::io::Errno>,
        file: &IoFile,
    ) -> Step {
        match moved {
            Ok(0) if self.done < self.bytes => Step::Failed(self.stuck().with_path(file.path())),
            Ok(count) => {
                self.done = self.bytes.min(self.done + count);
                match self.done < self.bytes {
                    true => Step::More,
                    false => Step::Done,
                }
            }
            Err(rustix::io::Errno::INTR) => Step::More,
            Err(errno) => Step::Failed(Error::io(self.verb(), file.path(), errno.into())),
        }
    }

    fn verb(&self) -> &'static str {
        match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }

    /// Nothing was moved although something is left: a file that ends early is a damaged one.
    fn stuck(&self) -> Error {
        let (kind, moved) = match self.operation {
            Operation::Read => (ErrorKind::Damaged, "got"),
            Operation::Write => (ErrorKind::Io, "wrote"),
        };
        let Self {
            offset,
            bytes,
            done,
            ..
        } = self;
        let verb = self.verb();
        Error::new(
            kind,
            format!("{verb} at {offset}: expected {bytes} bytes, {moved} {done}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::io::Errno;

    use super::super::OpenMode;
    use super::*;

    fn file(directory: &tempfile::TempDir) -> IoFile {
        let path = directory.path().join("file");
        IoFile::open(&path, OpenMode::CreateNew, false).unwrap()
    }

    proptest! {
        #[test]
        fn any_split_into_calls_moves_every_byte_once(
            bytes in 1_usize..100_000,
            parts in prop::collection::vec((1_usize..40_000, any::<bool>()), 0..200),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let file = file(&directory);
            let mut progress = Progress::new(Operation::Read, 4096, bytes);
            let mut moved = 0;
            for (part, interrupted) in parts {
                if interrupted {
                    let step = progress.advance(Err(Errno::INTR), &file);
                    prop_assert!(matches!(step, Step::More));
                }
                let part = part.min(bytes - moved);
                moved += part;
                let step = progress.advance(Ok(part), &file);
                prop_assert_eq!(progress.done(), moved);
                prop_assert_eq!(progress.rest_offset(), 4096 + moved as u64);
                if moved == bytes {
                    prop_assert!(matches!(step, Step::Done));
                    return Ok(());
                }
                prop_assert!(matches!(step, Step::More));
            }
            let Step::Failed(error) = progress.advance(Ok(0), &file) else {
                return Err(TestCaseError::fail("nothing was moved and that passed"));
            };
            prop_assert_eq!(error.kind(), ErrorKind::Damaged);
            let expected = format!("expected {bytes} bytes, got {moved}");
            prop_assert!(error.to_string().contains(&expected), "{}", error);
        }
    }

    #[test]
    fn an_error_ends_it_with_the_path_and_a_write_of_nothing_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(&directory);
        let mut progress = Progress::new(Operation::Write, 0, 10);
        for (moved, kind) in [(Err(Errno::IO), ErrorKind::Io), (Ok(0), ErrorKind::Io)] {
            let Step::Failed(error) = progress.advance(moved, &file) else {
                panic!("{moved:?} passed");
            };
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains("file"), "{error}");
        }
    }
}
