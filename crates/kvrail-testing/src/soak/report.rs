//! The plan of a run, and how it went.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::{LOOKUP_LIMIT_SECONDS, MAX_SIZE, WAIT_LIMIT_SECONDS};

/// Lines about what must not be that are printed.
const LINES_MAX: usize = 50;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How long.
    pub duration: Duration,
    /// Where chance comes from.
    pub seed: u64,
    /// Processes that share the store.
    pub processes: usize,
    /// A folder for the run; it is not removed.
    pub folder: PathBuf,
    /// The program that workers run, with the argument `--worker PATH`.
    pub program: PathBuf,
    /// The program `fault-fs`.
    pub fault_fs: PathBuf,
}

/// How a run went.
#[derive(Debug, Default)]
pub struct Report {
    /// Commands by their answers.
    pub answers: BTreeMap<String, u64>,
    /// Operations of the file system that failed on purpose.
    pub faults: u64,
    /// Processes that were killed.
    pub kills: u64,
    /// Janitors among them that were killed because they were that.
    pub janitors_killed: u64,
    /// How long the longest of these had no successor.
    pub longest_take_over: Duration,
    /// Chunks removed by a stranger.
    pub removed: u64,
    /// Chunks evicted by reason, as the store's log says.
    pub evicted: BTreeMap<String, u64>,
    /// Chunks that went without a trace while faults or deaths explain it.
    pub lost_to_faults: u64,
    /// Looks at what lies in the directory, all processes standing still.
    pub looks: u64,
    /// The most bytes that were seen.
    pub highest: u64,
    /// Times that each chunk was compared with what is known of it.
    pub audits: u64,
    /// Bytes in the directory at the end, and how far the account was off.
    pub left: (u64, u64),
    /// Chunks that were there in the end, and were found and loaded.
    pub survived: u64,
    /// Longest command of each kind in milliseconds.
    pub longest: BTreeMap<String, u64>,
    /// What must not be: wrong bytes, ghosts, chunks lost, a lease that nobody takes over.
    pub wrong: Vec<String>,
    /// Looks that found more than there may be.
    pub over: Vec<String>,
    /// What should be gone: temp files, leases, records.
    pub leaked: Vec<String>,
    /// Why there were no faults, if there were none.
    pub without_faults: Option<String>,
}

impl Report {
    /// Returns whether everything was as it must be.
    pub fn is_good(&self) -> bool {
        let bad = [&self.wrong, &self.over, &self.leaked];
        bad.iter().all(|lines| lines.is_empty()) && self.operations() > 0
    }

    /// Returns the number of commands.
    pub fn operations(&self) -> u64 {
        self.answers.values().sum()
    }

    /// Returns how many chunks were evicted.
    pub fn evictions(&self) -> u64 {
        self.evicted.values().sum()
    }

    /// Returns the report as text.
    pub fn text(&self, plan: &Plan) -> String {
        let mut lines = vec![format!(
            "seed {}: {} processes for {:?}",
            plan.seed, plan.processes, plan.duration
        )];
        if let Some(reason) = &self.without_faults {
            lines.push(format!("without faults: {reason}"));
        }
        let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
        lines.push(format!(
            "operations {}, faults injected {}, killed {}, removed by a stranger {}, wrong: {}, over the limit: \
             {}, leaked: {}",
            self.operations(),
            self.faults,
            self.kills,
            self.removed,
            self.wrong.len(),
            self.over.len(),
            self.leaked.len()
        ));
        lines.push(format!(
            "evicted {} {:?}, gone without a trace under faults: {}; {} looks at all chunks",
            self.evictions(),
            self.evicted,
            self.lost_to_faults,
            self.audits
        ));
        lines.push(format!(
            "{} looks at the usage, at most {:.1}% of max_size; in the end {} bytes, account {:.2}% off",
            self.looks,
            percent(self.highest, MAX_SIZE),
            self.left.0,
            percent(self.left.1, self.left.0)
        ));
        lines.push(format!(
            "survived: {} chunks; {} janitors killed, replaced after {:?} at most",
            self.survived, self.janitors_killed, self.longest_take_over
        ));
        for (answer, count) in &self.answers {
            lines.push(format!("  {answer}: {count}"));
        }
        for (name, milliseconds) in &self.longest {
            let limit = match name.as_str() {
                "store" => format!("limit {} s", 2.0 * WAIT_LIMIT_SECONDS),
                "load" => format!("limit {WAIT_LIMIT_SECONDS} s"),
                "lookup" => format!("limit {LOOKUP_LIMIT_SECONDS} s"),
                _ => "no limit".to_owned(),
            };
            lines.push(format!("  longest {name}: {milliseconds} ms, {limit}"));
        }
        for (word, found) in [
            ("WRONG", &self.wrong),
            ("OVER", &self.over),
            ("LEAKED", &self.leaked),
        ] {
            let found = found.iter().take(LINES_MAX);
            lines.extend(found.map(|line| format!("  {word}: {line}")));
        }
        lines.join("\n") + "\n"
    }
}
