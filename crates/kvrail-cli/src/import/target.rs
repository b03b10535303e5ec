//! The namespace that is imported to: what its manifest says of LMCache's files, and its store.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use kvrail::config::{FileMode, StoreConfig};
use kvrail::layout::{SideOrder, TokenOrder, TokenShape};
use kvrail::lmcache::{Element, LmcacheKey, MemoryFormat, TensorHead};
use kvrail::store::inspect::NamespaceInfo;
use kvrail::{ChunkKey, ChunkRef, Namespace, OpenOptions, Store};
use serde::Deserialize;
use serde_json::Value;

use crate::failure::Failure;
use crate::store_directory;

/// How long an answer of the store may take.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// A chunk of the namespace: whose it is, and its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TargetChunk {
    pub(super) rank: u32,
    pub(super) chunk: ChunkRef,
}

/// Why a key has no chunk in the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfit {
    OtherModel,
    Layer,
    Tagged,
}

/// What the connector puts into an identity whose chunk keys are LMCache's hashes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct FilesJson {
    model: String,
    workers: u32,
    element: String,
    has_sign: bool,
    block_tokens: usize,
    heads: usize,
    head_size: usize,
    element_bytes: usize,
    sides: Vec<[usize; 4]>,
}

/// The part of an identity that is of use here.
#[derive(Debug, Deserialize)]
struct IdentityJson {
    lmcache: FilesJson,
    chunk_size: usize,
    groups: Vec<GroupJson>,
}

#[derive(Debug, Deserialize)]
struct GroupJson {
    /// Missing with pipeline parallelism, where each stage has others.
    layers: Option<Vec<(String, usize)>>,
}

/// An open namespace.
#[derive(Debug)]
pub(super) struct Target {
    name: String,
    pub(super) store: Store,
    files: FilesJson,
    element: Element,
    pub(super) order: TokenOrder,
    pub(super) head: TensorHead,
    pub(super) blocks_per_chunk: usize,
}

impl Target {
    /// Opens the namespace that is named, or the only one that can be imported to.
    pub(super) fn open(directories: &[PathBuf], given: Option<&str>) -> Result<Self, Failure> {
        let first = directories.first().cloned().unwrap_or_default();
        let namespaces = store_directory::open(&first)?;
        let found = match given {
            Some(given) => store_directory::find(&namespaces, given)?,
            None => only(&namespaces)?,
        };
        let name = store_directory::name(found);
        let manifest = found.manifest.as_ref().map_err(|problem| {
            Failure::new(format!(
                "namespace {name}: its manifest cannot be read: {problem}"
            ))
        })?;
        let unusable = |why: &str| Failure::new(format!("namespace {name}: {why}"));
        let identity: IdentityJson = serde_json::from_value(identity_of(manifest).clone())
            .map_err(|error| {
                unusable(&format!(
                    "its identity does not say what LMCache's files are: {error}"
                ))
                .with_hint("start vLLM on it once with `chunk_hash: lmcache`")
            })?;
        let files = identity.lmcache;
        let layers = match identity.groups.as_slice() {
            [
                GroupJson {
                    layers: Some(layers),
                },
            ] => layers,
            [GroupJson { layers: None }] => {
                let why = "with pipeline parallelism its ranks have other layers; not supported";
                return Err(unusable(why));
            }
            _ => {
                return Err(unusable(
                    "it has several KV cache groups, LMCache knows one",
                ));
            }
        };
        let shape = TokenShape {
            layers: layers.len(),
            tokens: files.block_tokens,
            heads: files.heads,
            head_size: files.head_size,
            element_bytes: files.element_bytes,
        };
        let side = |[offset, head_stride, token_stride, element_stride]: &[usize; 4]| SideOrder {
            offset: *offset,
            head_stride: *head_stride,
            token_stride: *token_stride,
            element_stride: *element_stride,
        };
        let order = TokenOrder::new(shape, files.sides.iter().map(side).collect())?;
        let element = Element::of_key(&files.element)
            .ok_or_else(|| unusable("the type of its elements is not known"))?;
        let blocks_per_chunk = identity.chunk_size / files.block_tokens.max(1);
        let memory = match order.side_count() {
            1 => MemoryFormat::KvMla,
            _ => MemoryFormat::Kv2ltd,
        };
        let head = TensorHead::new(
            element,
            &order.token_payload_shape(blocks_per_chunk),
            memory,
        )?;
        if layers
            .iter()
            .any(|(_, bytes)| *bytes != order.block_bytes())
        {
            return Err(unusable(
                "its layers have other blocks than its identity says",
            ));
        }
        let mut config = StoreConfig::with_path(&first);
        config.gds_path = directories.to_vec();
        config.chunk_size = identity.chunk_size;
        // Files shall be readable by whoever can read those that are there.
        let mode = std::fs::metadata(found.directory.join("manifest.json"));
        let mode = mode
            .ok()
            .and_then(|found| FileMode::from_bits(found.mode() & 0o777));
        config.file_mode = mode.unwrap_or_default();
        let store = Store::open(&config, namespace_of(manifest)?, OpenOptions::default())?;
        Ok(Self {
            name,
            store,
            files,
            element,
            order,
            head,
            blocks_per_chunk,
        })
    }

