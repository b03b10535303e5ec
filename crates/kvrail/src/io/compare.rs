//! Which of two engines does better in a directory, found out by doing it.
//!
//! A chunk-sized file is written and read through either, in turn, in a few rounds that take a
//! fifth of a second together. Times of one round are compared with each other only: what the disk
//! does for others changes from one moment to the next.

use std::time::{Duration, Instant};

use super::trial::{Trial, fill};
use super::{Folder, IoEngine};
use crate::chunk::PAGE_BYTES;
use crate::error::Result;
use crate::memory::StagingPool;

/// The time for all of it: loads and stores of others are disturbed for no longer.
const BUDGET: Duration = Duration::from_millis(200);
/// What one transfer of the file should take, so that all rounds fit.
const TRANSFER: Duration = Duration::from_millis(8);
/// The file, at least and at most: of less than one request nothing can be learnt, and 16 MiB are a
/// chunk of a large model.
const FILE_BYTES: std::ops::RangeInclusive<usize> = (4 << 20)..=(16 << 20);
/// The first file, which shows how large the others can be.
const PILOT_BYTES: usize = 1 << 20;
/// Rounds that count, at least and at most.
const ROUNDS: std::ops::RangeInclusive<usize> = 5..=9;
/// How much better than the first the second has to be: less is not worth leaving what works
/// everywhere.
const MARGIN: f64 = 1.05;
/// Rounds that the second may lose all the same.
const LOST_MAX: usize = 1;

/// How two engines compare.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The time that the first one takes over that of the second, of each round that counts.
    pub ratios: Vec<f64>,
    /// Whether the second one is better: by a margin, and in all rounds but one.
    pub second_is_better: bool,
    /// The same in words.
    pub reason: String,
}

impl Comparison {
    fn undecided(reason: impl Into<String>) -> Self {
        Self {
            ratios: Vec::new(),
            second_is_better: false,
            reason: reason.into(),
        }
    }

    fn of(mut ratios: Vec<f64>, names: [&str; 2]) -> Self {
        let [first, second] = names;
        let count = ratios.len();
        if count < *ROUNDS.start() {
            let least = ROUNDS.start();
            return Self::undecided(format!(
                "too slow for {least} rounds in {BUDGET:?}, and {first} works everywhere"
            ));
        }
        let won = ratios.iter().filter(|ratio| **ratio > 1.0).count();
        ratios.sort_by(f64::total_cmp);
        let median = ratios.get(count / 2).copied().unwrap_or_default();
        let second_is_better = median >= MARGIN && won + LOST_MAX >= count;
        let reason = format!(
            "{second} takes 1/{median:.2} of the time of {first} here, quicker in {won} of {count} rounds{}",
            match second_is_better {
                true => String::new(),
                false => format!(": no reason to leave {first}"),
            }
        );
        Self {
            ratios,
            second_is_better,
            reason,
        }
    }
}

/// Compares two engines in a folder, with O_DIRECT or without.
///
/// `file_name` must be unique to the caller; the file is removed again. Where it cannot be told, or
/// not in time, the first one is the better one, and the comparison says why. It may run beside
/// loads and stores: they disturb both engines alike, for each round has both of them.
///
/// # Errors
/// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) when the second one gives other bytes than
/// were written, [`ErrorKind::Closed`](crate::ErrorKind::Closed) soon after `goes_on` says no, and
/// what else writing and reading says.
pub fn compare_engines(
    first: &dyn IoEngine,
    second: &dyn IoEngine,
    folder: &Folder,
    file_name: &str,
    direct: bool,
    goes_on: &dyn Fn() -> bool,
) -> Result<Comparison> {
    let begin = Instant::now();
    let names = [first.name(), second.name()];
    let trial = Trial {
        folder,
        file_name,
        direct,
        deadline: begin + 10 * BUDGET,
        goes_on,
    };
    let pool = StagingPool::new(*FILE_BYTES.end(), *FILE_BYTES.end())?;
    let mut buffer = pool.take(begin)?;
    fill(buffer.as_mut_slice());
    // Twice, for the first one finds everything cold.
    let (cold, buffer) = trial.round_trip(first, buffer, PILOT_BYTES)?;
    let (pilot, buffer) = trial.round_trip(first, buffer, PILOT_BYTES)?;
    let pilot = pilot.sum().min(cold.sum());
    let scale = TRANSFER.as_secs_f64() * 2.0 / pilot.as_secs_f64().max(1e-6);
    let bytes = (PILOT_BYTES as f64 * scale) as usize / PAGE_BYTES * PAGE_BYTES;
    if bytes < *FILE_BYTES.start() {
        let mebibytes = FILE_BYTES.start() >> 20;
        return Ok(Comparison::undecided(format!(
            "{mebibytes} MiB are not written and read in {:?}: the engine is not what it waits for",
            2 * TRANSFER
        )));
    }
    let bytes = bytes.min(*FILE_BYTES.end());
    // What it cannot do with the memory is no reason not to try it.
    drop(second.prepare(&pool));
    let mut buffer = buffer;
    let mut ratios = Vec::new();
    let mut longest = Duration::ZERO;
    for number in 0..=*ROUNDS.end() {
        let round = Instant::now();
        if begin.elapsed() + longest > BUDGET {
            break;
        }
        let mut times = [Duration::ZERO; 2];
        // Each of them first in every other round: neither always finds the disk as it was left.
        for turn in [number % 2, 1 - number % 2] {
            let engine = if turn == 0 { first } else { second };
            let (times_of_one, back) = trial.round_trip(engine, buffer, bytes)?;
            buffer = back;
            if let Some(time) = times.get_mut(turn) {
                *time = times_of_one.sum();
            }
        }
        longest = longest.max(round.elapsed());
        let [first_time, second_time] = times;
        // The first round makes both warm.
        if number > 0 {
            ratios.push(first_time.as_secs_f64() / second_time.as_secs_f64().max(1e-9));
        }
    }
    Ok(Comparison::of(ratios, names))
}

#[cfg(test)]
mod tests;
