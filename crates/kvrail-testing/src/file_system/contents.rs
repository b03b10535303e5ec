//! What is in files: opening, reading and writing, with what the script does to the bytes.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::FileExt;

use super::serving::Shared;
use crate::rules::{Effect, Fault};

impl Shared {
    pub(super) fn open(&self, inode: u64, flags: i32) -> io::Result<u64> {
        self.folder.metadata(inode)?;
        let path = self.folder.whole(inode)?;
        Ok(self.folder.keep(self.folder.open_path(&path, flags, 0)?))
    }

    pub(super) fn create(
        &self,
        parent: u64,
        name: &OsStr,
        flags: i32,
        mode: u32,
    ) -> io::Result<(u64, Metadata)> {
        let (_, path) = self.folder.entry(parent, name)?;
        // O_CREAT, which the kernel does not pass on.
        let file = self.folder.open_path(&path, flags | 0o100, mode)?;
        let metadata = file.metadata()?;
        self.folder.remember(parent, name, &metadata);
        Ok((self.folder.keep(file), metadata))
    }

    pub(super) fn read(
        &self,
        handle: u64,
        offset: u64,
        size: usize,
        fault: &Fault,
    ) -> io::Result<Vec<u8>> {
        let file = self.folder.file(handle)?;
        let mut bytes = vec![0; moved(size, fault)];
        let mut filled = 0;
        while filled < bytes.len() {
            let count = file.read_at(&mut bytes[filled..], offset + filled as u64)?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        bytes.truncate(filled);
        if let Some(Effect::Damage(damage)) = fault.effect {
            damage.apply(&mut bytes, fault.choice);
        }
        Ok(bytes)
    }

    /// Writes what the script leaves of `data`; returns how many bytes that were.
    pub(super) fn write(
        &self,
        handle: u64,
        offset: u64,
        data: &mut [u8],
        fault: &Fault,
    ) -> io::Result<usize> {
        if let Some(Effect::Damage(damage)) = fault.effect {
            damage.apply(data, fault.choice);
        }
        let count = moved(data.len(), fault);
        let file = self.folder.file(handle)?;
        file.write_all_at(&data[..count], offset)?;
        Ok(count)
    }
}

/// Returns how many bytes of a transfer are moved.
fn moved(bytes: usize, fault: &Fault) -> usize {
    match fault.effect {
        Some(Effect::Short) if bytes > 1 => bytes / 2,
        _ => bytes,
    }
}
