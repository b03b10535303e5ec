//! Who is the janitor: a lease that survives its holder's death and clocks that disagree.
//!
//! The lease is the file `<path>/.kvrail/janitor.<term>` with the highest term. Its holder writes
//! its name and a counter into it, again and again. Whoever wants to take over watches the content:
//! if it stays the same for the lease's limit by the watcher's own monotonic clock, or if the
//! holder's process is known to be gone, the watcher makes the file of the next term. Making it is
//! exclusive, so of many watchers one succeeds; a holder that finds a higher term has lost. A file
//! that stays empty for half a second is one whose maker died making it.
//!
//! No time is written down or compared between hosts. No lock of the file system is used: where
//! locks are only local to each host (NFS mounted with `nolock`, some FUSE file systems), a lock
//! says that a holder on another host is dead while it lives.
//!
//! A holder that was stopped for longer than the limit and goes on may do a last bit of work while
//! another one holds the lease. That is harmless: to evict is to remove a name, which a second
//! removal finds gone and does not count, and each janitor writes its own account.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::root::Root;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, SmallMode, Step, close};
use crate::store::publish::is_missing;
use crate::store::writer::writer_is_dead;

/// What the names of lease files begin with.
const PREFIX: &str = "janitor.";
/// Bytes of a lease file: a writer's name (at most 120) and a counter, filled up with spaces.
const CONTENT_BYTES: usize = 192;
/// Lease files that are looked at; there are two for a moment at most.
const FILES_MAX: usize = 4096;
/// How long a lease holds into which nobody wrote: its maker died, or writes at this moment.
const EMPTY_LIMIT: Duration = Duration::from_millis(500);
/// Counter of a holder that gave the lease up.
const RELEASED: &str = "released";

/// One contender's view of the lease.
#[derive(Debug)]
pub(super) struct Lease {
    root: Root,
    holder: String,
    limit: Duration,
    held: Option<u64>,
    beat: u64,
    seen: Option<Seen>,
}

/// What the lease looked like, and since when.
#[derive(Debug)]
struct Seen {
    term: u64,
    content: String,
    since: Instant,
}

impl Lease {
    /// Makes a contender. `holder` names it (as temp files name their writer), `limit` is how long
    /// a lease holds without a sign of life.
    pub(super) fn new(root: Root, holder: String, limit: Duration) -> Self {
        Self {
            root,
            holder,
            limit,
            held: None,
            beat: 0,
            seen: None,
        }
    }

    /// Returns whether the lease was held at the last look.
    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Keeps the lease, or takes it if it is free. Returns whether it is held.
    ///
    /// Where the disk is so full that nobody can take it, the janitor's work is needed most, so who
    /// finds it free or its own acts as if it were held. Of several that do so each removes what the
    /// others have not.
    ///
    /// # Errors
    /// Those of the file system; the lease is not held then.
    pub(super) fn tend(&mut self) -> Result<bool> {
        match self.tend_inner() {
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(true),
            Err(error) => {
                self.held = None;
                Err(error)
            }
            held => held,
        }
    }

    fn tend_inner(&mut self) -> Result<bool> {
        let folder = self.root.state()?;
        let current = current(&folder)?;
        if let Some(term) = self.held {
            let is_ours = current.as_ref().is_some_and(|(newest, content)| {
                *newest == term && content.split(' ').next() == Some(&self.holder)
            });
            if is_ours && self.write(&folder, term, SmallMode::Write)? {
                return Ok(true);
            }
            self.held = None;
            self.seen = None;
        }
        let next = match current {
            None => 1,
            Some((term, content)) if self.is_free(term, &content) => term.saturating_add(1),
            Some(_) => return Ok(false),
        };
        self.take(&folder, next)
    }

    /// Returns whether a lease of others may be taken over; remembers what it looks like.
    fn is_free(&mut self, term: u64, content: &str) -> bool {
        let (holder, beat) = content.split_once(' ').unwrap_or_default();
        if beat.trim_end() == RELEASED || writer_is_dead(holder) == Some(true) {
            return true;
        }
        let limit = match holder {
            "" => self.limit.min(EMPTY_LIMIT),
            _ => self.limit,
        };
        match &self.seen {
            Some(seen) if seen.term == term && seen.content == content => {
                seen.since.elapsed() >= limit
            }
            _ => {
                self.seen = Some(Seen {
                    term,
                    content: content.to_owned(),
                    since: Instant::now(),
                });
                false
            }
        }
    }

