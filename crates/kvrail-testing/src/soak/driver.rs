//! The process that drives a run, and its report.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::model::Model;
use super::worker::{Worker, key, namespace};
use super::{CHUNKS, LOOKUP_LIMIT_SECONDS, WAIT_LIMIT_SECONDS};
use crate::mount::FaultMount;
use crate::random::Random;

/// Faults, whether they change bytes on the way to the disk, and whether they make calls hang.
const FAULTS: [(&str, bool, bool); 16] = [
    (
        "read,open,lookup *-* error=EIO probability=0.05",
        false,
        false,
    ),
    (
        "write,create,rename *-* error=EIO probability=0.2",
        false,
        false,
    ),
    (
        "write,create,mkdir *-* error=ENOSPC probability=0.5",
        false,
        false,
    ),
    ("write *-* error=EDQUOT probability=0.5", false, false),
    (
        "lookup,getattr,open,read *-* error=ESTALE probability=0.1",
        false,
        false,
    ),
    ("open,create *-* error=EACCES probability=0.1", false, false),
    (
        "create,write,rename,unlink,mkdir *-* error=EROFS",
        false,
        false,
    ),
    (
        "lookup,open *.safetensors error=ENOENT probability=0.2",
        false,
        false,
    ),
    ("read,write *-* error=EINTR probability=0.2", false, false),
    ("read,write *-* short probability=0.5", false, false),
    (
        "read *.safetensors flip probability=0.3\nread *.safetensors zero probability=0.2",
        false,
        false,
    ),
    (
        "write *.chunk.* flip probability=0.3\nwrite *.chunk.* swap probability=0.2",
        true,
        false,
    ),
    ("* *-* delay=3ms probability=0.3", false, false),
    ("read,write *-* hang probability=0.1", false, true),
    ("* *-* hang probability=0.02", false, true),
    (
        "lookup *.safetensors late=300ms\nlookup,getattr *-* skew=3600s probability=0.5",
        false,
        false,
    ),
];
/// How long the worst command may take: a store waits twice.
const COMMAND_LIMIT: Duration = Duration::from_millis((WAIT_LIMIT_SECONDS * 2000.0) as u64 + 2000);

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
    /// Chunks removed by a stranger.
    pub removed: u64,
    /// Longest command of each kind in milliseconds.
    pub longest: BTreeMap<String, u64>,
    /// What must not be: wrong bytes, ghosts, chunks lost.
    pub wrong: Vec<String>,
    /// Files that should be gone.
    pub leaked: Vec<String>,
    /// Why there were no faults, if there were none.
    pub without_faults: Option<String>,
}

struct Process {
    child: Child,
    input: ChildStdin,
    /// The command under way and when it began.
    command: Option<(Operation, Instant)>,
    is_open: bool,
    generation: u64,
}

#[derive(Debug, Clone)]
enum Operation {
    Store(u64),
    Load(u64),
    Lookup(u64, Vec<u64>),
}

type Line = (usize, u64, Option<String>);

struct Driver {
    plan: Plan,
    random: Random,
    mounted: Option<FaultMount>,
    store: PathBuf,
    source: PathBuf,
    model: Model,
    report: Report,
    processes: Vec<Process>,
    sender: Sender<Line>,
    lines: Receiver<Line>,
    /// Whether bytes may change on their way to the disk under the rules in force, or did lately.
    is_damaging: bool,
    started: u64,
}

/// Runs a plan.
///
/// # Panics
/// When the machine does not let it run at all.
pub fn run(plan: Plan) -> Report {
    std::fs::create_dir_all(&plan.folder).unwrap();
    let mounted = FaultMount::new(&plan.fault_fs, &plan.folder, plan.seed);
    let (mounted, without_faults) = match mounted {
        Ok(mounted) => (Some(mounted), None),
        Err(reason) => (None, Some(reason)),
    };
    let source = plan.folder.join("source");
    std::fs::create_dir_all(&source).unwrap();
    let store = mounted
        .as_ref()
        .map_or(source.clone(), |mounted| mounted.path().to_path_buf());
    let (sender, lines) = channel();
    let mut driver = Driver {
        random: Random::new(plan.seed),
        plan,
        mounted,
        store,
        source,
        model: Model::default(),
        report: Report {
            without_faults,
            ..Report::default()
        },
        processes: Vec::new(),
        sender,
        lines,
        is_damaging: false,
        started: 0,
    };
    for number in 0..driver.plan.processes {
        let process = driver.start(number);
        driver.processes.push(process);
    }
    driver.drive();
    driver.finish()
}

