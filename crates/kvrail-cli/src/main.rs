//! The command `kvrail`: looks into a store, verifies it, and measures what it and the machine can do.
//!
//! Data goes to stdout, messages to stderr. The library never prints; all of it happens here.

mod amount;
mod bench;
mod chains;
mod completions;
mod confirm;
mod cufile_probe;
mod doctor;
mod explain;
mod failure;
mod gc;
mod import;
mod ls;
mod output;
mod policies;
mod rm;
mod stat;
mod store_directory;
mod verify;
mod workload;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

/// Printed below `--help`: scripts depend on it.
const EXIT_CODES: &str = "Exit codes:
  0  done; `verify` found every chunk whole
  1  bytes are not what was stored: `verify` found damaged chunks, `bench` loaded wrong bytes;
     `import` found damaged files; `doctor` found a directory, or the library asked for, that cannot be used
  2  wrong usage, or the command could not do its work (`error: ...` on stderr says why)";

/// Look into, verify and measure a kvrail store (the directory of `gds_path`).
#[derive(Debug, Parser)]
#[command(name = "kvrail", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List namespaces, their groups and ranks, and on request every chunk
    #[command(after_help = EXIT_CODES)]
    Ls(ls::Arguments),
    /// Show totals of each namespace: chunks, bytes, ages, chains, quarantine, free space, identity
    #[command(after_help = EXIT_CODES)]
    Stat(stat::Arguments),
    /// Read chunks and check all of each, at a given pace or in part; set bad ones aside on request
    #[command(after_help = EXIT_CODES)]
    Verify(verify::Arguments),
    /// Remove namespaces, old chunks, or what lies in quarantine; asks before
    #[command(after_help = EXIT_CODES)]
    Rm(rm::Arguments),
    /// Say why chunks were a miss: absent, elsewhere, in quarantine, evicted
    #[command(after_help = EXIT_CODES)]
    Explain(explain::Arguments),
    /// Remove chunks by age or size, leftovers and empty folders; asks first
    #[command(after_help = EXIT_CODES)]
    Gc(gc::Arguments),
    /// Copy the chunks of an LMCache directory (`GdsBackend`) into a store; goes on where it stopped
    #[command(after_help = EXIT_CODES)]
    Import(import::Arguments),
    /// Measure store, load and lookup against the raw limit of the file system
    #[command(after_help = EXIT_CODES)]
    Bench(Box<bench::Arguments>),
    /// Compare eviction and admission policies on made-up requests; touches no store
    #[command(after_help = EXIT_CODES)]
    Policies(policies::Arguments),
    /// Find out what this machine and directories can do, and what to change
    #[command(after_help = EXIT_CODES)]
    Doctor(doctor::Arguments),
    /// Print a shell's completion script
    #[command(after_help = EXIT_CODES)]
    Completions(completions::Arguments),
    /// Removes a directory of `bench` when stdin closes, that is, when the parent is gone.
    #[command(name = bench::CLEANUP_COMMAND, hide = true)]
    BenchCleanup(bench::CleanupArguments),
    /// Measures a store with many chunks once, for `bench --growth`.
    #[command(name = bench::PROBE_COMMAND, hide = true)]
    BenchGrowthProbe(bench::ProbeArguments),
    /// Tries cuFile as stdin says and answers on stdout.
    #[command(name = cufile_probe::COMMAND, hide = true)]
    CufileProbe,
}

fn main() -> ExitCode {
    match run(CommandLine::parse()) {
        Ok(code) => code,
        Err(failure) if failure.is_silent() => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command_line: CommandLine) -> Result<ExitCode, Failure> {
    match command_line.command {
        Command::Ls(arguments) => ls::run(&arguments),
        Command::Stat(arguments) => stat::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Rm(arguments) => rm::run(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Gc(arguments) => gc::run(&arguments),
        Command::Import(arguments) => import::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Policies(arguments) => policies::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments),
        Command::BenchCleanup(arguments) => bench::clean_up(&arguments),
        Command::BenchGrowthProbe(arguments) => bench::run_probe(&arguments),
        Command::CufileProbe => Ok(cufile_probe::run()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::CommandLine::command().debug_assert();
    }
}
