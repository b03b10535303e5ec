//! Whether cuFile moves the bytes of a store's paths: asked once, from the harmless to the bold.
//!
//! settings -> kernels that hash -> guards (nothing is touched) -> the library -> a process of its
//! own that opens the driver and writes, reads and compares on each path -> the driver in this
//! process, with a time limit -> a page written, read and compared on each path (`Cufile::check`).
//! The first "no" is the reason that users read.

use std::path::PathBuf;
use std::time::Duration;

use kvrail_cuda::probe::{ProbeProgram, Request, try_files};
use kvrail_cuda::system::{RefusalKind, SystemView, machine_guards, mount_guards};
use kvrail_cuda::{CuFile, CuFileDriver, DriverSettings};

use super::cufile::Cufile;
use crate::error::{Error, Result};
use crate::io::{CufileEngine, within};
use crate::memory::Gpu;
use crate::store::mount::Mount;
use crate::store::open::thread_start;
use crate::store::shared::StoreShared;

/// The longest that the process which tries cuFile may take: making a CUDA context takes a second
/// or two, and vLLM's start waits for it.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// Bytes that it writes and reads on each path: some requests of the device, and no time.
const PROBE_BYTES: usize = 1 << 20;

/// What the user and the caller say about cuFile.
#[derive(Debug)]
pub(in crate::store) struct CufileWish {
    /// Whether the settings allow it at all.
    pub(in crate::store) wanted: bool,
    /// Whether it is used without a direct path, in its compatibility mode.
    pub(in crate::store) compatibility: bool,
    /// Why KV cache is not read and written in place; `None`: it is where it can be.
    pub(in crate::store) no_in_place: Option<String>,
    /// Threads of the engine.
    pub(in crate::store) threads: usize,
    /// The CPUs that they run on.
    pub(in crate::store) cpus: Option<Vec<usize>>,
    /// The program that tries it; without one it is not used.
    pub(in crate::store) probe: Option<ProbeProgram>,
    /// Where the guards look.
    pub(in crate::store) system: SystemView,
}

impl CufileWish {
    fn settings(&self) -> DriverSettings {
        DriverSettings::for_machine(&self.system, self.compatibility)
    }
}

/// Opens cuFile for `gpu` where a path of the store takes it; each path learns what became of it.
pub(super) fn choose(store: &StoreShared, gpu: &Gpu) -> Option<Cufile> {
    let undecided = |mount: &&Mount| mount.cufile.describe().is_none_or(|(on, _)| on);
    let mounts: Vec<&Mount> = store
        .mounts
        .iter()
        .map(|mount| &**mount)
        .filter(undecided)
        .collect();
    let (allowed, refused) = match allowed(store, gpu) {
        Ok(()) => by_guards(store, mounts),
        Err(reason) => (Vec::new(), refuse_all(mounts, &reason)),
    };
    let (works, failed) = by_process(store, gpu, allowed);
    let (cufile, stopped) = match works.is_empty() {
        true => (None, Vec::new()),
        false => match open(store, gpu) {
            Ok(cufile) => (Some(cufile), Vec::new()),
            Err(error) => (None, refuse_all(works.clone(), &error.to_string())),
        },
    };
    for (mount, reason) in refused.into_iter().chain(failed).chain(stopped) {
        mount.cufile.turn_off(reason);
    }
    if cufile.is_some() {
        for mount in works {
            let reason = "a process of its own wrote, read and compared".to_owned();
            mount.cufile.turn_on(reason);
        }
    }
    cufile
}

type Refused<'a> = Vec<(&'a Mount, String)>;

fn refuse_all<'a>(mounts: Vec<&'a Mount>, reason: &str) -> Refused<'a> {
    let refuse = |mount| (mount, reason.to_owned());
    mounts.into_iter().map(refuse).collect()
}

/// Returns why cuFile is no choice on any path.
fn allowed(store: &StoreShared, gpu: &Gpu) -> Result<(), String> {
    let wish = &store.cufile;
    if !wish.wanted {
        return Err("turned off by `use_cufile`, `use_gds` or `gds_backend`".into());
    }
    if gpu.kernels().is_none() {
        let reason = gpu.reason();
        return Err(format!(
            "pages could not be verified in GPU memory: {reason}"
        ));
    }
    if wish.probe.is_none() {
        return Err("no program was named that tries it in a process of its own".into());
    }
    match machine_guards(&wish.system) {
        // Without a direct path there is still the compatibility mode.
        Err(refusal) if !(wish.compatibility && refusal.kind() == RefusalKind::NoDirectPath) => {
            Err(refusal.to_string())
        }
        _ => Ok(()),
    }
}

/// Asks what is known of each mount.
fn by_guards<'a>(store: &StoreShared, mounts: Vec<&'a Mount>) -> (Vec<&'a Mount>, Refused<'a>) {
    let mut allowed = Vec::new();
    let mut refused = Vec::new();
    for mount in mounts {
        let wish = &store.cufile;
        let reason = if !mount.report.writable {
            Some("it cannot be tried on a path that is only read".to_owned())
        } else if !mount.report.direct {
            Some(format!(
                "O_DIRECT is not used here: {}",
                mount.report.reason
            ))
        } else if wish.compatibility {
            None
        } else {
            let root = mount.root.canonicalize();
            let root = root.unwrap_or_else(|_| mount.root.clone());
            let refusal = mount_guards(&wish.system, &root).err();
            refusal.map(|refusal| refusal.to_string())
        };
        match reason {
            None => allowed.push(mount),
            Some(reason) => refused.push((mount, reason)),
        }
    }
    (allowed, refused)
}

/// Has a process of its own try cuFile on each mount.
fn by_process<'a>(
    store: &StoreShared,
    gpu: &Gpu,
    mounts: Vec<&'a Mount>,
) -> (Vec<&'a Mount>, Refused<'a>) {
    let Some(program) = store.cufile.probe.as_ref().filter(|_| !mounts.is_empty()) else {
        return (Vec::new(), Vec::new());
    };
    let file = |mount: &&Mount| -> PathBuf {
        let name = store.writer.file_name("probe");
        mount.directory.temporary_path().join(name)
    };
    let request = Request {
        ordinal: gpu.context().ordinal(),
        libraries: store.gpus.libraries().clone(),
        settings: store.cufile.settings(),
        bytes: PROBE_BYTES,
        files: mounts.iter().map(file).collect(),
    };
    let outcomes = try_files(program, &request, PROBE_LIMIT.min(store.wait_limit));
    let mut works = Vec::new();
    let mut failed = Vec::new();
    for (mount, outcome) in mounts.into_iter().zip(outcomes) {
        match outcome {
            Ok(_) => works.push(mount),
            Err(reason) => failed.push((mount, reason)),
        }
    }
    (works, failed)
}

/// Opens the driver in this process.
fn open(store: &StoreShared, gpu: &Gpu) -> Result<Cufile> {
    let libraries = store.gpus.libraries().clone();
    let (context, settings) = (gpu.context().clone(), store.cufile.settings());
    let opened = within(PROBE_LIMIT.min(store.wait_limit), "cuFileDriverOpen", {
        move || -> kvrail_cuda::Result<CuFileDriver> {
            let library = CuFile::load(&libraries.cufile)?;
            library.open_driver_with(&context, settings)
        }
    })?;
    let driver = opened.map_err(|error| Error::gpu("cuFile", error))?;
    let wish = &store.cufile;
    let on_start = thread_start(wish.cpus.as_deref());
    let engine = CufileEngine::new(&driver, gpu.context(), wish.threads, &on_start)?;
    Ok(Cufile { driver, engine })
}
