//! Checking a chunk file whole, with little memory however large it says it is.

use serde::Serialize;
use serde_json::Value;

use super::ChunkFile;
use crate::chunk::{ChunkFormat, ChunkHead, PAGE_BYTES, PageTable, RootHasher, first_bad_page};
use crate::error::{Error, ErrorKind, Result};
use crate::io::IoFile;

/// Pages read and verified at a time: 1 MiB.
const PAGES_AT_A_TIME: usize = 256;
/// Bytes of an entry of the page table.
const ENTRY_BYTES: usize = 8;

/// What a verified chunk says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChunkSummary {
    /// Tokens.
    pub tokens: u64,
    /// Payload bytes.
    pub payload_bytes: u64,
    /// Key of the chunk before it, hex.
    pub parent: Option<String>,
    /// Shape of the payload: blocks, layers or 1, bytes.
    pub shape: [u64; 3],
}

/// Verifies a chunk whole: head against name, place and manifest, page table, every page, padding.
///
/// # Errors
/// [`ErrorKind::Damaged`] with what is wrong, [`ErrorKind::Io`] when it cannot be read.
pub fn verify_chunk(file: &ChunkFile, manifest: &Value) -> Result<ChunkSummary> {
    verify(file, manifest).map_err(|error| match error.path() {
        Some(_) => error,
        None => error.with_path(&file.path),
    })
}

/// Reads the head of a chunk, which says how long it is and what came before it.
///
/// # Errors
/// [`ErrorKind::Damaged`] unless it is a head, [`ErrorKind::Io`] when it cannot be read.
pub fn read_head(file: &ChunkFile) -> Result<ChunkHead> {
    head_of(&file.open()?)
}

fn head_of(file: &IoFile) -> Result<ChunkHead> {
    let mut head = vec![0; PAGE_BYTES];
    file.read_exact_at(0, &mut head)?;
    ChunkHead::decode(&head).map_err(|error| error.with_path(file.path()))
}

fn verify(chunk: &ChunkFile, manifest: &Value) -> Result<ChunkSummary> {
    let is_link = |error: &Error| {
        let number = error.os_error().and_then(std::io::Error::raw_os_error);
        number == Some(rustix::io::Errno::LOOP.raw_os_error())
    };
    let file = match chunk.open() {
        Err(error) if is_link(&error) => {
            return Err(damaged("a symbolic link").with_path(&chunk.path));
        }
        file => file?,
    };
    let status = file.status()?;
    if !status.is_file {
        return Err(damaged("not a regular file"));
    }
    let head = head_of(&file)?;
    check_identity(chunk, &head, manifest)?;
    let format = head.format;
    if status.bytes != format.file_bytes() as u64 {
        let (expected, found) = (format.file_bytes(), status.bytes);
        return Err(damaged(format!("expected {expected} bytes, got {found}")));
    }
    verify_table(&format, head.root, &file)?;
    verify_pages(&format, &file)?;
    Ok(ChunkSummary {
        tokens: head.fields.tokens as u64,
        payload_bytes: format.payload_bytes() as u64,
        parent: head.fields.chunk.parent.map(|key| key.to_string()),
        shape: format.shape().map(|side| side as u64),
    })
}

fn check_identity(chunk: &ChunkFile, head: &ChunkHead, manifest: &Value) -> Result<()> {
    let text = serde_json::to_vec(manifest).unwrap_or_default();
    let id: String = blake3::hash(&text).to_hex().chars().take(16).collect();
    let fields = &head.fields;
    for (what, found, expected) in [
        ("key", fields.chunk.key.to_string(), chunk.key.to_string()),
        ("group", fields.group.to_string(), chunk.group.to_string()),
        ("rank", fields.rank.to_string(), chunk.rank.to_string()),
        ("namespace", fields.namespace.clone(), id),
    ] {
        if found != expected {
            return Err(damaged(format!(
                "head: {what} is {found}, expected {expected}"
            )));
        }
    }
    Ok(())
}

/// Checks the page table against the root, and that nothing stands behind its last entry.
fn verify_table(format: &ChunkFormat, root: u64, file: &IoFile) -> Result<()> {
    let mut hasher = RootHasher::default();
    let mut rest = false;
    let mut buffer = vec![0; PAGES_AT_A_TIME * PAGE_BYTES];
    for start in (0..format.table_bytes()).step_by(buffer.len()) {
        let bytes = buffer.len().min(format.table_bytes() - start);
        let piece = super::super::image::bytes_mut(&mut buffer, 0..bytes)?;
        file.read_exact_at((format.table_offset() + start) as u64, piece)?;
        hasher.add(piece);
        let used = format.page_count() * ENTRY_BYTES;
        let unused = piece.get(used.saturating_sub(start)..).unwrap_or_default();
        rest |= unused.iter().any(|byte| *byte != 0);
    }
    if hasher.root() != root {
        return Err(damaged("page table does not match the root checksum"));
    }
    if rest {
        return Err(damaged("page table has entries behind the last page"));
    }
    Ok(())
}

fn verify_pages(format: &ChunkFormat, file: &IoFile) -> Result<()> {
    let count = format.page_count();
    let mut buffer = vec![0; PAGES_AT_A_TIME * PAGE_BYTES];
    let mut entries = [0; PAGES_AT_A_TIME * ENTRY_BYTES];
    for first in (0..count).step_by(PAGES_AT_A_TIME) {
        let pages = PAGES_AT_A_TIME.min(count - first);
        let entries = super::super::image::bytes_mut(&mut entries, 0..pages * ENTRY_BYTES)?;
        let offset = format.table_offset() + first * ENTRY_BYTES;
        file.read_exact_at(offset as u64, entries)?;
        let expected = PageTable::decode_entries(entries);
        let buffer = super::super::image::bytes_mut(&mut buffer, 0..pages * PAGE_BYTES)?;
        let offset = format.payload_offset() + first * PAGE_BYTES;
        file.read_exact_at(offset as u64, buffer)?;
        if let Some(index) = first_bad_page(buffer, &expected) {
            let page = first + index;
            return Err(damaged(format!(
                "page {page} of {count} does not match its checksum"
            )));
        }
    }
    Ok(())
}

fn damaged(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, message)
}
