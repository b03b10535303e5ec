//! The raw limit: the same files, sizes and threads with nothing around the system calls.
//!
//! Store: create a temp file, write it whole from an aligned buffer, rename. Load: open, read it
//! whole into an aligned buffer. With O_DIRECT where the mount takes it, else through the page
//! cache. No hashing, no gather, no checks but the byte count.
//!
//! One thread moves a file whole, in order. It is what bare system calls reach in that shape, not a
//! bound: kvrail reads parts of one file on several threads, so a ratio above 1 is possible.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvrail::chunk::PAGE_BYTES;
use rustix::fs::OFlags;

use super::clients::{self, Sample};
use super::mix::Mix;
use super::random::Random;
use crate::failure::Failure;

/// The raw side of a benchmark.
pub(crate) struct Raw {
    /// The files go to these in turn.
    directories: Directories,
    file_bytes: usize,
    direct: bool,
    /// One per thread, used again for each file, so that no page fault is timed.
    buffers: Vec<AlignedBuffer>,
}

impl Raw {
    /// Makes the directories, finds out whether O_DIRECT works in the first unless `direct` says whether to
    /// use it, and fills the buffers.
    pub(crate) fn new(
        directories: Vec<PathBuf>,
        file_bytes: usize,
        threads: usize,
        direct: Option<bool>,
    ) -> Result<Self, Failure> {
        for directory in &directories {
            std::fs::create_dir(directory)
                .map_err(|error| Failure::io("create", directory, &error))?;
        }
        let directories = Directories(directories);
        let buffers = (0..threads)
            .map(|thread| AlignedBuffer::new(file_bytes, thread))
            .collect();
        let direct = match direct {
            Some(direct) => direct,
            None => probe_direct(directories.of(0))?,
        };
        Ok(Self {
            directories,
            file_bytes,
            direct,
            buffers,
        })
    }

    /// Returns the bytes of each file.
    pub(crate) fn file_bytes(&self) -> usize {
        self.file_bytes
    }

    /// Returns whether O_DIRECT is used.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Returns the file of an item.
    pub(crate) fn path(&self, item: u64) -> PathBuf {
        self.directories.path(item)
    }

    /// Returns all files that are there.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut files = Vec::new();
        for directory in &self.directories.0 {
            let found: io::Result<Vec<PathBuf>> = std::fs::read_dir(directory)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
            files.extend(found.map_err(|error| Failure::io("list", directory, &error))?);
        }
        Ok(files)
    }

    /// Writes the files of `items`.
    pub(crate) fn store(&mut self, items: &[u64]) -> Result<Sample, Failure> {
        let (directories, direct) = (&self.directories, self.direct);
        clients::run(&mut self.buffers, items, |buffer, item| {
            directories.store(buffer, item, direct)
        })
    }

    /// Reads the files of `items`.
    pub(crate) fn load(&mut self, items: &[u64]) -> Result<Sample, Failure> {
        self.load_by(items, self.direct)
    }

    /// Reads the files of `items` through the page cache.
    pub(crate) fn load_cached(&mut self, items: &[u64]) -> Result<Sample, Failure> {
        self.load_by(items, false)
    }

    fn load_by(&mut self, items: &[u64], direct: bool) -> Result<Sample, Failure> {
        let directories = &self.directories;
        clients::run(&mut self.buffers, items, |buffer, item| {
            directories.load(buffer, item, direct)
        })
    }

    /// Runs `work` for each item with what reads and writes files, on a thread for each buffer.
    pub(crate) fn run(
        &mut self,
        items: &[u64],
        work: impl Fn(&mut Hand<'_>, u64) -> Result<(), Failure> + Sync,
    ) -> Result<Sample, Failure> {
        let (directories, direct) = (&self.directories, self.direct);
        clients::run(&mut self.buffers, items, |buffer, item| {
            let mut hand = Hand {
                directories,
                direct,
                buffer,
            };
            work(&mut hand, item)
        })
    }

    /// Reads and writes at the same time; `cached`: reads come from the page cache.
    pub(crate) fn mix(&mut self, mix: &Mix, cached: bool) -> Result<Sample, Failure> {
        let (directories, direct) = (&self.directories, self.direct);
        mix.run(
            &mut self.buffers,
            |buffer, item| directories.load(buffer, item, direct && !cached),
            |buffer, item| directories.store(buffer, item, direct),
        )
    }
}

