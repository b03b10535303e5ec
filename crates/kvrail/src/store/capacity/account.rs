//! How many bytes a directory holds, without counting them: the sum of what everybody says.
//!
//! Each store that may write has one small file in `<path>/.kvrail/account/`, which only it
//! writes: bytes that it claimed, stored and removed since it was opened, and by how much a count
//! of the directory has corrected the sum. Usage is the sum over all files. Nothing is ever
//! written by two, so nothing is lost by two writing at once.
//!
//! The record of a store that is gone is absorbed: the janitor adds it to its own record together
//! with the absorbed file's name, in one write, and then removes the file. Whoever reads between
//! the two sees the name and leaves the file out, so a janitor may die at any point.
//!
//! A record has two places in its file, and is written to the one that does not hold the last one
//! that was written whole. So a write that is cut off, or under way, hides nothing: what it says
//! does not hold before it is whole.
//!
//! What is lost with a process that dies is what it had not written down yet; the janitor's pass
//! over the directory finds and corrects it.

use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use twox_hash::XxHash3_64;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, SmallMode, Step, close};
use crate::store::publish::is_missing;
use crate::store::writer::is_writers_name;

/// Bytes of a record.
const RECORD_BYTES: usize = 96;
/// Where a file's two records begin: in different sectors.
const PLACES: [usize; 2] = [0, 512];
/// Bytes of a file.
const FILE_BYTES: usize = PLACES[1] + RECORD_BYTES;
/// First bytes of a record: the format and its version.
const MAGIC: [u8; 8] = *b"kvracct1";
/// Records that are read: far above the stores of any one directory.
const RECORDS_MAX: usize = 65_536;
/// Attempts to read a record while its owner makes it.
const ATTEMPTS: usize = 8;
/// Attempts to read all records while some of them are absorbed, and the pause between two.
const LOOKS: u32 = 50;
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// The sum is right: somebody counted, or the directory was new.
const KNOWN: u64 = 1;
/// The owner is done with the record.
const RETIRED: u64 = 2;
/// The owner removes chunks and may not have said so of the last ones.
const REMOVING: u64 = 4;

/// What one store says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Bytes that it may store or has stored.
    pub(super) claimed: u64,
    /// Bytes that it has stored.
    pub(super) stored: u64,
    /// Bytes that it has removed.
    pub(super) removed: u64,
    /// Bytes to add, found by counting.
    pub(super) correction: i64,
    /// Hash of the name of the file that it absorbed last.
    pub(super) absorbed: u64,
    /// Grows with every write, so that others see that the owner lives.
    pub(super) beat: u64,
    pub(super) known: bool,
    pub(super) retired: bool,
    /// Whether a tool removes chunks: what is missing may not have been said yet.
    pub(super) removing: bool,
}

impl Record {
    /// Returns the bytes that count against a limit.
    pub(super) fn claimed_bytes(&self) -> i64 {
        signed(self.claimed)
            .saturating_sub(signed(self.removed))
            .saturating_add(self.correction)
    }

    /// Returns the bytes that are there.
    pub(super) fn used_bytes(&self) -> i64 {
        signed(self.stored)
            .saturating_sub(signed(self.removed))
            .saturating_add(self.correction)
    }

    /// Returns the record as bytes: magic, fields, checksum.
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let flags = u64::from(self.known) * KNOWN
            + u64::from(self.retired) * RETIRED
            + u64::from(self.removing) * REMOVING;
        let fields = [
            self.claimed,
            self.stored,
            self.removed,
            u64::from_le_bytes(self.correction.to_le_bytes()),
            self.absorbed,
            self.beat,
            flags,
        ];
        let mut bytes = [0; RECORD_BYTES];
        let (body, checksum) = bytes.split_at_mut(RECORD_BYTES - 8);
        let words = std::iter::once(MAGIC).chain(fields.map(u64::to_le_bytes));
        for (target, word) in body.chunks_exact_mut(8).zip(words) {
            target.copy_from_slice(&word);
        }
        checksum.copy_from_slice(&XxHash3_64::oneshot(body).to_le_bytes());
        bytes
    }

    /// Reads a record, `None` for bytes that are none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, checksum) = bytes.split_at_checked(RECORD_BYTES - 8)?;
        let checksum: [u8; 8] = checksum.try_into().ok()?;
        if body.get(..8)? != MAGIC || u64::from_le_bytes(checksum) != XxHash3_64::oneshot(body) {
            return None;
        }
        let field = |index: usize| -> Option<[u8; 8]> {
            body.get(8 * index..8 * index + 8)?.try_into().ok()
        };
        let word = |index| field(index).map(u64::from_le_bytes);
        let flags = word(7)?;
        Some(Self {
            claimed: word(1)?,
            stored: word(2)?,
            removed: word(3)?,
            correction: i64::from_le_bytes(field(4)?),
            absorbed: word(5)?,
            beat: word(6)?,
            known: flags & KNOWN != 0,
            retired: flags & RETIRED != 0,
            removing: flags & REMOVING != 0,
        })
    }

    /// Writes the record to one of the two places of its file, or makes the file.
    ///
    /// Opened for each write: on network file systems closing is what sends the bytes, and opening
    /// is what fetches those of others. A file that should be there and is not is an error.
    pub(super) fn write(
        &self,
        folder: &Folder,
        name: &str,
        place: Place,
        create: bool,
    ) -> Result<()> {
        let mode = match create {
            true => SmallMode::CreateNew,
            false => SmallMode::Write,
        };
        let file = folder.small_file(name, mode)?;
        let (path, bytes, offset) = (folder.path().join(name), self.encode(), place.offset());
        let written = file.write_all_at(&bytes, offset).and_then(|()| close(file));
        if let Err(source) = written {
            if create {
                // It would be in the way of the next try.
                drop(folder.remove_file(name));
            }
            return Err(Error::io("write account", &path, source));
        }
        folder.tell(&Step::WriteFile {
            path: &path,
            offset,
            bytes: &bytes,
        });
        Ok(())
    }
}

