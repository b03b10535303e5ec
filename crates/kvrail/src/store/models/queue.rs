//! The queue of transfers: work reaches a worker, loads go first, closing ends everything.

use std::time::Instant;

use shuttle::rand::{Rng, thread_rng};

use super::{LONG, explore, kv_cache};
use crate::chunk::{ChunkKey, ChunkRef};
use crate::store::batch::{Ending, start_load, start_store};
use crate::store::cache_shared::CacheShared;
use crate::store::capacity::PendingUse;
use crate::store::gpu::Route;
use crate::store::load_job::LoadJob;
use crate::store::queue::{Job, TransferQueue};
use crate::store::save::StoreJob;
use crate::store::staged::{Staged, StagedImage};
use crate::store::ticket::{LoadTicket, StoreTicket};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Arc, thread};

fn chunk() -> ChunkRef {
    ChunkRef {
        key: ChunkKey::from_bytes(&[7; 32]).unwrap(),
        parent: None,
    }
}

pub(super) fn load(cache: &Arc<CacheShared>) -> (LoadTicket, LoadJob) {
    let (ticket, mut members) = start_load(1);
    let job = LoadJob {
        cache: Arc::clone(cache),
        chunk: chunk(),
        payload: 0..cache.format.payload_bytes(),
        blocks: vec![0],
        after: None,
        member: members.pop().unwrap(),
        submitted: std::time::Instant::now(),
        started: None,
        route: Route::Posix,
        cufile_error: None,
        watched: Arc::default(),
        used_at: None,
        served_by: std::sync::Mutex::default(),
    };
    (ticket, job)
}

/// A store, with a buffer of the pool.
fn store(cache: &Arc<CacheShared>) -> (StoreTicket, StoreJob) {
    let (ticket, mut members) = start_store(1);
    let job = StoreJob {
        cache: Arc::clone(cache),
        chunk: chunk(),
        image: Staged::Host(StagedImage::complete(cache.pool.try_take(0).unwrap())),
        member: members.pop().unwrap(),
        submitted: Instant::now(),
        watched: Arc::default(),
        used_at: None,
    };
    (ticket, job)
}

/// Works until the queue is closed. A load without a buffer is put back, as the store does.
fn work(queue: &TransferQueue) {
    while let Some(job) = queue.next() {
        match job {
            Job::Load(load, None) => {
                // The store waits for a buffer here, for a while.
                thread::yield_now();
                queue.give_back(load);
            }
            Job::Load(load, buffer) => {
                drop(buffer);
                queue.load_ended();
                load.member.end(Ending::Loaded);
            }
            Job::Store(store) => {
                let StoreJob { image, member, .. } = *store;
                drop(image);
                queue.store_ended();
                member.end(Ending::Stored);
            }
            Job::Use(_) => queue.use_ended(),
        }
    }
}

/// One worker is kept by a store that does not end before the next one does, as on a path that
/// hangs, and somebody waits for all stores. The next store still reaches the other worker: nobody
/// but a worker may swallow the news of it.
#[test]
fn a_store_reaches_a_worker_while_somebody_waits_for_all() {
    explore(1000, || {
        let cache = kv_cache(2);
        let queue = Arc::new(TransferQueue::default());
        let (first, job) = store(&cache);
        assert!(queue.push_store(job));
        let Some(Job::Store(hangs)) = queue.next() else {
            panic!("the store was pushed");
        };
        let workers = thread::spawn({
            let queue = Arc::clone(&queue);
            move || work(&queue)
        });
        let flusher = thread::spawn({
            let queue = Arc::clone(&queue);
            move || assert!(queue.wait_for_stores(LONG))
        });
        let (second, job) = store(&cache);
        assert!(queue.push_store(job));
        assert_eq!(second.wait(LONG).unwrap().stored, 1);
        queue.store_ended();
        hangs.member.end(Ending::Stored);
        flusher.join().unwrap();
        assert_eq!(first.wait(LONG).unwrap().stored, 1);
        queue.close();
        workers.join().unwrap();
    });
}

