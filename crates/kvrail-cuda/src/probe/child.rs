//! What the program does: each step of cuFile once, for each file.
#![expect(
    unsafe_code,
    reason = "moves bytes between memory of its own and files of its own"
)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::request::{REQUEST_BYTES_MAX, Request};
use crate::{
    Context, CuFile, CuFileDriver, Cuda, DeviceMemory, Priority, RegisteredBuffer,
    TRANSFER_BYTES_MAX,
};

/// What starts a line of the answer; whatever else stands on standard output is not ours.
pub(super) const MARK: &str = "kvrail-probe: ";

/// Reads a request from `input`, tries it, and writes the answer to `output`.
///
/// For the program that [`ProbeProgram`](super::ProbeProgram) names; it should end right after. It
/// may never return.
pub fn answer(input: impl Read, output: &mut impl Write) {
    let mut bytes = Vec::new();
    let read = input.take(REQUEST_BYTES_MAX).read_to_end(&mut bytes);
    let mut say = |line: &str| {
        // Nobody to tell: the parent has given up.
        let _ = writeln!(output, "{MARK}{}", line.replace('\n', " "));
        let _ = output.flush();
    };
    match Request::decode(&bytes).filter(|_| read.is_ok()) {
        None => say("stopped this program was not asked as the library asks"),
        Some(request) => match Bench::set_up(&request, &mut say) {
            Err(reason) => say(&format!("stopped {reason}")),
            Ok(bench) => {
                for (index, path) in request.files.iter().enumerate() {
                    say(&format!("step cuFile on {}", path.display()));
                    match bench.try_file(path, index) {
                        Ok((write, read)) => {
                            let (write, read) = (write.as_nanos(), read.as_nanos());
                            say(&format!("works {index} {write} {read}"));
                        }
                        Err(reason) => say(&format!("fails {index} {reason}")),
                    }
                }
                say("done");
            }
        },
    }
}

/// An opened driver, and registered memory of the GPU.
struct Bench {
    context: Context,
    driver: CuFileDriver,
    // Dropped first: a registration ends before its memory is freed.
    _registered: RegisteredBuffer,
    memory: DeviceMemory,
    bytes: usize,
}

impl Bench {
    fn set_up(request: &Request, say: &mut impl FnMut(&str)) -> Result<Self, String> {
        let told = |error: crate::Error| error.to_string();
        say("step cuInit");
        let cuda = Cuda::load(&request.libraries.cuda).map_err(told)?;
        let context = cuda.retain_primary(request.ordinal).map_err(told)?;
        let memory = context.allocate_at_page(2 * request.bytes).map_err(told)?;
        let cufile = CuFile::load(&request.libraries.cufile).map_err(told)?;
        say("step cuFileDriverOpen");
        let driver = cufile
            .open_driver_with(&context, request.settings)
            .map_err(told)?;
        say("step cuFileBufRegister");
        // SAFETY: the memory stays allocated until the registration was dropped.
        let registered =
            unsafe { driver.register_buffer(&context, memory.address(), memory.bytes()) };
        Ok(Self {
            context,
            _registered: registered.map_err(told)?,
            driver,
            memory,
            bytes: request.bytes,
        })
    }

    /// Makes a file, writes it, reads it back and compares; returns how long writing and reading
    /// took. The file is removed.
    fn try_file(&self, path: &Path, seed: usize) -> Result<(Duration, Duration), String> {
        let mut options = OpenOptions::new();
        // Not O_NOFOLLOW, which cuFile refuses: a new file is made through no link.
        let flags = OFlags::DIRECT | OFlags::CLOEXEC;
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed());
        let file = options.open(path).map_err(|error| error.to_string())?;
        let result = self.round_trip(&file, seed);
        drop(file);
        let removed = std::fs::remove_file(path);
        removed.map_err(|error| format!("remove: {error}"))?;
        result
    }

    fn round_trip(&self, file: &File, seed: usize) -> Result<(Duration, Duration), String> {
        let told = |error: crate::Error| error.to_string();
        let bytes = self.bytes;
        let (base, half) = (self.memory.address(), bytes as u64);
        // A multiplicative hash of the index: no two pages look alike.
        let pattern: Vec<u8> = (0..half)
            .map(|index| ((index + seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
            .collect();
        let stream = self.context.stream(Priority::High).map_err(told)?;
        let mut found = vec![0; bytes];
        for (at, source) in [(base, &pattern), (base + half, &found)] {
            // SAFETY: each half has these bytes; both stay until the stream was waited for.
            unsafe { stream.copy_to_device(at, source.as_ptr(), bytes) }.map_err(told)?;
        }
        stream.synchronize().map_err(told)?;
        let handle = self.driver.register_file(file.as_fd()).map_err(told)?;
        let write = self.each_part("cuFileWrite", |at, part| {
            // SAFETY: the first half of registered memory that nobody else touches.
            unsafe { handle.write(base, part, at as u64, at) }
        })?;
        let read = self.each_part("cuFileRead", |at, part| {
            // SAFETY: as above, the second half.
            unsafe { handle.read(base, part, at as u64, bytes + at) }
        })?;
        // SAFETY: as above; the vector has as many bytes and stays.
        unsafe { stream.copy_to_host(found.as_mut_ptr(), base + half, bytes) }.map_err(told)?;
        stream.synchronize().map_err(told)?;
        match found == pattern {
            true => Ok((write, read)),
            false => Err("what was read is not what was written".to_owned()),
        }
    }

    /// Calls `transfer` for each part of 16 MiB, all of which must move whole; returns the time.
    fn each_part(
        &self,
        name: &str,
        mut transfer: impl FnMut(usize, usize) -> crate::Result<usize>,
    ) -> Result<Duration, String> {
        let start = Instant::now();
        for at in (0..self.bytes).step_by(TRANSFER_BYTES_MAX) {
            let part = (self.bytes - at).min(TRANSFER_BYTES_MAX);
            let moved = self.context.run(|| transfer(at, part));
            let moved = moved.map_err(|error| error.to_string())?;
            if moved != part {
                return Err(format!("{name}: expected {part} bytes, got {moved}"));
            }
        }
        Ok(start.elapsed())
    }
}
