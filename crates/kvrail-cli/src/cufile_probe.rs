//! The hidden command that tries cuFile in a process of its own, before this program does.

use std::io;
use std::process::ExitCode;

use kvrail::store::ProbeProgram;

/// The name of the hidden command.
pub(crate) const COMMAND: &str = "cufile-probe";

/// Returns how this program is started as the one that tries cuFile; `None` where its own path is
/// not known.
pub(crate) fn program() -> Option<ProbeProgram> {
    Some(ProbeProgram {
        program: std::env::current_exe().ok()?,
        arguments: vec![COMMAND.into()],
    })
}

/// Tries what standard input says, and answers on standard output. It may never return.
pub(crate) fn run() -> ExitCode {
    kvrail_cuda::probe::answer(io::stdin(), &mut io::stdout());
    ExitCode::SUCCESS
}