/// Uses, a store and two workers: nothing that was pushed is left, and one use is told at a time.
#[test]
fn uses_are_told_one_at_a_time_and_all() {
    explore(1000, || {
        let cache = kv_cache(2);
        let queue = Arc::new(TransferQueue::default());
        let (told, telling) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (queue, told, telling) =
                    (Arc::clone(&queue), Arc::clone(&told), Arc::clone(&telling));
                thread::spawn(move || {
                    while let Some(job) = queue.next() {
                        match job {
                            Job::Use(_) => {
                                assert_eq!(telling.fetch_add(1, Ordering::SeqCst), 0);
                                thread::yield_now();
                                telling.fetch_sub(1, Ordering::SeqCst);
                                queue.use_ended();
                                told.fetch_add(1, Ordering::SeqCst);
                            }
                            Job::Store(store) => {
                                queue.store_ended();
                                store.member.end(Ending::Stored);
                            }
                            Job::Load(..) => panic!("nothing is loaded"),
                        }
                    }
                })
            })
            .collect();
        let (ticket, job) = store(&cache);
        for _ in 0..2 {
            let used = PendingUse {
                place: cache.place(&chunk().key),
                chunk: chunk(),
                parts: vec![cache.part],
                at: 0,
            };
            assert_eq!(queue.push_use(used), 0);
        }
        assert!(queue.push_store(job));
        assert_eq!(ticket.wait(LONG).unwrap().stored, 1);
        while told.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        queue.close();
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

/// Loads and stores come from two threads: a worker that asks when a load waits gets a load.
#[test]
fn loads_go_first() {
    explore(1000, || {
        let cache = kv_cache(4);
        let queue = Arc::new(TransferQueue::default());
        let (is_there, mut tickets) = (Arc::new(AtomicBool::new(false)), Vec::new());
        let stores: Vec<_> = (0..2)
            .map(|_| {
                let (ticket, job) = store(&cache);
                tickets.push(ticket);
                job
            })
            .collect();
        let pushes = [
            thread::spawn({
                let queue = Arc::clone(&queue);
                move || {
                    for job in stores {
                        assert!(queue.push_store(job));
                    }
                }
            }),
            thread::spawn({
                let (queue, is_there) = (Arc::clone(&queue), Arc::clone(&is_there));
                let (_, job) = load(&cache);
                move || {
                    assert!(queue.push_loads(vec![job]).is_empty());
                    is_there.store(true, Ordering::SeqCst);
                }
            }),
        ];
        let mut loaded = false;
        for _ in 0..3 {
            let must_load = is_there.load(Ordering::SeqCst) && !loaded;
            match queue.next().unwrap() {
                Job::Load(..) => loaded = true,
                Job::Store(_) => assert!(!must_load, "a store went before a load"),
                Job::Use(_) => panic!("nothing was loaded"),
            }
        }
        assert!(loaded);
        for push in pushes {
            push.join().unwrap();
        }
    });
}

/// A store holds the only buffer, and a load waits for it. With one worker or two, both end.
#[test]
fn a_load_without_a_buffer_never_keeps_the_store_that_holds_it() {
    for workers in 1..=2 {
        explore(500, move || {
            let cache = kv_cache(1);
            let queue = Arc::new(TransferQueue::default());
            let (stored, store) = store(&cache);
            let (loaded, load) = load(&cache);
            let workers: Vec<_> = (0..workers)
                .map(|_| {
                    let queue = Arc::clone(&queue);
                    thread::spawn(move || work(&queue))
                })
                .collect();
            let pusher = thread::spawn({
                let queue = Arc::clone(&queue);
                move || assert!(queue.push_store(store))
            });
            assert!(queue.push_loads(vec![load]).is_empty());
            assert_eq!(loaded.wait(LONG).unwrap().loaded, 1);
            assert_eq!(stored.wait(LONG).unwrap().stored, 1);
            pusher.join().unwrap();
            queue.close();
            for worker in workers {
                worker.join().unwrap();
            }
            assert_eq!(cache.pool.free_count(), 1);
        });
    }
}

/// The queue is closed while others push and work: every ticket ends, as done or as failed, every
/// worker returns, whoever waits for stores goes on, and every buffer is back.
#[test]
fn closing_at_any_moment_ends_everything() {
    explore(1000, || {
        let cache = kv_cache(3);
        let queue = Arc::new(TransferQueue::default());
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || work(&queue))
            })
            .collect();
        let (first, first_job) = store(&cache);
        let (second, second_job) = store(&cache);
        let (loaded, load_job) = load(&cache);
        threads.push(thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                queue.push_store(first_job);
                queue.push_store(second_job);
            }
        }));
        threads.push(thread::spawn({
            let queue = Arc::clone(&queue);
            move || drop(queue.push_loads(vec![load_job]))
        }));
        threads.push(thread::spawn({
            let queue = Arc::clone(&queue);
            move || assert!(queue.wait_for_stores(LONG))
        }));
        queue.close();
        for ticket in [first, second] {
            let report = ticket.wait(LONG).unwrap();
            assert_eq!(report.stored + report.failed, 1);
        }
        let report = loaded.wait(LONG).unwrap();
        assert_eq!(report.loaded + report.failed.len(), 1);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(cache.pool.free_count(), 3);
    });
}

/// The last worker is lost while a load comes, and one comes back at the same time or never: the
/// load is done, or ends as failed, but does not wait for nobody.
#[test]
fn no_load_waits_for_workers_that_are_gone() {
    explore(1000, || {
        let cache = kv_cache(1);
        let (queue, gone) = (Arc::new(TransferQueue::default()), Arc::default());
        let (ticket, job) = load(&cache);
        let lost = thread::spawn({
            let (queue, gone): (_, Arc<AtomicBool>) = (Arc::clone(&queue), Arc::clone(&gone));
            move || {
                gone.store(true, Ordering::SeqCst);
                drop(queue.strand_if(|| gone.load(Ordering::SeqCst)));
                thread::spawn(move || {
                    if thread_rng().gen_bool(0.5) {
                        return;
                    }
                    gone.store(false, Ordering::SeqCst);
                    queue.resume();
                    work(&queue);
                })
            }
        });
        drop(queue.push_loads(vec![job]));
        let report = ticket.wait(LONG).unwrap();
        assert_eq!(report.loaded + report.failed.len(), 1);
        queue.close();
        lost.join().unwrap().join().unwrap();
    });
}
