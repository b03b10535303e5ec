//! The namespace: all that must be equal for bytes to be interchangeable.

use kvrail::{Error, ErrorKind};
use pyo3::prelude::*;
use serde_json::{Map, Value};

use crate::error::IntoPython;

/// A namespace; immutable.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct Namespace {
    pub(crate) inner: kvrail::Namespace,
}

#[pymethods]
impl Namespace {
    #[new]
    fn new(py: Python<'_>, model: &str, identity_json: &str) -> PyResult<Self> {
        let inner = identity(identity_json)
            .and_then(|identity| kvrail::Namespace::new(model, identity))
            .into_python(py)?;
        Ok(Self { inner })
    }

    #[getter]
    fn id(&self) -> &str {
        self.inner.id()
    }

    #[getter]
    fn directory_name(&self) -> String {
        self.inner.directory_name()
    }
}

fn identity(json: &str) -> kvrail::Result<Map<String, Value>> {
    serde_json::from_str(json).map_err(|error| {
        let message = "identity: expected a JSON object";
        Error::new(ErrorKind::InvalidArgument, message).with_source(error)
    })
}
