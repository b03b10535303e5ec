//! An attached KV cache: store and load of its blocks.

use kvrail::{ChunkKey, ChunkRef, LoadChunk, StoreChunk};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use crate::error::IntoPython;
use crate::pointer;
use crate::ticket::{LoadTicket, StoreTicket};

/// Key, parent's key, block ids.
type StoreItem = (PyBackedBytes, Option<PyBackedBytes>, Vec<usize>);
/// Key, parent's key, first block of the chunk, block ids from there on.
type LoadItem = (PyBackedBytes, Option<PyBackedBytes>, usize, Vec<usize>);

/// The KV cache of one group on one rank.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct KvCache {
    pub(crate) inner: kvrail::KvCache,
}

#[pymethods]
impl KvCache {
    #[getter]
    fn chunk_file_bytes(&self) -> usize {
        self.inner.chunk_file_bytes()
    }

    #[getter]
    fn payload_bytes(&self) -> usize {
        self.inner.payload_bytes()
    }

    #[getter]
    fn routes(&self) -> Vec<&'static str> {
        let routes = self.inner.routes().into_iter();
        routes.map(|route| route.name()).collect()
    }

    #[pyo3(signature = (chunks, *, stream=0))]
    fn store(
        &self,
        py: Python<'_>,
        chunks: Vec<StoreItem>,
        stream: usize,
    ) -> PyResult<StoreTicket> {
        let chunks = chunks
            .into_iter()
            .map(|(key, parent, blocks)| {
                Ok(StoreChunk {
                    chunk: chunk_ref(&key, parent.as_ref())?,
                    blocks,
                })
            })
            .collect::<kvrail::Result<Vec<_>>>()
            .into_python(py)?;
        let stream = pointer::compute_stream(stream);
        let inner = py
            .detach(|| self.inner.store_after(&chunks, stream))
            .into_python(py)?;
        Ok(StoreTicket { inner })
    }

    #[pyo3(signature = (chunks, *, stream=0))]
    fn load(&self, py: Python<'_>, chunks: Vec<LoadItem>, stream: usize) -> PyResult<LoadTicket> {
        let chunks = chunks
            .into_iter()
            .map(|(key, parent, first_block, blocks)| {
                Ok(LoadChunk {
                    chunk: chunk_ref(&key, parent.as_ref())?,
                    first_block,
                    blocks,
                })
            })
            .collect::<kvrail::Result<Vec<_>>>()
            .into_python(py)?;
        let stream = pointer::compute_stream(stream);
        let inner = py
            .detach(|| self.inner.load_after(chunks, stream))
            .into_python(py)?;
        Ok(LoadTicket { inner })
    }
}

fn chunk_ref(key: &[u8], parent: Option<&PyBackedBytes>) -> kvrail::Result<ChunkRef> {
    Ok(ChunkRef {
        key: ChunkKey::from_bytes(key)?,
        parent: parent
            .map(|parent| ChunkKey::from_bytes(parent))
            .transpose()?,
    })
}
