//! `fio` at the same work: files of the same size, as many threads, whole files in sequence.
//!
//! Each thread of fio is a job of its own with as many files as it gets of a wave. A request is a
//! whole file, as on the raw side; as many are in flight together as kvrail has. Files are neither
//! laid out nor reserved beforehand, since kvrail does not know its files beforehand either.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::clients::Sample;
use super::submission::WAIT_LIMIT;
use crate::failure::Failure;

/// How often the end of fio is looked for.
const POLL_PAUSE: Duration = Duration::from_millis(5);

/// A `fio` that can be run.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    path: PathBuf,
    version: String,
}

impl Program {
    /// Asks a program for its version; `None` when there is no such program or it is no fio.
    pub(crate) fn find(path: &Path) -> Option<Self> {
        let output = Command::new(path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let version = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        version.starts_with("fio-").then(|| Self {
            path: path.to_owned(),
            version,
        })
    }

    /// Returns what the program calls itself: `fio-3.33`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }
}

/// What fio is told about the files and their requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pattern {
    pub(crate) file_bytes: usize,
    pub(crate) threads: usize,
    pub(crate) in_flight: usize,
    /// Whether files are opened with O_DIRECT.
    pub(crate) direct: bool,
}

/// What fio does with the files of a wave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
}

/// The side that runs fio.
pub(crate) struct Fio {
    program: Program,
    directory: PathBuf,
    pattern: Pattern,
}

#[derive(Debug, Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Debug, Deserialize)]
struct Job {
    error: i32,
    /// Percent of `job_runtime`.
    usr_cpu: f64,
    sys_cpu: f64,
    /// Milliseconds.
    job_runtime: f64,
    read: Direction,
    write: Direction,
}

#[derive(Debug, Deserialize)]
struct Direction {
    io_bytes: u64,
    /// Milliseconds.
    runtime: u64,
}

impl Fio {
    /// Makes the directory of its files.
    pub(crate) fn new(
        program: Program,
        directory: PathBuf,
        pattern: Pattern,
    ) -> Result<Self, Failure> {
        std::fs::create_dir(&directory)
            .map_err(|error| Failure::io("create", &directory, &error))?;
        Ok(Self {
            program,
            directory,
            pattern,
        })
    }

    /// Returns what fio is told.
    pub(crate) fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// Returns all files that are there.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>, Failure> {
        std::fs::read_dir(&self.directory)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(|error| Failure::io("list", &self.directory, &error))
    }

    /// Writes a file for each item of a wave.
    pub(crate) fn store(&self, wave: &[u64]) -> Result<Sample, Failure> {
        self.run(Operation::Write, wave, self.pattern.direct, |job| {
            &job.write
        })
    }

    /// Reads the files of a wave; `cached`: from the page cache.
    pub(crate) fn load(&self, wave: &[u64], cached: bool) -> Result<Sample, Failure> {
        let direct = self.pattern.direct && !cached;
        self.run(Operation::Read, wave, direct, |job| &job.read)
    }

    fn run(
        &self,
        operation: Operation,
        wave: &[u64],
        direct: bool,
        direction: impl Fn(&Job) -> &Direction,
    ) -> Result<Sample, Failure> {
        // Beside the folder of the files, in the scratch folder.
        let answer = self.directory.with_extension("json");
        let mut command = Command::new(&self.program.path);
        command
            .args(["--output-format=json", "--output"])
            .arg(&answer)
            .args(["--name=global", "--directory"])
            .arg(&self.directory)
            .args(self.pattern.arguments(operation, wave, direct));
        let text = finish(command, &answer)?;
        let bytes = wave.len() as u64 * self.pattern.file_bytes as u64;
        sample(&text, bytes, direction)
    }
}

impl Pattern {
    /// Returns the engine and how many requests each thread has in flight: more than one only where
    /// the kernel takes them without waiting.
    pub(crate) fn engine(&self, direct: bool) -> (&'static str, usize) {
        if direct {
            ("libaio", self.in_flight.div_ceil(self.threads).max(1))
        } else {
            ("psync", 1)
        }
    }

    /// Returns the arguments for a wave, but for the directory.
    fn arguments(&self, operation: Operation, wave: &[u64], direct: bool) -> Vec<String> {
        let (engine, depth) = self.engine(direct);
        let mut arguments = vec![
            format!("--ioengine={engine}"),
            format!("--iodepth={depth}"),
            format!("--direct={}", u8::from(direct)),
            format!("--bs={}", self.file_bytes),
            format!("--filesize={}", self.file_bytes),
            "--filename_format=$jobname.$filenum".to_owned(),
            "--file_service_type=sequential".to_owned(),
            "--thread".to_owned(),
            "--fallocate=none".to_owned(),
            // What is in the page cache, and what is not, was seen to before.
            "--invalidate=0".to_owned(),
        ];
        let kind: &[&str] = match operation {
            // A mix of nothing but reads: only where it may have to write does fio touch its
            // buffers beforehand, as the other sides do.
            Operation::Read => &["--rw=rw", "--rwmixread=100"],
            Operation::Write => &["--rw=write", "--create_on_open=1"],
        };
        arguments.extend(kind.iter().map(|&one| one.to_owned()));
        let first = wave.first().copied().unwrap_or_default();
        let jobs = self.threads.min(wave.len()).max(1);
        for job in 0..jobs {
            // As evenly as it goes: the first ones take what is left over.
            let files = wave.len() / jobs + usize::from(job < wave.len() % jobs);
            arguments.push(format!("--name={first:08x}-{job}"));
            arguments.push(format!("--nrfiles={files}"));
        }
        arguments
    }
}

