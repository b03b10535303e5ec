//! Why a command could not do its work: one line for the user, and what to do about it.

use std::fmt;
use std::io;

use kvrail::ErrorKind;

/// The exit code of a run that found damaged chunks (or bytes that differ, in `bench`).
pub(crate) const EXIT_DAMAGED: u8 = 1;
/// The exit code of a run that could not do its work; clap uses the same for wrong usage.
pub(crate) const EXIT_FAILED: u8 = 2;

/// An error as the user sees it: `error: <message>`, then `hint: <hint>` where there is one.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    exit_code: u8,
    /// Whoever read our output is gone: nothing is left to say, and nobody to say it to.
    silent: bool,
}

impl Failure {
    /// Makes a failure with exit code [`EXIT_FAILED`] and no hint.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            exit_code: EXIT_FAILED,
            silent: false,
        }
    }

    /// Makes the failure of an operation of the system on a path.
    pub(crate) fn io(operation: &str, path: &std::path::Path, error: &io::Error) -> Self {
        let failure = Self::new(format!("{operation}: `{}`: {error}", path.display()));
        match error.kind() {
            io::ErrorKind::PermissionDenied => failure.with_hint("check who owns the directory"),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                failure.with_hint("free space there, or ask for fewer --chunks")
            }
            _ => failure,
        }
    }

    /// Adds what the user can do.
    #[must_use]
    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Marks the failure as bytes that are not what they should be.
    #[must_use]
    pub(crate) fn damaged(mut self) -> Self {
        self.exit_code = EXIT_DAMAGED;
        self
    }

    /// Returns whether the reader of our output went away, which is no error of ours.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    /// Returns the exit code of the process.
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line, whatever a cause put into its text.
        write!(out, "error: {}", self.message.replace('\n', " "))?;
        if let Some(hint) = &self.hint {
            write!(out, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl From<kvrail::Error> for Failure {
    fn from(error: kvrail::Error) -> Self {
        let hint = match error.kind() {
            ErrorKind::NoSpace => Some("free space there, or ask for fewer --chunks"),
            ErrorKind::TimedOut => Some("the file system did not answer; is its server up?"),
            ErrorKind::Mismatch => Some("move the directory away: its name and manifest disagree"),
            _ => match error.os_error().map(io::Error::kind) {
                Some(io::ErrorKind::PermissionDenied) => Some("check who owns the directory"),
                _ => None,
            },
        };
        let failure = Self::new(error.to_string());
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

/// A failure to print: the only bare I/O errors of this program are those of its own output.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let silent = error.kind() == io::ErrorKind::BrokenPipe;
        Self {
            silent,
            ..Self::new(format!("write the output: {error}"))
        }
    }
}