/// What reads and writes the files of items on one thread.
pub(crate) struct Hand<'a> {
    directories: &'a Directories,
    direct: bool,
    buffer: &'a mut AlignedBuffer,
}

impl Hand<'_> {
    /// Reads the file of an item.
    pub(crate) fn load(&mut self, item: u64) -> Result<(), Failure> {
        self.directories.load(self.buffer, item, self.direct)
    }

    /// Writes the file of an item.
    pub(crate) fn store(&mut self, item: u64) -> Result<(), Failure> {
        self.directories.store(self.buffer, item, self.direct)
    }
}

/// Where the files are: one directory for each path that is measured.
struct Directories(Vec<PathBuf>);

impl Directories {
    /// Returns the directory of an item.
    fn of(&self, item: u64) -> &Path {
        let count = self.0.len().max(1) as u64;
        let directory = self.0.get((item % count) as usize);
        directory.map_or(Path::new(""), PathBuf::as_path)
    }

    fn path(&self, item: u64) -> PathBuf {
        self.of(item).join(format!("{item:08x}"))
    }

    fn store(&self, buffer: &AlignedBuffer, item: u64, direct: bool) -> Result<(), Failure> {
        let temporary = self.of(item).join(format!(".{item:08x}.tmp"));
        write_file(&temporary, buffer.bytes(), direct)
            .and_then(|()| std::fs::rename(&temporary, self.path(item)))
            .map_err(|error| Failure::io("write", &temporary, &error))
    }

    fn load(&self, buffer: &mut AlignedBuffer, item: u64, direct: bool) -> Result<(), Failure> {
        let path = self.path(item);
        read_file(&path, buffer.bytes_mut(), direct)
            .map_err(|error| Failure::io("read", &path, &error))
    }
}

/// Writes a page with O_DIRECT and reads it back: an open that succeeds proves nothing.
fn probe_direct(directory: &Path) -> Result<bool, Failure> {
    let path = directory.join(".probe");
    let mut page = AlignedBuffer::new(PAGE_BYTES, 0);
    let outcome = write_file(&path, page.bytes(), true)
        .and_then(|()| read_file(&path, page.bytes_mut(), true));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::io("remove", &path, &error))
        }
        _ => Ok(outcome.is_ok()),
    }
}

fn options(direct: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    if direct {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    options
}

fn write_file(path: &Path, bytes: &[u8], direct: bool) -> io::Result<()> {
    let mut file = options(direct)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)
}

fn read_file(path: &Path, target: &mut [u8], direct: bool) -> io::Result<()> {
    options(direct).read(true).open(path)?.read_exact(target)
}

/// Random bytes that start at a page boundary, as O_DIRECT asks for.
struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    fn new(length: usize, seed: usize) -> Self {
        let mut memory = vec![0; length + PAGE_BYTES];
        Random::new(seed as u64).fill(&mut memory);
        let start = memory.as_ptr().align_offset(PAGE_BYTES);
        Self {
            memory,
            start,
            length,
        }
    }

    fn bytes(&self) -> &[u8] {
        self.memory
            .get(self.start..self.start + self.length)
            .unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory
            .get_mut(self.start..self.start + self.length)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::page_cache::drop_from_page_cache;
    use super::*;

    #[test]
    fn what_is_stored_is_read_back_and_nothing_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = 3 * PAGE_BYTES;
        let directories = ["a", "b"].map(|name| directory.path().join(name));
        let mut raw = Raw::new(directories.to_vec(), bytes, 2, None).unwrap();
        raw.store(&[1, 2, 3]).unwrap();
        drop_from_page_cache(&raw.path(2)).unwrap();
        assert_eq!(raw.load(&[3, 2, 1]).unwrap().latencies.len(), 3);
        assert_eq!(raw.load_cached(&[2, 3]).unwrap().latencies.len(), 2);
        let sizes = directories.map(|directory| {
            let found = std::fs::read_dir(directory).unwrap();
            found
                .map(|entry| entry.unwrap().metadata().unwrap().len())
                .collect::<Vec<u64>>()
        });
        assert_eq!(sizes, [vec![bytes as u64], vec![bytes as u64; 2]]);
        let missing = raw.load(&[4]).unwrap_err().to_string();
        assert!(missing.starts_with("error: read: "), "{missing}");
    }
}
