//! `kvrail completions SHELL`: the completion script of a shell, on stdout.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::CommandLine;
use crate::failure::Failure;

/// The arguments of `kvrail completions`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The shell to complete for
    shell: Shell,
}

/// Prints the script.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    // Into memory first: the generator itself panics when its output goes away.
    let mut script = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut CommandLine::command(),
        "kvrail",
        &mut script,
    );
    io::stdout().lock().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
