//! The store of a slab: objects of a serving cache's host memory, in tasks.

use std::time::Duration;

use kvrail::store::NoticeLevel;
use kvrail::store::slab::{KindId, ObjectEnding, ObjectName, Slab, SlabObject};
use kvrail::{ChunkKey, Device, Error, ErrorKind, OpenOptions};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyDict;
use serde_json::Value;

use crate::config::Config;
use crate::error::IntoPython;
use crate::namespace::Namespace;
use crate::pointer;
use crate::ticket::limit;

/// Kind, group, rank, key.
type Name = (usize, u32, u32, PyBackedBytes);
/// As [`Name`], and the address.
type Object = (usize, u32, u32, PyBackedBytes, usize);

/// Objects of a slab, stored and loaded in tasks.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct SlabStore {
    inner: kvrail::store::slab::SlabStore,
}

#[pymethods]
impl SlabStore {
    #[new]
    #[pyo3(signature = (config, address, bytes, owner, *, align))]
    fn new(
        py: Python<'_>,
        config: &Config,
        address: usize,
        bytes: usize,
        owner: Py<PyAny>,
        align: usize,
    ) -> PyResult<Self> {
        let regions = pointer::regions(&[(address, bytes)], Device::Host, owner).into_python(py)?;
        let region = regions.into_iter().next();
        let missing = || Error::new(ErrorKind::InvalidArgument, "no memory");
        let slab = Slab {
            region: region.ok_or_else(missing).into_python(py)?,
            address,
            align,
        };
        let options = OpenOptions::default();
        let inner = kvrail::store::slab::SlabStore::new(&config.inner.store, options, slab)
            .into_python(py)?;
        Ok(Self { inner })
    }

    fn kind(&self, py: Python<'_>, namespace: &Namespace, object_bytes: usize) -> PyResult<usize> {
        let kind = self.inner.kind(namespace.inner.clone(), object_bytes);
        Ok(kind.into_python(py)?.number())
    }

    #[getter]
    fn events(&self) -> (i32, i32, i32) {
        self.inner.events().into()
    }

    fn submit_store(&self, py: Python<'_>, objects: Vec<Object>) -> PyResult<u64> {
        let objects = slab_objects(&objects).into_python(py)?;
        Ok(py.detach(|| self.inner.submit_store(objects)))
    }

    fn submit_lookup(&self, py: Python<'_>, names: Vec<Name>) -> PyResult<u64> {
        let names = object_names(&names).into_python(py)?;
        Ok(py.detach(|| self.inner.submit_lookup(names)))
    }

    fn submit_load(&self, py: Python<'_>, objects: Vec<Object>) -> PyResult<u64> {
        let objects = slab_objects(&objects).into_python(py)?;
        Ok(py.detach(|| self.inner.submit_load(objects)))
    }

    fn take_stores(&self) -> Vec<(u64, Vec<&'static str>)> {
        let ending = |ending| match ending {
            ObjectEnding::Stored => "stored",
            ObjectEnding::AlreadyPresent => "present",
            ObjectEnding::Missed => "missed",
        };
        let tasks = self.inner.take_stores().into_iter();
        tasks
            .map(|(task, endings)| (task, endings.into_iter().map(ending).collect()))
            .collect()
    }

    fn take_lookup(&self, task: u64) -> Option<Vec<bool>> {
        self.inner.take_lookup(task)
    }

    fn take_load(&self, task: u64) -> Option<Vec<bool>> {
        self.inner.take_load(task)
    }

    fn wait_for_lookup(
        &self,
        py: Python<'_>,
        task: u64,
        limit_seconds: f64,
    ) -> PyResult<Vec<bool>> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait_for_lookup(task, limit))
            .into_python(py)
    }

    fn wait_for_load(&self, py: Python<'_>, task: u64, limit_seconds: f64) -> PyResult<Vec<bool>> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait_for_load(task, limit))
            .into_python(py)
    }

    fn remove(&self, py: Python<'_>, names: Vec<Name>, limit_seconds: f64) -> PyResult<Vec<u64>> {
        let names = object_names(&names).into_python(py)?;
        let limit: Duration = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.remove(names, limit))
            .into_python(py)
    }

    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        for (directory, snapshot) in py.detach(|| self.inner.metrics()) {
            let metrics = PyDict::new(py);
            let unreadable = |error: serde_json::Error| {
                Error::new(ErrorKind::InvalidArgument, "report as JSON").with_source(error)
            };
            let snapshot = serde_json::to_value(snapshot).map_err(unreadable);
            if let Value::Object(fields) = snapshot.into_python(py)? {
                for (name, value) in fields {
                    metrics.set_item(name, value.as_f64())?;
                }
            }
            all.set_item(directory, metrics)?;
        }
        Ok(all)
    }

    fn take_notices(&self, py: Python<'_>) -> Vec<(&'static str, String)> {
        let level = |level| match level {
            NoticeLevel::Warning => "warning",
            NoticeLevel::Info => "info",
        };
        let notices = py.detach(|| self.inner.take_notices());
        notices
            .into_iter()
            .map(|notice| (level(notice.level), notice.message))
            .collect()
    }

    fn close(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<()> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.close(limit)).into_python(py)
    }
}

fn object_name(kind: usize, group: u32, rank: u32, key: &[u8]) -> kvrail::Result<ObjectName> {
    Ok(ObjectName {
        kind: KindId::from_number(kind),
        group,
        rank,
        key: ChunkKey::from_bytes(key)?,
    })
}

fn object_names(names: &[Name]) -> kvrail::Result<Vec<ObjectName>> {
    let name = |(kind, group, rank, key): &Name| object_name(*kind, *group, *rank, key);
    names.iter().map(name).collect()
}

fn slab_objects(objects: &[Object]) -> kvrail::Result<Vec<SlabObject>> {
    let object = |(kind, group, rank, key, address): &Object| {
        Ok(SlabObject {
            name: object_name(*kind, *group, *rank, key)?,
            address: *address,
        })
    };
    objects.iter().map(object).collect()
}
