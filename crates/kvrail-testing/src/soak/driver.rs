//! The process that drives a run.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::faults::SCRIPTS;
use super::model::{Finding, Model};
use super::outside::{Look, Outside};
use super::process::{COMMAND_LIMIT, Line, Operation, Process};
use super::report::{Plan, Report};
use super::shared_memory::SharedMemory;
use super::trail::Trail;
use super::worker::key;
use super::{CHUNKS, MAX_SIZE, TAKE_OVER_LIMIT};
use crate::mount::FaultMount;
use crate::random::Random;

/// How long an eviction may take to be written down after the file is gone, without faults.
const TRACE_LIMIT: Duration = Duration::from_secs(2);
/// Share of the limit that a count may be off while files that are there are said to be missing.
const HIDDEN_PART: u64 = 20;

/// A run under way.
pub(super) struct Driver {
    pub(super) plan: Plan,
    random: Random,
    mounted: Option<FaultMount>,
    pub(super) outside: Outside,
    pub(super) model: Model,
    pub(super) trail: Trail,
    pub(super) report: Report,
    processes: Vec<Process>,
    sender: Sender<Line>,
    lines: Receiver<Line>,
    started: u64,
    /// Whether bytes may change on their way to the disk under the rules in force, or did lately.
    is_damaging: bool,
    /// Whether all goes well.
    is_healthy: bool,
    /// Files were said to be missing since the account was last seen to be right.
    is_misled: bool,
}

/// When something is due next.
struct Due {
    at: Instant,
    from: u64,
    spread: u64,
}

impl Due {
    /// Every `from` to `from + spread` milliseconds.
    fn every(from: u64, spread: u64) -> Self {
        let at = Instant::now() + Duration::from_millis(from);
        Self { at, from, spread }
    }

    fn is_now(&mut self, random: &mut Random) -> bool {
        let is_now = Instant::now() >= self.at;
        if is_now {
            let pause = self.from + random.below(self.spread);
            self.at = Instant::now() + Duration::from_millis(pause);
        }
        is_now
    }
}

/// Runs a plan.
///
/// # Panics
/// When the machine does not let it run at all.
pub fn run(plan: Plan) -> Report {
    std::fs::create_dir_all(&plan.folder).unwrap();
    let _memory = SharedMemory::of_run(&plan.folder);
    let mounted = FaultMount::new(&plan.fault_fs, &plan.folder, plan.seed);
    let (mounted, without_faults) = match mounted {
        Ok(mounted) => (Some(mounted), None),
        Err(reason) => (None, Some(reason)),
    };
    let source = plan.folder.join("source");
    std::fs::create_dir_all(&source).unwrap();
    let outside = Outside::new(&source);
    let (sender, lines) = channel();
    let mut driver = Driver {
        random: Random::new(plan.seed),
        plan,
        mounted,
        model: Model::default(),
        trail: Trail::new(outside.namespace()),
        outside,
        report: Report {
            without_faults,
            ..Report::default()
        },
        processes: Vec::new(),
        sender,
        lines,
        started: 0,
        is_damaging: false,
        is_healthy: true,
        is_misled: false,
    };
    for number in 0..driver.plan.processes {
        let process = driver.start(number);
        driver.processes.push(process);
    }
    driver.drive();
    driver.finish();
    super::check::check(&mut driver);
    let mut report = driver.report;
    report.faults = driver.mounted.as_ref().map_or(0, FaultMount::hits);
    report.evicted = driver.trail.by_reason().clone();
    report.wrong.append(&mut driver.model.wrong);
    report
}

impl Driver {
    /// Returns the store's path, where faults happen.
    pub(super) fn store(&self) -> std::path::PathBuf {
        let mounted = self.mounted.as_ref();
        mounted.map_or(self.outside.root(), FaultMount::path).into()
    }

    /// Starts a worker; every fifth sees the folder as another host does, without faults.
    fn start(&mut self, number: usize) -> Process {
        self.started += 1;
        let path = if number % 5 == 4 {
            self.outside.root().to_path_buf()
        } else {
            self.store()
        };
        let name = (number, self.started);
        Process::start(&self.plan.program, &path, name, self.sender.clone())
    }

