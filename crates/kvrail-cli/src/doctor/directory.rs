//! A directory: what lies below it, what it can do, and what kvrail will do with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvrail::io::{
    Folder, FolderRules, IoEngine, IoFile, OpenMode, compare_engines, file_system_name,
    probe_mount, within,
};
use kvrail_cuda::system::{BlockDevice, DeviceKind, Mount, SystemView, direct_io_alignment};
use serde::Serialize;

use super::advice;
use super::cufile::{self, CufileOutcome};
use super::machine::Machine;
use super::measure::{self, Engine, FILE_BYTES, Measurement};
use super::scratch_file::ScratchFile;
use super::weight::Weight;
use crate::output::human_bytes;

/// Free space that a measurement asks for: three times its file, since others write, too.
const SPACE_BYTES_MIN: u64 = 3 * FILE_BYTES;

/// What is written by cuFile where nothing is measured.
const PROBE_BYTES: u64 = 1 << 20;

/// What was found out about a directory.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Directory {
    #[serde(serialize_with = "super::lossy")]
    pub(super) path: PathBuf,
    /// Whether kvrail can store and load here.
    pub(super) usable: bool,
    /// Why not.
    pub(super) problem: Option<String>,
    pub(super) mount: Option<MountInfo>,
    pub(super) space: Option<Space>,
    pub(super) direct_io: Option<DirectIo>,
    pub(super) uring: Option<Uring>,
    /// By what the directory gets its share of the chunks beside others.
    pub(super) weight: Option<Weight>,
    /// The engine that kvrail will use.
    pub(super) engine: Option<Choice>,
    pub(super) cufile: Option<CufileOutcome>,
    pub(super) measurements: Vec<Measurement>,
    /// Why nothing was measured though it was asked for.
    pub(super) not_measured: Option<String>,
    /// What to change, one sentence each.
    pub(super) advice: Vec<String>,
}

/// The mount that a directory lies on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct MountInfo {
    #[serde(serialize_with = "super::lossy")]
    pub(super) mount_point: PathBuf,
    pub(super) file_system: String,
    pub(super) source: String,
    pub(super) options: String,
    pub(super) super_options: String,
    /// As `259:2`.
    pub(super) device_number: String,
    pub(super) device: Option<Device>,
}

/// The block device below a mount.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Device {
    pub(super) name: String,
    disk: String,
    /// `nvme`, `device-mapper`, `raid`, `loop` or `other`.
    pub(super) kind: &'static str,
    /// More about it, in words.
    pub(super) detail: Option<String>,
    has_udev_record: bool,
}

/// The space of a file system.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Space {
    pub(super) total_bytes: u64,
    /// What is free to us, without what is reserved for root.
    pub(super) available_bytes: u64,
}

/// What O_DIRECT does here.
#[derive(Debug, Clone, Serialize)]
pub(super) struct DirectIo {
    pub(super) works: bool,
    pub(super) reason: String,
    /// As the file system states it (`STATX_DIOALIGN`), where it does; 0: not possible.
    pub(super) memory_alignment_bytes: Option<u32>,
    pub(super) offset_alignment_bytes: Option<u32>,
}

/// The engine that kvrail will use.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Choice {
    pub(super) name: &'static str,
    pub(super) direct: bool,
    pub(super) reason: String,
    /// Why this one and not the other that goes through host memory.
    pub(super) engine_reason: String,
}

/// What io_uring does here.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Uring {
    pub(super) works: bool,
    /// How it compares with posix, or why it does not work or was not compared.
    pub(super) reason: String,
}

/// How a directory is examined.
#[derive(Debug, Clone, Copy)]
pub(super) struct Examination<'a> {
    pub(super) view: &'a SystemView,
    pub(super) machine: &'a Machine,
    /// The wait for each step.
    pub(super) limit: Duration,
    /// Whether to measure.
    pub(super) measure: bool,
}

