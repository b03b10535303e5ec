//! Who writes: the id in the names of temp files, and the removal of what dead writers left.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::error::Result;
use crate::io::Folder;

/// Age from which a temp file of an unknown writer is a leftover: no chunk takes an hour to write.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

/// Temp files looked at in one clean-up, so that opening a store stays quick.
const LEFTOVERS_MAX: usize = 10_000;

/// Identity of this process as a writer: host (boot), process namespace, process and its start.
///
/// Whoever shares host and process namespace can tell whether the writer still lives; all others
/// go by the age of the file.
#[derive(Debug)]
pub(super) struct Writer {
    id: String,
    sequence: AtomicU64,
}

impl Writer {
    pub(super) fn new() -> Self {
        let process = std::process::id();
        let start = process_start(process).unwrap_or_default();
        let id = format!("{}.{process}.{start}", host());
        Self {
            id,
            sequence: AtomicU64::new(next_store()),
        }
    }

    /// Returns a file name that no other writer and no other call uses.
    pub(super) fn file_name(&self, purpose: &str) -> String {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        format!(".{purpose}.{}.{sequence}", self.id)
    }
}

/// Returns where the numbers of a store's files start: several stores of one process are apart.
fn next_store() -> u64 {
    static STORES: AtomicU64 = AtomicU64::new(0);
    STORES.fetch_add(1, Ordering::Relaxed) << 40
}

/// Returns what tells this host and process namespace from others: `<boot id>-<namespace>`.
fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot: String = boot
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(12)
        .collect();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let namespace: String = namespace
        .to_string_lossy()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    format!("{boot}-{namespace}")
}

/// Returns when a process started, in clock ticks since boot (proc(5), stat field 22).
fn process_start(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The command's name stands in parentheses and may hold anything; fields go on behind it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// Returns whether a temp file's writer is known to be dead, `None` if that cannot be known here.
pub(super) fn writer_is_dead(name: &str) -> Option<bool> {
    let mut parts = name.trim_start_matches('.').split('.');
    let (_purpose, writer_host) = (parts.next()?, parts.next()?);
    let process: u32 = parts.next()?.parse().ok()?;
    let start: u64 = parts.next()?.parse().ok()?;
    let ours = host();
    // Where not both are known, other hosts' writers are called the same.
    let is_here = writer_host == ours && !ours.starts_with('-') && !ours.ends_with('-');
    if !is_here {
        return None;
    }
    let number = Pid::from_raw(i32::try_from(process).ok()?)?;
    is_dead(start, process_start(process), || {
        test_kill_process(number) == Err(Errno::SRCH)
    })
}

/// Returns whether a process that began at `start` is known to be dead: its number has another start
/// now, or nobody has it.
fn is_dead(start: u64, found: Option<u64>, is_gone: impl FnOnce() -> bool) -> Option<bool> {
    match found {
        // 0 is what a writer says who could not find it out.
        Some(found) => (start != 0).then_some(found != start),
        // Those of other users may be hidden (hidepid of proc(5)) and live.
        None => is_gone().then_some(true),
    }
}

/// Returns whether a name is one that some writer gave to a temp file.
pub(super) fn is_writers_name(name: &str) -> bool {
    let mut parts = name.split('.');
    let number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u64>().is_ok());
    parts.next() == Some("")
        && parts.next().is_some_and(|purpose| !purpose.is_empty())
        && parts.next().is_some()
        && (0..3).all(|_| number(parts.next()))
        && parts.next().is_none()
}

/// What a clean-up of temp files came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Leftovers {
    /// Files removed.
    pub(super) removed: u64,
    /// Bytes of those that should have gone and could not be removed.
    pub(super) kept_bytes: u64,
}

impl Leftovers {
    /// Adds those of another folder.
    pub(super) fn add(&mut self, other: Self) {
        self.removed += other.removed;
        self.kept_bytes += other.kept_bytes;
    }
}

/// Removes temp files whose writer is dead or that are old. Returns how many were removed, and what
/// could not be.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the folder cannot be read; single files that
/// cannot be removed (another process was quicker) are passed over.
pub(super) fn remove_leftovers(folder: &Folder) -> Result<Leftovers> {
    let now = SystemTime::now();
    let mut found = Leftovers::default();
    for name in folder.names()?.take(LEFTOVERS_MAX).flatten() {
        let status = || folder.status(&name).ok().flatten();
        let dead = writer_is_dead(&name.to_string_lossy()).unwrap_or_else(|| {
            let age = status().and_then(|status| now.duration_since(status.modified).ok());
            age.is_some_and(|age| age > LEFTOVER_AGE)
        });
        if !dead {
            continue;
        }
        match folder.remove_file(&name) {
            Ok(()) => found.removed += 1,
            Err(_) => found.kept_bytes += status().map_or(0, |status| status.bytes),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;
    use crate::io::FolderRules;

    #[test]
    fn leftovers_go_by_their_writer_or_their_age() {
        let folder = tempfile::tempdir().unwrap();
        let touch = |name: &str, age: u64| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age))
                .unwrap();
        };
        let own = Writer::new().file_name("chunk");
        let dead = format!(".chunk.{}.{}.{}.0", host(), std::process::id(), 1);
        touch(&own, 100_000);
        touch(&dead, 0);
        touch(".chunk.otherhost-1.5.5.0", 10);
        touch(".chunk.otherhost-1.5.6.0", 100_000);
        touch(".garbage", 100_000);
        let opened = Folder::open(folder.path(), FolderRules::default()).unwrap();
        let found = remove_leftovers(&opened).unwrap();
        assert_eq!((found.removed, found.kept_bytes), (3, 0));
        let mut left: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut expected = [own, ".chunk.otherhost-1.5.5.0".to_owned()];
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn only_a_process_that_is_known_to_be_gone_is_dead() {
        let (there, gone) = (|| false, || true);
        assert_eq!(is_dead(5, Some(5), there), Some(false));
        assert_eq!(
            is_dead(5, Some(6), there),
            Some(true),
            "its number is used again"
        );
        assert_eq!(is_dead(5, None, gone), Some(true));
        assert_eq!(is_dead(5, None, there), None, "it is hidden");
        assert_eq!(
            is_dead(0, Some(6), there),
            None,
            "it did not know when it began"
        );
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let name = format!(".chunk.{}.{}.5.0", host(), child.id());
        child.wait().unwrap();
        assert_eq!(writer_is_dead(&name), Some(true));
    }

    proptest! {
        /// A name of any kind says of no living writer that it is dead, and never panics.
        #[test]
        fn names_of_any_kind_are_read(name in "\\.?[a-z]{0,3}(\\.[0-9a-f-]{0,20}){0,5}|.{0,60}") {
            let foreign = !name.contains(&host());
            prop_assert!(!foreign || writer_is_dead(&name).is_none(), "{}", name);
        }
    }

    #[test]
    fn a_writer_s_names_are_known_and_others_are_not() {
        assert!(is_writers_name(&Writer::new().file_name("chunk")));
        for name in [
            "notes",
            ".notes",
            ".a.b.c.d.e",
            "x.chunk.h.1.2.3",
            ".chunk.h.1.2.3.4",
            "",
        ] {
            assert!(!is_writers_name(name), "{name}");
        }
    }

    #[test]
    fn names_are_never_given_twice() {
        let (first, second) = (Writer::new(), Writer::new());
        let names = [&first, &second, &first, &second].map(|writer| writer.file_name("chunk"));
        let distinct: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