impl Driver {
    /// Starts a worker; every fifth sees the folder as another host does, without faults.
    fn start(&mut self, number: usize) -> Process {
        self.started += 1;
        let generation = self.started;
        let path = if number % 5 == 4 {
            &self.source
        } else {
            &self.store
        };
        let mut child = Command::new(&self.plan.program)
            .arg("--worker")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((number, generation, Some(line))).is_err() {
                    return;
                }
            }
            drop(sender.send((number, generation, None)));
        });
        Process {
            child,
            input,
            command: None,
            is_open: false,
            generation,
        }
    }

    fn drive(&mut self) {
        let end = Instant::now() + self.plan.duration;
        let mut next_fault = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            for number in 0..self.processes.len() {
                if self.processes[number].is_open && self.processes[number].command.is_none() {
                    self.command(number);
                }
            }
            self.receive(Duration::from_millis(20));
            if Instant::now() >= next_fault {
                let milliseconds = self.change_fault();
                next_fault = Instant::now() + Duration::from_millis(milliseconds);
            }
            if self.random.chance(0.002) {
                let number = self.random.below(self.processes.len() as u64) as usize;
                self.kill(number);
            }
            if self.random.chance(0.05) {
                let index = self.random.below(CHUNKS);
                self.remove(index);
            }
        }
    }

    /// Gives a process something to do.
    fn command(&mut self, number: usize) {
        let index = self.random.below(CHUNKS);
        let (text, operation) = match self.random.below(10) {
            0..4 if self.model.begin_store(index) => {
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
        let process = &mut self.processes[number];
        process.command = Some((operation, Instant::now()));
        // A process that died says so by the end of its output.
        drop(writeln!(process.input, "{text}"));
    }

    /// Takes answers for a while.
    fn receive(&mut self, limit: Duration) {
        let mut wait = limit;
        while let Ok(line) = self.lines.recv_timeout(wait) {
            self.take(line);
            wait = Duration::ZERO;
        }
        for process in &self.processes {
            if let Some((operation, since)) = &process.command
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
            // It could not open the store, or was killed; another one tries.
            self.end(number, "killed");
            drop(self.processes[number].child.wait());
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
        let Some((operation, _)) = self.processes[number].command.take() else {
            return;
        };
        let mut words = line.split(' ');
        let answer = words.next().unwrap_or_default();
        let count = words.clone().next().and_then(|count| count.parse().ok());
        let milliseconds: u64 = words
            .next_back()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let name = match operation {
            Operation::Store(index) => {
                self.model.end_store(index, answer, self.is_damaging);
                "store"
            }
            Operation::Load(index) => {
                self.model.end_load(index, answer);
                "load"
            }
            Operation::Lookup(first, versions) => {
                let found = if answer == "found" { count } else { None };
                self.model
                    .end_lookup(first, &versions, found.unwrap_or_default());
                "lookup"
            }
        };
        *self
            .report
            .answers
            .entry(format!("{name} {answer}"))
            .or_default() += 1;
        let longest = self.report.longest.entry(name.to_owned()).or_default();
        *longest = milliseconds.max(*longest);
    }

    /// Puts other faults in force. Returns for how long, in milliseconds.
    fn change_fault(&mut self) -> u64 {
        let Some(mounted) = &self.mounted else {
            return 1000;
        };
        // Half of the time all is well, so that paths come back and chunks are stored.
        if self.random.chance(0.5) {
            mounted.heal();
            self.wait_for_commands();
            self.is_damaging = false;
            return 500 + self.random.below(2500);
        }
        let (script, is_damaging, hangs) = *self.random.pick(&FAULTS);
        self.is_damaging |= is_damaging;
        mounted.set(script);
        if hangs {
            300 + self.random.below(3000)
        } else {
            300 + self.random.below(1500)
        }
    }

    /// Waits until no command is under way.
    fn wait_for_commands(&mut self) {
        let end = Instant::now() + 2 * COMMAND_LIMIT;
        while self
            .processes
            .iter()
            .any(|process| process.command.is_some())
            && Instant::now() < end
        {
            self.receive(Duration::from_millis(10));
        }
    }

    /// Kills a process in the middle of whatever it does.
    fn kill(&mut self, number: usize) {
        if !self.processes[number].is_open {
            return;
        }
        drop(self.processes[number].child.kill());
        if let Some(mounted) = &self.mounted {
            // A call that hangs keeps even a killed process; its end is waited for here.
            mounted.heal();
        }
        drop(self.processes[number].child.wait());
        self.report.kills += 1;
        self.end(number, "killed");
        self.processes[number] = self.start(number);
    }

    /// Removes a chunk's file as somebody who knows nothing of kvrail does.
    fn remove(&mut self, index: u64) {
        if !self.model.begin_other(index) {
            return;
        }
        if std::fs::remove_file(chunk_path(&self.source, index)).is_ok() {
            self.report.removed += 1;
        }
        self.model.end_remove(index);
    }

    /// Heals everything, ends the processes, and looks whether all is as it must be.
    fn finish(mut self) -> Report {
        if let Some(mounted) = &self.mounted {
            mounted.heal();
        }
        self.wait_for_commands();
        for process in std::mem::take(&mut self.processes) {
            let Process {
                mut child, input, ..
            } = process;
            drop(input);
            drop(child.wait());
        }
        self.model.settle();
        self.check();
        let mut report = self.report;
        report.faults = self.mounted.as_ref().map_or(0, FaultMount::hits);
        report.wrong.append(&mut self.model.wrong);
        report
    }

    /// Opens the store anew and checks it against the model.
    fn check(&mut self) {
        let worker = Worker::open(&self.store).unwrap();
        let source = Worker::open(&self.source).unwrap();
        for index in self.model.present() {
            if worker.lookup(index, 1) != 1 {
                self.report.wrong.push(format!("chunk {index} is lost"));
            }
            let answer = worker.load(index);
            if answer != "loaded" {
                self.report
                    .wrong
                    .push(format!("chunk {index}: {answer} in the end"));
            }
        }
        for index in self.model.absent() {
            if source.lookup(index, 1) == 1 {
                self.report
                    .wrong
                    .push(format!("chunk {index} came from nowhere"));
            }
        }
        for index in 0..CHUNKS {
            if source.load(index) == "wrong" {
                self.report
                    .wrong
                    .push(format!("chunk {index}: other bytes in the end"));
            }
            // Whatever was there, every chunk can be stored, and is found then.
            source.store(index);
            if source.load(index) != "loaded" {
                self.report
                    .wrong
                    .push(format!("chunk {index} cannot be stored again"));
            }
        }
        let directory = self.source.join(namespace().directory_name());
        let names = |folder: &str| {
            let entries = std::fs::read_dir(directory.join(folder));
            let entries = entries.into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path().display().to_string())
                .collect::<Vec<_>>()
        };
        self.report.leaked = names("tmp");
        let quarantined = names("quarantine");
        let quarantined = quarantined
            .iter()
            .filter(|name| name.ends_with(".safetensors"));
        let quarantined = quarantined.count();
        // A hundred are kept; each process that sets one aside at the same moment adds its own.
        if quarantined > 100 + self.plan.processes {
            self.report
                .leaked
                .push(format!("{quarantined} files in quarantine"));
        }
    }
}

fn chunk_path(root: &Path, index: u64) -> PathBuf {
    let name = key(index).to_string();
    root.join(namespace().directory_name())
        .join("g0r0")
        .join(&name[..3])
        .join(format!("{name}.safetensors"))
}

impl Report {
    /// Returns whether everything was as it must be.
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty() && self.leaked.is_empty() && self.operations() > 0
    }

    /// Returns the number of commands.
    pub fn operations(&self) -> u64 {
        self.answers.values().sum()
    }

    /// Returns the report as text.
    pub fn text(&self, plan: &Plan) -> String {
        let mut text = format!(
            "seed {}: {} processes for {:?}\n",
            plan.seed, plan.processes, plan.duration
        );
        if let Some(reason) = &self.without_faults {
            text.push_str(&format!("without faults: {reason}\n"));
        }
        text.push_str(&format!(
            "operations {}, faults injected {}, killed {}, removed {}, wrong: {}, leaked: {}\n",
            self.operations(),
            self.faults,
            self.kills,
            self.removed,
            self.wrong.len(),
            self.leaked.len()
        ));
        for (answer, count) in &self.answers {
            text.push_str(&format!("  {answer}: {count}\n"));
        }
        for (name, milliseconds) in &self.longest {
            let limit = match name.as_str() {
                "store" => 2.0 * WAIT_LIMIT_SECONDS,
                "load" => WAIT_LIMIT_SECONDS,
                _ => LOOKUP_LIMIT_SECONDS,
            };
            text.push_str(&format!(
                "  longest {name}: {milliseconds} ms, limit {limit} s\n"
            ));
        }
        for line in self.wrong.iter().chain(&self.leaked).take(50) {
            text.push_str(&format!("  WRONG: {line}\n"));
        }
        text
    }
}
