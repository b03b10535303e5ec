//! The chunk files in a directory of LMCache's `GdsBackend`, and what each holds.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, FolderRules, IoFile, OpenMode};
use crate::lmcache::{FileKind, FilePlace, HEAD_BYTES, LmcacheKey, TensorHead};

/// Characters of a folder's name, at most.
const FOLDER_CHARACTERS_MAX: usize = 2;

/// A chunk file that LMCache would find: its metadata is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LmcacheFile {
    /// Where it is, for messages.
    pub path: PathBuf,
    root: PathBuf,
    place: FilePlace,
}

impl LmcacheFile {
    /// Returns the key, from the file's name.
    pub fn key(&self) -> &LmcacheKey {
        &self.place.key
    }

    /// Reads the metadata: what the file should hold.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] when it is none, [`ErrorKind::Io`] when it cannot be read.
    pub fn read_metadata(&self) -> Result<TensorHead> {
        let file = self.open(FileKind::Metadata)?;
        check_length(&file, HEAD_BYTES)?;
        let mut page = [0; HEAD_BYTES];
        file.read_exact_at(0, &mut page)?;
        TensorHead::decode(&page).map_err(|error| error.with_path(file.path()))
    }

    /// Reads the tensor into `payload`, which gets its length. There is no checksum: length and head
    /// are what is checked.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] for a file of another length or head than `head` says,
    /// [`ErrorKind::Io`] when it cannot be read.
    pub fn read_payload(&self, head: &TensorHead, payload: &mut Vec<u8>) -> Result<()> {
        let file = self.open(FileKind::Chunk)?;
        check_length(&file, head.file_bytes())?;
        let mut page = [0; HEAD_BYTES];
        file.read_exact_at(0, &mut page)?;
        head.check(&page)
            .map_err(|error| error.with_path(file.path()))?;
        payload.resize(head.payload_bytes(), 0);
        file.read_exact_at(HEAD_BYTES as u64, payload)
    }

    fn open(&self, kind: FileKind) -> Result<IoFile> {
        let place = FilePlace {
            kind,
            ..self.place.clone()
        };
        let below = format!("{}/{}", place.folder(), place.name()?);
        let root = Folder::open(&self.root, FolderRules::default())?;
        IoFile::open_in(&root, below, OpenMode::Read, false)
    }
}

/// Walks the chunk files of a directory, folder by folder; one folder's names are in memory.
///
/// Names that are none of LMCache's, or lie in another folder than theirs, are passed over, as LMCache
/// does not find them either; a folder that cannot be read is one error.
pub fn lmcache_files(root: &Path) -> impl Iterator<Item = Result<LmcacheFile>> + use<> {
    let root = root.to_path_buf();
    let folders = folders(&root).unwrap_or_else(|error| vec![Err(error)]);
    folders.into_iter().flat_map(move |below| {
        let files = below.and_then(|below| files(&root, &below));
        files.unwrap_or_else(|error| vec![Err(error)])
    })
}

/// Lists the folders that may hold files, sorted: one below the other, and the outer alone.
fn folders(root: &Path) -> Result<Vec<Result<String>>> {
    let opened = Folder::open(root, FolderRules::default())?;
    let mut all = Vec::new();
    for outer in folder_names(&opened)? {
        all.push(Ok(outer.clone()));
        let inner = opened
            .folder(&outer)
            .and_then(|folder| folder_names(&folder));
        match inner {
            Ok(names) => all.extend(names.iter().map(|inner| Ok(format!("{outer}/{inner}")))),
            Err(error) => all.push(Err(error)),
        }
    }
    Ok(all)
}

