//! The file from which an interrupted run goes on.

use std::io::Write;
use std::path::{Path, PathBuf};

use kvrail::store::inspect::ScrubState;

use super::selection::After;
use crate::failure::Failure;

/// The file, and what a run over the same directory and selection has in it.
#[derive(Debug)]
pub(super) struct Resume {
    path: PathBuf,
    directory: String,
    selection: String,
}

impl Resume {
    pub(super) fn new(path: &Path, directory: &Path, selection: String) -> Self {
        Self {
            path: path.to_path_buf(),
            directory: directory.display().to_string(),
            selection,
        }
    }

    /// Reads how far an earlier run came; `None` when there was none or it came to its end.
    pub(super) fn read(&self) -> Result<Option<ScrubState>, Failure> {
        use std::io::Read;
        let failed = |error: &std::io::Error| Failure::io("read", &self.path, error);
        let file = match std::fs::File::open(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|error| failed(&error))?,
        };
        let mut text = Vec::new();
        file.take(ScrubState::BYTES_MAX as u64 + 1)
            .read_to_end(&mut text)
            .map_err(|error| failed(&error))?;
        let hint = "remove the file to begin anew";
        let state = ScrubState::parse(&text).map_err(|error| {
            Failure::new(error.with_path(&self.path).to_string()).with_hint(hint)
        })?;
        if state.directory != self.directory || state.selection != self.selection {
            let message = format!(
                "`{}` is of another run: {} of `{}`",
                self.path.display(),
                state.selection,
                state.directory
            );
            return Err(Failure::new(message).with_hint(hint));
        }
        Ok(Some(state))
    }

    /// Writes how far the run has come; an old state is replaced whole.
    pub(super) fn write(&self, mut state: ScrubState) -> Result<(), Failure> {
        state.directory.clone_from(&self.directory);
        state.selection.clone_from(&self.selection);
        let mut name = self.path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}", std::process::id()));
        let next = self.path.with_file_name(name);
        let written = std::fs::File::create(&next)
            .and_then(|mut file| file.write_all(&state.encode()))
            .and_then(|()| std::fs::rename(&next, &self.path));
        written.map_err(|error| {
            drop(std::fs::remove_file(&next));
            Failure::io("write", &self.path, &error)
        })
    }

    /// Removes the file: the run came to its end.
    pub(super) fn finish(&self) -> Result<(), Failure> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::io("remove", &self.path, &error))
            }
            _ => Ok(()),
        }
    }
}

/// Returns where a state says to go on.
pub(super) fn after(state: &ScrubState) -> Result<After, Failure> {
    Ok(After {
        namespace: state.namespace.clone(),
        place: state.place()?,
    })
}
