//! A store as the inspecting commands see it: a directory with namespaces in it.

use std::path::Path;

use kvrail::store::inspect::{ChunkFile, NamespaceInfo, chunks, namespaces, read_head};

use crate::failure::Failure;
use crate::output::warn;

/// Finds the namespaces of a store.
///
/// # Errors
/// The directory is missing, is no directory, cannot be read, or holds no namespace.
pub(crate) fn open(directory: &Path) -> Result<Vec<NamespaceInfo>, Failure> {
    let metadata = std::fs::metadata(directory).map_err(|error| {
        let failure = Failure::io("open", directory, &error);
        match error.kind() {
            std::io::ErrorKind::NotFound => failure.with_hint("give the directory of `gds_path`"),
            _ => failure,
        }
    })?;
    if !metadata.is_dir() {
        return Err(
            Failure::new(format!("not a directory: `{}`", directory.display()))
                .with_hint("give the directory of `gds_path`"),
        );
    }
    let found = namespaces(directory)?;
    if !found.is_empty() {
        return Ok(found);
    }
    let hint = if directory.join("manifest.json").is_file() {
        "this is one namespace of a store; give the directory that holds it"
    } else {
        "give the directory of `gds_path`; a store makes its first namespace when it is opened"
    };
    let message = format!(
        "not a kvrail store: `{}` holds no namespace",
        directory.display()
    );
    Err(Failure::new(message).with_hint(hint))
}

/// Returns a namespace's name: the last part of its path.
pub(crate) fn name(namespace: &NamespaceInfo) -> String {
    let last = namespace.directory.file_name();
    last.map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Finds the namespace that a user names: by its directory's name, or by its id alone.
///
/// # Errors
/// There is none of that name.
pub(crate) fn find<'a>(
    namespaces: &'a [NamespaceInfo],
    given: &str,
) -> Result<&'a NamespaceInfo, Failure> {
    let is_it = |namespace: &&NamespaceInfo| {
        let name = name(namespace);
        let id = name.rsplit_once('-').map(|(_, id)| id);
        name == given || id == Some(given)
    };
    namespaces.iter().find(is_it).ok_or_else(|| {
        let names: Vec<String> = namespaces.iter().map(name).collect();
        Failure::new(format!("no namespace `{given}` here"))
            .with_hint(format!("there are: {}", names.join(", ")))
    })
}

/// Lists a namespace's chunks by group, rank and key; warns of what cannot be read and goes on.
pub(crate) fn list(namespace: &NamespaceInfo) -> Vec<ChunkFile> {
    let mut found = Vec::new();
    for entry in chunks(&namespace.directory) {
        match entry {
            Ok(chunk) => found.push(chunk),
            Err(error) => warn(&error.to_string()),
        }
    }
    found.sort_by_key(|chunk| (chunk.group, chunk.rank, chunk.key));
    found
}

/// Returns the tokens of one chunk as its head states them; `None` where there is no good head.
///
/// All chunks of a group have as many tokens, since the chunk size is part of the namespace.
pub(crate) fn tokens_of(chunk: &ChunkFile) -> Option<u64> {
    u64::try_from(read_head(chunk).ok()?.fields.tokens).ok()
}
