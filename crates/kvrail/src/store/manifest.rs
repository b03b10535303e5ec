//! `manifest.json`: the identity that a namespace directory stands for, readable by people.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::directory::NamespaceDirectory;
use super::namespace::{IDENTITY_BYTES_MAX, Namespace};
use super::publish::publish_bytes;
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Result};

/// Reads a manifest of bounded size.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be read, [`ErrorKind::Damaged`] when it is no JSON.
pub(super) fn read_manifest(path: &Path) -> Result<Value> {
    let failed = |source| Error::io("read manifest", path, source);
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    file.take(IDENTITY_BYTES_MAX as u64)
        .read_to_end(&mut text)
        .map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| {
        Error::new(ErrorKind::Damaged, "manifest")
            .with_path(path)
            .with_source(error)
    })
}

/// Writes the manifest, or checks the one that is there.
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
    let path = directory.manifest();
    match read_manifest(&path) {
        Ok(found) => check_manifest(&path, &found, namespace),
        Err(error) if is_missing(&error) => {
            let mut text = serde_json::to_vec_pretty(namespace.document()).map_err(|error| {
                Error::new(ErrorKind::InvalidArgument, "manifest").with_source(error)
            })?;
            text.push(b'\n');
            let temporary = directory.temporary().join(writer.file_name("manifest"));
            publish_bytes(temporary, &path, &text, sync)
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

/// Returns the difference to the nearest other namespace of the same model name on `root`.
///
/// So that a user who expects hits learns at once why there are none. Looks at 64 directories at
/// most.
pub(super) fn nearest_other(root: &Path, namespace: &Namespace) -> Option<(String, Vec<String>)> {
    const DIRECTORIES_MAX: usize = 64;
    let own = namespace.directory_name();
    std::fs::read_dir(root)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(namespace.slug()) && *name != own)
        .take(DIRECTORIES_MAX)
        .filter_map(|name| {
            let found = read_manifest(&root.join(&name).join(super::directory::MANIFEST_NAME));
            Some((name, namespace.differences(&found.ok()?)))
        })
        .min_by_key(|(_, differences)| differences.len())
}

fn is_missing(error: &Error) -> bool {
    error
        .os_error()
        .is_some_and(|source| source.kind() == std::io::ErrorKind::NotFound)
}
