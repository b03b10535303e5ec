//! The model checker, for half a minute; `make soak` runs it for an hour.
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::path::PathBuf;
use std::time::Duration;

use kvrail_testing::fresh_seed;
use kvrail_testing::soak::driver::{Plan, run};

#[test]
fn what_loads_is_what_was_stored_and_what_is_there_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan {
        duration: Duration::from_secs(25),
        seed: fresh_seed(),
        processes: 5,
        folder: folder.path().to_path_buf(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_soak")),
        fault_fs: PathBuf::from(env!("CARGO_BIN_EXE_fault-fs")),
    };
    let report = run(plan.clone());
    println!("{}", report.text(&plan));
    assert!(report.is_good(), "{}", report.text(&plan));
    if report.without_faults.is_none() {
        assert!(
            report.faults > 0 && report.kills > 0,
            "{}",
            report.text(&plan)
        );
    }
}
