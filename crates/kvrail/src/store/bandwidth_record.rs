//! `<path>/.kvrail/bandwidth`: what a path's bandwidth was when it was first one of several.
//!
//! Everybody who shares the paths places chunks by it, so there is one record for each path, it is
//! never replaced by us, and who has measured takes what is recorded all the same.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capacity::STATE_NAME;
use super::publish::is_missing;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Bandwidth, Folder, FolderRules, IoFile, OpenMode};

/// The file's name in the folder of accounts and lease.
const RECORD_NAME: &str = "bandwidth";
/// The number that says how it is written.
const RECORD_FORMAT: u32 = 1;
/// A record has less than 100 bytes.
const RECORD_BYTES_MAX: usize = 4096;
/// Megabytes a second that a record may have: more is no path of ours.
const RATES: std::ops::RangeInclusive<u64> = 1..=10_000_000;
/// Where no file can be renamed without replacing another, a reader may see half of a record.
const HALF_WRITTEN: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    mb_per_s: u64,
    write_mb_per_s: u64,
    read_mb_per_s: u64,
}

/// Reads the text of a record.
///
/// # Errors
/// [`ErrorKind::Damaged`] for anything but a record of this format, with rates that can be.
pub(super) fn parse_record(text: &[u8]) -> Result<Bandwidth> {
    let damaged = |message: String| Error::new(ErrorKind::Damaged, message);
    if text.len() > RECORD_BYTES_MAX {
        return Err(damaged("record of a bandwidth: too long".to_owned()));
    }
    let record: Record = serde_json::from_slice(text)
        .map_err(|error| damaged("record of a bandwidth".to_owned()).with_source(error))?;
    if record.format != RECORD_FORMAT {
        let found = record.format;
        return Err(damaged(format!("record of a bandwidth in format {found}")));
    }
    let rates = [record.mb_per_s, record.write_mb_per_s, record.read_mb_per_s];
    if let Some(rate) = rates.iter().find(|rate| !RATES.contains(rate)) {
        return Err(damaged(format!("record of a bandwidth: {rate} MB/s")));
    }
    Ok(Bandwidth {
        mb_per_s: record.mb_per_s,
        write_mb_per_s: record.write_mb_per_s,
        read_mb_per_s: record.read_mb_per_s,
    })
}

/// Returns the text of a record.
pub(super) fn encode_record(bandwidth: Bandwidth) -> Vec<u8> {
    let within = |rate: u64| rate.clamp(*RATES.start(), *RATES.end());
    let record = Record {
        format: RECORD_FORMAT,
        mb_per_s: within(bandwidth.mb_per_s),
        write_mb_per_s: within(bandwidth.write_mb_per_s),
        read_mb_per_s: within(bandwidth.read_mb_per_s),
    };
    // Numbers have no way to fail; an empty record would be read as a damaged one.
    let mut text = serde_json::to_vec(&record).unwrap_or_default();
    text.push(b'\n');
    text
}

/// Returns what is recorded for a path, `None` where nothing is.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a file that is no record, [`ErrorKind::Io`] when it cannot be read.
pub(super) fn read_record(root: &Folder) -> Result<Option<Bandwidth>> {
    let read = || {
        let state = root.folder(STATE_NAME)?;
        let file = IoFile::open_in(&state, RECORD_NAME, OpenMode::Read, false)?;
        let text = file.read_bounded(RECORD_BYTES_MAX + 1)?;
        parse_record(&text).map_err(|error| error.with_path(file.path()))
    };
    let mut result = read();
    for pause in HALF_WRITTEN {
        if !matches!(&result, Err(error) if error.kind() == ErrorKind::Damaged) {
            break;
        }
        std::thread::sleep(pause);
        result = read();
    }
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Records what was measured, unless somebody else has. Returns what is recorded then.
///
/// It is written and synced in `temporary`, under a name of ours, and then gets its own name in one
/// step that fails when there is one already.
///
/// # Errors
/// Those of the file system, and [`ErrorKind::Damaged`] when what is there is no record.
pub(super) fn publish_record(
    root: &Folder,
    temporary: &Folder,
    file_name: &str,
    measured: Bandwidth,
) -> Result<Bandwidth> {
    let state = root.make(STATE_NAME, true)?;
    let text = encode_record(measured);
    let published = write(temporary, file_name, &text).and_then(|()| {
        match temporary.rename_to_free(file_name, &state, RECORD_NAME) {
            Err(error) if is_unsupported(&error) => write(&state, RECORD_NAME, &text),
            renamed => renamed,
        }
    });
    drop(temporary.remove_file(file_name));
    match published {
        Ok(()) => state.sync()?,
        Err(error) if is_there(&error) => {}
        Err(error) => return Err(error),
    }
    let found = read_record(root)?;
    found.ok_or_else(|| {
        let message = "the record of its bandwidth is gone again";
        Error::new(ErrorKind::Io, message).with_path(root.path())
    })
}

/// Writes a new file whole.
fn write(folder: &Folder, name: &str, text: &[u8]) -> Result<()> {
    let file = IoFile::open_in(folder, name, OpenMode::CreateNew, false)?;
    let written = rustix::io::pwrite(&file, text, 0)
        .map_err(|errno| Error::io("write", file.path(), errno.into()))?;
    if written != text.len() {
        let message = format!("expected to write {} bytes, wrote {written}", text.len());
        drop(folder.remove_file(name));
        return Err(Error::new(ErrorKind::Io, message).with_path(file.path()));
    }
    file.sync()
}

fn is_there(error: &Error) -> bool {
    let kind = error.os_error().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::AlreadyExists)
}