/// One of the two places of a record in its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Place {
    #[default]
    First,
    Second,
}

impl Place {
    fn offset(self) -> u64 {
        let [first, second] = PLACES;
        match self {
            Self::First => first as u64,
            Self::Second => second as u64,
        }
    }

    /// Returns the other place.
    pub(super) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Returns the number that stands for a record's file in [`Record::absorbed`].
pub(super) fn name_hash(name: &str) -> u64 {
    // 0 means none.
    XxHash3_64::oneshot(name.as_bytes()).max(1)
}

/// A record and the name of its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedRecord {
    pub(super) name: String,
    pub(super) record: Record,
}

/// All records at about one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Sum {
    pub(super) records: Vec<NamedRecord>,
    /// Files that another record has absorbed and that are not removed yet.
    pub(super) absorbed: Vec<String>,
    /// Files that hold no record: their owners died while making them, or are about to.
    pub(super) broken: Vec<String>,
    /// Bytes that count against a limit.
    pub(super) claimed: u64,
    /// Bytes that are there.
    pub(super) used: u64,
    /// The same before it was cut off at 0: without a count, removals may be all that was said.
    pub(super) said: i64,
    /// Whether that is so; not when chunks were there before anybody kept an account.
    pub(super) known: bool,
    /// Whether a tool removes chunks at this moment.
    pub(super) removing: bool,
}

/// Reads all records of a folder.
///
/// A file that holds no record (its owner died while making it) counts as nothing. One that is gone
/// when its turn comes, or soon after it was read, was absorbed, perhaps into a record that was
/// read before or is read now: it would count not at all, or twice. So all are read again when
/// there are other files than before.
///
/// # Errors
/// [`ErrorKind::Io`] when the folder or a store's file in it cannot be read: to leave it out would
/// give its room away. Also when there are more than 65,536 files, or when files vanish each time.
pub(super) fn read_all(folder: &Folder) -> Result<Sum> {
    for _ in 0..LOOKS {
        if let Some(sum) = try_read_all(folder)? {
            return Ok(sum);
        }
        std::thread::sleep(LOOK_PAUSE);
    }
    let message = format!("accounts vanished while they were read, {LOOKS} times");
    Err(Error::new(ErrorKind::Io, message).with_path(folder.path()))
}

