//! The store: open, lookup, attach, and what it tells about itself.

use std::ffi::OsString;
use std::path::PathBuf;

use kvrail::layout::{SideOrder, TokenOrder, TokenShape};
use kvrail::lmcache::Element;
use kvrail::store::{LmcacheNames, NoticeLevel, ProbeProgram};
use kvrail::{Access, ChunkKey, Device, Error, ErrorKind, KvLayout, LayerSpan, OpenOptions, Part};
use kvrail_cuda::LibraryPaths;
use kvrail_cuda::system::{SystemView, cufile_guards};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;

use crate::config::Config;
use crate::error::IntoPython;
use crate::kv_cache::KvCache;
use crate::namespace::Namespace;
use crate::part::PartArgument;
use crate::pointer;
use crate::ticket::{LookupTicket, PresenceTicket, limit};

/// How LMCache's files are named: model, workers, type of the elements, whether hashes have a sign.
type Names = (String, u32, String, bool);

/// The order of KV in a block: tokens, heads, elements of a head, bytes of an element, and for each
/// side offset and strides of head, token and element.
type Order = (
    usize,
    usize,
    usize,
    usize,
    Vec<(usize, usize, usize, usize)>,
);

/// A store of chunks in one or more directories.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct Store {
    inner: kvrail::Store,
}

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (
        config, namespace, *, read_only=false, quiet=false, cpus=None, cuda_library=None,
        cufile_libraries=None, cufile_probe=None, no_in_place=None, system_root=None, lmcache=None,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "they are keyword arguments in Python"
    )]
    fn new(
        py: Python<'_>,
        config: &Config,
        namespace: &Namespace,
        read_only: bool,
        quiet: bool,
        cpus: Option<Vec<usize>>,
        cuda_library: Option<PathBuf>,
        cufile_libraries: Option<Vec<PathBuf>>,
        cufile_probe: Option<Vec<OsString>>,
        no_in_place: Option<String>,
        system_root: Option<PathBuf>,
        lmcache: Option<Names>,
    ) -> PyResult<Self> {
        let access = if read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let mut libraries = LibraryPaths::default();
        if let Some(path) = cuda_library {
            libraries.cuda = vec![path];
        }
        if let Some(paths) = cufile_libraries {
            libraries.cufile = paths;
        }
        let mut system = SystemView::default();
        if let Some(root) = system_root {
            system.root = root;
        }
        let options = OpenOptions {
            access,
            quiet,
            cpus,
            libraries,
            cufile_probe: cufile_probe.and_then(program),
            system,
            no_in_place,
            lmcache: lmcache.map(names).transpose().into_python(py)?,
            ..OpenOptions::default()
        };
        let namespace = namespace.inner.clone();
        let inner = py
            .detach(|| kvrail::Store::open(&config.inner.store, namespace, options))
            .into_python(py)?;
        Ok(Self { inner })
    }

    #[pyo3(signature = (keys, *, group=0, ranks=vec![PartArgument::Rank(0)]))]
    fn lookup(
        &self,
        py: Python<'_>,
        keys: Vec<PyBackedBytes>,
        group: u32,
        ranks: Vec<PartArgument>,
    ) -> PyResult<LookupTicket> {
        let (keys, parts) = (chunk_keys(&keys), parts(&ranks));
        let (keys, parts) = (keys.into_python(py)?, parts.into_python(py)?);
        let inner = py.detach(|| self.inner.lookup(group, &parts, keys));
        Ok(LookupTicket { inner })
    }

    #[pyo3(signature = (keys, *, group=0, ranks=vec![PartArgument::Rank(0)]))]
    fn lookup_each(
        &self,
        py: Python<'_>,
        keys: Vec<PyBackedBytes>,
        group: u32,
        ranks: Vec<PartArgument>,
    ) -> PyResult<PresenceTicket> {
        let (keys, parts) = (chunk_keys(&keys), parts(&ranks));
        let (keys, parts) = (keys.into_python(py)?, parts.into_python(py)?);
        let inner = py.detach(|| self.inner.lookup_each(group, &parts, keys));
        Ok(PresenceTicket { inner })
    }

    #[pyo3(signature = (
        layers, regions, owner, *, block_count, blocks_per_chunk, group=0,
        rank=PartArgument::Rank(0), device="cpu", order=None,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "they are keyword arguments in Python"
    )]
    fn attach(
        &self,
        py: Python<'_>,
        layers: Vec<(usize, usize, usize, usize)>,
        regions: Vec<(usize, usize)>,
        owner: Py<PyAny>,
        block_count: usize,
        blocks_per_chunk: usize,
        group: u32,
        rank: PartArgument,
        device: &str,
        order: Option<Order>,
    ) -> PyResult<KvCache> {
        let order = order
            .map(|order| token_order(layers.len(), order))
            .transpose()
            .into_python(py)?;
        let layers = layers
            .into_iter()
            .map(|(region, offset, block_stride, block_bytes)| LayerSpan {
                region,
                offset,
                block_stride,
                block_bytes,
            })
            .collect();
        let sizes: Vec<usize> = regions.iter().map(|(_, bytes)| *bytes).collect();
        let device = parse_device(device).into_python(py)?;
        let regions = pointer::regions(&regions, device, owner).into_python(py)?;
        let inner = py
            .detach(|| {
                let layout = KvLayout::new(layers, block_count, &sizes)?;
                let (store, blocks, part) = (&self.inner, blocks_per_chunk, rank.part()?);
                match order {
                    None => store.attach(group, part, layout, regions, blocks),
                    Some(_) if part.heads().is_some() => {
                        let message = format!("rank {part}: LMCache's files are those of a rank");
                        Err(Error::new(ErrorKind::InvalidArgument, message))
                    }
                    Some(order) => {
                        let rank = part.rank();
                        store.attach_by_tokens(group, rank, layout, regions, blocks, order)
                    }
                }
            })
            .into_python(py)?;
        Ok(KvCache { inner })
    }

    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let snapshot = serde_json::to_value(self.inner.metrics()).map_err(unreadable);
        let metrics = PyDict::new(py);
        if let Value::Object(fields) = snapshot.into_python(py)? {
            for (name, value) in fields {
                metrics.set_item(name, value.as_f64())?;
            }
        }
        Ok(metrics)
    }

    fn take_notices(&self) -> Vec<(&'static str, String)> {
        let level = |level| match level {
            NoticeLevel::Warning => "warning",
            NoticeLevel::Info => "info",
        };
        let notices = self.inner.take_notices();
        notices
            .into_iter()
            .map(|notice| (level(notice.level), notice.message))
            .collect()
    }

    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let mounts = py.detach(|| self.inner.describe());
        let text = serde_json::to_string(&mounts)
            .map_err(unreadable)
            .into_python(py)?;
        let mounts = py.import("json")?.call_method1("loads", (text,))?;
        Ok(mounts.cast_into()?)
    }

    fn flush(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<()> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.flush(limit)).into_python(py)
    }

    fn close(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<()> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.close(limit)).into_python(py)
    }
}

