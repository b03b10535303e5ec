//! cuFile: files straight to and from registered memory.

mod calls;
mod driver;
mod file;
mod memory;
mod settings;
pub(crate) mod sys;

pub use driver::{CuFile, CuFileDriver, RegisteredBuffer, TRANSFER_BYTES_MAX};
pub use file::FileHandle;
pub use memory::RegisteredMemory;
pub use settings::DriverSettings;

use crate::error::{Error, Result};

/// Turns a status into a result.
pub(crate) fn check(operation: &'static str, status: sys::Status) -> Result<()> {
    match status.error {
        0 => Ok(()),
        code => Err(Error::cufile(operation, code, status.cuda)),
    }
}
