//! What the tests over the faulty file system share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::ops::Deref;
use std::path::Path;

use kvrail_testing::FaultMount;
use tempfile::TempDir;

/// A faulty mount and the folder that holds it, which goes after the mount: through a mounted
/// file system only what is behind it would be removed.
#[derive(Debug)]
pub struct Mounted {
    pub mount: FaultMount,
    pub folder: TempDir,
}

impl Deref for Mounted {
    type Target = FaultMount;

    fn deref(&self) -> &FaultMount {
        &self.mount
    }
}

/// Mounts a faulty file system; where that cannot be, says why, and the test is skipped.
pub fn mount(seed: u64) -> Option<Mounted> {
    let folder = tempfile::tempdir().unwrap();
    println!("seed {seed}");
    match FaultMount::new(
        Path::new(env!("CARGO_BIN_EXE_fault-fs")),
        folder.path(),
        seed,
    ) {
        Ok(mount) => Some(Mounted { mount, folder }),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}