    fn drive(&mut self) {
        let end = Instant::now() + self.plan.duration;
        let mut fault = Due::every(1000, 1);
        let mut kill = Due::every(500, 3000);
        let mut stranger = Due::every(100, 200);
        let mut look = Due::every(20, 300);
        let mut scrub = Due::every(500, 1500);
        let mut collect = Due::every(3000, 6000);
        let mut exit = Due::every(2000, 4000);
        let mut janitor = Due::every(4000, 12_000);
        while Instant::now() < end {
            for number in 0..self.processes.len() {
                if self.processes[number].is_idle() {
                    self.command(number);
                }
            }
            self.receive(Duration::from_millis(20));
            if fault.is_now(&mut self.random) {
                let milliseconds = self.change_fault();
                fault.at = Instant::now() + Duration::from_millis(milliseconds);
            }
            if kill.is_now(&mut self.random) {
                let number = self.random.below(self.processes.len() as u64) as usize;
                self.kill(number);
            }
            if stranger.is_now(&mut self.random) {
                let index = self.random.below(CHUNKS);
                self.remove(index);
            }
            if look.is_now(&mut self.random) {
                self.look();
            }
            if scrub.is_now(&mut self.random) {
                let text = format!("verify {}", self.random.number());
                self.chore(&text, Operation::Scrub);
            }
            if collect.is_now(&mut self.random) {
                let text = format!("gc {} {}", 60 + self.random.below(36), 25);
                self.chore(&text, Operation::Collect);
            }
            if exit.is_now(&mut self.random) {
                self.chore("exit", Operation::Exit);
            }
            if self.is_healthy && janitor.is_now(&mut self.random) {
                self.kill_janitor();
            }
        }
    }

    /// Gives a process something to do.
    fn command(&mut self, number: usize) {
        let index = self.random.below(CHUNKS);
        let evictions = self.trail.count(&key(index).to_string());
        let (text, operation) = match self.random.below(10) {
            0..4 if self.model.begin_store(index, evictions) => {
                (format!("store {index}"), Operation::Store(index))
            }
            4..8 if self.model.begin_other(index) => {
                (format!("load {index}"), Operation::Load(index))
            }
            8..10 => {
                let count = 1 + self.random.below(40).min(CHUNKS - index - 1);
                let versions = self.model.versions(index, count);
                let text = format!("lookup {index} {count}");
                (text, Operation::Lookup(index, versions))
            }
            _ => return,
        };
        self.processes[number].command(&text, operation);
    }

    /// Gives the next process that has time something else to do.
    fn chore(&mut self, text: &str, operation: Operation) {
        let count = self.processes.len();
        let first = self.random.below(count as u64) as usize;
        let numbers = (0..count).map(|number| (first + number) % count);
        for _ in 0..50 {
            if let Some(number) = numbers
                .clone()
                .find(|number| self.processes[*number].is_idle())
            {
                self.processes[number].command(text, operation);
                return;
            }
            self.receive(Duration::from_millis(20));
        }
        // All hang: another time.
    }

    /// Takes answers for a while.
    fn receive(&mut self, limit: Duration) {
        let mut wait = limit;
        // What came until now, and no more: answers may come as fast as they are taken.
        for _ in 0..=self.processes.len() {
            let Ok(line) = self.lines.recv_timeout(wait) else {
                break;
            };
            self.take(line);
            wait = Duration::ZERO;
        }
        for process in &self.processes {
            if let Some((operation, since)) = &process.command
                && operation.is_bounded()
                && since.elapsed() > COMMAND_LIMIT
            {
                let late = format!("{operation:?} takes longer than {COMMAND_LIMIT:?}");
                if !self.report.wrong.contains(&late) {
                    self.report.wrong.push(late);
                }
            }
        }
    }

