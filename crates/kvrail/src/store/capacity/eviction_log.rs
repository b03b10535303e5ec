//! What was evicted lately, for whoever asks why a chunk is not there.
//!
//! Two text files in each namespace directory, `evictions.log` and, before it, `evictions.1.log`.
//! One line for each chunk, oldest first, fields separated by one space:
//!
//! ```text
//! <evicted at> <reason> <group> <rank> <key> <last used at> <uses> <bytes>
//! 1764090000123 size 0 3 5a5a...5a 1764080000456 2 33558528
//! ```
//!
//! Times are milliseconds since 1970, the reason is `size`, `space`, `age` or `request` (somebody
//! ran `kvrail gc`). The first file becomes the second one at 4 MiB, so that the last 31,000
//! evictions at least are kept, in at most 8 MiB. Whoever appends begins with a line `#`: it ends a
//! line that somebody who died did not, and makes it one that cannot be read. Such lines are passed
//! over. Anybody may remove the files.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::stamp::Stamp;
use super::sweep::Reason;
use crate::chunk::{ChunkKey, Part};
use crate::error::{Error, Result};
use crate::io::{Folder, FolderRules, SmallMode, Step};

/// The file that is appended to.
const LOG_NAME: &str = "evictions.log";
/// The file before it.
const FORMER_LOG_NAME: &str = "evictions.1.log";
/// All of them.
pub(in crate::store) const LOG_NAMES: [&str; 2] = [FORMER_LOG_NAME, LOG_NAME];
/// Bytes at which the file is put aside. A line has at most 130 bytes.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// What each batch begins with.
const BATCH_START: &str = "#\n";
/// Bytes of a line that are looked at; anything longer is none of ours.
const LINE_BYTES_MAX: u64 = 256;

/// One eviction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Eviction {
    /// When, in milliseconds since 1970.
    pub evicted_milliseconds: i64,
    /// Why.
    pub reason: EvictionReason,
    /// The KV cache group.
    pub group: u32,
    /// The part that the file held.
    pub rank: Part,
    /// The chunk.
    #[serde(serialize_with = "as_text")]
    pub key: ChunkKey,
    /// When it was last used, in milliseconds since 1970.
    pub used_milliseconds: i64,
    /// How often it was used again, as far as that is counted.
    pub uses: u8,
    /// Bytes of its file.
    pub bytes: u64,
}

/// Why a chunk was evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EvictionReason {
    /// The directory held more than `max_size` allowed.
    Size,
    /// The file system had less free space than `min_free` asks for.
    Space,
    /// Nobody used it for `ttl`.
    Age,
    /// Somebody asked for it with `kvrail gc`.
    Request,
}

impl From<Reason> for EvictionReason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Size => Self::Size,
            Reason::Space => Self::Space,
            Reason::Age => Self::Age,
        }
    }
}

impl EvictionReason {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Size, "size"),
        (Self::Space, "space"),
        (Self::Age, "age"),
        (Self::Request, "request"),
    ];

    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        let row = Self::ALL.iter().find(|(reason, _)| *reason == self);
        row.map_or("size", |(_, name)| name)
    }
}

impl Eviction {
    /// Returns the stamp that the chunk had.
    pub fn stamp(&self) -> Stamp {
        Stamp::new(self.used_milliseconds, self.uses)
    }

    fn line(&self) -> String {
        format!(
            "{} {} {} {} {} {} {} {}\n",
            self.evicted_milliseconds,
            self.reason.name(),
            self.group,
            self.rank,
            self.key,
            self.used_milliseconds,
            self.uses,
            self.bytes
        )
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.strip_suffix('\n')?.split(' ');
        let evicted_milliseconds = fields.next()?.parse().ok()?;
        let word = fields.next()?;
        let (reason, _) = EvictionReason::ALL.iter().find(|(_, name)| *name == word)?;
        let eviction = Self {
            evicted_milliseconds,
            reason: *reason,
            group: fields.next()?.parse().ok()?,
            rank: Part::parse(fields.next()?)?,
            key: ChunkKey::from_hex(fields.next()?).ok()?,
            used_milliseconds: fields.next()?.parse().ok()?,
            uses: fields.next()?.parse().ok()?,
            bytes: fields.next()?.parse().ok()?,
        };
        fields.next().is_none().then_some(eviction)
    }
}

fn as_text<S: serde::Serializer>(key: &ChunkKey, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(key)
}

