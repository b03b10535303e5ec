//! Clients: threads that take one item after the other and are timed, the same for both sides.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::failure::Failure;

/// What some timed work took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    /// Wall time from the start of the clients until the last item is done.
    pub(crate) seconds: f64,
    /// CPU time of the whole process meanwhile, user and system.
    pub(crate) cpu_seconds: f64,
    /// Per item: from the moment a client takes it until it is done.
    pub(crate) latencies: Vec<Duration>,
}

impl Sample {
    /// Adds work that ran before or after this.
    pub(crate) fn add(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.cpu_seconds += other.cpu_seconds;
        self.latencies.extend(other.latencies);
    }
}

/// Runs `work` for each item on one thread per entry of `states`, each owning its entry.
///
/// # Errors
/// The first failure of `work`; the other clients stop before their next item.
pub(crate) fn run<S: Send>(
    states: &mut [S],
    items: &[u64],
    work: impl Fn(&mut S, u64) -> Result<(), Failure> + Sync,
) -> Result<Sample, Failure> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let latencies = Mutex::new(Vec::with_capacity(items.len()));
    let client = |state: &mut S| -> Result<(), Failure> {
        while !stop.load(Ordering::Relaxed) {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            let start = Instant::now();
            let outcome = work(state, *item);
            let latency = start.elapsed();
            latencies
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .push(latency);
            if outcome.is_err() {
                stop.store(true, Ordering::Relaxed);
                return outcome;
            }
        }
        Ok(())
    };
    let (start, cpu_start) = (Instant::now(), process_cpu_seconds());
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for state in states {
            let thread = std::thread::Builder::new()
                .name("kvrail-client".into())
                .spawn_scoped(scope, || client(state))
                .map_err(|error| Failure::new(format!("start a thread: {error}")))?;
            threads.push(thread);
        }
        for thread in threads {
            thread
                .join()
                .map_err(|_| Failure::new("a client thread panicked"))??;
        }
        Ok::<(), Failure>(())
    })?;
    Ok(Sample {
        seconds: start.elapsed().as_secs_f64(),
        cpu_seconds: process_cpu_seconds() - cpu_start,
        latencies: latencies
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner()),
    })
}

/// Runs `work` once, on this thread.
pub(crate) fn time(work: impl FnOnce() -> Result<(), Failure>) -> Result<Sample, Failure> {
    let (start, cpu_start) = (Instant::now(), process_cpu_seconds());
    work()?;
    Ok(Sample {
        seconds: start.elapsed().as_secs_f64(),
        cpu_seconds: process_cpu_seconds() - cpu_start,
        latencies: Vec::new(),
    })
}

/// Returns the CPU time of this process so far: user and system, all threads, in nanosecond steps
/// where `/proc/self/stat` counts in hundredths of a second.
fn process_cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_and_timed() {
        let items: Vec<u64> = (0..100).collect();
        let mut states = vec![Vec::new(), Vec::new(), Vec::new()];
        let sample = run(&mut states, &items, |done, item| {
            done.push(item);
            Ok(())
        })
        .unwrap();
        let mut done: Vec<u64> = states.concat();
        done.sort_unstable();
        assert_eq!(done, items);
        assert_eq!(sample.latencies.len(), 100);
        assert!(sample.cpu_seconds > 0.0);
    }

    #[test]
    fn a_failure_stops_all_clients() {
        let items: Vec<u64> = (0..1_000_000).collect();
        let outcome = run(&mut [0_u64, 0], &items, |done, item| {
            *done += 1;
            if item == 3 {
                Err(Failure::new("item 3"))
            } else {
                Ok(())
            }
        });
        assert_eq!(outcome.unwrap_err().to_string(), "error: item 3");
    }
}
