//! The first 4 KiB of a chunk file: a safetensors head of fixed size.
//!
//! Every field but the root checksum is known to a reader before it opens the file, so a head is
//! checked by writing the expected one and comparing the bytes: whatever differs makes the chunk
//! bad, and nothing read from disk is ever used as a length or an offset.

use serde::{Deserialize, Serialize};

use super::format::{ChunkFormat, ENTRY_BYTES, FORMAT_VERSION, PAGE_BYTES};
use super::key::{ChunkKey, ChunkRef};
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the length that precedes the JSON of a safetensors file.
const LENGTH_BYTES: usize = 8;
/// Digits of the root checksum.
const ROOT_DIGITS: usize = 16;

/// What stands in a head beside the lengths: all of it known before a file is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadFields {
    /// The namespace's id, 16 hex digits.
    pub namespace: String,
    /// The KV cache group.
    pub group: u32,
    /// The part that the file holds: a rank of the instance, or a stage's heads.
    pub rank: Part,
    /// Tokens of a chunk.
    pub tokens: usize,
    /// The chunk's key and its parent's.
    pub chunk: ChunkRef,
}

/// A head: fields, format and the root checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkHead {
    /// Identity of the chunk.
    pub fields: HeadFields,
    /// Shape and lengths.
    pub format: ChunkFormat,
    /// XXH3-64 of the page table.
    pub root: u64,
}

/// The JSON of a head. Field order is file order; `docs/format.md` fixes it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadJson {
    #[serde(rename = "__metadata__")]
    metadata: MetadataJson,
    kvcache: TensorJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    pad: Option<TensorJson>,
    page_xxh3: TensorJson,
}

