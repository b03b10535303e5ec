//! Trying cuFile in a process of its own, before this one touches it.
//!
//! Opening cuFile's driver can spin for ever, and no thread can be stopped; a process can. So
//! somebody who wants to use cuFile starts a program with [`try_files`], which tells it through
//! standard input what to try; the program calls [`answer`], which opens the driver, writes each
//! file from GPU memory, reads it back and compares, and says on standard output how that went.
//!
//! The answer is a line for each step, so that after a time limit it is known where it hung.

mod child;
mod parent;
mod request;

pub use child::answer;
pub use parent::{Outcome, ProbeProgram, Timing, try_files};
pub use request::Request;
