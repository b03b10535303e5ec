//! The extension module `kvrail._core`: the store of the library for Python.
//!
//! It converts arguments and results and releases the GIL around everything that can block. It
//! holds no logic of its own; `kvrail/_core.pyi` is its documentation for Python readers.

mod config;
mod error;
mod inspect;
mod kv_cache;
mod lmcache;
mod namespace;
mod part;
mod pointer;
mod slab;
mod store;
mod ticket;

use pyo3::pymodule;

#[pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::config::Config;
    #[pymodule_export]
    use crate::inspect::namespaces;
    #[pymodule_export]
    use crate::kv_cache::KvCache;
    #[pymodule_export]
    use crate::lmcache::{lmcache_decode_head, lmcache_encode_head, lmcache_key_of, lmcache_path};
    #[pymodule_export]
    use crate::namespace::Namespace;
    #[pymodule_export]
    use crate::slab::SlabStore;
    #[pymodule_export]
    use crate::store::{Store, answer_cufile_probe, direct_path_problem};
    #[pymodule_export]
    use crate::ticket::{
        LoadReport, LoadTicket, LookupTicket, PresenceTicket, StoreReport, StoreTicket,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::error::add_to(module)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // The package warns on import when this is set: a debug build is many times slower.
        module.add("debug_build", cfg!(debug_assertions))
    }
}
