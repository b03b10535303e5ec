//! The model checker, for a minute; `make soak` runs it for an hour.
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::path::PathBuf;
use std::time::Duration;

use kvrail_testing::fresh_seed;
use kvrail_testing::soak::{Plan, run};

#[test]
fn what_loads_was_stored_what_is_there_is_found_and_there_is_never_too_much() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan {
        duration: Duration::from_secs(60),
        seed: fresh_seed(),
        processes: 5,
        folder: folder.path().to_path_buf(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_soak")),
        fault_fs: PathBuf::from(env!("CARGO_BIN_EXE_fault-fs")),
    };
    let report = run(plan.clone());
    let text = report.text(&plan);
    println!("{text}");
    assert!(report.is_good(), "{text}");
    // A run in which nothing happened shows nothing.
    assert!(report.evictions() > 0 && report.looks > 0, "{text}");
    assert!(report.kills > 0 && report.janitors_killed > 0, "{text}");
    assert!(report.survived > 0, "{text}");
    if report.without_faults.is_none() {
        assert!(report.faults > 0, "{text}");
    }
}
