//! cuFile in use: its driver, its engine, and the last check of a mount before it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail_cuda::CuFileDriver;

use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{CufileEngine, Folder, IoEngine, IoFile, IoHandle, IoRequest, OpenMode, Operation};
use crate::memory::{DeviceArena, Gpu, GpuSlot, GpuSlots, StagingRange};
use crate::store::directory::TEMPORARY_NAME;
use crate::store::image::CUFILE_REQUEST_BYTES;
use crate::store::mount::Mount;
use crate::store::writer::Writer;

/// cuFile for one GPU.
#[derive(Debug)]
pub(in crate::store) struct Cufile {
    pub(super) driver: CuFileDriver,
    pub(super) engine: CufileEngine,
}

impl Cufile {
    /// Moves a range of a slot's image, which starts at `offset` of the file, and waits for it.
    ///
    /// # Errors
    /// The first error of the engine; [`ErrorKind::TimedOut`] when a part hangs: it goes on, with
    /// its hold on the slot.
    pub(super) fn transfer(
        &self,
        operation: Operation,
        file: &Arc<IoFile>,
        offset: usize,
        image: StagingRange<DeviceArena>,
        deadline: Instant,
    ) -> Result<()> {
        let handles = self.submit(operation, file, offset, image);
        wait_all(handles, deadline)
    }

    /// Submits a range of a slot's image, which starts at `offset` of the file.
    pub(super) fn submit(
        &self,
        operation: Operation,
        file: &Arc<IoFile>,
        offset: usize,
        mut image: StagingRange<DeviceArena>,
    ) -> Vec<IoHandle<DeviceArena>> {
        let mut handles = Vec::with_capacity(image.len().div_ceil(CUFILE_REQUEST_BYTES));
        let mut offset = offset as u64;
        while !image.is_empty() {
            let buffer = image.split_to(CUFILE_REQUEST_BYTES);
            let bytes = buffer.len() as u64;
            handles.push(self.engine.submit(IoRequest {
                operation,
                file: Arc::clone(file),
                offset,
                buffer,
            }));
            offset += bytes;
        }
        handles
    }

    /// Writes a page of a slot to a file of the mount, reads it back and compares, as the child
    /// process did: what works there may not work here.
    ///
    /// # Errors
    /// Whatever went wrong; [`ErrorKind::TimedOut`] after `limit`.
    pub(super) fn check(
        &self,
        gpu: &Gpu,
        slots: &GpuSlots,
        mount: &Mount,
        writer: &Writer,
        limit: Duration,
    ) -> Result<()> {
        let name = writer.file_name("probe");
        let deadline = Instant::now() + limit;
        let folder = mount.directory.open()?.folder(TEMPORARY_NAME)?;
        let mut slot = slots.take(gpu, deadline)?;
        let result = self.write_and_compare(gpu, &mut slot, &folder, &name, deadline);
        drop(folder.remove_file(&name));
        result
    }

    fn write_and_compare(
        &self,
        gpu: &Gpu,
        slot: &mut GpuSlot,
        folder: &Folder,
        name: &str,
        deadline: Instant,
    ) -> Result<()> {
        let stream = gpu.store_stream();
        let seed = name.len();
        let pattern: Vec<u8> = (0..PAGE_BYTES)
            .map(|index| ((index * 31 + seed) % 251) as u8)
            .collect();
        let put = |slot: &mut GpuSlot, bytes: &[u8]| -> Result<()> {
            slot.head_mut()?.copy_from_slice(bytes);
            slot.send_head(stream)?;
            slot.mark(stream)?;
            slot.wait(deadline)
        };
        put(slot, &pattern)?;
        let file = Arc::new(IoFile::open_in(folder, name, OpenMode::CreateNew, true)?);
        let page = slot.share(0..PAGE_BYTES)?;
        self.transfer(Operation::Write, &file, 0, page, deadline)?;
        put(slot, &[0; PAGE_BYTES])?;
        let file = Arc::new(IoFile::open_in(folder, name, OpenMode::Read, true)?);
        let page = slot.share(0..PAGE_BYTES)?;
        self.transfer(Operation::Read, &file, 0, page, deadline)?;
        slot.fetch_frame(stream, PAGE_BYTES)?;
        slot.mark(stream)?;
        slot.wait(deadline)?;
        if slot.frame()?.0 == pattern {
            return Ok(());
        }
        let message = "cuFile: what was read is not what was written";
        Err(Error::new(ErrorKind::Damaged, message).with_path(file.path()))
    }
}

/// Waits for all of them, and returns the first error.
pub(super) fn wait_all(handles: Vec<IoHandle<DeviceArena>>, deadline: Instant) -> Result<()> {
    let results: Vec<Result<()>> = handles
        .into_iter()
        .map(|handle| handle.wait(deadline).map(drop))
        .collect();
    results.into_iter().collect()
}