impl Examination<'_> {
    /// Finds out about a directory.
    pub(super) fn examine(&self, path: &Path) -> Directory {
        let mut directory = Directory {
            path: path.to_path_buf(),
            usable: false,
            problem: None,
            mount: None,
            space: None,
            direct_io: None,
            uring: None,
            weight: None,
            engine: None,
            cufile: None,
            measurements: Vec::new(),
            not_measured: None,
            advice: Vec::new(),
        };
        match self.fill(&mut directory) {
            Ok(()) => directory.usable = true,
            Err(problem) => directory.problem = Some(problem),
        }
        directory.advice = advice::for_directory(&directory, self.machine);
        directory
    }

    /// Fills in what is found, up to the first problem that ends it.
    fn fill(&self, directory: &mut Directory) -> Result<(), String> {
        let path = directory.path.clone();
        // The mount by the path's text first: that answers for a mount that hangs, too.
        let absolute = std::path::absolute(&path).map_err(|error| error.to_string())?;
        directory.mount = self.mount(&absolute);
        let real = self.bounded({
            let path = path.clone();
            move || resolve(&path)
        })??;
        directory.mount = self.mount(&real);
        directory.space = self.bounded({
            let real = real.clone();
            move || space(&real)
        })?;
        let available = directory.space.map(|space| space.available_bytes);
        let is_roomy = available.is_none_or(|bytes| bytes >= SPACE_BYTES_MIN);
        let found = self.choose(&real, self.measure && is_roomy)?;
        let (file_system, choice) = (found.file_system, found.choice);
        let has_uring = found.uring.works;
        directory.direct_io = Some(found.direct_io);
        directory.uring = Some(found.uring);
        directory.weight = Some(found.weight);
        let bytes = match self.measure && is_roomy {
            true => FILE_BYTES,
            false => PROBE_BYTES,
        };
        let found = cufile::examine(self.view, self.machine, &real, bytes, 2 * self.limit);
        directory.engine = Some(match found.works && choice.direct {
            true => Choice {
                name: "cufile",
                direct: true,
                reason: found.reason.clone(),
                engine_reason: choice.engine_reason.clone(),
            },
            false => choice.clone(),
        });
        let by_cufile = found.measurement.clone();
        directory.cufile = Some(found);
        if !self.measure {
            return Ok(());
        }
        if available.is_some_and(|bytes| bytes < SPACE_BYTES_MIN) {
            let least = human_bytes(SPACE_BYTES_MIN);
            directory.not_measured = Some(format!("less than {least} are free"));
            return Ok(());
        }
        directory.measurements.extend(by_cufile);
        for direct in [true, false] {
            if direct && !choice.direct {
                continue;
            }
            for engine in [Engine::Posix, Engine::Uring] {
                if engine == Engine::Posix || has_uring {
                    let found = self.run(&real, &file_system, engine, direct)?;
                    directory.measurements.push(found);
                }
            }
        }
        Ok(())
    }

    /// Runs a step that touches the directory.
    fn bounded<T: Send + 'static>(
        &self,
        step: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        within(self.limit, "the directory", step).map_err(|error| error.to_string())
    }

    fn mount(&self, path: &Path) -> Option<MountInfo> {
        let mount = Mount::of(self.view, path)?;
        let device = BlockDevice::read(self.view, mount.device);
        Some(MountInfo {
            device: device.map(Device::from),
            device_number: mount.device.to_string(),
            mount_point: mount.mount_point,
            file_system: mount.file_system,
            source: mount.source,
            options: mount.options,
            super_options: mount.super_options,
        })
    }

    /// Finds out what the store will find out when it opens.
    fn choose(&self, real: &Path, compare: bool) -> Result<Found, String> {
        // The probe has a limit of its own; ours comes first, so that there is one message for it.
        let (real, limit) = (real.to_path_buf(), 2 * self.limit);
        self.bounded(move || choose(&real, compare, limit))?
    }

    /// Measures one way of reading and writing.
    fn run(
        &self,
        real: &Path,
        file_system: &str,
        engine: Engine,
        direct: bool,
    ) -> Result<Measurement, String> {
        let (real, file_system) = (real.to_path_buf(), file_system.to_owned());
        let limit = self.limit;
        // Twice, for what the measurement does beside its requests.
        within(2 * limit, "the directory", move || {
            measure::measure(&real, &file_system, engine, direct, limit)
        })
        .map_err(|error| format!("write and read: {error}"))?
    }
}

