//! Files in the page cache, and out of it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::path::Path;

use rustix::io::ReadWriteFlags;

use crate::failure::Failure;

/// How much is asked for at a time.
const STEP_BYTES: usize = 1 << 20;

/// Writes back and drops a file's pages from the page cache, so that a load is one from disk. The
/// kernel takes it as advice, and keeps pages that somebody uses at that moment.
pub(crate) fn drop_from_page_cache(path: &Path) -> Result<(), Failure> {
    let file = File::open(path).map_err(|error| Failure::io("open", path, &error))?;
    file.sync_data()
        .map_err(|error| Failure::io("sync", path, &error))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
        .map_err(|error| Failure::io("drop from the page cache", path, &error.into()))
}

/// Reads a file through the page cache, which leaves it there.
pub(crate) fn read_through(path: &Path) -> Result<(), Failure> {
    File::open(path)
        .and_then(|mut file| io::copy(&mut file, &mut io::sink()))
        .map(drop)
        .map_err(|error| Failure::io("read", path, &error))
}

/// Returns whether all pages of a file are in the page cache, as far as the file system tells.
pub(crate) fn is_resident(path: &Path) -> Result<bool, Failure> {
    let file = File::open(path).map_err(|error| Failure::io("open", path, &error))?;
    let bytes = file
        .metadata()
        .map_err(|error| Failure::io("look at", path, &error))?
        .len();
    let mut buffer = vec![0; STEP_BYTES];
    for offset in (0..bytes).step_by(STEP_BYTES) {
        let wanted = (bytes - offset).min(STEP_BYTES as u64) as usize;
        let target = &mut [IoSliceMut::new(&mut buffer)];
        match rustix::io::preadv2(&file, target, offset, ReadWriteFlags::NOWAIT) {
            // A read that does not wait ends at the first page that is not there.
            Ok(found) if found < wanted => return Ok(false),
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            // A file system without reads that do not wait, such as tmpfs: nothing to find out.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return Ok(true),
            Err(error) => return Err(Failure::io("read", path, &error.into())),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_file_that_was_dropped_is_out_and_one_that_was_read_is_in() {
        // Beside the program rather than in /tmp, which is memory itself on many machines.
        let program = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, vec![7; 3 * STEP_BYTES / 2]).unwrap();
        let kind = kvrail::io::file_system_name(directory.path()).unwrap();
        if ["tmpfs", "ramfs"].contains(&kind.as_str()) {
            eprintln!("skipped: the programs of tests lie in memory ({kind})");
            return;
        }
        // Advice: the kernel keeps what is in use at that moment, so it may take another time.
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            drop_from_page_cache(&path).unwrap();
            if !is_resident(&path).unwrap() {
                break;
            }
            assert!(Instant::now() < end, "the file stays in the page cache");
            std::thread::sleep(Duration::from_millis(10));
        }
        read_through(&path).unwrap();
        assert!(is_resident(&path).unwrap());
    }
}