/// Returns nothing when a file vanished.
fn try_read_all(folder: &Folder) -> Result<Option<Sum>> {
    // The names first, all of them: a record that has absorbed one that is not among them says so
    // when it is read.
    let names = names(folder)?;
    let before: HashSet<String> = names.iter().cloned().collect();
    let (mut records, mut broken) = (Vec::new(), Vec::new());
    for name in names {
        match read(folder, &name) {
            Ok(Some(record)) => records.push(NamedRecord { name, record }),
            Ok(None) => broken.push(name),
            // What others keep here is no matter.
            Err(_) if !is_writers_name(&name) => {}
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    // A record says of the last one only that it was absorbed; one before that is gone by then. And
    // one that gets another name while names are listed may be missed under both.
    let after: HashSet<String> = self::names(folder)?.into_iter().collect();
    Ok((before == after).then(|| sum(records, broken)))
}

fn names(folder: &Folder) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for name in folder.names()? {
        if names.len() == RECORDS_MAX {
            let message = format!("more than {RECORDS_MAX} accounts");
            return Err(Error::new(ErrorKind::Io, message).with_path(folder.path()));
        }
        names.extend(name?.into_string());
    }
    Ok(names)
}

fn sum(mut records: Vec<NamedRecord>, broken: Vec<String>) -> Sum {
    let gone: Vec<u64> = records.iter().map(|named| named.record.absorbed).collect();
    let is_absorbed = |named: &NamedRecord| gone.contains(&name_hash(&named.name));
    let absorbed = records
        .extract_if(.., |named| is_absorbed(named))
        .map(|named| named.name)
        .collect();
    let total = |of: fn(&Record) -> i64| -> i64 {
        let amounts = records.iter().map(|named| of(&named.record));
        amounts.fold(0, i64::saturating_add)
    };
    let (claimed, said) = (total(Record::claimed_bytes), total(Record::used_bytes));
    Sum {
        claimed: u64::try_from(claimed).unwrap_or_default(),
        used: u64::try_from(said).unwrap_or_default(),
        said,
        known: records.iter().any(|named| named.record.known),
        removing: records.iter().any(|named| named.record.removing),
        absorbed,
        broken,
        records,
    }
}

/// Reads a record, `None` for a file that holds none.
///
/// # Errors
/// [`ErrorKind::Io`] when the file is gone or cannot be read.
pub(super) fn read(folder: &Folder, name: &str) -> Result<Option<Record>> {
    let mut found = Ok(None);
    for _ in 0..ATTEMPTS {
        found = read_once(folder, name);
        if matches!(found, Ok(Some(_))) {
            break;
        }
    }
    found
}

fn read_once(folder: &Folder, name: &str) -> Result<Option<Record>> {
    let mut bytes = Vec::with_capacity(FILE_BYTES);
    let file = folder.small_file(name, SmallMode::Read)?;
    let read = file.take(FILE_BYTES as u64).read_to_end(&mut bytes);
    read.map_err(|source| Error::io("read account", &folder.path().join(name), source))?;
    Ok(newest(&bytes))
}

/// Returns the record that a file's bytes hold: of two the one that was written later.
fn newest(bytes: &[u8]) -> Option<Record> {
    let at = |from: usize| Record::decode(bytes.get(from..from + RECORD_BYTES)?);
    let found = PLACES.into_iter().filter_map(at);
    found.max_by_key(|record| record.beat)
}

/// Returns a number as a signed one; no store has 2^63 bytes.
pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::FolderRules;

    proptest! {
        #[test]
        fn records_round_trip(
            claimed in any::<u64>(), removed in any::<u64>(), correction in any::<i64>(),
            absorbed in any::<u64>(),
            (known, retired, removing) in any::<(bool, bool, bool)>(),
        ) {
            let record = Record {
                claimed, stored: claimed / 2, removed, correction, absorbed, beat: 7, known, retired,
                removing,
            };
            prop_assert_eq!(Record::decode(&record.encode()), Some(record));
            let _ = (record.claimed_bytes(), record.used_bytes());
        }

        #[test]
        fn other_bytes_are_no_record(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            (place, bit) in (0..RECORD_BYTES, 0..8),
        ) {
            prop_assert_eq!(Record::decode(&bytes), None);
            bytes = Record { claimed: 5, ..Record::default() }.encode().to_vec();
            bytes[place] ^= 1_u8 << bit;
            prop_assert_eq!(Record::decode(&bytes), None);
        }
    }

    #[test]
    fn an_absorbed_file_counts_once_whether_it_is_removed_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path(), FolderRules::default()).unwrap();
        let write = |name: &str, record: Record| {
            let is_new = !folder.path().join(name).exists();
            record.write(&opened, name, Place::First, is_new).unwrap();
        };
        let used = || {
            let sum = read_all(&opened).unwrap();
            (sum.claimed, sum.used, sum.known, sum.absorbed.len())
        };
        let one = Record {
            claimed: 100,
            stored: 70,
            known: true,
            ..Record::default()
        };
        write("one", one);
        let mut two = Record {
            claimed: 10,
            stored: 10,
            removed: 5,
            ..Record::default()
        };
        write("two", two);
        std::fs::write(folder.path().join("broken"), "kvracct1").unwrap();
        assert_eq!(used(), (105, 75, true, 0));
        two.claimed += 100;
        two.stored += 70;
        two.absorbed = name_hash("one");
        two.known = true;
        write("two", two);
        assert_eq!(used(), (105, 75, true, 1));
        std::fs::remove_file(folder.path().join("one")).unwrap();
        assert_eq!(used(), (105, 75, true, 0));
    }

    #[test]
    fn a_file_that_was_absorbed_is_not_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let opened = Folder::open(folder.path(), FolderRules::default()).unwrap();
        let written = Record::default().write(&opened, "gone", Place::First, false);
        assert!(written.is_err());
        assert!(!folder.path().join("gone").exists());
    }

    #[test]
    fn a_write_that_is_cut_off_anywhere_leaves_what_was_said_before() {
        let before = Record {
            claimed: 100,
            beat: 7,
            ..Record::default()
        };
        let next = Record {
            claimed: 999,
            beat: 8,
            ..before
        };
        for [place, other] in [[Place::First, Place::Second], [Place::Second, Place::First]] {
            assert_eq!((place.other(), other.other()), (other, place));
            for length in 0..=RECORD_BYTES {
                let mut file = vec![0xff; FILE_BYTES];
                for (record, at, length) in [(before, place, RECORD_BYTES), (next, other, length)] {
                    let at = at.offset() as usize;
                    file[at..at + length].copy_from_slice(&record.encode()[..length]);
                }
                let is_whole = length == RECORD_BYTES;
                let expected = if is_whole { next } else { before };
                assert_eq!(newest(&file), Some(expected), "{length} bytes");
            }
        }
    }
}
