//! Tickets of work in the background, and the reports that they end with.

use std::time::Duration;

use kvrail::{Error, ErrorKind};
use pyo3::prelude::*;

use crate::error::IntoPython;

/// Reads a limit in seconds.
pub(crate) fn limit(seconds: f64) -> kvrail::Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| {
        let message = format!("`limit_seconds` = {seconds}: expected a finite number from 0");
        Error::new(ErrorKind::InvalidArgument, message).with_source(error)
    })
}

/// A lookup in the background.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct LookupTicket {
    pub(crate) inner: kvrail::LookupTicket,
}

#[pymethods]
impl LookupTicket {
    fn poll(&self) -> Option<usize> {
        self.inner.poll()
    }

    fn wait(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<usize> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait(limit)).into_python(py)
    }
}

/// A lookup of each of several chunks in the background.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct PresenceTicket {
    pub(crate) inner: kvrail::PresenceTicket,
}

#[pymethods]
impl PresenceTicket {
    fn poll(&self) -> Option<Vec<bool>> {
        self.inner.poll()
    }

    fn wait(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<Vec<bool>> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait(limit)).into_python(py)
    }
}

/// A store in the background.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct StoreTicket {
    pub(crate) inner: kvrail::StoreTicket,
}

#[pymethods]
impl StoreTicket {
    fn poll(&self) -> Option<StoreReport> {
        self.inner.poll().map(StoreReport::from)
    }

    fn wait(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<StoreReport> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait(limit))
            .map(StoreReport::from)
            .into_python(py)
    }
}

/// A load in the background.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct LoadTicket {
    pub(crate) inner: kvrail::LoadTicket,
}

#[pymethods]
impl LoadTicket {
    fn poll(&self) -> Option<LoadReport> {
        self.inner.poll().map(LoadReport::from)
    }

    fn wait(&self, py: Python<'_>, limit_seconds: f64) -> PyResult<LoadReport> {
        let limit = limit(limit_seconds).into_python(py)?;
        py.detach(|| self.inner.wait(limit))
            .map(LoadReport::from)
            .into_python(py)
    }
}

/// What became of the chunks of a store.
#[derive(Debug)]
#[pyclass(frozen, get_all, module = "kvrail._core")]
pub(crate) struct StoreReport {
    stored: usize,
    already_present: usize,
    dropped: usize,
    failed: usize,
}

#[pymethods]
impl StoreReport {
    fn __repr__(&self) -> String {
        format!("{self:?}")
    }
}

impl From<kvrail::StoreReport> for StoreReport {
    fn from(report: kvrail::StoreReport) -> Self {
        Self {
            stored: report.stored,
            already_present: report.already_present,
            dropped: report.dropped,
            failed: report.failed,
        }
    }
}

/// What became of the chunks of a load.
#[derive(Debug)]
#[pyclass(frozen, get_all, module = "kvrail._core")]
pub(crate) struct LoadReport {
    loaded: usize,
    failed: Vec<usize>,
    errors: Vec<String>,
}

#[pymethods]
impl LoadReport {
    fn __repr__(&self) -> String {
        format!("{self:?}")
    }
}

impl From<kvrail::LoadReport> for LoadReport {
    fn from(report: kvrail::LoadReport) -> Self {
        Self {
            loaded: report.loaded,
            failed: report.failed,
            errors: report.errors,
        }
    }
}