    fn take(&mut self, (number, generation, line): Line) {
        if self.processes[number].generation != generation {
            return;
        }
        let Some(line) = line else {
            // It was told to end, could not open the store, or was killed; another one begins.
            self.end(number, "killed");
            self.processes[number].wait();
            self.processes[number] = self.start(number);
            return;
        };
        if line == "open" {
            self.processes[number].is_open = true;
            return;
        }
        self.end(number, &line);
    }

    /// Notes the end of a process's command.
    fn end(&mut self, number: usize, line: &str) {
        let generation = self.processes[number].generation;
        let Some((operation, _)) = self.processes[number].command.take() else {
            return;
        };
        let words: Vec<&str> = line.split(' ').collect();
        let answer = words[0];
        let milliseconds = words[words.len() - 1].parse().unwrap_or(0);
        let name = operation.name();
        match operation {
            Operation::Store(index) => {
                self.model
                    .end_store(index, answer, self.is_damaging, generation);
            }
            Operation::Load(index) => self.model.end_load(index, answer),
            Operation::Lookup(first, versions) if answer == "found" => {
                let found = words[1].parse().unwrap();
                self.model.end_lookup(first, &versions, found);
            }
            Operation::Scrub if answer == "verified" => {
                let indices = words[2].split(',').filter_map(|index| index.parse().ok());
                indices.for_each(|index| self.model.set_aside(index));
            }
            _ => {}
        }
        let answer = match (name, answer) {
            // Its end is its answer.
            ("restart", _) => "ended",
            _ => answer,
        };
        let count = self.report.answers.entry(format!("{name} {answer}"));
        *count.or_default() += 1;
        let longest = self.report.longest.entry(name.to_owned()).or_default();
        *longest = milliseconds.max(*longest);
    }

    /// Puts other faults in force. Returns for how long, in milliseconds.
    fn change_fault(&mut self) -> u64 {
        if self.is_healthy {
            self.audit();
        }
        // Half of the time all is well, so that paths come back and chunks are stored.
        if self.mounted.is_none() || self.random.chance(0.5) {
            self.heal();
            return 500 + self.random.below(2500);
        }
        let script = *self.random.pick(&SCRIPTS);
        self.is_damaging |= script.damages;
        self.is_misled |= script.hides;
        self.is_healthy = false;
        self.model.disturb();
        let mounted = self.mounted.as_ref();
        mounted
            .into_iter()
            .for_each(|mounted| mounted.set(script.rules));
        300 + self.random.below(if script.hangs { 3000 } else { 1500 })
    }

    /// Makes all go well, and looks whether it does.
    fn heal(&mut self) {
        self.model.disturb();
        self.mounted.iter().for_each(FaultMount::heal);
        self.wait_for_commands();
        self.is_damaging = false;
        self.is_healthy = true;
        self.audit();
    }

    /// Waits until no command is under way.
    fn wait_for_commands(&mut self) {
        let end = Instant::now() + 4 * COMMAND_LIMIT;
        let is_busy = |process: &Process| process.command.is_some();
        while self.processes.iter().any(is_busy) && Instant::now() < end {
            self.receive(Duration::from_millis(10));
        }
    }

    /// Kills a process in the middle of whatever it does.
    fn kill(&mut self, number: usize) {
        if !self.processes[number].is_open {
            return;
        }
        self.processes[number].kill();
        if !self.is_healthy {
            // A call that hangs keeps even a killed process; its end is waited for here.
            self.mounted.iter().for_each(FaultMount::heal);
        }
        self.model.disturb();
        self.processes[number].wait();
        self.report.kills += 1;
        self.end(number, "killed");
        self.processes[number] = self.start(number);
    }