/// Runs fio to its end and returns what it wrote.
fn finish(mut command: Command, answer: &Path) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::new(format!("run fio: {error}"));
    let messages = answer.with_extension("stderr");
    let file = std::fs::File::create(&messages)
        .map_err(|error| Failure::io("create", &messages, &error))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    let mut child = command.spawn().map_err(failed)?;
    let end = Instant::now() + WAIT_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if Instant::now() > end {
            child.kill().and_then(|()| child.wait()).map_err(failed)?;
            let seconds = WAIT_LIMIT.as_secs();
            return Err(Failure::new(format!("fio took more than {seconds} s"))
                .with_hint("ask for fewer --chunks, or leave it out with --no-fio"));
        }
        std::thread::sleep(POLL_PAUSE);
    };
    if !status.success() {
        let text = std::fs::read_to_string(&messages).unwrap_or_default();
        let reason = text.lines().next().unwrap_or("it said nothing");
        return Err(Failure::new(format!("fio ended with {status}: {reason}"))
            .with_hint("leave it out with --no-fio"));
    }
    std::fs::read_to_string(answer).map_err(|error| Failure::io("read", answer, &error))
}

/// Takes the figures out of fio's answer, which must be about `bytes` bytes. The jobs start
/// together, so the longest says how long all took.
fn sample(
    text: &str,
    bytes: u64,
    direction: impl Fn(&Job) -> &Direction,
) -> Result<Sample, Failure> {
    // Warnings may stand in front of the JSON.
    let start = text.find('{').unwrap_or_default();
    let output: Output = serde_json::from_str(text.get(start..).unwrap_or_default())
        .map_err(|error| Failure::new(format!("understand the answer of fio: {error}")))?;
    if let Some(job) = output.jobs.iter().find(|job| job.error != 0) {
        let reason = std::io::Error::from_raw_os_error(job.error);
        return Err(
            Failure::new(format!("fio failed: {reason}")).with_hint("leave it out with --no-fio")
        );
    }
    let moved: u64 = output.jobs.iter().map(|job| direction(job).io_bytes).sum();
    if moved != bytes {
        return Err(Failure::new(format!(
            "fio moved {moved} bytes, expected {bytes}"
        )));
    }
    let longest = output.jobs.iter().map(|job| direction(job).runtime).max();
    let milliseconds = longest.unwrap_or_default();
    if milliseconds == 0 {
        return Err(
            Failure::new("fio was done in less than it can measure, 1 ms")
                .with_hint("ask for more --chunks, or leave it out with --no-fio"),
        );
    }
    let cpu = output.jobs.iter().map(|job| {
        let share = (job.usr_cpu + job.sys_cpu) / 100.0;
        share * job.job_runtime / 1e3
    });
    Ok(Sample {
        seconds: milliseconds as f64 / 1e3,
        cpu_seconds: cpu.sum(),
        latencies: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: Pattern = Pattern {
        file_bytes: 8192,
        threads: 3,
        in_flight: 6,
        direct: true,
    };

    fn answer(second_bytes: u64, second_runtime: u64, error: i32) -> String {
        let job = |bytes: u64, runtime: u64, error: i32| {
            let side = |bytes: u64, runtime: u64| {
                format!(r#"{{"io_bytes": {bytes}, "runtime": {runtime}, "bw": 1}}"#)
            };
            format!(
                r#"{{"error": {error}, "usr_cpu": 5.0, "sys_cpu": 15.0, "job_runtime": 200,
                    "read": {}, "write": {}}}"#,
                side(0, 0),
                side(bytes, runtime)
            )
        };
        let second = job(second_bytes, second_runtime, error);
        let first = job(100, 40, 0);
        format!("fio: a warning\n{{\"jobs\": [{first}, {second}]}}")
    }

    fn read(text: &str) -> Result<Sample, Failure> {
        sample(text, 150, |job| &job.write)
    }

    #[test]
    fn the_longest_job_is_the_time_and_all_are_the_cpu_time() {
        let found = read(&answer(50, 60, 0)).unwrap();
        assert!((found.seconds - 0.06).abs() < 1e-9, "{found:?}");
        assert!((found.cpu_seconds - 0.08).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn what_is_not_the_whole_work_is_no_figure() {
        for (text, expected) in [
            (answer(49, 60, 0), "moved 149 bytes, expected 150"),
            (answer(50, 60, 28), "No space left"),
            ("nothing".to_owned(), "understand the answer"),
        ] {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let instant = sample(&answer(0, 0, 0), 0, |job| &job.read).unwrap_err();
        assert!(instant.to_string().contains("1 ms"), "{instant}");
    }

    #[test]
    fn files_are_spread_evenly_and_each_job_has_a_name() {
        let arguments = PATTERN.arguments(Operation::Write, &[16, 17, 18, 19], true);
        let of = |option: &str| -> Vec<&str> {
            let found = arguments.iter().filter_map(|one| one.strip_prefix(option));
            found.collect()
        };
        assert_eq!(of("--nrfiles="), ["2", "1", "1"]);
        assert_eq!(of("--name="), ["00000010-0", "00000010-1", "00000010-2"]);
        assert_eq!((of("--iodepth="), of("--direct=")), (vec!["2"], vec!["1"]));
        assert_eq!(
            PATTERN
                .arguments(Operation::Read, &[1], false)
                .last()
                .unwrap(),
            "--nrfiles=1"
        );
        assert_eq!(PATTERN.engine(false), ("psync", 1));
    }

    #[test]
    fn what_is_no_fio_is_not_taken_for_one() {
        assert!(Program::find(Path::new("/nonexistent/fio")).is_none());
        assert!(Program::find(Path::new("/bin/true")).is_none());
    }
}
