//! What must hold in the end, when all processes are gone and nothing fails any more.

use std::time::{Duration, Instant};

use kvrail::store::capacity::{Janitor, JanitorSettings, JanitorTiming, usage};

use super::CHUNKS;
use super::driver::Driver;
use super::outside::Look;
use super::worker::{Worker, config, unlimited};

/// Time for a janitor that does not wait between slices to do all there is to do.
const JANITOR_LIMIT: Duration = Duration::from_secs(60);
/// Passes after which nothing is left to find.
const PASSES: u64 = 3;
/// Chunks that a quarantine keeps.
const QUARANTINE_MAX: usize = 100;

/// Looks whether all is as it must be.
pub(super) fn check(driver: &mut Driver) {
    let look = driver.outside.look();
    // Temp files of processes that are gone are looked for below.
    driver.weigh(Look {
        temporary: 0,
        ..look
    });
    clean(driver);
    driver.audit();
    read(driver);
    write(driver);
    find_temporary(driver);
}

/// Lets a last janitor work; nothing of those before it may be left.
fn clean(driver: &mut Driver) {
    let root = driver.outside.root().to_path_buf();
    let settings = JanitorSettings {
        timing: JanitorTiming {
            tick: Duration::from_millis(20),
            pass: Duration::from_millis(1),
            ..JanitorTiming::default()
        },
        ..JanitorSettings::new(&config(&root))
    };
    let mut janitor = Janitor::open(&root, settings).unwrap();
    if !janitor.tick().unwrap().is_janitor {
        let late = "the lease of processes that are gone is not taken over at once";
        driver.report.wrong.push(late.into());
    }
    let start = Instant::now();
    let mut passes = 0;
    loop {
        let tick = janitor.tick().unwrap();
        passes += tick.passes;
        if passes >= PASSES && !tick.busy {
            break;
        }
        if start.elapsed() > JANITOR_LIMIT {
            driver
                .report
                .wrong
                .push("the last janitor does not come to an end".into());
            break;
        }
    }
    let found = driver.outside.look().chunks;
    let said = usage(&root).unwrap();
    let off = said.bytes.map_or(u64::MAX, |said| said.abs_diff(found));
    driver.report.left = (found, off);
    if off > found / 100 {
        let wrong = format!("{found} bytes are there, the account says {said:?}");
        driver.report.wrong.push(wrong);
    }
    if said.claimed_ahead_bytes > 0 {
        driver.report.leaked.push(format!("claims: {said:?}"));
    }
    let records = driver.outside.names(".kvrail/account");
    if records.len() != 1 {
        driver
            .report
            .leaked
            .push(format!("records of the dead: {records:?}"));
    }
    let state = driver.outside.names(".kvrail");
    if state.len() != 2 {
        driver.report.leaked.push(format!("leases: {state:?}"));
    }
    janitor.close();
    if usage(&root).unwrap().stores > 0 {
        driver.report.leaked.push("a record is open".into());
    }
    find_temporary(driver);
    let quarantined = driver.outside.quarantined();
    // Each process that sets one aside at the same moment adds its own.
    if quarantined > QUARANTINE_MAX + driver.plan.processes {
        let leaked = format!("{quarantined} files in quarantine");
        driver.report.leaked.push(leaked);
    }
}

fn find_temporary(driver: &mut Driver) {
    let temporary = driver.outside.namespace().join("tmp");
    let entries = std::fs::read_dir(temporary).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.path().display().to_string());
    driver.report.leaked.extend(names);
}

/// Opens the store anew: what is there is found, and is what was stored.
fn read(driver: &mut Driver) {
    let store = driver.store();
    let worker = Worker::open(&store, &unlimited(&store)).unwrap();
    for index in 0..CHUNKS {
        if !driver.outside.chunk_path(index).exists() {
            if worker.lookup(index, 1) > 0 {
                let ghost = format!("chunk {index} is found, and has no file");
                driver.report.wrong.push(ghost);
            }
            continue;
        }
        let must_load = driver.model.must_load(index);
        if must_load && worker.lookup(index, 1) != 1 {
            driver.report.wrong.push(format!("chunk {index} is lost"));
        }
        match worker.load(index) {
            "loaded" => driver.report.survived += 1,
            "wrong" => {
                let wrong = format!("chunk {index}: other bytes in the end");
                driver.report.wrong.push(wrong);
            }
            answer if must_load => {
                let wrong = format!("chunk {index}: {answer} in the end");
                driver.report.wrong.push(wrong);
            }
            _ => {}
        }
    }
}

/// Whatever was there, every chunk can be stored, and is found then.
fn write(driver: &mut Driver) {
    let root = driver.outside.root().to_path_buf();
    let worker = Worker::open(&root, &unlimited(&root)).unwrap();
    for index in 0..CHUNKS {
        worker.store(index);
        if worker.load(index) != "loaded" {
            let wrong = format!("chunk {index} cannot be stored again");
            driver.report.wrong.push(wrong);
        }
    }
}