    /// Kills the janitor, and waits for the next one.
    fn kill_janitor(&mut self) {
        let holder = self.outside.janitor();
        let is_holder = |process: &Process| process.is_open && Some(process.id()) == holder;
        let Some(number) = self.processes.iter().position(is_holder) else {
            return;
        };
        self.kill(number);
        self.report.janitors_killed += 1;
        let start = Instant::now();
        loop {
            let next = self.outside.janitor();
            if self
                .processes
                .iter()
                .any(|process| Some(process.id()) == next)
            {
                break;
            }
            if start.elapsed() > TAKE_OVER_LIMIT {
                let late = format!("nobody is janitor {TAKE_OVER_LIMIT:?} after the last one died");
                self.report.wrong.push(late);
                break;
            }
            self.receive(Duration::from_millis(10));
        }
        let longest = &mut self.report.longest_take_over;
        *longest = start.elapsed().max(*longest);
    }

    /// Removes a chunk's file as somebody who knows nothing of kvrail does.
    fn remove(&mut self, index: u64) {
        if !self.model.begin_other(index) {
            return;
        }
        if std::fs::remove_file(self.outside.chunk_path(index)).is_ok() {
            self.report.removed += 1;
        }
        self.model.end_remove(index);
    }

    /// Looks how much there is, while all stand still.
    fn look(&mut self) {
        self.signal(Signal::STOP);
        let look = self.outside.look();
        self.signal(Signal::CONT);
        self.weigh(look);
    }

    fn signal(&self, signal: Signal) {
        for process in &self.processes {
            // One that has just ended needs none.
            let _ = kill_process(Pid::from_child(process.child()), signal);
        }
    }

    /// Compares what was seen with the limit.
    pub(super) fn weigh(&mut self, look: Look) {
        let bytes = look.chunks + look.temporary;
        self.report.looks += 1;
        self.report.highest = self.report.highest.max(bytes);
        let account = kvrail::store::capacity::usage(self.outside.root());
        let said = account.ok().and_then(|usage| usage.bytes);
        if self.is_healthy && said.is_some_and(|said| said >= bytes) {
            self.is_misled = false;
        }
        let hidden = if self.is_misled {
            MAX_SIZE / HIDDEN_PART
        } else {
            0
        };
        if bytes > MAX_SIZE + hidden {
            let over = format!("{look}, max_size is {MAX_SIZE}, the account says {said:?}");
            self.report.over.push(over);
        }
    }

    /// Compares all chunks that nobody works on with what is known of them.
    pub(super) fn audit(&mut self) {
        self.report.audits += 1;
        // What is there now may be evicted, and the log say so, before the log is read again.
        self.trail.follow();
        let before: Vec<u64> = (0..CHUNKS)
            .map(|index| self.trail.count(&key(index).to_string()))
            .collect();
        let quiet = (0..CHUNKS).filter(|index| self.model.is_quiet(*index));
        let there: Vec<(u64, bool)> = quiet
            .map(|index| (index, self.outside.chunk_path(index).exists()))
            .collect();
        let start = Instant::now();
        loop {
            self.trail.follow();
            let is_missed = |(index, is_there): &(u64, bool)| {
                let evictions = self.trail.count(&key(*index).to_string());
                self.model.is_missed(*index, *is_there, evictions)
            };
            if !there.iter().any(is_missed) || start.elapsed() > TRACE_LIMIT {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for (index, is_there) in there {
            let evictions = if is_there {
                before[index as usize]
            } else {
                self.trail.count(&key(index).to_string())
            };
            match self.model.audit(index, is_there, evictions) {
                Finding::Fine => {}
                Finding::LostToFault => self.report.lost_to_faults += 1,
                Finding::Lost => {
                    let aside = self.outside.set_aside(index);
                    let lost =
                        format!("chunk {index} is gone, nobody evicted it; set aside: {aside:?}");
                    self.report.wrong.push(lost);
                }
                Finding::Ghost => {
                    let ghost = format!("chunk {index} came from nowhere");
                    self.report.wrong.push(ghost);
                }
            }
        }
        let alive = self.processes.iter().map(|process| process.generation);
        self.model.settle(&alive.collect::<Vec<_>>());
    }

    /// Heals everything and ends the processes.
    fn finish(&mut self) {
        self.heal();
        for mut process in std::mem::take(&mut self.processes) {
            process.wait();
        }
        self.audit();
    }
}
