//! What the store's own log says of evictions, followed from outside.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The names of the log: the one that is written to, and the one before it.
const NAMES: [&str; 2] = ["evictions.log", "evictions.1.log"];

/// A reader of the log that goes on where it stopped, also when the log begins another file.
#[derive(Debug)]
pub(super) struct Trail {
    namespace: PathBuf,
    /// The file that was read last and how far.
    place: Option<(u64, u64)>,
    by_key: HashMap<String, u64>,
    by_reason: BTreeMap<String, u64>,
}

impl Trail {
    pub(super) fn new(namespace: &Path) -> Self {
        Self {
            namespace: namespace.to_path_buf(),
            place: None,
            by_key: HashMap::new(),
            by_reason: BTreeMap::new(),
        }
    }

    /// Reads what was written since.
    pub(super) fn follow(&mut self) {
        let [newest, before] = NAMES.map(|name| {
            let file = File::open(self.namespace.join(name)).ok()?;
            let inode = file.metadata().ok()?.ino();
            Some((file, inode))
        });
        if let (Some((file, inode)), Some((last, _))) = (before, self.place)
            && inode == last
        {
            self.read(file, inode);
        }
        if let Some((file, inode)) = newest {
            self.read(file, inode);
        }
    }

    fn read(&mut self, mut file: File, inode: u64) {
        let from = match self.place {
            Some((last, offset)) if last == inode => offset,
            _ => 0,
        };
        let mut bytes = Vec::new();
        let read = file
            .seek(SeekFrom::Start(from))
            .and_then(|_| file.read_to_end(&mut bytes));
        if read.is_err() {
            return;
        }
        // The rest is a line that is still being written.
        let end = bytes.iter().rposition(|byte| *byte == b'\n');
        let whole = &bytes[..end.map_or(0, |end| end + 1)];
        for line in String::from_utf8_lossy(whole).lines() {
            self.note(line);
        }
        self.place = Some((inode, from + whole.len() as u64));
    }

    fn note(&mut self, line: &str) {
        // One that was cut off by a fault has fewer fields, or all of them but for its last digits.
        let fields: Vec<&str> = line.split(' ').collect();
        if let [_, reason, _, _, key, _, _, _] = fields[..] {
            *self.by_reason.entry(reason.to_owned()).or_default() += 1;
            *self.by_key.entry(key.to_owned()).or_default() += 1;
        }
    }

    /// Returns how often a chunk was evicted so far.
    pub(super) fn count(&self, key: &str) -> u64 {
        self.by_key.get(key).copied().unwrap_or_default()
    }

    /// Returns how many chunks were evicted so far, by reason.
    pub(super) fn by_reason(&self) -> &BTreeMap<String, u64> {
        &self.by_reason
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lines_are_read_once_across_files_and_torn_ones_do_not_hide_others() {
        let folder = tempfile::tempdir().unwrap();
        let [newest, before] = NAMES.map(|name| folder.path().join(name));
        let line = |key: &str| format!("1 size 0 0 {key} 1 0 5\n");
        let mut trail = Trail::new(folder.path());
        trail.follow();
        fs::write(&newest, line("a") + "1 size 0 0 a").unwrap();
        trail.follow();
        trail.follow();
        assert_eq!(trail.count("a"), 1);
        fs::write(&newest, line("a") + "1 size 0 0 a#\n" + &line("b")).unwrap();
        fs::rename(&newest, &before).unwrap();
        fs::write(&newest, line("a")).unwrap();
        trail.follow();
        assert_eq!((trail.count("a"), trail.count("b")), (2, 1));
        assert_eq!(trail.by_reason()["size"], 3);
    }
}