    /// Returns the namespace's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the chunk that a key of LMCache's stands for.
    pub(super) fn chunk(&self, key: &LmcacheKey) -> Result<TargetChunk, Unfit> {
        let files = &self.files;
        let is_same = key.model == files.model
            && key.world_size == files.workers
            && key.worker < files.workers
            && key.element == self.element;
        let bits = key.hash.bits(files.has_sign);
        let (true, Some(bits)) = (is_same, bits) else {
            return Err(Unfit::OtherModel);
        };
        if key.layer.is_some() {
            return Err(Unfit::Layer);
        }
        if !key.tags.is_empty() {
            return Err(Unfit::Tagged);
        }
        let rank = key.worker;
        let key = ChunkKey::from_bytes(&bits.to_be_bytes()).map_err(|_| Unfit::OtherModel)?;
        // Which chunk is before it is not known, and the connector does not ask for it.
        let chunk = ChunkRef { key, parent: None };
        Ok(TargetChunk { rank, chunk })
    }

    /// Returns whether the namespace has a chunk.
    pub(super) fn has(&self, chunk: TargetChunk) -> Result<bool, Failure> {
        let keys = vec![chunk.chunk.key];
        let ticket = self.store.lookup(0, &[chunk.rank], keys);
        Ok(ticket.wait(LIMIT)? == 1)
    }

    /// Returns whether a tensor is that of a chunk with more or fewer tokens.
    pub(super) fn is_other_length(&self, found: &TensorHead) -> bool {
        let same_but_tokens = |shape: &[usize]| match shape {
            [sides, layers, _, width] => Some([*sides, *layers, *width]),
            _ => None,
        };
        found.shape() != self.head.shape()
            && same_but_tokens(found.shape()) == same_but_tokens(self.head.shape())
    }

    /// Ends the store.
    pub(super) fn close(self) -> Result<(), Failure> {
        Ok(self.store.close(LIMIT)?)
    }
}

fn identity_of(manifest: &Value) -> &Value {
    manifest.get("identity").unwrap_or(&Value::Null)
}

/// Returns the namespace that a manifest stands for.
fn namespace_of(manifest: &Value) -> Result<Namespace, Failure> {
    let model = manifest.get("model").and_then(Value::as_str);
    let identity = identity_of(manifest).as_object();
    Ok(Namespace::new(
        model.unwrap_or_default(),
        identity.cloned().unwrap_or_default(),
    )?)
}

/// Returns the only namespace whose chunk keys are LMCache's hashes.
fn only(namespaces: &[NamespaceInfo]) -> Result<&NamespaceInfo, Failure> {
    let is_fit = |namespace: &&NamespaceInfo| {
        let manifest = namespace.manifest.as_ref();
        manifest.is_ok_and(|manifest| identity_of(manifest).get("lmcache").is_some())
    };
    let fit: Vec<_> = namespaces.iter().filter(is_fit).collect();
    match fit.as_slice() {
        [one] => Ok(one),
        [] => Err(
            Failure::new("no namespace here has LMCache's hashes as its chunk keys")
                .with_hint("start vLLM on the store once with `chunk_hash: lmcache`"),
        ),
        several => {
            let names: Vec<String> = several
                .iter()
                .map(|namespace| store_directory::name(namespace))
                .collect();
            Err(
                Failure::new("several namespaces have LMCache's hashes as their chunk keys")
                    .with_hint(format!("give one with --namespace: {}", names.join(", "))),
            )
        }
    }
}