/// safetensors allows only strings here.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataJson {
    format: String,
    version: String,
    namespace: String,
    group: String,
    rank: String,
    tokens: String,
    chunk_key: String,
    parent: String,
    root_xxh3: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorJson {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

impl TensorJson {
    fn new(dtype: &str, shape: &[usize], offset: usize, bytes: usize) -> Self {
        Self {
            dtype: dtype.into(),
            shape: shape.into(),
            data_offsets: [offset, offset + bytes],
        }
    }
}

impl ChunkHead {
    /// Writes the head: length, JSON, spaces up to [`PAGE_BYTES`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when `target` is not one page or the JSON does not fit in.
    pub fn encode_into(&self, target: &mut [u8]) -> Result<()> {
        let invalid = |message: String| Error::new(ErrorKind::InvalidArgument, message);
        let json = serde_json::to_vec(&self.json())
            .map_err(|error| invalid("head as JSON".into()).with_source(error))?;
        let Some((length, text)) = target.split_first_chunk_mut::<LENGTH_BYTES>() else {
            return Err(invalid(format!("head of {} bytes", target.len())));
        };
        if text.len() != PAGE_BYTES - LENGTH_BYTES || json.len() > text.len() {
            return Err(invalid(format!(
                "head of {} bytes in {}",
                json.len(),
                text.len()
            )));
        }
        *length = (text.len() as u64).to_le_bytes();
        text.fill(b' ');
        text.iter_mut()
            .zip(&json)
            .for_each(|(target, source)| *target = *source);
        Ok(())
    }

    /// Reads a head of any content. Never panics.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] unless `page` is exactly what [`ChunkHead::encode_into`] writes for
    /// the head that it describes.
    pub fn decode(page: &[u8]) -> Result<Self> {
        let damaged = |message: &str| Error::new(ErrorKind::Damaged, format!("head: {message}"));
        let Some((_, text)) = page.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(damaged("shorter than its length field"));
        };
        let json: HeadJson = serde_json::from_slice(text)
            .map_err(|error| damaged("not the JSON of a chunk").with_source(error))?;
        let head = Self::from_json(&json).ok_or_else(|| damaged("impossible values"))?;
        let mut expected = [0; PAGE_BYTES];
        head.encode_into(&mut expected)?;
        if expected != page {
            return Err(damaged("bytes differ from the canonical form"));
        }
        Ok(head)
    }

    /// Checks a page against what a reader expects and returns the root checksum it holds.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the first field that differs.
    pub fn check(page: &[u8], fields: &HeadFields, format: &ChunkFormat) -> Result<u64> {
        // Nearly always the page is the expected one. Then nothing of it but the root checksum has
        // to be read, which takes a quarter of the time.
        if let Some(root) = root_in(page) {
            let mut expected = [0; PAGE_BYTES];
            let head = Self {
                fields: fields.clone(),
                format: *format,
                root,
            };
            head.encode_into(&mut expected)?;
            if expected == page {
                return Ok(root);
            }
        }
        let found = Self::decode(page)?;
        let differs = |name: &str, found: String, expected: String| {
            let message = format!("head: {name} is {found}, expected {expected}");
            Err(Error::new(ErrorKind::Damaged, message))
        };
        if found.fields.chunk != fields.chunk {
            return differs(
                "chunk",
                found.fields.chunk.key.to_string(),
                fields.chunk.key.to_string(),
            );
        }
        if found.fields != *fields {
            return differs(
                "identity",
                format!("{:?}", found.fields),
                format!("{fields:?}"),
            );
        }
        if found.format != *format {
            let (found, expected) = (found.format.shape(), format.shape());
            return differs("shape", format!("{found:?}"), format!("{expected:?}"));
        }
        Ok(found.root)
    }

    fn json(&self) -> HeadJson {
        let format = &self.format;
        let table_start = format.table_offset() - format.payload_offset();
        let pad = format.pad_bytes();
        let parent = self.fields.chunk.parent;
        HeadJson {
            metadata: MetadataJson {
                format: "kvrail".into(),
                version: FORMAT_VERSION.to_string(),
                namespace: self.fields.namespace.clone(),
                group: self.fields.group.to_string(),
                rank: self.fields.rank.to_string(),
                tokens: self.fields.tokens.to_string(),
                chunk_key: self.fields.chunk.key.to_string(),
                parent: parent.map(|key| key.to_string()).unwrap_or_default(),
                root_xxh3: format!("{:016x}", self.root),
            },
            kvcache: TensorJson::new("U8", &format.shape(), 0, format.payload_bytes()),
            pad: (pad > 0).then(|| TensorJson::new("U8", &[pad], format.payload_bytes(), pad)),
            page_xxh3: TensorJson::new(
                "U64",
                &[format.table_entries()],
                table_start,
                format.table_entries() * ENTRY_BYTES,
            ),
        }
    }

    /// Takes over what the JSON says; the caller compares the canonical form afterwards.
    fn from_json(json: &HeadJson) -> Option<Self> {
        let metadata = &json.metadata;
        let parent = match metadata.parent.as_str() {
            "" => None,
            hex => Some(ChunkKey::from_hex(hex).ok()?),
        };
        let key = ChunkKey::from_hex(&metadata.chunk_key).ok()?;
        Some(Self {
            fields: HeadFields {
                namespace: metadata.namespace.clone(),
                group: metadata.group.parse().ok()?,
                rank: Part::parse(&metadata.rank)?,
                tokens: metadata.tokens.parse().ok()?,
                chunk: ChunkRef { key, parent },
            },
            format: ChunkFormat::new(json.kvcache.shape.as_slice().try_into().ok()?).ok()?,
            root: u64::from_str_radix(&metadata.root_xxh3, 16).ok()?,
        })
    }
}

/// Returns what a page has where a head has its root checksum. Whether the page is a head is for the
/// caller to find out.
fn root_in(page: &[u8]) -> Option<u64> {
    let name = br#""root_xxh3":""#;
    let at = page.windows(name.len()).position(|bytes| bytes == name)? + name.len();
    let digits = page.get(at..at + ROOT_DIGITS)?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests;