/// Appends evictions to a namespace's log.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io): the evictions happened, their trace is lost.
pub(super) fn append(namespace: &Folder, evictions: &[Eviction]) -> Result<()> {
    let failed = |source| {
        Error::io(
            "write eviction log",
            &namespace.path().join(LOG_NAME),
            source,
        )
    };
    let mut file = namespace.small_file(LOG_NAME, SmallMode::Append)?;
    let lines = evictions.iter().map(Eviction::line);
    let text: String = std::iter::once(BATCH_START.to_owned())
        .chain(lines)
        .collect();
    file.write_all(text.as_bytes()).map_err(failed)?;
    namespace.tell(&Step::WriteFile {
        path: &namespace.path().join(LOG_NAME),
        offset: 0,
        bytes: text.as_bytes(),
    });
    let written = file.metadata().map_err(failed)?;
    let is_newest = || -> Result<bool> {
        let newest = namespace.status(LOG_NAME)?;
        Ok(newest.is_some_and(|newest| newest.inode == written.ino()))
    };
    // Somebody else may have put it aside meanwhile: the one that was begun then is not full.
    if written.len() >= LOG_BYTES_MAX && is_newest()? {
        namespace.rename(LOG_NAME, namespace, FORMER_LOG_NAME)?;
    }
    Ok(())
}

/// Reads a namespace's evictions, oldest first; none where there is no log.
pub fn evictions(namespace_directory: &Path) -> impl Iterator<Item = Eviction> + use<> {
    let namespace = Folder::open(namespace_directory, FolderRules::default()).ok();
    let open = |name: &str| namespace.as_ref()?.small_file(name, SmallMode::Read).ok();
    let files = [open(FORMER_LOG_NAME), open(LOG_NAME)];
    files.into_iter().flatten().flat_map(|file| {
        // A batch may go beyond the size at which the file is put aside; not by as much again.
        let mut reader = BufReader::new(file.take(2 * LOG_BYTES_MAX));
        std::iter::from_fn(move || {
            loop {
                let mut line = Vec::new();
                match (&mut reader)
                    .take(LINE_BYTES_MAX)
                    .read_until(b'\n', &mut line)
                {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
                if let Some(eviction) = std::str::from_utf8(&line).ok().and_then(Eviction::parse) {
                    return Some(eviction);
                }
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn eviction(index: u64) -> Eviction {
        Eviction {
            evicted_milliseconds: index as i64,
            reason: EvictionReason::ALL[index as usize % 4].0,
            group: 0,
            rank: u32::MAX.into(),
            key: ChunkKey::from_bytes(blake3::hash(&index.to_le_bytes()).as_bytes()).unwrap(),
            used_milliseconds: i64::MIN,
            uses: 15,
            bytes: u64::MAX,
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(LOG_NAME), bytes).unwrap();
            for eviction in evictions(folder.path()) {
                prop_assert_eq!(Eviction::parse(&eviction.line()), Some(eviction));
            }
        }
    }

    #[test]
    fn the_last_evictions_are_kept_and_the_size_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path(), FolderRules::default()).unwrap();
        assert_eq!(evictions(folder.path()).count(), 0);
        let batches = 120;
        for batch in 0..batches {
            let lines: Vec<_> = (1000 * batch..1000 * (batch + 1)).map(eviction).collect();
            append(&opened, &lines).unwrap();
        }
        let kept: Vec<_> = evictions(folder.path()).collect();
        let last = 1000 * batches - 1;
        assert!(kept.len() > 32_000, "{}", kept.len());
        assert_eq!(*kept.last().unwrap(), eviction(last));
        assert_eq!(
            *kept.first().unwrap(),
            eviction(last + 1 - kept.len() as u64)
        );
        let bytes: u64 = [LOG_NAME, FORMER_LOG_NAME]
            .iter()
            .map(|name| std::fs::metadata(folder.path().join(name)).unwrap().len())
            .sum();
        assert!(bytes < 2 * LOG_BYTES_MAX + (1 << 20), "{bytes}");
    }

    #[test]
    fn a_line_that_is_cut_off_anywhere_costs_itself_only() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path(), FolderRules::default()).unwrap();
        let line = eviction(7).line();
        for length in 0..line.len() {
            append(&opened, &[eviction(5)]).unwrap();
            let mut log = std::fs::File::options()
                .append(true)
                .open(folder.path().join(LOG_NAME))
                .unwrap();
            log.write_all(&line.as_bytes()[..length]).unwrap();
            append(&opened, &[eviction(6)]).unwrap();
            let read: Vec<_> = evictions(folder.path()).collect();
            assert_eq!(read, [eviction(5), eviction(6)], "{length} bytes of a line");
            std::fs::remove_file(folder.path().join(LOG_NAME)).unwrap();
        }
    }
}
