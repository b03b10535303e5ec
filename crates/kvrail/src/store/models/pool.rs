//! The staging pool: no buffer twice, none leaked, whoever waits gets one.

use std::time::Instant;

use super::{LONG, explore};
use crate::chunk::PAGE_BYTES;
use crate::memory::StagingPool;
use crate::sync::thread;

/// Three threads share two buffers, each splits its own and drops the parts in another thread: what
/// it wrote is still there, so nobody else had it; in the end all buffers are back. A wake-up that
/// got lost would be a deadlock.
#[test]
fn a_buffer_belongs_to_one_holder_and_comes_back() {
    explore(1500, || {
        let pool = StagingPool::new(4 * PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
        let holders: Vec<_> = (1..=3_u8)
            .map(|mark| {
                let pool = pool.clone();
                thread::spawn(move || {
                    let mut rest = pool.take(Instant::now() + LONG).unwrap();
                    let mut head = rest.split_to(PAGE_BYTES);
                    head.as_mut_slice().fill(mark);
                    let other = thread::spawn(move || {
                        rest.as_mut_slice().fill(mark);
                        thread::yield_now();
                        assert!(rest.as_slice().iter().all(|byte| *byte == mark));
                    });
                    thread::yield_now();
                    assert!(head.as_slice().iter().all(|byte| *byte == mark));
                    drop(head);
                    other.join().unwrap();
                })
            })
            .collect();
        for holder in holders {
            holder.join().unwrap();
        }
        assert_eq!(pool.free_count(), 2);
    });
}

/// Stores that ask at the same time never take the buffer that is kept for loads.
#[test]
fn the_last_buffer_is_kept_for_loads() {
    explore(1000, || {
        let pool = StagingPool::new(2 * PAGE_BYTES, PAGE_BYTES).unwrap();
        let stores: Vec<_> = (0..3)
            .map(|_| {
                let pool = pool.clone();
                thread::spawn(move || pool.try_take(1))
            })
            .collect();
        let load = pool.take(Instant::now()).unwrap();
        let taken: Vec<_> = stores
            .into_iter()
            .filter_map(|store| store.join().unwrap())
            .collect();
        assert!(taken.len() <= 1);
        drop((load, taken));
        assert_eq!(pool.free_count(), 2);
    });
}
