//! Stores with many chunks, made quickly: one chunk is stored, all others are its file under their
//! own names.
//!
//! Only names count for opening and for lookups, and what is stored and loaded while measuring are
//! other chunks, whole ones.

use std::io;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kvrail::ChunkKey;
use kvrail::store::inspect::{find_chunk, namespaces};

use super::probe::Small;
use crate::bench::arguments::Engine;
use crate::bench::submission::key_of;
use crate::failure::Failure;

/// Names after which another file takes its turn: below what file systems allow for one (ext4:
/// 65,000), or the limit is met and handled.
const NAMES_PER_FILE: u64 = 60_000;
/// How often the progress is drawn.
const STEP: u64 = 1_000;

/// Makes a store with `count` chunks at `path`: those of the numbers below `count`.
pub(super) fn make(path: &Path, count: u64, bar: &ProgressBar) -> Result<(), Failure> {
    let small = Small::open(path, 1, Engine::Posix)?;
    small.store(&small.attach()?, 0, 1)?;
    small.close()?;
    let namespace = namespaces(path)?.into_iter().next();
    let namespace = namespace.ok_or_else(|| Failure::new("the store made no namespace"))?;
    let first = find_chunk(&namespace.directory, (0, 0.into(), key_of(0)?))?;
    let first = first.ok_or_else(|| Failure::new("the first chunk is not there"))?;
    let mut names = Names {
        root: rank_folder(&first.path)?,
        file: first.path,
        made: vec![false; FOLDERS],
    };
    for number in 1..count {
        names.add(key_of(number)?, number)?;
        if number.is_multiple_of(STEP) {
            bar.inc(STEP);
        }
    }
    // What was made by hand must be what a store would have made.
    let last = (0, 0.into(), key_of(count - 1)?);
    match find_chunk(&namespace.directory, last)? {
        Some(_) => Ok(()),
        None => Err(Failure::new("a chunk that was made is not found")),
    }
}

/// Folders of one rank: three hex digits.
const FOLDERS: usize = 1 << 12;

/// Returns the folder of a rank from the path of one of its chunks.
fn rank_folder(chunk: &Path) -> Result<PathBuf, Failure> {
    let folder = chunk.parent().and_then(Path::parent);
    let folder = folder.ok_or_else(|| Failure::new("a chunk lies in no folder"))?;
    Ok(folder.to_owned())
}

struct Names {
    root: PathBuf,
    /// The file that gets more names.
    file: PathBuf,
    /// Which folders are there.
    made: Vec<bool>,
}

impl Names {
    /// Adds a name for a chunk.
    fn add(&mut self, key: ChunkKey, number: u64) -> Result<(), Failure> {
        let text = key.to_string();
        let digits = text.get(..3).unwrap_or_default();
        let folder = self.root.join(digits);
        let index = usize::from_str_radix(digits, 16).unwrap_or_default();
        if let Some(made @ false) = self.made.get_mut(index) {
            match std::fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Failure::io("create", &folder, &error));
                }
                _ => *made = true,
            }
        }
        let path = folder.join(format!("{text}.safetensors"));
        if !number.is_multiple_of(NAMES_PER_FILE) && std::fs::hard_link(&self.file, &path).is_ok() {
            return Ok(());
        }
        // Time for another file, or there is no other way here.
        std::fs::copy(&self.file, &path).map_err(|error| Failure::io("write", &path, &error))?;
        self.file = path;
        Ok(())
    }
}
