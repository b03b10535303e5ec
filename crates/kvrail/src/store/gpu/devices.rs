//! The GPUs that a store uses, opened when the first KV cache on them is attached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvrail_cuda::{Cuda, LibraryPaths};

use super::choice;
use super::cufile::Cufile;
use super::shared_memory::SharedMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Device, Gpu, Region};
use crate::store::shared::StoreShared;

/// The GPUs of a store.
#[derive(Debug)]
pub(in crate::store) struct Gpus {
    libraries: LibraryPaths,
    open: Mutex<HashMap<usize, Opened>>,
}

/// A GPU, and cuFile for it where some path of the store takes it.
#[derive(Debug, Clone)]
pub(in crate::store) struct Opened {
    pub(in crate::store) gpu: Gpu,
    pub(super) cufile: Option<Arc<Cufile>>,
    pub(super) memory: Arc<SharedMemory>,
}

impl Gpus {
    pub(in crate::store) fn new(libraries: LibraryPaths) -> Self {
        Self {
            libraries,
            open: Mutex::default(),
        }
    }

    /// Returns where the libraries are looked for.
    pub(super) fn libraries(&self) -> &LibraryPaths {
        &self.libraries
    }

    /// Returns the GPU with this ordinal.
    fn get(&self, store: &StoreShared, ordinal: usize) -> Result<Opened> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = open.get(&ordinal) {
            return Ok(opened.clone());
        }
        let cuda = Cuda::load(&self.libraries.cuda)
            .map_err(|error| Error::gpu(format!("KV cache on cuda:{ordinal}"), error))?;
        let gpu = Gpu::open(&cuda, ordinal)?;
        let cufile = choice::choose(store, &gpu).map(Arc::new);
        let opened = Opened {
            gpu,
            cufile,
            memory: Arc::default(),
        };
        open.insert(ordinal, opened.clone());
        Ok(opened)
    }

    /// Returns the GPU that holds all of `regions`, `None` for host memory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for regions of several devices, [`ErrorKind::Gpu`].
    pub(in crate::store) fn of(
        &self,
        store: &StoreShared,
        regions: &[Region],
    ) -> Result<Option<Opened>> {
        let device = regions.first().map_or(Device::Host, Region::device);
        if let Some(other) = regions.iter().find(|region| region.device() != device) {
            let message = format!("a KV cache on {device} and {}", other.device());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        match device {
            Device::Host => Ok(None),
            Device::Cuda(ordinal) => self.get(store, ordinal).map(Some),
        }
    }
}
