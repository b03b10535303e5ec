//! The same prompts with nothing around the system calls: files are read and written whole, and
//! which are there is known without a look.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use indicatif::ProgressBar;

use crate::bench::clients::Sample;
use crate::bench::plan::Plan;
use crate::bench::raw::Raw;
use crate::failure::Failure;
use crate::workload::Request;

/// The raw side of prompts.
pub(super) struct Bare {
    raw: Raw,
    chunks: Mutex<Chunks>,
}

#[derive(Debug, Default)]
struct Chunks {
    present: HashSet<u64>,
    /// Present, or being written by somebody.
    taken: HashSet<u64>,
}

impl Bare {
    /// Makes its directories.
    pub(super) fn new(
        plan: &Plan,
        directories: Vec<PathBuf>,
        file_bytes: usize,
    ) -> Result<Self, Failure> {
        Ok(Self {
            raw: Raw::new(directories, file_bytes, plan.threads, plan.direct)?,
            chunks: Mutex::default(),
        })
    }

    /// Reads what is there of each prompt and writes the rest, a prompt at a time on each thread.
    pub(super) fn answer(
        &mut self,
        requests: &[Request],
        bar: &ProgressBar,
    ) -> Result<Sample, Failure> {
        let numbers: Vec<u64> = (0..requests.len() as u64).collect();
        let chunks = &self.chunks;
        let locked = || chunks.lock().unwrap_or_else(PoisonError::into_inner);
        self.raw.run(&numbers, |hand, number| {
            let Some(request) = requests.get(number as usize) else {
                return Err(Failure::new(format!("there is no prompt {number}")));
            };
            let found = {
                let chunks = locked();
                let present = |chunk: &&u64| chunks.present.contains(chunk);
                request.chunks.iter().take_while(present).count()
            };
            let (there, rest) = request.chunks.split_at(found);
            there.iter().try_for_each(|chunk| hand.load(*chunk))?;
            for chunk in rest {
                if locked().taken.insert(*chunk) {
                    hand.store(*chunk)?;
                    locked().present.insert(*chunk);
                }
            }
            bar.inc(1);
            Ok(())
        })
    }
}
