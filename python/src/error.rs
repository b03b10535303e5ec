//! The exceptions, and the one map from [`ErrorKind`] to them.

use kvrail::{Error, ErrorKind};
use pyo3::exceptions::{PyException, PyOSError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The exception classes, made once.
///
/// They are made by hand because most have two bases: the one of this package, and the built-in
/// class that Python code catches by habit.
struct Exceptions {
    base: Py<PyType>,
    config: Py<PyType>,
    damaged: Py<PyType>,
    io: Py<PyType>,
    no_space: Py<PyType>,
    wait_timeout: Py<PyType>,
    closed: Py<PyType>,
    mismatch: Py<PyType>,
    gpu: Py<PyType>,
}

static EXCEPTIONS: PyOnceLock<Exceptions> = PyOnceLock::new();

impl Exceptions {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        EXCEPTIONS.get_or_try_init(py, || Self::new(py))
    }

    fn new(py: Python<'_>) -> PyResult<Self> {
        let class = |name: &str, doc: &str, bases: &[&Bound<'_, PyType>]| -> PyResult<Py<PyType>> {
            let attributes = PyDict::new(py);
            attributes.set_item("__module__", "kvrail._core")?;
            attributes.set_item("__doc__", doc)?;
            let arguments = (name, PyTuple::new(py, bases)?, attributes);
            Ok(py
                .get_type::<PyType>()
                .call1(arguments)?
                .cast_into()?
                .unbind())
        };
        let exception = py.get_type::<PyException>();
        let value_error = py.get_type::<PyValueError>();
        let os_error = py.get_type::<PyOSError>();
        let timeout = py.get_type::<PyTimeoutError>();
        let base = class(
            "KvrailError",
            "The base of all errors of this package.",
            &[&exception],
        )?;
        let root = base.bind(py);
        let io = class(
            "StoreIoError",
            "The operating system refused an operation; `errno` says why where it is known.",
            &[root, &os_error],
        )?;
        Ok(Self {
            config: class(
                "ConfigError",
                "A setting or an argument cannot work; the message says what was expected.",
                &[root, &value_error],
            )?,
            damaged: class(
                "DamagedError",
                "Bytes on disk are not what was stored.",
                &[root],
            )?,
            no_space: class(
                "NoSpaceError",
                "The file system or a quota is full.",
                &[io.bind(py)],
            )?,
            wait_timeout: class(
                "WaitTimeoutError",
                "A bounded wait ended before the work did; the work goes on.",
                &[root, &timeout],
            )?,
            closed: class("ClosedError", "The store was closed.", &[root])?,
            gpu: class(
                "GpuError",
                "The GPU, its driver or cuFile refused an operation.",
                &[root],
            )?,
            mismatch: class(
                "MismatchError",
                "A directory holds another namespace than its name says.",
                &[root],
            )?,
            io,
            base: base.clone_ref(py),
        })
    }

    fn class(&self, kind: ErrorKind) -> &Py<PyType> {
        match kind {
            ErrorKind::InvalidConfig | ErrorKind::InvalidArgument => &self.config,
            ErrorKind::Damaged => &self.damaged,
            ErrorKind::Io => &self.io,
            ErrorKind::NoSpace => &self.no_space,
            ErrorKind::TimedOut | ErrorKind::Unavailable => &self.wait_timeout,
            ErrorKind::Closed => &self.closed,
            ErrorKind::Mismatch => &self.mismatch,
            ErrorKind::Gpu => &self.gpu,
            _ => &self.base,
        }
    }
}

/// Adds the exception classes to the module.
pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let all = Exceptions::get(module.py())?;
    module.add("KvrailError", &all.base)?;
    module.add("ConfigError", &all.config)?;
    module.add("DamagedError", &all.damaged)?;
    module.add("StoreIoError", &all.io)?;
    module.add("NoSpaceError", &all.no_space)?;
    module.add("WaitTimeoutError", &all.wait_timeout)?;
    module.add("ClosedError", &all.closed)?;
    module.add("GpuError", &all.gpu)?;
    module.add("MismatchError", &all.mismatch)
}

/// Makes the exception of an error: the class of its kind, its whole message, and `errno`.
pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    match exception(py, error) {
        Ok(value) => PyErr::from_value(value),
        Err(other) => other,
    }
}

fn exception<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let value = Exceptions::get(py)?
        .class(error.kind())
        .bind(py)
        .call1((error.to_string(),))?;
    let number = error.os_error().and_then(std::io::Error::raw_os_error);
    if let (Some(number), true) = (number, value.is_instance_of::<PyOSError>()) {
        // `strerror` stays unset: with both set, `str()` would drop the message.
        value.setattr("errno", number)?;
    }
    Ok(value)
}

/// Turns a result of the library into one of Python.
pub(crate) trait IntoPython<T> {
    /// Returns the value, or raises the exception of the error.
    fn into_python(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> IntoPython<T> for kvrail::Result<T> {
    fn into_python(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| to_python(py, &error))
    }
}
