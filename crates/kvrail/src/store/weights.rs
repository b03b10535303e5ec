//! How large a share of the chunks each path gets.
//!
//! All instances must come to the same weights, or they do not find each other's chunks. So the
//! measured ones are measured once, by whoever first opens several paths, and recorded on the path.
//! A path without a record has a weight that everybody knows.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bandwidth_record::{publish_record, read_record};
use super::directory::TEMPORARY_NAME;
use super::mount::Mount;
use super::notice::{Notices, Topic};
use super::writer::Writer;
use crate::config::{PathSharding, PathWeights, StoreConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Bandwidth, measure_bandwidth, within};

/// The weight of a path that has no record, in megabytes a second: that of a modest SSD, so that
/// the path has a share of the usual size beside paths that were measured.
const DEFAULT_WEIGHT: u64 = 1000;
/// Bytes that a measurement has on a path at a time, at most.
const MEASURED_BYTES_MAX: u64 = 16 << 20;
/// Parts of 1 in which weights from the configuration are counted.
const PARTS: f64 = 1e6;

/// Returns the weights of a store's paths in their order.
pub(super) fn weights(
    config: &StoreConfig,
    mounts: &[Arc<Mount>],
    writer: &Arc<Writer>,
    notices: &Notices,
) -> Vec<u64> {
    let is_alone = mounts.len() <= 1 || config.gds_path_sharding != PathSharding::ByHash;
    match &config.path_weights {
        PathWeights::Listed(list) => list
            .iter()
            .map(|weight| (weight * PARTS).round() as u64)
            .collect(),
        PathWeights::Measured if !is_alone => {
            let limit = Duration::from_secs_f64(config.wait_limit_seconds);
            // One after the other: what a path is found to do must not depend on which others are
            // in this instance's list, for it is recorded for all.
            let one = |mount| weight(mount, writer, notices, limit);
            mounts.iter().map(one).collect()
        }
        _ => vec![1; mounts.len()],
    }
}

/// Returns the weight of one path, which is measured if nothing is recorded.
fn weight(mount: &Arc<Mount>, writer: &Arc<Writer>, notices: &Notices, limit: Duration) -> u64 {
    let (on, writer) = (Arc::clone(mount), Arc::clone(writer));
    let deadline = Instant::now() + limit;
    // On a thread that is left behind when the path hangs: the others are placed all the same.
    let found = within(limit, "reading or measuring its bandwidth", move || {
        find(&on, &writer, deadline)
    });
    let path = mount.root.display();
    match found.and_then(|found| found) {
        Ok(Found::Recorded(bandwidth)) => bandwidth.mb_per_s,
        Ok(Found::Measured(bandwidth)) => {
            let rate = bandwidth.mb_per_s;
            notices.info(Topic::Start, || {
                format!("{path}: {rate} MB/s were measured and recorded, its weight from now on")
            });
            rate
        }
        Ok(Found::Nothing) => DEFAULT_WEIGHT,
        Err(error) => {
            notices.warn(Topic::Start, || warning(&mount.root, &error));
            DEFAULT_WEIGHT
        }
    }
}

fn warning(root: &Path, error: &Error) -> String {
    let path = root.display();
    let cure = match error.kind() {
        ErrorKind::Damaged => ", until the file is removed while no instance runs",
        _ => "",
    };
    format!("{path}: its weight is {DEFAULT_WEIGHT}, as without a record{cure}: {error}")
}

/// What is known of a path's bandwidth.
enum Found {
    Recorded(Bandwidth),
    Measured(Bandwidth),
    /// It is not recorded, and may not be.
    Nothing,
}

fn find(mount: &Mount, writer: &Writer, deadline: Instant) -> Result<Found> {
    let root = match mount.directory.open_root() {
        Ok(root) => root,
        // A path that is only read may not be there yet.
        Err(_) if !mount.report.writable => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    if let Some(recorded) = read_record(&root)? {
        return Ok(Found::Recorded(recorded));
    }
    if !mount.report.writable {
        return Ok(Found::Nothing);
    }
    mount.check_space(MEASURED_BYTES_MAX)?;
    let temporary = mount.directory.open()?.folder(TEMPORARY_NAME)?;
    let name = writer.file_name("bandwidth");
    let goes_on = || Instant::now() < deadline;
    let (engine, direct) = (mount.engine.get(), mount.report.direct);
    let measured = measure_bandwidth(&*engine, &temporary, &name, direct, &goes_on)?;
    let name = writer.file_name("record");
    let recorded = publish_record(&root, &temporary, &name, measured)?;
    Ok(match recorded == measured {
        true => Found::Measured(recorded),
        false => Found::Recorded(recorded),
    })
}
