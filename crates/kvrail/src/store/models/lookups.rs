//! Lookups: one answer, whoever is last.

use super::{LONG, explore};
use crate::chunk::ChunkKey;
use crate::store::lookup::Lookup;
use crate::store::metrics::Metrics;
use crate::sync::{Arc, thread};

fn keys(count: u8) -> Vec<ChunkKey> {
    (0..count)
        .map(|index| ChunkKey::from_bytes(&[index; 32]).unwrap())
        .collect()
}

/// Two threads check three chunks of which the last is missing, the watch gives the lookup up at
/// any moment: there is one answer, two or nothing, it stays, and it is counted once.
#[test]
fn there_is_one_answer() {
    explore(2000, || {
        let metrics = Arc::new(Metrics::default());
        let (ticket, lookup) = Lookup::new(0, &[0.into()], keys(3), 2);
        let lookup = Arc::new(lookup);
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                let (lookup, metrics) = (Arc::clone(&lookup), Arc::clone(&metrics));
                thread::spawn(move || {
                    lookup.check(|index, _| index < 2);
                    lookup.end_one(&metrics, false);
                })
            })
            .collect();
        let (theirs, counted) = (Arc::clone(&lookup), Arc::clone(&metrics));
        threads.push(thread::spawn(move || theirs.give_up(&counted)));
        let answer = ticket.wait(LONG).unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(answer == 0 || answer == 2, "{answer}");
        assert_eq!(ticket.poll(), Some(answer), "the answer changed");
        assert_eq!(metrics.snapshot().lookups, 1);
        assert_eq!(metrics.snapshot().chunks_found, answer as u64);
    });
}

/// As above for a lookup of each chunk: what was found is all there or the answer is "nothing".
#[test]
fn there_is_one_answer_for_each() {
    explore(2000, || {
        let metrics = Arc::new(Metrics::default());
        let (ticket, lookup) = Lookup::of_each(0, &[0.into()], keys(4), 2);
        let lookup = Arc::new(lookup);
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                let (lookup, metrics) = (Arc::clone(&lookup), Arc::clone(&metrics));
                thread::spawn(move || {
                    lookup.check(|index, _| index != 1);
                    lookup.end_one(&metrics, false);
                })
            })
            .collect();
        let (theirs, counted) = (Arc::clone(&lookup), Arc::clone(&metrics));
        threads.push(thread::spawn(move || theirs.give_up(&counted)));
        let answer = ticket.wait(LONG).unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        let whole = [true, false, true, true];
        assert!(answer == whole || answer == [false; 4], "{answer:?}");
        assert_eq!(ticket.poll(), Some(answer), "the answer changed");
        assert_eq!(metrics.snapshot().lookups, 1);
    });
}

/// There was room in the queue for one of two threads only: what it finds counts, whichever of the
/// two is through last.
#[test]
fn a_thread_that_was_refused_costs_no_answer() {
    explore(1000, || {
        let metrics = Arc::new(Metrics::default());
        let (ticket, lookup) = Lookup::new(0, &[0.into()], keys(4), 2);
        let lookup = Arc::new(lookup);
        let worker = thread::spawn({
            let (lookup, metrics) = (Arc::clone(&lookup), Arc::clone(&metrics));
            move || {
                lookup.check(|index, _| index < 1);
                lookup.end_one(&metrics, false);
            }
        });
        lookup.end_one(&metrics, true);
        assert_eq!(ticket.wait(LONG).unwrap(), 1);
        worker.join().unwrap();
    });
}
