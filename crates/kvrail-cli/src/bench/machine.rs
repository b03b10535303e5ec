//! What a report says of the machine and the run, so that its figures can be placed.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The machine and the run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// The version of kvrail.
    pub(crate) version: &'static str,
    /// The command line, quoted for a shell.
    pub(crate) command: String,
    pub(crate) started_unix_seconds: u64,
    pub(crate) cpu: String,
    /// Cores that this process may use.
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    /// Processes that ran or waited to run when the benchmark began, over the last minute: far
    /// above zero means that others were busy on this machine.
    pub(crate) load_before: f64,
}

impl Machine {
    /// Looks at the machine; what the system does not tell is left empty.
    pub(crate) fn find() -> Self {
        let system = rustix::system::sysinfo();
        let name = rustix::system::uname();
        let text = |value: &std::ffi::CStr| value.to_string_lossy().into_owned();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let arguments: Vec<String> = std::env::args_os()
            .map(|argument| quoted(&argument.to_string_lossy()))
            .collect();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            command: arguments.join(" "),
            started_unix_seconds: now.unwrap_or_default().as_secs(),
            cpu: cpu_name(&read("/proc/cpuinfo")),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            memory_bytes: u64::from(system.mem_unit.max(1)).saturating_mul(system.totalram as u64),
            kernel: format!(
                "{} {} {}",
                text(name.sysname()),
                text(name.release()),
                text(name.machine())
            ),
            load_before: first_number(&read("/proc/loadavg")),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(path)).unwrap_or_default()
}

fn first_number(text: &str) -> f64 {
    let first = text.split_whitespace().next();
    first.and_then(|word| word.parse().ok()).unwrap_or_default()
}

/// Returns the processor's name from the text of `/proc/cpuinfo`.
fn cpu_name(text: &str) -> String {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(key, _)| key.trim() == "model name");
    found.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// Returns an argument as a POSIX shell takes it for one word.
fn quoted(argument: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,+@%".contains(&byte);
    if !argument.is_empty() && argument.bytes().all(is_plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quoted("--mix=0.7"), "--mix=0.7");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_first_processor_names_the_machine() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n";
        assert_eq!(cpu_name(text), "A CPU @ 2 GHz");
        assert_eq!(cpu_name(""), "");
        assert!(Machine::find().memory_bytes > 1 << 20);
    }
}
