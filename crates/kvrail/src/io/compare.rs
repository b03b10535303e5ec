//! Which of two engines does better in a directory, found out by doing it.
//!
//! A chunk-sized file is written and read through either, in turn, in a few rounds that take a
//! fifth of a second together. Times of one round are compared with each other only: what the disk
//! does for others changes from one moment to the next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Folder, IoEngine, IoFile, IoRequest, OpenMode, Operation};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{StagingPool, StagingRange};

/// The time for all of it. Who opens a store waits for it, once for each file system.
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
/// not in time, the first one is the better one, and the comparison says why.
///
/// # Errors
/// [`ErrorKind::Damaged`] when the second one gives other bytes than were written, and what else
/// writing and reading says.
pub fn compare_engines(
    first: &dyn IoEngine,
    second: &dyn IoEngine,
    folder: &Folder,
    file_name: &str,
    direct: bool,
) -> Result<Comparison> {
    let begin = Instant::now();
    let names = [first.name(), second.name()];
    let place = Place {
        folder,
        file_name,
        direct,
        deadline: begin + 10 * BUDGET,
    };
    let pool = StagingPool::new(*FILE_BYTES.end(), *FILE_BYTES.end())?;
    let mut buffer = pool.take(begin)?;
    fill(buffer.as_mut_slice());
    // Twice, for the first one finds everything cold.
    let (cold, buffer) = place.round_trip(first, buffer, PILOT_BYTES)?;
    let (pilot, buffer) = place.round_trip(first, buffer, PILOT_BYTES)?;
    let pilot = pilot.min(cold);
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
            let (time, back) = place.round_trip(engine, buffer, bytes)?;
            buffer = back;
            if let Some(place) = times.get_mut(turn) {
                *place = time;
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

/// Where and how files are written.
struct Place<'a> {
    folder: &'a Folder,
    file_name: &'a str,
    direct: bool,
    deadline: Instant,
}

impl Place<'_> {
    /// Writes and reads `bytes` bytes of the buffer, and compares them. Returns the time of both,
    /// and the buffer.
    fn round_trip(
        &self,
        engine: &dyn IoEngine,
        buffer: StagingRange,
        bytes: usize,
    ) -> Result<(Duration, StagingRange)> {
        let result = self.try_round_trip(engine, buffer, bytes);
        drop(self.folder.remove_file(self.file_name));
        result
    }

    fn try_round_trip(
        &self,
        engine: &dyn IoEngine,
        mut buffer: StagingRange,
        bytes: usize,
    ) -> Result<(Duration, StagingRange)> {
        let mut image = buffer.split_to(bytes);
        let start = Instant::now();
        image = self.transfer(engine, Operation::Write, OpenMode::CreateNew, image)?;
        let written = start.elapsed();
        // A few bytes of each page, so that what is not read shows.
        poison(image.as_mut_slice());
        let start = Instant::now();
        image = self.transfer(engine, Operation::Read, OpenMode::Read, image)?;
        let time = written + start.elapsed();
        if !is_filled(image.as_slice()) {
            let message = format!("{}: what was read is not what was written", engine.name());
            let path = self.folder.path().join(self.file_name);
            return Err(Error::new(ErrorKind::Damaged, message).with_path(&path));
        }
        image.rejoin(buffer).map_err(|_| lost(engine))?;
        Ok((time, image))
    }

    /// Moves an image whole, as the store does.
    fn transfer(
        &self,
        engine: &dyn IoEngine,
        operation: Operation,
        mode: OpenMode,
        mut image: StagingRange,
    ) -> Result<StagingRange> {
        let file = IoFile::open_in(self.folder, self.file_name, mode, self.direct)?;
        let file = Arc::new(file);
        let mut requests = Vec::new();
        let mut offset = 0;
        while !image.is_empty() {
            let buffer = image.split_to(engine.request_bytes(operation));
            let bytes = buffer.len() as u64;
            requests.push(IoRequest {
                operation,
                file: Arc::clone(&file),
                offset,
                buffer,
            });
            offset += bytes;
        }
        let mut moved: Option<StagingRange> = None;
        for handle in engine.submit_all(requests) {
            let part = handle.wait(self.deadline)?;
            match &mut moved {
                None => moved = Some(part),
                Some(moved) => moved.rejoin(part).map_err(|_| lost(engine))?,
            }
        }
        moved.ok_or_else(|| lost(engine))
    }
}

fn lost(engine: &dyn IoEngine) -> Error {
    let message = format!("{} gave back another buffer", engine.name());
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Marks each page with its number, behind bytes that no device compresses to nothing.
fn fill(buffer: &mut [u8]) {
    let mut state = 1_u64;
    for bytes in buffer.chunks_exact_mut(8) {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        bytes.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    mark(buffer, |number| number);
}

fn poison(buffer: &mut [u8]) {
    mark(buffer, |number| !number);
}

fn mark(buffer: &mut [u8], what: impl Fn(u64) -> u64) {
    for (number, page) in buffer.chunks_exact_mut(PAGE_BYTES).enumerate() {
        if let Some(first) = page.first_chunk_mut() {
            *first = what(number as u64).to_le_bytes();
        }
    }
}

fn is_filled(buffer: &[u8]) -> bool {
    let mut pages = buffer.chunks_exact(PAGE_BYTES).enumerate();
    pages.all(|(number, page)| page.first_chunk() == Some(&(number as u64).to_le_bytes()))
}

#[cfg(test)]
mod tests;