fn parts(ranks: &[PartArgument]) -> kvrail::Result<Vec<Part>> {
    ranks.iter().map(|rank| rank.part()).collect()
}

fn chunk_keys(keys: &[PyBackedBytes]) -> kvrail::Result<Vec<ChunkKey>> {
    keys.iter().map(|key| ChunkKey::from_bytes(key)).collect()
}

fn names((model, workers, element, has_sign): Names) -> kvrail::Result<LmcacheNames> {
    let element = Element::of_key(&element).ok_or_else(|| {
        let message = format!("type of elements {element:?}: expected LMCache's name of one");
        Error::new(ErrorKind::InvalidArgument, message)
    })?;
    Ok(LmcacheNames {
        model,
        workers,
        element,
        has_sign,
    })
}

fn token_order(layers: usize, order: Order) -> kvrail::Result<TokenOrder> {
    let (tokens, heads, head_size, element_bytes, sides) = order;
    let shape = TokenShape {
        layers,
        tokens,
        heads,
        head_size,
        element_bytes,
    };
    let side = |(offset, head_stride, token_stride, element_stride)| SideOrder {
        offset,
        head_stride,
        token_stride,
        element_stride,
    };
    TokenOrder::new(shape, sides.into_iter().map(side).collect())
}

/// Takes a command line apart; `None` for an empty one.
fn program(command: Vec<OsString>) -> Option<ProbeProgram> {
    let mut words = command.into_iter();
    Some(ProbeProgram {
        program: words.next()?.into(),
        arguments: words.collect(),
    })
}

/// Tries cuFile as standard input says, and answers on standard output.
#[pyfunction]
pub(crate) fn answer_cufile_probe(py: Python<'_>) {
    py.detach(|| kvrail_cuda::probe::answer(std::io::stdin(), &mut std::io::stdout()));
}

/// Says why cuFile has no direct path to a directory, `None` where it may have one.
#[pyfunction]
#[pyo3(signature = (directory, *, system_root=None))]
pub(crate) fn direct_path_problem(
    py: Python<'_>,
    directory: PathBuf,
    system_root: Option<PathBuf>,
) -> Option<String> {
    let mut system = SystemView::default();
    if let Some(root) = system_root {
        system.root = root;
    }
    let guards = py.detach(|| cufile_guards(&system, &directory));
    guards.err().map(|refusal| refusal.to_string())
}

fn unreadable(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::InvalidArgument, "report as JSON").with_source(error)
}

/// Reads a device as PyTorch writes it: `cpu`, `cuda` or `cuda:<ordinal>`.
fn parse_device(text: &str) -> kvrail::Result<Device> {
    let ordinal = match text {
        "cpu" => return Ok(Device::Host),
        "cuda" => Some(0),
        other => other
            .strip_prefix("cuda:")
            .and_then(|number| number.parse().ok()),
    };
    ordinal.map(Device::Cuda).ok_or_else(|| {
        let message = format!("`device` = {text:?}: expected cpu or cuda:<ordinal>");
        Error::new(ErrorKind::InvalidArgument, message)
    })
}
