//! The limit of cuFile: the same files, sizes and threads with nothing around cuFile's own calls.
//!
//! Store: create a temp file, register it, write it whole from registered VRAM, rename. Load: open,
//! register, read it whole. No gather, no hashing, no head, no checks but the byte count. One call
//! moves 16 MiB, or, as a limit of the way in place, one block.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvrail::memory::Gpu;
use kvrail_cuda::{CuFile, CuFileDriver, RegisteredMemory, TRANSFER_BYTES_MAX};
use rustix::fs::OFlags;

use super::super::clients::{self, Sample};
use crate::failure::Failure;

/// cuFile without a store around it.
pub(crate) struct BareCufile {
    driver: CuFileDriver,
    directory: PathBuf,
    direct: bool,
    /// The parts of a file that one call moves each.
    calls: Vec<Range<usize>>,
    /// One per thread, registered once.
    memories: Vec<RegisteredMemory>,
}

/// Cuts a range into parts that one call may move.
pub(crate) fn calls(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(TRANSFER_BYTES_MAX)
        .map(move |start| start..end.min(start + TRANSFER_BYTES_MAX))
}

impl BareCufile {
    /// Opens the driver, which a store in this process must have opened before: that it returns is
    /// known from there. Files are as long as `calls` say, which follow each other.
    pub(crate) fn new(
        candidates: &[PathBuf],
        gpu: &Gpu,
        directory: PathBuf,
        direct: bool,
        calls: Vec<Range<usize>>,
        threads: usize,
    ) -> Result<Self, Failure> {
        let file_bytes = calls.last().map_or(0, |call| call.end);
        std::fs::create_dir(&directory)
            .map_err(|error| Failure::io("create", &directory, &error))?;
        let open = || -> kvrail_cuda::Result<_> {
            let driver = CuFile::load(candidates)?.open_driver(gpu.context())?;
            let memory =
                |_| RegisteredMemory::new(&driver, gpu.context().allocate_at_page(file_bytes)?);
            let memories = (0..threads)
                .map(memory)
                .collect::<kvrail_cuda::Result<_>>()?;
            Ok((driver, memories))
        };
        let (driver, memories) = open().map_err(|error| failed("bare cuFile", &error))?;
        Ok(Self {
            driver,
            directory,
            direct,
            calls,
            memories,
        })
    }

    /// Returns the file of an item.
    pub(crate) fn path(&self, item: u64) -> PathBuf {
        self.directory.join(format!("{item:08x}"))
    }

    /// Writes the files of `items`.
    pub(crate) fn store(&mut self, items: &[u64]) -> Result<Sample, Failure> {
        let (driver, directory, direct) = (&self.driver, &self.directory, self.direct);
        let calls = &self.calls;
        clients::run(&mut self.memories, items, |memory, item| {
            let temporary = directory.join(format!(".{item:08x}.tmp"));
            let target = directory.join(format!("{item:08x}"));
            let file = options(direct)
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)
                .map_err(|error| Failure::io("create", &temporary, &error))?;
            transfer(driver, memory, calls, &file, &temporary, true)?;
            drop(file);
            std::fs::rename(&temporary, &target)
                .map_err(|error| Failure::io("rename", &temporary, &error))
        })
    }

    /// Reads the files of `items`.
    pub(crate) fn load(&mut self, items: &[u64]) -> Result<Sample, Failure> {
        let (driver, directory, direct) = (&self.driver, &self.directory, self.direct);
        let calls = &self.calls;
        clients::run(&mut self.memories, items, |memory, item| {
            let path = directory.join(format!("{item:08x}"));
            let file = options(direct)
                .read(true)
                .open(&path)
                .map_err(|error| Failure::io("open", &path, &error))?;
            transfer(driver, memory, calls, &file, &path, false)
        })
    }
}

/// Writes or reads a whole file.
fn transfer(
    driver: &CuFileDriver,
    memory: &mut RegisteredMemory,
    calls: &[Range<usize>],
    file: &File,
    path: &Path,
    write: bool,
) -> Result<(), Failure> {
    let handle = driver
        .register_file(file.as_fd())
        .map_err(|error| failed(&path.display().to_string(), &error))?;
    for range in calls.iter().cloned() {
        let (start, expected) = (range.start, range.len());
        let moved = match write {
            true => memory.write(&handle, range, start as u64),
            false => memory.read(&handle, range, start as u64),
        };
        let moved = moved.map_err(|error| failed(&path.display().to_string(), &error))?;
        if moved != expected {
            let message = format!("`{}` at {start}: {moved} of {expected}", path.display());
            return Err(Failure::new(format!(
                "bare cuFile moved too little: {message} bytes"
            )));
        }
    }
    Ok(())
}

fn options(direct: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    if direct {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    options
}

fn failed(what: &str, error: &kvrail_cuda::Error) -> Failure {
    Failure::new(format!("{what}: {error}")).with_hint("`kvrail doctor DIR` tells more of cuFile")
}
