//! Opening a store: directories, probes, manifest, leftovers, threads.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvrail_cuda::system::SystemView;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::assemble::Windows;
use super::bad::BadChunks;
use super::capacity::{Capacity, JanitorThreads};
use super::comparisons::{self, Comparisons};
use super::directory::{NamespaceDirectory, TEMPORARY_NAME};
use super::engine::{Chosen, Engines};
use super::gpu::{CufileWish, Gpus};
use super::health::Health;
use super::known::KnownAnswers;
use super::lmcache_names::{LmcacheNames, LmcacheTree};
use super::lookup::LookupQueue;
use super::manifest::{check_manifest, ensure_manifest, read_manifest};
use super::metrics::Metrics;
use super::mount::Mount;
use super::namespace::Namespace;
use super::nearest::Nearest;
use super::notice::{Notices, Topic};
use super::options::{Access, OpenOptions};
use super::placement::Placement;
use super::present::PresentChunks;
use super::queue::TransferQueue;
use super::shared::{Running, StoreShared};
use super::splits::Splits;
use super::tier::{self, Tier};
use super::watch::{self, Watch};
use super::weights::weights;
use super::worker;
use super::writer::{Writer, remove_leftovers};
use crate::config::{DirectoryLayout, Durability, PageCache, StoreConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{
    Folder, FolderRules, IoEngine, MountReport, Permissions, file_system_name, probe_folder, within,
};

/// How long other namespaces are compared with at start, at most.
const NEAREST_LIMIT: Duration = Duration::from_secs(2);

/// What opening needs at hand.
#[derive(Clone)]
struct Opening {
    config: StoreConfig,
    namespace: Namespace,
    access: Access,
    quiet: bool,
    rules: FolderRules,
    lmcache: Option<LmcacheNames>,
    system: SystemView,
    engines: Arc<Engines>,
    writer: Arc<Writer>,
    notices: Arc<Notices>,
    metrics: Arc<Metrics>,
}

/// What was found out about a path.
struct Prepared {
    report: MountReport,
    chosen: Chosen,
    /// Whether the engine is still to be compared with the other one.
    is_undecided: bool,
}

/// Opens a store, over `engine` or the one that the configuration asks for.
pub(super) fn open(
    config: &StoreConfig,
    namespace: Namespace,
    options: &OpenOptions,
    engine: Option<Arc<dyn IoEngine>>,
) -> Result<Running> {
    config.validate()?;
    let is_lmcache = config.layout == DirectoryLayout::Lmcache;
    if options.lmcache.is_some() != is_lmcache {
        let message = "names of LMCache's files go with `layout: lmcache`, and only with it";
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    let tier_bytes = tier_bytes(config)?;
    let tier_folder = tier_folder(config, options.access, tier_bytes)?;
    let on_start = thread_start(options.cpus.as_deref());
    let threads = config.disk_io_threads;
    let writer = Arc::new(Writer::new());
    let (notices, metrics) = (Arc::new(Notices::default()), Arc::new(Metrics::default()));
    if config.local_cpu_shared.is_some() && !config.local_cpu && !options.quiet {
        notices.warn(Topic::Tier, || {
            "extra_config.local_cpu_shared has no effect: expected local_cpu true beside it".into()
        });
    }
    let engines = Engines::new(
        config.io_engine,
        engine,
        threads,
        Arc::clone(&on_start),
        Arc::clone(&notices),
    );
    let opening = Opening {
        config: config.clone(),
        namespace: namespace.clone(),
        access: options.access,
        quiet: options.quiet,
        rules: FolderRules {
            permissions: Permissions::of_files(config.file_mode.bits()),
            observer: options.observer.clone(),
        },
        lmcache: options.lmcache.clone(),
        system: options.system.clone(),
        engines: Arc::new(engines),
        writer: Arc::clone(&writer),
        notices: Arc::clone(&notices),
        metrics: Arc::clone(&metrics),
    };
    let wait_limit = Duration::from_secs_f64(config.wait_limit_seconds);
    let deadline = Instant::now() + wait_limit;
    let mounts: Vec<Arc<Mount>> = config
        .gds_path
        .iter()
        .map(|root| opening.mount_until(root, deadline))
        .collect::<Result<_>>()?;
    if mounts.is_empty() {
        return Err(Error::config(
            "gds_path",
            "nothing",
            "one or more directories",
        ));
    }
    let weights = weights(config, &mounts, &writer, &notices);
    let paths = mounts.iter().map(|mount| mount.root.as_path());
    let placement = Placement::new(config.gds_path_sharding, paths.zip(weights));
    let engines = Arc::clone(&opening.engines);
    drop(opening);
    // In LMCache's directory nothing is counted, stamped or evicted.
    let counted = if is_lmcache { &[][..] } else { &mounts };
    let capacity = Capacity::open(config, counted, &notices)?;
    let splits = Splits::new(mounts.len());
    let shared = Arc::new(StoreShared {
        namespace,
        mounts,
        placement,
        writer,
        metrics,
        notices,
        present: PresentChunks::default(),
        bad: BadChunks::default(),
        chunk_size: config.chunk_size,
        durability: config.durability,
        wait_limit,
        lookup_limit: Duration::from_secs_f64(config.lookup_limit_seconds),
        known: KnownAnswers::new(Duration::from_secs_f64(config.lookup_hold_seconds)),
        watch: Watch::default(),
        comparisons: Comparisons::default(),
        may_write: options.access == Access::ReadWrite,
        buffer_mib: config.buffer_mib,
        tier_bytes,
        tier_folder,
        pool: Mutex::new(None),
        tier: Tier::default(),
        windows: Windows::default(),
        splits,
        gpus: Gpus::new(options.libraries.clone()),
        copy_method: options.copy_method,
        cufile: CufileWish {
            wanted: config.wants_cufile(),
            compatibility: config.cufile_compat_mode,
            no_in_place: match (config.direct, &options.no_in_place) {
                (Some(false), _) => Some("`extra_config.direct` is false".into()),
                (_, reason) => reason.clone(),
            },
            threads,
            cpus: options.cpus.clone(),
            probe: options.cufile_probe.clone(),
            system: options.system.clone(),
        },
        capacity,
        lmcache: options.lmcache.clone(),
    });
    let queue = Arc::new(TransferQueue::default());
    // Made before the workers start, so that a failure to start one closes the queue again.
    let lookups = LookupQueue::start(&shared, threads, &on_start)?;
    let janitors = JanitorThreads::start(&shared, &on_start)?;
    let running = Running {
        shared,
        queue,
        lookups,
        janitors,
    };
    worker::start(&running.shared, &running.queue, threads, &on_start)?;
    watch::start(&running.shared, &on_start)?;
    // Gives the engines back when it is through: one that no path has chosen goes.
    comparisons::start(&running.shared, engines, &on_start);
    Ok(running)
}

/// Returns what each thread does first: it moves to `cpus`, where the caller names some.
pub(super) fn thread_start(cpus: Option<&[usize]>) -> Arc<dyn Fn() + Send + Sync> {
    let Some(cpus) = cpus else {
        return Arc::new(|| ());
    };
    let mut set = CpuSet::new();
    cpus.iter()
        .filter(|cpu| **cpu < CpuSet::MAX_CPU)
        .for_each(|cpu| set.set(*cpu));
    Arc::new(move || {
        // Best effort: a container may forbid it, and then the inherited CPUs serve.
        let _ = sched_setaffinity(None, &set);
    })
}

impl Opening {
    /// Prepares one path, on a thread of its own that is left behind when the path hangs.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at `deadline`, and what else preparing says.
    fn mount_until(&self, root: &Path, deadline: Instant) -> Result<Arc<Mount>> {
        let (opening, path) = (self.clone(), root.to_path_buf());
        let left = deadline.saturating_duration_since(Instant::now());
        let mount = within(left, "opening the store", move || opening.mount(&path));
        let mount = mount.map_err(|error| error.with_path(root))?;
        mount.map(Arc::new)
    }

    /// Prepares one path.
    fn mount(&self, root: &Path) -> Result<Mount> {
        let rules = self.rules.clone();
        let mut directory = NamespaceDirectory::new(root, &self.namespace).with_rules(rules);
        if let Some(names) = &self.lmcache {
            let tree = LmcacheTree::new(names.clone(), &self.system, root)?;
            directory = directory.of_lmcache(tree);
        }
        let is_new = directory.open().is_err();
        let mut lacks_manifest = false;
        let prepared = match self.access {
            Access::ReadOnly => self.open_for_reading(root, &directory, "opened read-only")?,
            Access::ReadWrite => match self.prepare(root, &directory) {
                Ok(prepared) => prepared,
                Err(error) if error.kind() == ErrorKind::NoSpace && is_readable(root) => {
                    self.notices.warn(Topic::NoSpace, || {
                        format!(
                            "no space left, chunks are loaded only until there is some, and \
                             written through the page cache until this store is opened again: \
                             {error}"
                        )
                    });
                    let why = "no space left to try O_DIRECT when the store was opened";
                    let mut prepared = self.open_for_reading(root, &directory, why)?;
                    prepared.report.writable = true;
                    lacks_manifest = true;
                    prepared
                }
                Err(error) if is_refused(&error) && is_readable(root) => {
                    self.notices.warn(Topic::ReadOnly, || {
                        format!("cannot write here, chunks are loaded only: {error}")
                    });
                    self.open_for_reading(root, &directory, "not writable")?
                }
                Err(error) => return Err(self.explain(root, error)),
            },
        };
        if !self.quiet && self.lmcache.is_none() {
            self.tell_nearest(root, is_new);
        }
        let slow_limit = Duration::from_secs_f64(self.config.slow_limit_seconds);
        let health = Health::new(
            slow_limit,
            Arc::clone(&self.notices),
            Arc::clone(&self.metrics),
        );
        let mount = Mount::new(
            root.to_path_buf(),
            directory,
            prepared.report,
            prepared.chosen,
            self.config.min_free,
            health,
        );
        mount.set_lacks_manifest(lacks_manifest);
        Ok(mount
            .with_page_cache(self.config.page_cache)
            .with_undecided(prepared.is_undecided))
    }

    /// Creates what is missing and finds out what the mount can do.
    fn prepare(&self, root: &Path, directory: &NamespaceDirectory) -> Result<Prepared> {
        let sync = self.config.durability == Durability::Full;
        let namespace = directory.make(sync)?;
        let temporary = namespace.make(TEMPORARY_NAME, sync)?;
        // First, since a full disk may have room then.
        let leftovers = remove_leftovers(&temporary)?;
        self.metrics.leftovers_removed.add(leftovers.removed);
        ensure_manifest(directory, &self.namespace, &self.writer, sync)?;
        let (first, direct, reason) = self.probe(&temporary)?;
        if self.config.use_direct_io == Some(true) && !direct {
            self.notices.warn(Topic::Start, || {
                format!("use_direct_io is set, but {}: {reason}", root.display())
            });
        }
        if self.config.page_cache == PageCache::Bypass && !direct {
            self.notices.warn(Topic::Start, || {
                format!("page_cache is bypass, but {}: {reason}", root.display())
            });
        }
        let (chosen, is_undecided) = self.engines.start_with(first, &temporary, direct);
        Ok(Prepared {
            is_undecided,
            ..report(root, chosen, (direct, reason), true)
        })
    }

    /// Finds out whether O_DIRECT works, with the engine that was asked for if that works here.
    fn probe(&self, temporary: &Folder) -> Result<(Chosen, bool, String)> {
        let limit = Duration::from_secs_f64(self.config.wait_limit_seconds);
        let wanted = self.config.use_direct_io;
        let probe = |engine: &dyn IoEngine| {
            let name = self.writer.file_name("probe");
            probe_folder(engine, temporary, &name, wanted, limit)
        };
        let first = self.engines.first()?;
        let (first, (direct, reason)) = match probe(&*first.0) {
            Ok(found) => (first, found),
            Err(error)
                if self.engines.is_wished_uring(&*first.0)
                    && error.kind() != ErrorKind::TimedOut =>
            {
                let other = self
                    .engines
                    .instead(&format!("it does not work here: {error}"))?;
                let found = probe(&*other.0)?;
                (other, found)
            }
            Err(error) => return Err(error),
        };
        Ok((first, direct, reason))
    }

    /// Describes a path that is only read. Files are read through the page cache there: what
    /// O_DIRECT does cannot be tried without writing.
    fn open_for_reading(
        &self,
        root: &Path,
        directory: &NamespaceDirectory,
        why: &str,
    ) -> Result<Prepared> {
        let found = directory.open().and_then(|found| read_manifest(&found));
        if let Ok(found) = found {
            check_manifest(&directory.manifest(), &found, &self.namespace)?;
        }
        let direct = self.config.use_direct_io == Some(true);
        let folder = directory.open_root().ok();
        let first = self.engines.first()?;
        let chosen = self
            .engines
            .choose_unmeasured(first, folder.as_ref(), direct);
        Ok(report(root, chosen, (direct, why.to_owned()), false))
    }

    /// Says what separates the namespace from its nearest relative, so that a user who expects hits
    /// learns at once why there are none.
    ///
    /// Nothing depends on it, so it has a short time of its own and no errors.
    fn tell_nearest(&self, root: &Path, is_new: bool) {
        let limit = Duration::from_secs_f64(self.config.wait_limit_seconds / 4.0);
        let limit = limit.min(NEAREST_LIMIT);
        let deadline = Instant::now() + limit;
        let (path, rules, namespace) =
            (root.to_owned(), self.rules.clone(), self.namespace.clone());
        let nearest = within(limit, "comparing namespaces", move || {
            let root = Folder::open(&path, rules).ok()?;
            Nearest::find(&root, &namespace, deadline)
        });
        if let Ok(Some(nearest)) = nearest {
            self.notices.info(Topic::Namespace, || {
                let kind = if is_new { "new namespace" } else { "namespace" };
                let name = self.namespace.directory_name();
                format!("{kind} {name} shares nothing with {nearest}")
            });
        }
    }

    /// Turns what the system said about a configured path into the setting that is wrong.
    fn explain(&self, root: &Path, error: Error) -> Error {
        use std::io::ErrorKind as Os;
        let expected = match error.os_error().map(std::io::Error::kind) {
            Some(Os::NotADirectory | Os::AlreadyExists) => "a directory, or a path to make one at",
            Some(Os::PermissionDenied | Os::ReadOnlyFilesystem) => {
                "a directory that this user can read and write"
            }
            _ => return error,
        };
        Error::config("gds_path", root.display(), format!("{expected} ({error})"))
    }
}

fn report(
    root: &Path,
    chosen: Chosen,
    (direct, reason): (bool, String),
    writable: bool,
) -> Prepared {
    let report = MountReport {
        path: root.to_path_buf(),
        file_system: file_system_name(root).unwrap_or_else(|_| "not there yet".into()),
        engine: chosen.0.name(),
        engine_reason: chosen.1.clone(),
        direct,
        writable,
        reason,
    };
    Prepared {
        report,
        chosen,
        is_undecided: false,
    }
}

/// Returns whether this process may list a directory and open what is in it.
fn is_readable(directory: &Path) -> bool {
    let wanted = rustix::fs::Access::READ_OK | rustix::fs::Access::EXEC_OK;
    directory.is_dir() && rustix::fs::access(directory, wanted).is_ok()
}

/// Returns whether the system refuses to write, rather than anything being wrong.
fn is_refused(error: &Error) -> bool {
    use std::io::ErrorKind as Os;
    matches!(
        error.os_error().map(std::io::Error::kind),
        Some(Os::PermissionDenied | Os::ReadOnlyFilesystem)
    )
}

/// Returns the bytes that the DRAM tier may keep: 0 where it is off.
fn tier_bytes(config: &StoreConfig) -> Result<usize> {
    if !config.local_cpu {
        return Ok(0);
    }
    let system = rustix::system::sysinfo();
    let there = system.totalram as f64 * f64::from(system.mem_unit.max(1));
    let wanted = config.max_local_cpu_size_gb * 1e9;
    if wanted <= there {
        return Ok(wanted as usize);
    }
    let expected = format!(
        "at most what the machine has ({:.1} GB), for each worker",
        there / 1e9
    );
    Err(Error::config(
        "max_local_cpu_size",
        config.max_local_cpu_size_gb,
        expected,
    ))
}

/// Returns the folder of the memory that processes share, where the tier is that, and checks it.
fn tier_folder(config: &StoreConfig, access: Access, bytes: usize) -> Result<Option<PathBuf>> {
    let Some(folder) = config.local_cpu_shared.as_ref().filter(|_| bytes > 0) else {
        return Ok(None);
    };
    // Who only looks loads nothing that could be kept.
    if access == Access::ReadWrite {
        tier::check_folder(folder, bytes).map_err(|expected| {
            let value = format!("`{}`", folder.display());
            Error::config("extra_config.local_cpu_shared", value, expected)
        })?;
    }
    Ok(Some(folder.clone()))
}
