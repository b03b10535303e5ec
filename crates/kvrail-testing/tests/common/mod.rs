//! What the tests over the faulty file system share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::path::Path;

use kvrail_testing::FaultMount;
use tempfile::TempDir;

/// Mounts a faulty file system; where that cannot be, says why, and the test is skipped.
pub fn mount(seed: u64) -> Option<(FaultMount, TempDir)> {
    let folder = tempfile::tempdir().unwrap();
    println!("seed {seed}");
    match FaultMount::new(
        Path::new(env!("CARGO_BIN_EXE_fault-fs")),
        folder.path(),
        seed,
    ) {
        // The mount is first, so that it goes before its folder does.
        Ok(mounted) => Some((mounted, folder)),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}
