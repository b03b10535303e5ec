//! Who may write to the blocks of a load: its thread, or after it was given up nobody of ours.

use std::time::Instant;

use super::{LONG, explore, kv_cache};
use crate::store::batch::Ending;
use crate::store::crew::Crew;
use crate::store::models::queue::load;
use crate::store::watch::{Overdue, Watch, Watched};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, thread};

const BYTES: usize = 64;

/// A load's thread claims its blocks, writes them in two steps and ends; the watch gives it up at
/// any moment, and then the blocks belong to somebody else, who writes them, too. Whoever got the
/// blocks never finds a byte of the load in them, and the ticket says what happened.
#[test]
fn a_load_that_was_given_up_writes_nothing() {
    explore(2000, || {
        let cache = kv_cache(1);
        let region = cache.regions[0].clone();
        let (ticket, job) = load(&cache);
        let watch = Arc::new(Watch::default());
        let watched: Arc<Watched> = Arc::clone(&job.watched);
        let member = job.member.share();
        let overdue = Overdue {
            end: Box::new(|_| ()),
            replace: Box::new(|| true),
        };
        assert!(watch.begin(&watched, Instant::now(), overdue));
        let (loader, theirs) = (Arc::clone(&watch), region.clone());
        let loader = thread::spawn(move || {
            if watched.claim() {
                theirs.copy_in(0, &[1; BYTES / 2]).unwrap();
                thread::yield_now();
                theirs.copy_in(BYTES / 2, &[1; BYTES / 2]).unwrap();
                watched.release();
            }
            if watched.end() {
                job.member.end(Ending::Loaded);
            }
            loader.forget(&watched);
        });
        let looker = thread::spawn(move || {
            if !watch.take_overdue(Instant::now() + LONG).is_empty() {
                member.end(Ending::Failed("given up".into()));
            }
        });
        let report = ticket.wait(LONG).unwrap();
        let mut found = [0; BYTES];
        if report.failed.is_empty() {
            region.copy_out(0, &mut found).unwrap();
            assert_eq!(found, [1; BYTES]);
        } else {
            region.copy_in(0, &[2; BYTES]).unwrap();
            loader.join().unwrap();
            region.copy_out(0, &mut found).unwrap();
            assert_eq!(found, [2; BYTES], "written after it was given up");
            looker.join().unwrap();
            return;
        }
        loader.join().unwrap();
        looker.join().unwrap();
    });
}

/// Jobs begin while the watch is closed: each is either seen by the watch, which goes on until it
/// has ended, or refused. None is left to itself.
#[test]
fn no_job_begins_unwatched() {
    explore(1000, || {
        let watch = Arc::new(Watch::default());
        let jobs: Vec<_> = (0..2)
            .map(|_| {
                let watch = Arc::clone(&watch);
                thread::spawn(move || {
                    let job = Arc::new(Watched::default());
                    let overdue = Overdue {
                        end: Box::new(|_| ()),
                        replace: Box::new(|| true),
                    };
                    // It hangs: nothing but the watch ends it.
                    watch.begin(&job, Instant::now(), overdue).then_some(job)
                })
            })
            .collect();
        let looker = thread::spawn({
            let watch = Arc::clone(&watch);
            move || {
                while watch.wait() {
                    drop(watch.take_overdue(Instant::now() + LONG));
                }
            }
        });
        watch.close();
        looker.join().unwrap();
        for job in jobs {
            if let Some(job) = job.join().unwrap() {
                assert!(!job.end(), "nobody looked after it");
            }
        }
    });
}

/// Threads are replaced and come back at the same time: there are never more than are allowed.
#[test]
fn a_crew_stays_within_its_bound() {
    explore(500, || {
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (crews, theirs) = (crate::sync::channel::bounded(64), Arc::clone(&most));
        let (sender, receiver) = crews;
        let body = move |crew: &Arc<Crew>| {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            theirs.fetch_max(now, Ordering::SeqCst);
            drop(sender.try_send(Arc::clone(crew)));
            thread::yield_now();
            running.fetch_sub(1, Ordering::SeqCst);
        };
        let on_start: Arc<dyn Fn() + Send + Sync> = Arc::new(|| ());
        Crew::start("model", 1, &on_start, Box::new(body)).unwrap();
        let crew = (&receiver).next().unwrap();
        let replacing: Vec<_> = (0..5)
            .map(|_| {
                let crew = Arc::clone(&crew);
                thread::spawn(move || crew.replace())
            })
            .collect();
        let replaced: usize = replacing
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum();
        assert_eq!(replaced, 4, "four for each that was asked for");
        assert!(crew.is_gone(), "the fifth found no place");
        assert!(most.load(Ordering::SeqCst) <= 5);
    });
}
