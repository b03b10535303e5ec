//! The directory that `bench` works in and removes at the end, however it ends.
//!
//! A second process waits for the end of its stdin, which the kernel closes when `bench` is gone,
//! and then removes the directory. That covers Ctrl-C, `kill -9` and a panic with no signal
//! handler; it runs in a process group of its own so that Ctrl-C does not reach it.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Args;

use crate::failure::Failure;
use crate::output::warn;

/// The hidden command that the second process runs.
pub(crate) const CLEANUP_COMMAND: &str = "bench-cleanup";

/// How the name of such a directory starts: what the hidden command refuses to remove otherwise.
const PREFIX: &str = ".kvrail-bench-";

/// How often a removal that failed is tried again, and after which pause: 10 s in all.
const ATTEMPTS: usize = 50;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(200);

/// The arguments of the hidden command.
#[derive(Debug, Args)]
pub(crate) struct CleanupArguments {
    /// The directory to remove
    directory: PathBuf,
}

/// A new directory below a given one, removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    guard: Option<Child>,
}

impl Scratch {
    /// Makes the directory and starts the process that removes it if this one cannot.
    pub(crate) fn new(parent: &Path) -> Result<Self, Failure> {
        let parent = parent.canonicalize().map_err(|error| {
            Failure::io("open", parent, &error).with_hint("give --path a directory that exists")
        })?;
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| Failure::io("create", &path, &error))?;
        let guard = start_guard(&path)
            .inspect_err(|error| warn(&format!("after Ctrl-C files may stay behind: {error}")))
            .ok();
        Ok(Self { path, guard })
    }

    /// Returns the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            warn(&format!("remove `{}`: {error}", self.path.display()));
        }
        if let Some(mut guard) = self.guard.take() {
            // Closing its stdin ends it; it finds nothing left to remove.
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }
}

/// Waits until stdin closes, then removes the directory.
pub(crate) fn clean_up(arguments: &CleanupArguments) -> Result<ExitCode, Failure> {
    let name = arguments
        .directory
        .file_name()
        .map(|name| name.to_string_lossy());
    if !name.is_some_and(|name| name.starts_with(PREFIX)) {
        let path = arguments.directory.display();
        return Err(Failure::new(format!(
            "not a directory of `kvrail bench`: `{path}`"
        )));
    }
    // Whatever ends the wait, an error too, means that nobody uses the directory any more.
    let _ = io::stdin().lock().read_to_end(&mut Vec::new());
    // A fio that `bench` left behind may still make files there; without its folder it soon ends.
    let mut outcome = remove(&arguments.directory);
    for _ in 0..ATTEMPTS {
        if outcome.is_ok() {
            break;
        }
        std::thread::sleep(ATTEMPT_PAUSE);
        outcome = remove(&arguments.directory);
    }
    outcome.map_err(|error| Failure::io("remove", &arguments.directory, &error))?;
    Ok(ExitCode::SUCCESS)
}

fn start_guard(path: &Path) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .arg(CLEANUP_COMMAND)
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
