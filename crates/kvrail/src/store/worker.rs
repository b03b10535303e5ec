//! The threads that transfer chunks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::Ending;
use super::crew::Crew;
use super::notice::Topic;
use super::present::Place;
use super::queue::{Job, TransferQueue};
use super::shared::StoreShared;
use super::watch::{End, Overdue, Watched};
use super::{load, save};
use crate::error::Result;

/// Wait limits that a store has for what it does, without its wait for the GPU: one is for its
/// writes, another one for a look at what is there and for publishing.
const STORE_WAITS: u32 = 2;
/// The same with a GPU, which cuFile and a copy to the host may wait for again.
const STORE_WAITS_WITH_GPU: u32 = 4;

/// Starts `threads` workers; `on_start` runs first on each. They end when the queue is closed.
pub(super) fn start(
    shared: &Arc<StoreShared>,
    queue: &Arc<TransferQueue>,
    threads: usize,
    on_start: &Arc<dyn Fn() + Send + Sync>,
) -> Result<()> {
    let (shared, queue) = (Arc::clone(shared), Arc::clone(queue));
    let body = move |crew: &Arc<Crew>| {
        while let Some(mut job) = queue.next() {
            let Some(watched) = announce(&shared, &queue, crew, &mut job) else {
                // The store was dropped and nobody watches any more: the job ends as failed.
                return;
            };
            run(&shared, &queue, job, &watched);
            shared.watch.forget(&watched);
            if !crew.goes_on(&watched) {
                return;
            }
            if watched.given_up().is_some() {
                queue.resume();
            }
        }
    };
    Crew::start("transfer", threads, on_start, Box::new(body)).map(drop)
}

/// Tells the watch about a job, and how to end it. `None` when there is no watch any more.
fn announce(
    shared: &Arc<StoreShared>,
    queue: &Arc<TransferQueue>,
    crew: &Arc<Crew>,
    job: &mut Job,
) -> Option<Arc<Watched>> {
    let (waiting, queue) = (Arc::clone(queue), Arc::clone(queue));
    // A new one each time: a load that found no staging buffer is announced again.
    let watched = Arc::new(Watched::default());
    let (place, limit, end): (Place, _, End) = match job {
        Job::Load(load, _) => {
            let waited = load.started.map_or(Duration::ZERO, |since| since.elapsed());
            let (member, limit) = (load.member.share(), shared.wait_limit);
            let end = move |shared: &StoreShared| {
                shared.metrics.loads_failed.add(1);
                queue.load_ended();
                member.end(Ending::Failed(overdue(limit)));
            };
            let left = limit.saturating_sub(waited);
            load.watched = Arc::clone(&watched);
            (load.cache.place(&load.chunk.key), left, Box::new(end))
        }
        Job::Store(store) => {
            let waits = match store.cache.gpu {
                Some(_) => STORE_WAITS_WITH_GPU,
                None => STORE_WAITS,
            };
            let (member, limit) = (store.member.share(), shared.wait_limit * waits);
            let end = move |shared: &StoreShared| {
                shared.metrics.stores_failed.add(1);
                queue.store_ended();
                member.end(Ending::Failed(overdue(limit)));
            };
            store.watched = Arc::clone(&watched);
            (store.cache.place(&store.chunk.key), limit, Box::new(end))
        }
        Job::Use(used) => {
            let end = move |_: &StoreShared| queue.use_ended();
            (used.place, shared.wait_limit, Box::new(end))
        }
    };
    watched.is_at(shared.mount_index(place.1, &place.2));
    let (crew, lost) = (Arc::clone(crew), Arc::clone(crew));
    let end = move |shared: &StoreShared| {
        shared.present.remove(&place);
        end(shared);
        end_waiting(shared, &waiting, &lost);
    };
    let overdue = Overdue {
        end: Box::new(end),
        replace: Box::new(move || crew.replace()),
    };
    shared
        .watch
        .begin(&watched, Instant::now() + limit, overdue)
        .then_some(watched)
}

/// Ends what waits when the last thread was lost and not replaced: nobody would.
fn end_waiting(shared: &StoreShared, queue: &TransferQueue, crew: &Crew) {
    let (loads, stores) = queue.strand_if(|| crew.is_gone());
    shared.metrics.loads_failed.add(loads.len() as u64);
    shared.metrics.stores_failed.add(stores.len() as u64);
    let ended = "all threads are held by the file system";
    for job in loads {
        job.member.end(Ending::Failed(ended.to_owned()));
    }
    for job in stores {
        let job = *job;
        shared.present.remove(&job.cache.place(&job.chunk.key));
        job.member.end(Ending::Failed(ended.to_owned()));
    }
}

fn overdue(limit: Duration) -> String {
    format!(
        "the file system did not answer within {:.3} s",
        limit.as_secs_f64()
    )
}

/// Runs a job. A panic in it is a bug of ours; it costs the chunk, not the thread or the ticket.
fn run(shared: &StoreShared, queue: &Arc<TransferQueue>, job: Job, watched: &Watched) {
    // A job that panics was dropped while unwinding, so its ticket says failed; it is counted out.
    let count_out = match &job {
        Job::Load(..) => TransferQueue::load_ended,
        Job::Store(_) => TransferQueue::store_ended,
        Job::Use(_) => TransferQueue::use_ended,
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| match job {
        Job::Load(job, buffer) => load::run(shared, queue, job, buffer),
        Job::Store(job) => save::run(shared, queue, *job),
        Job::Use(used) => {
            let is_left = used.tell(shared, watched, || queue.loads_wait());
            if watched.end() {
                queue.use_ended();
                if is_left {
                    shared.metrics.touches_failed.add(queue.push_use(*used));
                }
            }
        }
    }));
    // When the watch has ended it there is nothing more to count.
    if outcome.is_err() && watched.end() {
        count_out(queue);
        shared.notices.warn(Topic::Panic, || {
            "a transfer thread panicked; its chunk counts as failed".to_owned()
        });
    }
}
