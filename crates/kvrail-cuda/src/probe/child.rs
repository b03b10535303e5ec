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

use rustix::fs::OFlags;

use super::request::{REQUEST_BYTES_MAX, Request};
use crate::{Context, CuFile, CuFileDriver, Cuda, DeviceMemory, Priority, RegisteredBuffer};

/// Bytes that are written and read: some requests of the device, few enough to take no time.
const BYTES: usize = 1 << 20;

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
                        Ok(()) => say(&format!("works {index}")),
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
}

impl Bench {
    fn set_up(request: &Request, say: &mut impl FnMut(&str)) -> Result<Self, String> {
        let told = |error: crate::Error| error.to_string();
        say("step cuInit");
        let cuda = Cuda::load(&request.libraries.cuda).map_err(told)?;
        let context = cuda.retain_primary(request.ordinal).map_err(told)?;
        let memory = context.allocate(2 * BYTES).map_err(told)?;
        let cufile = CuFile::load(&request.libraries.cufile).map_err(told)?;
        say("step cuFileDriverOpen");
        let driver = cufile
            .open_driver_with(request.allow_compatibility)
            .map_err(told)?;
        say("step cuFileBufRegister");
        // SAFETY: the memory stays allocated until the registration was dropped.
        let registered = unsafe { driver.register_buffer(memory.address(), memory.bytes()) };
        Ok(Self {
            context,
            _registered: registered.map_err(told)?,
            driver,
            memory,
        })
    }

    /// Makes a file, writes it, reads it back and compares. The file is removed.
    fn try_file(&self, path: &Path, seed: usize) -> Result<(), String> {
        let mut options = OpenOptions::new();
        let flags = OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
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
        result.and(removed.map_err(|error| format!("remove: {error}")))
    }

    fn round_trip(&self, file: &File, seed: usize) -> Result<(), String> {
        let told = |error: crate::Error| error.to_string();
        let (base, half) = (self.memory.address(), BYTES as u64);
        // A multiplicative hash of the index: no two pages look alike.
        let pattern: Vec<u8> = (0..half)
            .map(|index| ((index + seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
            .collect();
        let stream = self.context.stream(Priority::High).map_err(told)?;
        let mut found = vec![0; BYTES];
        for (at, bytes) in [(base, &pattern), (base + half, &found)] {
            // SAFETY: each half has these bytes; both stay until the stream was waited for.
            unsafe { stream.copy_to_device(at, bytes.as_ptr(), BYTES) }.map_err(told)?;
        }
        stream.synchronize().map_err(told)?;
        let handle = self.driver.register_file(file.as_fd()).map_err(told)?;
        // SAFETY: the first half of registered memory that nobody else touches.
        let written = self
            .context
            .run(|| unsafe { handle.write(base, BYTES, 0, 0) });
        // SAFETY: as above, the second half.
        let read = self
            .context
            .run(|| unsafe { handle.read(base, BYTES, 0, BYTES) });
        for (name, moved) in [("cuFileWrite", written), ("cuFileRead", read)] {
            let moved = moved.map_err(told)?;
            if moved != BYTES {
                return Err(format!("{name}: expected {BYTES} bytes, got {moved}"));
            }
        }
        // SAFETY: as above; the vector has as many bytes and stays.
        unsafe { stream.copy_to_host(found.as_mut_ptr(), base + half, BYTES) }.map_err(told)?;
        stream.synchronize().map_err(told)?;
        match found == pattern {
            true => Ok(()),
            false => Err("what was read is not what was written".to_owned()),
        }
    }
}
