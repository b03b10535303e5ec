//! Which engine is better is found out behind a store that is open already.
//!
//! Comparing takes a fifth of a second, and whoever opens a store should not wait for it. So a path
//! starts with posix, is compared on a thread of its own, and what begins after that takes the
//! engine that did better. Each comparison has an end, and it ends early when the store is closed.

use std::time::{Duration, Instant};

use super::directory::TEMPORARY_NAME;
use super::engine::{Chosen, Engines};
use super::mount::Mount;
use super::notice::Topic;
use super::shared::StoreShared;
use crate::io::within;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, thread};

/// What moves the bytes of a path until both engines are compared.
pub(super) const MEANWHILE: &str = "being compared with uring, posix meanwhile";

/// The time for a comparison, with waiting for that of another store; it ends before its next
/// transfer then. One that is still not back when an operation could have hung after that, has.
const LIMIT: Duration = Duration::from_secs(3);
/// Bytes that a comparison may have on a path at a time.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The comparisons of a store that have not ended.
#[derive(Debug, Default)]
pub(super) struct Comparisons {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    under_way: usize,
    is_stopped: bool,
}

impl Comparisons {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no path is being compared; `false` when one still is after `limit`.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.lock();
        while state.under_way > 0 {
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => limit,
            };
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Has what is under way end before its next transfer, and begins nothing any more.
    pub(super) fn stop(&self) {
        self.lock().is_stopped = true;
    }

    fn is_stopped(&self) -> bool {
        self.lock().is_stopped
    }

    fn end_one(&self) {
        let mut state = self.lock();
        state.under_way = state.under_way.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }
}

/// Compares the engines on the paths where that is still to be done, one after the other. Does not
/// wait for it.
pub(super) fn start(
    shared: &Arc<StoreShared>,
    engines: Arc<Engines>,
    on_start: &Arc<dyn Fn() + Send + Sync>,
) {
    let undecided = shared.mounts.iter().filter(|mount| mount.is_undecided);
    let undecided: Vec<Arc<Mount>> = undecided.cloned().collect();
    if undecided.is_empty() {
        return;
    }
    shared.comparisons.lock().under_way = undecided.len();
    let (weak, on_start) = (Arc::downgrade(shared), Arc::clone(on_start));
    let mounts = undecided.clone();
    let work = move || {
        on_start();
        for mount in mounts {
            compare(&weak, &mount, &engines);
        }
    };
    let thread = thread::Builder::new().name("kvrail-compare".to_owned());
    if let Err(error) = thread.spawn(work) {
        for mount in undecided {
            let reason = format!("not compared with uring: no thread for it ({error})");
            settle(shared, &mount, (mount.engine.get(), reason));
        }
    }
}

/// Compares the engines on a path and has the better one used from then on.
///
/// On a thread that is left behind when the path hangs: the path is left alone then, as after any
/// operation that hangs, and posix stays its engine.
fn compare(weak: &Weak<StoreShared>, mount: &Arc<Mount>, engines: &Arc<Engines>) {
    let Some(shared) = weak.upgrade() else {
        return;
    };
    let (limit, deadline) = (LIMIT + shared.wait_limit, Instant::now() + LIMIT);
    let (theirs, on, with) = (Arc::clone(&shared), Arc::clone(mount), Arc::clone(engines));
    let found = within(limit, "comparing I/O engines", move || {
        find(&theirs, &on, &with, deadline)
    });
    let chosen = found.unwrap_or_else(|error| {
        mount.health.note_hung(&mount.root, error.to_string());
        let reason = format!("uring could not be compared: {error}");
        (mount.engine.get(), reason)
    });
    settle(&shared, mount, chosen);
}

/// Finds out which engine is better on a path; may hang where the path does.
fn find(shared: &StoreShared, mount: &Mount, engines: &Engines, deadline: Instant) -> Chosen {
    let posix = mount.engine.get();
    let unless = |reason: String| {
        (
            Arc::clone(&posix),
            format!("not compared with uring: {reason}"),
        )
    };
    let goes_on = || !shared.comparisons.is_stopped() && Instant::now() < deadline;
    if !goes_on() {
        return unless("the store was closed before".to_owned());
    }
    if let Some(pause) = mount.paused() {
        let reason = mount.health.reason();
        return unless(reason.unwrap_or_else(|| format!("nothing is stored here now ({pause:?})")));
    }
    if let Err(error) = mount.check_space(FILE_BYTES_MAX) {
        return unless(error.to_string());
    }
    let folder = mount.directory.open();
    let folder = match folder.and_then(|folder| folder.folder(TEMPORARY_NAME)) {
        Ok(folder) => folder,
        Err(error) => return unless(error.to_string()),
    };
    let name = shared.writer.file_name("compare");
    engines.compare(&posix, &folder, &name, mount.report.direct, &goes_on)
}

/// Has what was chosen for a path used from now on, and says so.
fn settle(shared: &StoreShared, mount: &Mount, chosen: Chosen) {
    let is_stopped = shared.comparisons.is_stopped();
    let is_other = mount.engine.replace(chosen);
    if is_other && !is_stopped {
        shared.prepare_engine(&mount.engine.get());
    }
    if !is_stopped {
        shared.notices.info(Topic::EngineChosen, || {
            let (engine, reason) = mount.engine.describe();
            let since = if is_other { "from now on" } else { "as before" };
            let path = mount.root.display();
            format!("{path}: {engine} moves the bytes {since}: {reason}")
        });
    }
    // Last, so that who waits finds all of it done.
    shared.comparisons.end_one();
}

#[cfg(test)]
mod tests;
