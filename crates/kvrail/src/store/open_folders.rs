//! The directories of a namespace that a lookup has opened, shared by the threads that work on it.
//!
//! Opening one is two or three file operations: nothing on a local file system, as many round trips
//! on a remote one, and a lookup there has dozens of threads.

use super::mount::Mount;
use super::publish::is_missing;
use crate::error::Result;
use crate::io::Folder;
use crate::sync::{Arc, Mutex, PoisonError};

/// An open directory; `None` is one that is not there.
type Opened = Option<Arc<Folder>>;

/// By the mount's index; they are few, and are closed when the lookup ends.
#[derive(Debug, Default)]
pub(super) struct OpenFolders(Mutex<Vec<(usize, Opened)>>);

/// What one thread knows of them: it asks the others only for what it has not seen.
#[derive(Debug, Default)]
pub(super) struct SeenFolders(Vec<(usize, Opened)>);

impl SeenFolders {
    /// Returns the directory on the mount with this index, which is opened unless somebody has.
    ///
    /// Nobody waits for another thread to open it: one may hang.
    pub(super) fn get(
        &mut self,
        shared: &OpenFolders,
        index: usize,
        mount: &Mount,
    ) -> Result<Opened> {
        if let Some((_, opened)) = self.0.iter().find(|(seen, _)| *seen == index) {
            return Ok(opened.clone());
        }
        let known = {
            let opened = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
            let found = opened.iter().find(|(seen, _)| *seen == index);
            found.map(|(_, opened)| opened.clone())
        };
        let opened = match known {
            Some(opened) => opened,
            None => {
                let opened = match mount.directory.open() {
                    Ok(folder) => Some(Arc::new(folder)),
                    Err(error) if is_missing(&error) => None,
                    Err(error) => return Err(error),
                };
                let mut all = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                all.push((index, opened.clone()));
                opened
            }
        };
        self.0.push((index, opened.clone()));
        Ok(opened)
    }
}