/// Returns the path without symbolic links, of a directory only.
fn resolve(path: &Path) -> Result<PathBuf, String> {
    let real = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "does not exist".to_owned(),
        _ => format!("cannot be opened: {error}"),
    })?;
    match real.is_dir() {
        true => Ok(real),
        false => Err("is not a directory".to_owned()),
    }
}

fn space(path: &Path) -> Option<Space> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(Space {
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        available_bytes: found.f_bavail.saturating_mul(found.f_frsize),
    })
}

/// What the store will find out.
struct Found {
    file_system: String,
    choice: Choice,
    direct_io: DirectIo,
    uring: Uring,
    weight: Weight,
}

fn choose(real: &Path, compare: bool, limit: Duration) -> Result<Found, String> {
    let posix = Engine::Posix.start().map_err(|error| error.to_string())?;
    let scratch = ScratchFile::new(real);
    let name = scratch
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let (direct, reason) = probe_mount(&*posix, real, &name, None, limit)
        .map_err(|error| format!("cannot be written: {error}").replace('\n', " "))?;
    let weight = Weight::examine(&*posix, real, &name, direct, compare);
    let (name, uring) = try_uring(&*posix, real, &name, direct, compare);
    // The file system's own words; what counts is that it was tried.
    let alignment = IoFile::open(scratch.path(), OpenMode::CreateNew, false)
        .ok()
        .and_then(|file| direct_io_alignment(&file).ok()?);
    let direct_io = DirectIo {
        works: direct,
        reason: reason.clone(),
        memory_alignment_bytes: alignment.map(|alignment| alignment.memory_bytes),
        offset_alignment_bytes: alignment.map(|alignment| alignment.offset_bytes),
    };
    Ok(Found {
        file_system: file_system_name(real).unwrap_or_else(|_| "unknown".to_owned()),
        choice: Choice {
            name,
            direct,
            reason,
            engine_reason: uring.reason.clone(),
        },
        direct_io,
        uring,
        weight,
    })
}

/// Finds out whether io_uring works and which engine the store takes by itself.
fn try_uring(
    posix: &dyn IoEngine,
    real: &Path,
    file_name: &str,
    direct: bool,
    compare: bool,
) -> (&'static str, Uring) {
    let outcome = |works, reason: String| Uring {
        works,
        reason: reason.replace('\n', " "),
    };
    let engine = match Engine::Uring.start() {
        Ok(engine) => engine,
        Err(error) => return ("posix", outcome(false, error.to_string())),
    };
    if !compare {
        let reason = "not compared with posix now; a store does when it is open".to_owned();
        return ("posix", outcome(true, reason));
    }
    let compared = Folder::open(real, FolderRules::default())
        .and_then(|folder| compare_engines(posix, &*engine, &folder, file_name, direct, &|| true));
    match compared {
        Ok(found) if found.second_is_better => ("uring", outcome(true, found.reason)),
        Ok(found) => ("posix", outcome(true, found.reason)),
        Err(error) => ("posix", outcome(false, error.to_string())),
    }
}

impl From<BlockDevice> for Device {
    fn from(device: BlockDevice) -> Self {
        let (kind, detail) = match device.kind {
            DeviceKind::Nvme { transport } => ("nvme", transport),
            DeviceKind::DeviceMapper => ("device-mapper", None),
            DeviceKind::Raid { level, members } => {
                let level = level.unwrap_or_default();
                ("raid", Some(format!("{level} of {}", members.join(", "))))
            }
            DeviceKind::Loop => ("loop", None),
            _ => ("other", None),
        };
        Self {
            name: device.name,
            disk: device.disk,
            kind,
            detail,
            has_udev_record: device.has_udev_record,
        }
    }
}