    /// Makes the lease file of a term. Returns whether the lease is held now.
    fn take(&mut self, folder: &Folder, term: u64) -> Result<bool> {
        self.beat += 1;
        if !self.write(folder, term, SmallMode::CreateNew)? {
            return Ok(false);
        }
        // Whoever was slow may have made a term that others have gone beyond.
        let terms = terms(folder)?;
        if terms.iter().any(|other| *other > term) {
            drop(folder.remove_file(file_name(term)));
            return Ok(false);
        }
        self.held = Some(term);
        self.seen = None;
        for old in terms.into_iter().filter(|old| *old < term) {
            // One that stays is found and removed by the next holder.
            drop(folder.remove_file(file_name(old)));
        }
        Ok(true)
    }

    /// Gives the lease up, so that the next one need not wait.
    pub(super) fn release(&mut self) {
        if let Some(term) = self.held.take() {
            let folder = self.root.state();
            let written =
                folder.and_then(|folder| self.put(&folder, term, SmallMode::Write, RELEASED));
            // A lease that cannot be given up runs out.
            drop(written);
        }
    }

    /// Writes a sign of life. Returns `false` when the file is there already, or gone.
    fn write(&mut self, folder: &Folder, term: u64, mode: SmallMode) -> Result<bool> {
        self.beat += 1;
        self.put(folder, term, mode, &self.beat.to_string())
    }

    fn put(&self, folder: &Folder, term: u64, mode: SmallMode, beat: &str) -> Result<bool> {
        let name = file_name(term);
        let file = match folder.small_file(&name, mode) {
            Ok(file) => file,
            Err(error) if mode == SmallMode::CreateNew && is_there(&error) => return Ok(false),
            Err(error) if mode == SmallMode::Write && is_missing(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        let content = self.content(beat);
        let path = folder.path().join(name);
        let written = file
            .write_all_at(content.as_bytes(), 0)
            .and_then(|()| close(file));
        if let Err(source) = written {
            if mode == SmallMode::CreateNew {
                // Nobody holds it.
                drop(folder.remove_file(file_name(term)));
            }
            return Err(Error::io("write lease", &path, source));
        }
        folder.tell(&Step::WriteFile {
            path: &path,
            offset: 0,
            bytes: content.as_bytes(),
        });
        Ok(true)
    }

    fn content(&self, beat: &str) -> String {
        format!("{:<CONTENT_BYTES$}", format!("{} {beat}", self.holder))
    }
}

fn file_name(term: u64) -> String {
    format!("{PREFIX}{term}")
}

/// Returns the highest term and its file's content.
fn current(folder: &Folder) -> Result<Option<(u64, String)>> {
    let Some(term) = terms(folder)?.into_iter().max() else {
        return Ok(None);
    };
    Ok(Some((term, read(folder, term)?)))
}

fn terms(folder: &Folder) -> Result<Vec<u64>> {
    let terms = folder
        .names()?
        .take(FILES_MAX)
        .flatten()
        .filter_map(|name| name.to_str()?.strip_prefix(PREFIX)?.parse().ok());
    Ok(terms.collect())
}

/// Reads a lease file; one that has just gone is empty, and watched like any other.
fn read(folder: &Folder, term: u64) -> Result<String> {
    let name = file_name(term);
    let file = match folder.small_file(&name, SmallMode::Read) {
        Err(error) if is_missing(&error) => return Ok(String::new()),
        opened => opened?,
    };
    let mut content = Vec::new();
    file.take(CONTENT_BYTES as u64)
        .read_to_end(&mut content)
        .map_err(|source| Error::io("read lease", &folder.path().join(name), source))?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}

fn is_there(error: &Error) -> bool {
    error
        .os_error()
        .is_some_and(|source| source.kind() == std::io::ErrorKind::AlreadyExists)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::io::Permissions;

    const LIMIT: Duration = Duration::from_millis(80);

    fn root_of(folder: &Path) -> Root {
        let root = Root::new(folder, Permissions::default());
        root.make_accounts().unwrap();
        root
    }

    fn terms_in(folder: &Path) -> Vec<u64> {
        terms(&root_of(folder).state().unwrap()).unwrap()
    }

    fn contender(folder: &Path, name: &str) -> Lease {
        Lease::new(
            root_of(folder),
            format!(".account.elsewhere-1.{name}.1.0"),
            LIMIT,
        )
    }

    fn until_held(lease: &mut Lease) -> Duration {
        let start = Instant::now();
        while !lease.tend().unwrap() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "never taken over"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        start.elapsed()
    }

    #[test]
    fn one_holds_and_a_silent_one_is_replaced_after_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = contender(folder.path(), "1");
        let mut second = contender(folder.path(), "2");
        assert!(first.tend().unwrap());
        let start = Instant::now();
        while start.elapsed() < 3 * LIMIT {
            assert!(first.tend().unwrap());
            assert!(!second.tend().unwrap());
        }
        let waited = until_held(&mut second);
        assert!(
            waited >= LIMIT - Duration::from_millis(5) && waited < 5 * LIMIT,
            "{waited:?}"
        );
        assert!(
            !first.tend().unwrap(),
            "the old holder must see that it lost"
        );
        assert_eq!(terms_in(folder.path()), [2]);
    }

    #[test]
    fn a_released_lease_and_that_of_a_dead_process_are_free_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let writer = crate::store::writer::Writer::new();
        let own = writer.file_name("account");
        let mut parts: Vec<&str> = own.split('.').collect();
        // The start of this process, so of one that is gone.
        parts[4] = "1";
        let mut dead = Lease::new(root_of(folder.path()), parts.join("."), LIMIT);
        assert!(dead.tend().unwrap());
        let mut second = contender(folder.path(), "2");
        assert!(second.tend().unwrap());
        second.release();
        assert!(contender(folder.path(), "3").tend().unwrap());
    }

