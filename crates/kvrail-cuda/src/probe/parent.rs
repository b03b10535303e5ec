//! Starting the program, and understanding its answer within a time limit.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::child::MARK;
use super::request::Request;

/// Bytes of the answer that are read at most: a line for each file, and whatever else is printed.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// A program that calls [`answer`](super::answer) with its standard input and output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeProgram {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// How long cuFile took for one file, one call of 16 MiB after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// For writing it.
    pub write: Duration,
    /// For reading it back.
    pub read: Duration,
}

/// How cuFile did on one file: `Err` says why not, in words.
pub type Outcome = Result<Timing, String>;

/// Has `program` try cuFile on the files of `request`; takes `limit` at most.
///
/// Returns an outcome for each file. A program that is not through in time is killed, and the step
/// that it hung in is the outcome of all files that it had not come to.
pub fn try_files(program: &ProbeProgram, request: &Request, limit: Duration) -> Vec<Outcome> {
    let mut outcomes = vec![None; request.files.len()];
    let reason = match start(program, request) {
        Err(error) => format!("{} was not started: {error}", program.program.display()),
        Ok(mut child) => {
            let reason = listen(&mut child, &mut outcomes, limit);
            // It may be in a system call that does not end; nobody waits for it then.
            let _ = child.kill();
            thread::spawn(move || child.wait());
            reason
        }
    };
    // A program that was killed cannot have cleaned up.
    for path in &request.files {
        let _ = std::fs::remove_file(path);
    }
    let unknown = || Err(reason.clone());
    outcomes
        .into_iter()
        .map(|outcome: Option<Outcome>| outcome.unwrap_or_else(unknown))
        .collect()
}

fn start(program: &ProbeProgram, request: &Request) -> std::io::Result<Child> {
    let mut child = Command::new(&program.program)
        .args(&program.arguments)
        .current_dir("/")
        // libcufile writes its log into the current folder, and prints to standard error.
        .env("CUFILE_LOGFILE_PATH", "/dev/null")
        // For versions before 1.13, which have no calls for settings: on a path that is not direct
        // they fail here, where the environment is no other thread's.
        .env(
            "CUFILE_ALLOW_COMPAT_MODE",
            request.settings.allow_compatibility.to_string(),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let input = child.stdin.take();
    let bytes = request.encode();
    // On a thread: a program that does not read must not stop us.
    thread::spawn(move || input.map(|mut input| input.write_all(&bytes)));
    Ok(child)
}

/// Reads the answer until its end or the limit; returns what to say of files without an outcome.
fn listen(child: &mut Child, outcomes: &mut [Option<Outcome>], limit: Duration) -> String {
    let deadline = Instant::now() + limit;
    let lines = lines(child);
    let mut step = "the start of the program".to_owned();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = match lines.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                return format!("{step} did not return within {:.1} s", limit.as_secs_f64());
            }
            Err(RecvTimeoutError::Disconnected) => {
                return format!("the process that tried it ended in {step}");
            }
        };
        let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let (index, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let outcome = index
            .parse()
            .ok()
            .and_then(|index: usize| outcomes.get_mut(index));
        match (verb, outcome) {
            ("step", _) => step = rest.to_owned(),
            ("works", Some(outcome)) => {
                let unclear = || format!("the answer of the program: {line}");
                *outcome = Some(timing(text).ok_or_else(unclear));
            }
            ("fails", Some(outcome)) => *outcome = Some(Err(text.to_owned())),
            ("stopped", _) => return rest.to_owned(),
            _ => {}
        }
        if outcomes.iter().all(Option::is_some) {
            return String::new();
        }
    }
}

/// Reads the nanoseconds of writing and reading.
fn timing(text: &str) -> Option<Timing> {
    let (write, read) = text.split_once(' ')?;
    Some(Timing {
        write: Duration::from_nanos(write.parse().ok()?),
        read: Duration::from_nanos(read.parse().ok()?),
    })
}

/// Returns the lines of the answer as they come.
fn lines(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    if let Some(output) = child.stdout.take() {
        thread::spawn(move || {
            let lines = BufReader::new(output.take(ANSWER_BYTES_MAX)).lines();
            for line in lines.map_while(Result::ok) {
                let Some(ours) = line.find(MARK).and_then(|at| line.get(at + MARK.len()..)) else {
                    continue;
                };
                if sender.send(ours.to_owned()).is_err() {
                    break;
                }
            }
        });
    }
    receiver
}
