//! cuFile on a directory: whether it may be tried, and what came of it.

use std::path::Path;
use std::time::Duration;

use kvrail_cuda::probe::{Request, Timing, try_files};
use kvrail_cuda::system::{SystemView, mount_guards};
use kvrail_cuda::{DriverSettings, LibraryPaths};
use serde::Serialize;

use super::machine::{Machine, RefusalReport};
use super::measure::Measurement;
use super::scratch_file::ScratchFile;
use crate::cufile_probe;

/// How cuFile fares on a directory.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CufileOutcome {
    /// Whether bytes were moved by cuFile and came back right.
    pub(super) works: bool,
    /// In words: what was tried, or why nothing was.
    pub(super) reason: String,
    /// What of the directory's mount keeps cuFile away, whatever the machine.
    pub(super) refusal: Option<RefusalReport>,
    /// How fast it was, one call at a time; shown among the other measurements.
    #[serde(skip)]
    pub(super) measurement: Option<Measurement>,
}

/// Tries cuFile on a directory, an absolute path without symbolic links, where nothing speaks
/// against it; `bytes` are written and read.
///
/// What the mount's guards say is reported on a machine without a GPU, too: it would come next.
pub(super) fn examine(
    view: &SystemView,
    machine: &Machine,
    real: &Path,
    bytes: u64,
    limit: Duration,
) -> CufileOutcome {
    let refusal = mount_guards(view, real).err().map(RefusalReport::from);
    let system = &machine.system;
    let machine_reason = || {
        let guard = system.refusal.as_ref().map(|refusal| &refusal.reason);
        guard.or(system.error.as_ref())
    };
    let obstacle = if machine.libcuda.library().is_none() {
        Some("no GPU".to_owned())
    } else if machine.libcufile.library().is_none() {
        Some("no libcufile".to_owned())
    } else {
        let mount_reason = || refusal.as_ref().map(|refusal| &refusal.reason);
        machine_reason().or_else(mount_reason).cloned()
    };
    let tried = match (obstacle, machine.libcufile.library()) {
        (None, Some(library)) => {
            let settings = DriverSettings::for_machine(view, false);
            try_in_child(&library.path, settings, real, bytes, limit)
        }
        (obstacle, _) => Err(format!("not tried: {}", obstacle.unwrap_or_default())),
    };
    let (measurement, reason) = match tried {
        Ok(timing) => {
            let found = Measurement::of_cufile(bytes, timing);
            let reason = "a process of its own wrote, read and compared".to_owned();
            (Some(found), reason)
        }
        Err(reason) => (None, reason),
    };
    CufileOutcome {
        works: measurement.is_some(),
        reason,
        refusal,
        measurement,
    }
}

/// Opens cuFile's driver, writes, reads and compares, in a process of its own that is killed at a
/// limit: the driver can spin for ever, and must not be opened in a process that goes on.
fn try_in_child(
    library: &Path,
    settings: DriverSettings,
    real: &Path,
    bytes: u64,
    limit: Duration,
) -> Result<Timing, String> {
    let unknown = || "the path of this program is not known".to_owned();
    let program = cufile_probe::program().ok_or_else(unknown)?;
    let scratch = ScratchFile::new(real);
    let request = Request {
        ordinal: 0,
        libraries: LibraryPaths {
            cufile: vec![library.to_path_buf()],
            ..LibraryPaths::default()
        },
        settings,
        bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
        files: vec![scratch.path().to_path_buf()],
    };
    let outcome = try_files(&program, &request, limit).pop();
    outcome.unwrap_or_else(|| Err("no answer".to_owned()))
}