    #[test]
    fn of_many_contenders_one_wins() {
        const CONTENDERS: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        assert!(contender(folder.path(), "silent").tend().unwrap());
        for round in 0..5 {
            let barrier = std::sync::Barrier::new(CONTENDERS);
            let held: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..CONTENDERS)
                    .map(|index| {
                        let mut lease = contender(folder.path(), &format!("{round}{index}"));
                        let barrier = &barrier;
                        scope.spawn(move || {
                            // All have seen the same lease, and seen it unchanged for its limit.
                            assert!(!lease.tend().unwrap());
                            std::thread::sleep(LIMIT);
                            barrier.wait();
                            usize::from(lease.tend().unwrap())
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .sum()
            });
            // The winner is silent from now on, and the next round's contenders replace it.
            assert_eq!(held, 1, "round {round}");
        }
        assert_eq!(terms_in(folder.path()), [6]);
    }

    #[test]
    fn a_lease_that_its_maker_died_making_is_taken_over_soon() {
        let folder = tempfile::tempdir().unwrap();
        let state = root_of(folder.path()).state().unwrap();
        std::fs::write(state.path().join(file_name(7)), b"").unwrap();
        let mut lease = contender(folder.path(), "1");
        lease.limit = Duration::from_secs(3600);
        let waited = until_held(&mut lease);
        assert!(waited >= EMPTY_LIMIT, "{waited:?}");
        assert_eq!(terms_in(folder.path()), [8]);
    }

    #[test]
    fn garbage_is_a_lease_that_runs_out() {
        let folder = tempfile::tempdir().unwrap();
        let state = root_of(folder.path()).state().unwrap();
        let place = |name: &str| state.path().join(name);
        std::fs::write(place("janitor.18446744073709551614"), b"\xff\0 x").unwrap();
        std::fs::write(place("janitor.x"), b"").unwrap();
        let mut lease = contender(folder.path(), "1");
        assert!(!lease.tend().unwrap());
        assert!(until_held(&mut lease) < 5 * LIMIT);
    }
}
