//! cuFile on a directory: whether it may be tried, and what came of it.

use std::path::Path;

use kvrail_cuda::system::{SystemView, mount_guards};
use serde::Serialize;

use super::machine::{Machine, RefusalReport};

/// How cuFile fares on a directory.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CufileOutcome {
    /// Whether bytes were moved by cuFile and came back right.
    pub(super) works: bool,
    /// In words: what was tried, or why nothing was.
    pub(super) reason: String,
    /// What of the directory's mount keeps cuFile away, whatever the machine.
    pub(super) refusal: Option<RefusalReport>,
}

/// Tries cuFile on a directory, an absolute path without symbolic links, where nothing speaks
/// against it.
///
/// What the mount's guards say is reported on a machine without a GPU, too: it would come next.
pub(super) fn examine(view: &SystemView, machine: &Machine, real: &Path) -> CufileOutcome {
    let refusal = mount_guards(view, real).err().map(RefusalReport::from);
    let system = &machine.system;
    let machine_reason = || {
        let guard = system.refusal.as_ref().map(|refusal| &refusal.reason);
        guard.or(system.error.as_ref())
    };
    let obstacle = if machine.libcuda.library().is_none() {
        Some("no GPU")
    } else if machine.libcufile.library().is_none() {
        Some("no libcufile")
    } else {
        let mount_reason = || refusal.as_ref().map(|refusal| &refusal.reason);
        machine_reason().or_else(mount_reason).map(String::as_str)
    };
    let (works, reason) = match obstacle {
        Some(obstacle) => (false, format!("not tried: {obstacle}")),
        None => try_in_child(real),
    };
    CufileOutcome {
        works,
        reason,
        refusal,
    }
}

/// Opens cuFile's driver, writes, reads and compares, in a process of its own that is killed at a
/// limit: the driver can spin for ever, and must not be opened in a process that goes on.
///
/// Returns whether it worked, and what happened in words.
fn try_in_child(_real: &Path) -> (bool, String) {
    let reason = "not tried: this version of kvrail does not choose cuFile";
    (false, reason.to_owned())
}
