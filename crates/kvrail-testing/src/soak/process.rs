//! One of the processes, as the driver sees it.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::WAIT_LIMIT_SECONDS;

/// How long the worst command may take: a store waits twice.
pub(super) const COMMAND_LIMIT: Duration =
    Duration::from_millis((WAIT_LIMIT_SECONDS * 2000.0) as u64 + 2000);

/// What a process does.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Store(u64),
    Load(u64),
    /// The first chunk, and what tells whether it and the next ones changed meanwhile.
    Lookup(u64, Vec<u64>),
    /// Verifies a sample of all chunks and sets bad ones aside.
    Scrub,
    /// Evicts as somebody who runs `kvrail gc`.
    Collect,
    /// Closes the store and ends.
    Exit,
}

impl Operation {
    /// Returns the word for it in the report.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Store(_) => "store",
            Self::Load(_) => "load",
            Self::Lookup(..) => "lookup",
            Self::Scrub => "verify",
            Self::Collect => "gc",
            Self::Exit => "restart",
        }
    }

    /// Returns whether it promises to end in time; tools wait for the mount as `cp` does.
    pub(super) fn is_bounded(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Load(_) | Self::Lookup(..))
    }
}

/// What a process said: its number, which of those with this number it is, and the line, or that
/// it has ended.
pub(super) type Line = (usize, u64, Option<String>);

/// A process that serves commands.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// `None` once it was told to end.
    input: Option<ChildStdin>,
    /// The command under way and when it began.
    pub(super) command: Option<(Operation, Instant)>,
    /// Whether its store is open.
    pub(super) is_open: bool,
    /// No other process has the same number.
    pub(super) generation: u64,
}

impl Process {
    /// Starts one on the store at `path`; what it says is sent on.
    pub(super) fn start(
        program: &Path,
        path: &Path,
        (number, generation): (usize, u64),
        sender: Sender<Line>,
    ) -> Self {
        let mut child = Command::new(program)
            .arg("--worker")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((number, generation, Some(line))).is_err() {
                    return;
                }
            }
            drop(sender.send((number, generation, None)));
        });
        Self {
            child,
            input,
            command: None,
            is_open: false,
            generation,
        }
    }

    /// Returns whether it waits for a command.
    pub(super) fn is_idle(&self) -> bool {
        self.is_open && self.command.is_none()
    }

    /// Gives it something to do.
    pub(super) fn command(&mut self, text: &str, operation: Operation) {
        self.command = Some((operation, Instant::now()));
        // A process that died says so by the end of its output.
        drop(self.input.as_mut().map(|input| writeln!(input, "{text}")));
    }

    /// Returns its number for the system.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns a handle for signals.
    pub(super) fn child(&self) -> &Child {
        &self.child
    }

    /// Ends it in the middle of whatever it does.
    pub(super) fn kill(&mut self) {
        drop(self.child.kill());
    }

    /// Lets it end, and waits until it has.
    pub(super) fn wait(&mut self) {
        drop(self.input.take());
        drop(self.child.wait());
    }
}
