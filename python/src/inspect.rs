//! Looking into a store without opening it.

use std::path::PathBuf;

use kvrail::store::inspect;
use pyo3::prelude::*;

use crate::error::IntoPython;

/// A namespace: its name, its manifest as JSON, why there is none.
type Described = (String, Option<String>, Option<String>);

/// Lists the namespaces of a directory: name, manifest as JSON or `None`, why it cannot be read.
#[pyfunction]
pub(crate) fn namespaces(py: Python<'_>, directory: PathBuf) -> PyResult<Vec<Described>> {
    let found = py
        .detach(|| inspect::namespaces(&directory))
        .into_python(py)?;
    let each = found.into_iter().map(|namespace| {
        let name = namespace.directory.file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        match namespace.manifest {
            Ok(manifest) => (name, Some(manifest.to_string()), None),
            Err(problem) => (name, None, Some(problem)),
        }
    });
    Ok(each.collect())
}
