//! Names and heads of LMCache's directories, for who compares them with LMCache's own.

use kvrail::lmcache::{Element, FileKind, FilePlace, LmcacheKey, MemoryFormat, TensorHead};
use kvrail::{Error, ErrorKind};
use pyo3::prelude::*;

use crate::error::IntoPython;

/// What a head says: name of the type, shape, number of the memory format.
type Described = (&'static str, Vec<usize>, u8);

/// Returns the first page of a file: the head of a tensor.
#[pyfunction]
pub(crate) fn lmcache_encode_head(
    py: Python<'_>,
    dtype: &str,
    shape: Vec<usize>,
    fmt: u8,
) -> PyResult<Vec<u8>> {
    let unknown = |what: String| Error::new(ErrorKind::InvalidArgument, what);
    let head = Element::of_head(dtype)
        .ok_or_else(|| unknown(format!("`dtype` = {dtype}: expected a name such as BF16")))
        .and_then(|element| {
            let format = MemoryFormat::of_number(fmt)
                .ok_or_else(|| unknown(format!("`fmt` = {fmt}: expected 0 to 8")))?;
            TensorHead::new(element, &shape, format)
        });
    Ok(head.into_python(py)?.encode().to_vec())
}

/// Reads the first page of a file.
#[pyfunction]
pub(crate) fn lmcache_decode_head(py: Python<'_>, page: &[u8]) -> PyResult<Described> {
    let head = TensorHead::decode(page).into_python(py)?;
    let name = head.element().head_name();
    Ok((name, head.shape().to_vec(), head.format().number()))
}

/// Returns where a key's file lies below the path.
#[pyfunction]
#[pyo3(signature = (key, *, on_weka=false, metadata=false))]
pub(crate) fn lmcache_path(
    py: Python<'_>,
    key: &str,
    on_weka: bool,
    metadata: bool,
) -> PyResult<String> {
    let kind = if metadata {
        FileKind::Metadata
    } else {
        FileKind::Chunk
    };
    let path = LmcacheKey::parse(key).and_then(|key| {
        let place = FilePlace {
            key,
            is_on_weka: on_weka,
            kind,
        };
        Ok(format!("{}/{}", place.folder(), place.name()?))
    });
    path.into_python(py)
}

/// Returns the key in a file's name; `None` for any other name.
#[pyfunction]
pub(crate) fn lmcache_key_of(name: &str) -> Option<String> {
    FilePlace::parse(name).map(|place| place.key.to_string())
}
