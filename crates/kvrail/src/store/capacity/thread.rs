//! The threads in which a store's janitors run, one for each path that it may write to.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::PathCapacity;
use super::janitor::{Janitor, Tick};
use crate::error::{Error, ErrorKind, Result};
use crate::store::metrics::Counter;
use crate::store::notice::Topic;
use crate::store::shared::StoreShared;
use crate::sync::atomic::Ordering;
use crate::sync::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use crate::sync::thread;
use crate::sync::{Arc, Mutex, PoisonError};

/// Longest wait of a closing store for its janitors: one that works ends within a tick, one whose
/// mount does not answer is left to end when the mount does.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// A store's janitors; they end when this is dropped.
#[derive(Debug)]
pub(in crate::store) struct JanitorThreads {
    stop: Mutex<Option<Sender<()>>>,
    ended: Receiver<()>,
}

impl JanitorThreads {
    /// Starts a janitor for each path with an account; `on_start` runs first on each thread.
    pub(in crate::store) fn start(
        shared: &Arc<StoreShared>,
        on_start: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self> {
        // Nothing is ever sent: the threads see that the other end is gone.
        let (stop, stopped) = bounded(0);
        let (alive, ended) = bounded(0);
        for index in 0..shared.capacity.paths.len() {
            let (shared, on_start) = (Arc::clone(shared), Arc::clone(on_start));
            let (stopped, alive) = (stopped.clone(), alive.clone());
            thread::Builder::new()
                .name(format!("kvrail-janitor-{index}"))
                .spawn(move || {
                    on_start();
                    run(&shared, index, &stopped);
                    drop(alive);
                })
                .map_err(|source| {
                    Error::new(ErrorKind::Io, "start a janitor thread").with_source(source)
                })?;
        }
        Ok(Self {
            stop: Mutex::new(Some(stop)),
            ended,
        })
    }

    /// Ends the janitors. Waits until they have, for `limit` at most: a mount may not answer. Who
    /// comes after the first waits no more.
    pub(in crate::store) fn stop(&self, limit: Duration) {
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.take().is_some() {
            drop(stop);
            // Disconnected when the last of them is through.
            let _ = self.ended.recv_timeout(limit.min(CLOSE_LIMIT));
        }
    }
}

fn run(shared: &StoreShared, index: usize, stopped: &Receiver<()>) {
    let Some(path) = shared.capacity.paths.get(index) else {
        return;
    };
    let mut janitor = Janitor::new(
        path.root.clone(),
        Arc::clone(&path.room),
        path.settings.clone(),
        Arc::clone(&path.progress),
    );
    let mut pause = Duration::ZERO;
    while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        let start = Instant::now();
        // A panic is a bug of ours; it must not end eviction for good.
        let result = catch_unwind(AssertUnwindSafe(|| {
            remove_lingering(shared, path);
            janitor.tick()
        }));
        let tick = match result {
            Ok(Ok(tick)) => {
                if let Some(fault) = janitor.take_fault() {
                    shared.notices.warn(Topic::Capacity, || {
                        format!("the janitor could not do all of its work, tries again: {fault}")
                    });
                }
                tick
            }
            Ok(Err(error)) => {
                shared.notices.warn(Topic::Capacity, || {
                    format!("the janitor could not do its work, tries again: {error}")
                });
                Tick::default()
            }
            Err(_) => {
                let text = || "the janitor panicked, goes on".to_owned();
                shared.notices.warn(Topic::Panic, text);
                Tick::default()
            }
        };
        path.is_janitor.store(tick.is_janitor, Ordering::Relaxed);
        path.room.set_evicting(tick.busy);
        report(shared, path.root.path(), &tick);
        let rest = path.settings.timing.tick.saturating_sub(start.elapsed());
        pause = if tick.busy {
            Duration::ZERO
        } else {
            rest.max(path.settings.timing.tick / 4)
        };
    }
    janitor.close();
    path.is_janitor.store(false, Ordering::Relaxed);
}

/// Tries again to remove temp files that could not be removed, unless the path is left alone.
fn remove_lingering(shared: &StoreShared, path: &PathCapacity) {
    let mut mounts = shared.mounts.iter();
    let mount = mounts.find(|mount| mount.root == path.root.path());
    let Some(mount) = mount.filter(|_| !path.progress.is_halted()) else {
        return;
    };
    path.progress.step();
    mount.directory.remove_lingering();
    shared.capacity.keep_lingering(mount);
    path.progress.rest();
}

/// Counts what a tick did.
fn report(shared: &StoreShared, root: &std::path::Path, tick: &Tick) {
    let metrics = &shared.metrics;
    let add = |counter: &Counter, amount: u64| {
        if amount > 0 {
            counter.add(amount);
        }
    };
    add(&metrics.chunks_evicted_size, tick.visit.for_size.chunks);
    add(&metrics.chunks_evicted_space, tick.visit.for_space.chunks);
    add(&metrics.chunks_evicted_age, tick.visit.for_age.chunks);
    add(&metrics.bytes_evicted, tick.visit.removed().bytes);
    add(&metrics.leftovers_removed, tick.leftovers_removed);
    if tick.stuck {
        shared.notices.warn(Topic::Capacity, || {
            format!(
                "there is too little room and removing chunks does not make any: {}",
                root.display()
            )
        });
    }
}
