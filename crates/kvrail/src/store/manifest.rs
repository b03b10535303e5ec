//! `manifest.json`: the identity that a namespace directory stands for, readable by people.

use std::path::Path;

use serde_json::Value;

use super::directory::{Location, MANIFEST_NAME, NamespaceDirectory};
use super::namespace::{IDENTITY_BYTES_MAX, Namespace};
use super::publish::{is_missing, publish_bytes};
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, IoFile, OpenMode};

/// Reads a namespace's manifest, of bounded size.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be read, [`ErrorKind::Damaged`] when it is no JSON.
pub(super) fn read_manifest(namespace: &Folder) -> Result<Value> {
    let path = namespace.path().join(MANIFEST_NAME);
    let file = IoFile::open_in(namespace, MANIFEST_NAME, OpenMode::Read, false)?;
    let text = file.read_bounded(IDENTITY_BYTES_MAX)?;
    parse_manifest(&text).map_err(|error| error.with_path(&path))
}

/// Reads the text of a manifest.
///
/// # Errors
/// [`ErrorKind::Damaged`] when it is no JSON.
pub(super) fn parse_manifest(text: &[u8]) -> Result<Value> {
    serde_json::from_slice(text)
        .map_err(|error| Error::new(ErrorKind::Damaged, "manifest").with_source(error))
}

/// Writes the manifest where there is none that can be read, or checks the one that is there.
/// LMCache's directory has none.
///
/// # Errors
/// [`ErrorKind::Mismatch`] when the directory holds another identity than its name says, and the
/// errors of reading and writing.
pub(super) fn ensure_manifest(
    directory: &NamespaceDirectory,
    namespace: &Namespace,
    writer: &Writer,
    sync: bool,
) -> Result<()> {
    if directory.lmcache.is_some() {
        return Ok(());
    }
    match read_manifest(&directory.open()?) {
        Ok(found) => check_manifest(&directory.manifest(), &found, namespace),
        // A manifest that is no JSON was cut off by a power failure. The directory's name is the hash
        // of what belongs there, so it is written again rather than be an error at every start.
        Err(error) if is_missing(&error) || error.kind() == ErrorKind::Damaged => {
            let mut text = serde_json::to_vec_pretty(namespace.document()).map_err(|error| {
                Error::new(ErrorKind::InvalidArgument, "manifest").with_source(error)
            })?;
            text.push(b'\n');
            let temporary = writer.file_name("manifest");
            publish_bytes(directory, temporary, &Location::manifest(), &text, sync)
        }
        Err(error) => Err(error),
    }
}

/// Checks a manifest against the namespace that the directory's name stands for.
pub(super) fn check_manifest(path: &Path, found: &Value, namespace: &Namespace) -> Result<()> {
    let differences = namespace.differences(found);
    if differences.is_empty() {
        return Ok(());
    }
    let message = format!("manifest of another namespace ({})", differences.join("; "));
    Err(Error::new(ErrorKind::Mismatch, message).with_path(path))
}

#[cfg(test)]
mod tests {
    use super::super::directory::TEMPORARY_NAME;
    use super::*;

    #[test]
    fn a_manifest_that_was_cut_off_is_written_again_and_another_one_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(root.path(), &namespace);
        let opened = directory.make(false).unwrap();
        opened.make(TEMPORARY_NAME, false).unwrap();
        let writer = Writer::new();
        let ensure = || ensure_manifest(&directory, &namespace, &writer, false);
        ensure().unwrap();
        let whole = std::fs::read(directory.manifest()).unwrap();
        for cut in [0, 1, whole.len() / 2] {
            std::fs::write(directory.manifest(), &whole[..cut]).unwrap();
            ensure().unwrap();
            assert_eq!(
                std::fs::read(directory.manifest()).unwrap(),
                whole,
                "cut at {cut}"
            );
        }
        std::fs::write(directory.manifest(), "{}").unwrap();
        assert_eq!(ensure().unwrap_err().kind(), ErrorKind::Mismatch);
    }
}
