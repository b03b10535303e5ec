//! The namespaces on a path.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::super::directory::{
    MANIFEST_NAME, QUARANTINE_NAME, TEMPORARY_NAME, parse_part_name, part_name,
};
use super::super::manifest::read_manifest;
use super::super::namespace::parse_directory_name;
use super::super::quarantine;
use crate::chunk::Part;
use crate::error::Result;
use crate::io::{Folder, FolderRules};

/// A namespace found on a path.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NamespaceInfo {
    /// Its directory.
    pub directory: PathBuf,
    /// Its manifest, or why it cannot be read.
    pub manifest: Result<Value, String>,
    /// The (group, part) pairs that have chunks.
    pub groups: Vec<(u32, Part)>,
    /// Files being written, or left by writers that died.
    pub temporary_files: usize,
    /// Chunks that were set aside.
    pub quarantined: usize,
}

/// Lists the namespaces on a path, by name: its folders that are named as one and have a manifest.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the path cannot be read.
pub fn namespaces(path: &Path) -> Result<Vec<NamespaceInfo>> {
    let root = Folder::open(path, FolderRules::default())?;
    let mut found = Vec::new();
    for name in root.names()? {
        let Ok(name) = name?.into_string() else {
            continue;
        };
        let namespace = match parse_directory_name(&name) {
            Some(_) => root.folder(&name),
            None => continue,
        };
        // A link, a file, or gone meanwhile: no namespace.
        let Ok(namespace) = namespace else { continue };
        let manifest = namespace.status(MANIFEST_NAME)?;
        if manifest.is_some_and(|status| status.is_file) {
            found.push(describe(&namespace)?);
        }
    }
    found.sort_by(|left, right| left.directory.cmp(&right.directory));
    Ok(found)
}

fn describe(namespace: &Folder) -> Result<NamespaceInfo> {
    let temporary = namespace.folder(TEMPORARY_NAME);
    let temporary = temporary.and_then(|folder| Ok(folder.names()?.count()));
    let aside = namespace.folder(QUARANTINE_NAME);
    let aside = aside.and_then(|folder| Ok(quarantine::list(&folder)?.len()));
    Ok(NamespaceInfo {
        directory: namespace.path().to_path_buf(),
        manifest: read_manifest(namespace).map_err(|error| error.to_string()),
        groups: ranks(namespace)?,
        // Neither folder needs to be there.
        temporary_files: temporary.unwrap_or_default(),
        quarantined: aside.unwrap_or_default(),
    })
}

/// Returns the (group, part) pairs of the folders `g<group>r<part>` of a namespace, sorted.
pub(super) fn ranks(namespace: &Folder) -> Result<Vec<(u32, Part)>> {
    let mut ranks = Vec::new();
    for name in namespace.names()? {
        let name = name?;
        let Some((group, rank)) = name.to_str().and_then(parse_part_name) else {
            continue;
        };
        let status = namespace.status(part_name(group, rank))?;
        if status.is_some_and(|status| status.is_folder) {
            ranks.push((group, rank));
        }
    }
    ranks.sort_unstable();
    Ok(ranks)
}
