//! The threads that transfer chunks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use super::notice::Topic;
use super::queue::{Job, TransferQueue};
use super::shared::StoreShared;
use super::{load, save};
use crate::error::{Error, ErrorKind, Result};

/// Starts `threads` workers; `on_start` runs first on each. They end when the queue is closed.
pub(super) fn start(
    shared: &Arc<StoreShared>,
    queue: &Arc<TransferQueue>,
    threads: usize,
    on_start: &Arc<dyn Fn() + Send + Sync>,
) -> Result<()> {
    for index in 0..threads {
        let (shared, queue) = (Arc::clone(shared), Arc::clone(queue));
        let on_start = Arc::clone(on_start);
        thread::Builder::new()
            .name(format!("kvrail-transfer-{index}"))
            .spawn(move || {
                on_start();
                while let Some(job) = queue.next() {
                    run(&shared, &queue, job);
                }
            })
            .map_err(|source| {
                Error::new(ErrorKind::Io, "start a transfer thread").with_source(source)
            })?;
    }
    Ok(())
}

/// Runs a job. A panic in it is a bug of ours; it costs the chunk, not the thread or the ticket.
fn run(shared: &StoreShared, queue: &Arc<TransferQueue>, job: Job) {
    let is_load = matches!(job, Job::Load(..));
    let outcome = catch_unwind(AssertUnwindSafe(|| match job {
        Job::Load(job, buffer) => load::run(shared, queue, job, buffer),
        Job::Store(job) => save::run(shared, queue, *job),
    }));
    if outcome.is_err() {
        // The job was dropped while unwinding, so its ticket says failed; count it out.
        if is_load {
            queue.load_ended();
        } else {
            queue.store_ended();
        }
        shared.notices.warn(Topic::Panic, || {
            "a transfer thread panicked; its chunk counts as failed".to_owned()
        });
    }
}
