//! Running and steering `fault-fs` from a test.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};

use crate::rules::Rules;

/// Time for the program to end by itself.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A mounted `fault-fs`. It is unmounted when this is dropped, and when this process dies.
#[derive(Debug)]
pub struct FaultMount {
    program: Child,
    mount_point: PathBuf,
    source: PathBuf,
    control: PathBuf,
    seed: u64,
}

impl FaultMount {
    /// Mounts a faulty file system in `folder`, which holds its parts `mount`, `source` and
    /// `control` from then on. `program` is the path of the program `fault-fs`.
    ///
    /// # Errors
    /// Why this machine cannot: no `/dev/fuse`, no right to mount. A test says so and is skipped.
    ///
    /// # Panics
    /// When the folder cannot be used.
    pub fn new(program: &Path, folder: &Path, seed: u64) -> Result<Self, String> {
        let part = |name: &str| folder.join(name);
        let (mount_point, source) = (part("mount"), part("source"));
        std::fs::create_dir_all(&mount_point).unwrap();
        std::fs::create_dir_all(&source).unwrap();
        let control = part("control");
        let mut program = Command::new(program)
            .args([&source, &mount_point])
            .arg("--control")
            .arg(&control)
            .args(["--seed", &seed.to_string(), "--until-input-ends"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("start fault-fs: {error}"))?;
        let mut line = String::new();
        let output = program.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        if line.trim() != "mounted" {
            drop(program.stdin.take());
            let output = program.wait_with_output().unwrap();
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self {
            program,
            mount_point,
            source,
            control,
            seed,
        })
    }

    /// Returns where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Returns the folder behind it, where nothing fails.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Returns the seed of its chances.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Puts a script in force for every operation that begins after this call, and lets go those
    /// that hang by a rule that is gone.
    ///
    /// # Panics
    /// For a script that is not understood.
    pub fn set(&self, script: &str) {
        Rules::new(0).set(script).unwrap();
        let new = self.control.with_extension("new");
        std::fs::write(&new, script).unwrap();
        std::fs::rename(&new, &self.control).unwrap();
    }

    /// Makes everything go well again.
    pub fn heal(&self) {
        self.set("");
    }

    /// Returns how many operations were hit by a rule so far.
    pub fn hits(&self) -> u64 {
        let text = std::fs::read_to_string(self.control.with_extension("hits"));
        text.ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Takes the file system away while it is in use, as a server that dies does.
    pub fn kill(&mut self) {
        drop(self.program.stdin.take());
        let end = Instant::now() + END_LIMIT;
        while Instant::now() < end && self.program.try_wait().is_ok_and(|ended| ended.is_none()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Both have nothing to do after an orderly end.
        drop(self.program.kill());
        drop(self.program.wait());
        let _ = unmount(&self.mount_point, UnmountFlags::DETACH);
    }
}

impl Drop for FaultMount {
    fn drop(&mut self) {
        self.kill();
    }
}