fn folder_names(folder: &Folder) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for name in folder.names()? {
        let name = name?;
        let Some(name) = name.to_str().filter(|name| is_folder_name(name)) else {
            continue;
        };
        let status = folder.status(name)?;
        if status.is_some_and(|status| status.is_folder) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Returns whether a name is the beginning of a number in decimal.
fn is_folder_name(name: &str) -> bool {
    let digits = name.strip_prefix('-').unwrap_or(name);
    (1..=FOLDER_CHARACTERS_MAX).contains(&name.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn files(root: &Path, below: &str) -> Result<Vec<Result<LmcacheFile>>> {
    let folder = Folder::open(root, FolderRules::default())?.folder(below)?;
    let mut places = Vec::new();
    for name in folder.names()? {
        let name = name?;
        let place = name.to_str().and_then(FilePlace::parse);
        if let Some(place) = place
            && place.kind == FileKind::Metadata
            && place.folder() == below
        {
            places.push(place);
        }
    }
    places.sort_by_key(|place| place.key.hash);
    let file = |mut place: FilePlace| {
        place.kind = FileKind::Chunk;
        Ok(LmcacheFile {
            path: root.join(below).join(place.name()?),
            root: root.to_path_buf(),
            place,
        })
    };
    Ok(places.into_iter().map(file).collect())
}

fn check_length(file: &IoFile, expected: usize) -> Result<()> {
    let status = file.status()?;
    if status.is_file && status.bytes == expected as u64 {
        return Ok(());
    }
    let message = match status.is_file {
        true => format!("expected {expected} bytes, the file has {}", status.bytes),
        false => "not a regular file".into(),
    };
    Err(Error::new(ErrorKind::Damaged, message).with_path(file.path()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lmcache::{Element, MemoryFormat};

    const KEY: &str = "m@1@0@1e240@half";

    fn put(root: &Path, below: &str, content: &[u8]) {
        let path = root.join(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn name(text: &str, kind: FileKind) -> String {
        let place = FilePlace {
            key: LmcacheKey::parse(text).unwrap(),
            is_on_weka: false,
            kind,
        };
        format!("{}/{}", place.folder(), place.name().unwrap())
    }

    #[test]
    fn files_are_found_as_lmcache_finds_them_and_checked() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let head = TensorHead::new(Element::F16, &[2, 1, 4, 8], MemoryFormat::Kv2ltd).unwrap();
        let page = head.encode();
        let content = [&page[..], &[7; 128]].concat();
        put(root, &name(KEY, FileKind::Chunk), &content);
        put(root, &name(KEY, FileKind::Metadata), &page);
        // Without metadata, in another's folder, being written, and not of LMCache.
        put(root, &name("m@1@0@1e241@half", FileKind::Chunk), &content);
        let elsewhere = name("m@1@0@2e240@half", FileKind::Metadata);
        put(
            root,
            &format!("99/99/{}", elsewhere.rsplit('/').next().unwrap()),
            &page,
        );
        put(
            root,
            &format!("{}.tmp01234567", name(KEY, FileKind::Metadata)),
            &page,
        );
        put(root, "12/34/other", b"");
        put(root, "12/x", b"");
        let found: Vec<_> = lmcache_files(root).map(Result::unwrap).collect();
        assert_eq!(found.len(), 1);
        let file = &found[0];
        assert_eq!(file.key().to_string(), KEY);
        assert_eq!(file.path, root.join(name(KEY, FileKind::Chunk)));
        assert_eq!(file.read_metadata().unwrap(), head);
        let mut payload = Vec::new();
        file.read_payload(&head, &mut payload).unwrap();
        assert_eq!(payload, [7; 128]);
        let other = TensorHead::new(Element::F16, &[2, 2, 2, 8], MemoryFormat::Kv2ltd).unwrap();
        let error = file.read_payload(&other, &mut payload).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        put(
            root,
            &name(KEY, FileKind::Chunk),
            &content[..content.len() - 1],
        );
        let error = file.read_payload(&head, &mut payload).unwrap_err();
        assert!(error.to_string().contains("expected 4224 bytes"), "{error}");
        put(root, &name(KEY, FileKind::Metadata), b"{}");
        assert_eq!(file.read_metadata().unwrap_err().kind(), ErrorKind::Damaged);
    }

    #[test]
    fn links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let head = TensorHead::new(Element::F16, &[2, 1, 4, 8], MemoryFormat::Kv2ltd).unwrap();
        put(
            outside.path(),
            &name(KEY, FileKind::Metadata),
            &head.encode(),
        );
        std::os::unix::fs::symlink(outside.path().join("12"), root.path().join("12")).unwrap();
        assert_eq!(lmcache_files(root.path()).count(), 0);
        assert_eq!(lmcache_files(outside.path()).count(), 1);
    }
}
