//! Tickets and batches: every waiter is woken, every chunk ends once.

use super::{LONG, explore};
use crate::store::batch::{Ending, start_load};
use crate::store::ticket::LookupTicket;
use crate::sync::{Arc, thread};

/// Two threads wait for one ticket while a third gives the result: no wake-up is lost.
#[test]
fn every_waiter_is_woken() {
    explore(2000, || {
        let (issuer, ticket) = LookupTicket::issue();
        let ticket = Arc::new(ticket);
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let ticket = Arc::clone(&ticket);
                thread::spawn(move || ticket.wait(LONG).unwrap())
            })
            .collect();
        thread::spawn(move || issuer.complete(7));
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), 7);
        }
    });
}

/// A thread and the watch both end one chunk, the job of the other is dropped: each ends once, the
/// ticket is done when both are, and its report does not change afterwards.
#[test]
fn every_chunk_ends_once_and_the_report_stays() {
    explore(2000, || {
        let (ticket, mut members) = start_load(2);
        let dropped = members.pop().unwrap();
        let job = members.pop().unwrap();
        let watched = job.share();
        let ends = [
            thread::spawn(move || job.end(Ending::Loaded)),
            thread::spawn(move || watched.end(Ending::Failed("given up".into()))),
            thread::spawn(move || drop(dropped)),
        ];
        let report = ticket.wait(LONG).unwrap();
        for end in ends {
            end.join().unwrap();
        }
        assert_eq!(report.loaded + report.failed.len(), 2);
        assert!(report.failed.contains(&1));
        assert_eq!(ticket.poll(), Some(report));
    });
}

/// Whoever holds a ticket may drop it at any moment; the work ends all the same.
#[test]
fn a_ticket_is_dropped_at_any_moment() {
    explore(1000, || {
        let (ticket, members) = start_load(2);
        let holder = thread::spawn(move || {
            drop(ticket.poll());
            drop(ticket);
        });
        let work: Vec<_> = members
            .into_iter()
            .map(|member| thread::spawn(move || member.end(Ending::Loaded)))
            .collect();
        for thread in work {
            thread.join().unwrap();
        }
        holder.join().unwrap();
    });
}