/// Returns whether the file system knows no rename that replaces nothing.
fn is_unsupported(error: &Error) -> bool {
    use rustix::io::Errno;
    let number = error.os_error().and_then(std::io::Error::raw_os_error);
    let unsupported = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP];
    unsupported
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&number)
}

/// Returns what is recorded for a path of `gds_path`, `None` where nothing is: for tools.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a file that is no record, [`ErrorKind::Io`] when it cannot be read.
pub fn recorded_bandwidth(path: &Path) -> Result<Option<Bandwidth>> {
    read_record(&Folder::open(path, FolderRules::default())?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bandwidth(mb_per_s: u64) -> Bandwidth {
        Bandwidth {
            mb_per_s,
            write_mb_per_s: 700,
            read_mb_per_s: 1500,
        }
    }

    #[test]
    fn of_several_who_publish_one_wins_and_all_take_its_value() {
        let directory = tempfile::tempdir().unwrap();
        let root = || Folder::open(directory.path(), FolderRules::default()).unwrap();
        let temporary = root().make("tmp", false).unwrap();
        assert_eq!(read_record(&root()).unwrap(), None);
        let (root, temporary) = (&root, &temporary);
        let found: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=8)
                .map(|number| {
                    scope.spawn(move || {
                        let name = format!(".bandwidth.{number}");
                        publish_record(&root(), temporary, &name, bandwidth(number)).unwrap()
                    })
                })
                .collect();
            let found = threads.into_iter().map(|one| one.join().unwrap().mb_per_s);
            found.collect()
        });
        assert!(found.iter().all(|one| *one == found[0]), "{found:?}");
        let recorded = recorded_bandwidth(directory.path()).unwrap().unwrap();
        assert_eq!(recorded, bandwidth(found[0]));
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_record_is_damaged_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let root = Folder::open(directory.path(), FolderRules::default()).unwrap();
        let temporary = root.make("tmp", false).unwrap();
        let state = directory.path().join(STATE_NAME);
        std::fs::create_dir(&state).unwrap();
        let good = String::from_utf8(encode_record(bandwidth(950))).unwrap();
        for text in [
            String::new(),
            good[..good.len() / 2].to_owned(),
            good.replace("950", "0"),
            good.replace("950", "10000001"),
            good.replace("950", "-3"),
            good.replace("\"format\":1", "\"format\":2"),
            format!("{good}{}", " ".repeat(RECORD_BYTES_MAX)),
        ] {
            std::fs::write(state.join(RECORD_NAME), &text).unwrap();
            let error = read_record(&root).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{text}");
            let published = publish_record(&root, &temporary, ".b", bandwidth(3));
            assert_eq!(published.unwrap_err().kind(), ErrorKind::Damaged);
            let left = std::fs::read_to_string(state.join(RECORD_NAME)).unwrap();
            assert_eq!(left, text);
        }
        std::fs::write(state.join(RECORD_NAME), &good).unwrap();
        assert_eq!(read_record(&root).unwrap(), Some(bandwidth(950)));
    }

    proptest! {
        #[test]
        fn records_round_trip(rates in proptest::array::uniform3(RATES)) {
            let [mb_per_s, write_mb_per_s, read_mb_per_s] = rates;
            let all = Bandwidth { mb_per_s, write_mb_per_s, read_mb_per_s };
            prop_assert_eq!(parse_record(&encode_record(all)).unwrap(), all);
        }
    }
}
