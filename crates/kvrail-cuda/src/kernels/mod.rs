//! kvrail's own kernels: many copies in one launch, the hashes of pages, and both in one pass.
//!
//! `kvrail.cu` is the source, `kvrail.ptx` what the driver gets: PTX of CUDA 12.0 for compute
//! capability 8.0, which every later driver and GPU takes. `scripts/kernels` makes one from the
//! other. `reference` does the same on the CPU.
#![expect(unsafe_code, reason = "launches kernels")]

mod grid;
pub mod reference;

pub use grid::{GRID_ROWS_MAX, PieceGrid};

use std::ffi::{CStr, CString, c_uint, c_void};
use std::ptr;

use crate::driver::sys::Handle;
use crate::driver::{Context, DevicePointer, Stream};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a page, the unit of [`Kernels::hash_pages`].
pub const PAGE_BYTES: usize = 4096;
/// Longest piece that one descriptor of [`Kernels::copy`] should have: a block of threads copies
/// one piece, and many blocks keep the memory busy.
pub const COPY_PIECE_BYTES: usize = 64 << 10;

/// Threads of a block of each kernel, as `__launch_bounds__` in the source says.
const COPY_THREADS: c_uint = 256;
const HASH_THREADS: c_uint = 128;
/// Pages that a block of a kernel that hashes takes at a time: a warp of 32 threads to a page.
const HASH_PAGES: usize = HASH_THREADS as usize / 32;
/// Blocks of one launch at most; more work than that is done in rounds.
const BLOCKS_MAX: usize = 1 << 20;

const PTX: &str = include_str!("kvrail.ptx");

/// One copy of [`Kernels::copy`], as the device reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyDescriptor {
    /// Address of the first byte to read.
    pub source: u64,
    /// Address of the first byte to write.
    pub target: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A run of pages of [`Kernels::hash_pages`], as the device reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashDescriptor {
    /// Address of the first page, a multiple of 16.
    pub source: u64,
    /// Where the hash of the first page goes: an index into the hashes.
    pub first_page: u64,
    /// Number of pages.
    pub pages: u64,
}

/// The kernels, compiled by the driver for the device of a context.
#[derive(Debug)]
pub struct Kernels {
    context: Context,
    module: Handle,
    copy: Handle,
    hash_pages: Handle,
    gather_hashed: Handle,
    scatter_verified: Handle,
    gather_grid: Handle,
    scatter_grid: Handle,
}

/// Pages that lie one behind the other, and what of [`Kernels`] goes to them or comes from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Address of the first page, a multiple of 16.
    pub address: DevicePointer,
    /// Number of pages.
    pub count: usize,
    /// Address of their hashes, 8 bytes for each.
    pub hashes: DevicePointer,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Has the driver compile the kernels.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when driver or GPU are too old, else what the driver said.
    pub fn load(context: &Context) -> Result<Self> {
        let text = CString::new(PTX).map_err(|_| {
            Error::new(
                ErrorKind::InvalidArgument,
                "cuModuleLoadData",
                "PTX with a zero byte",
            )
        })?;
        let mut module = ptr::null_mut();
        // SAFETY: the text ends with a zero; the driver copies what it keeps.
        context.call("cuModuleLoadData", |api| unsafe {
            (api.module_load)(&raw mut module, text.as_ptr().cast())
        })?;
        let mut kernels = Self {
            context: context.clone(),
            module,
            copy: ptr::null_mut(),
            hash_pages: ptr::null_mut(),
            gather_hashed: ptr::null_mut(),
            scatter_verified: ptr::null_mut(),
            gather_grid: ptr::null_mut(),
            scatter_grid: ptr::null_mut(),
        };
        kernels.copy = kernels.function(c"kvrail_copy")?;
        kernels.hash_pages = kernels.function(c"kvrail_hash_pages")?;
        kernels.gather_hashed = kernels.function(c"kvrail_gather_hashed")?;
        kernels.scatter_verified = kernels.function(c"kvrail_scatter_verified")?;
        kernels.gather_grid = kernels.function(c"kvrail_gather_grid")?;
        kernels.scatter_grid = kernels.function(c"kvrail_scatter_grid")?;
        Ok(kernels)
    }

    /// Puts `count` copies on a stream; they run in any order among themselves.
    ///
    /// # Safety
    /// `descriptors` is device memory with `count` [`CopyDescriptor`]s when the stream gets there;
    /// what they name is device memory, or pinned; no target overlaps anything else.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn copy(
        &self,
        stream: &Stream,
        descriptors: DevicePointer,
        count: usize,
    ) -> Result<()> {
        let (mut descriptors, mut number) = (descriptors, count as u64);
        let arguments = [(&raw mut descriptors).cast(), (&raw mut number).cast()];
        self.launch(stream, self.copy, count, COPY_THREADS, arguments)
    }

    /// Puts the hashing of `pages` pages, in `count` runs, on a stream: XXH3-64 of each page.
    ///
    /// # Safety
    /// `descriptors` is device memory with `count` [`HashDescriptor`]s of `pages` pages together
    /// when the stream gets there; `hashes` has room at every index that they name.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn hash_pages(
        &self,
        stream: &Stream,
        descriptors: DevicePointer,
        count: usize,
        pages: usize,
        hashes: DevicePointer,
    ) -> Result<()> {
        let (mut descriptors, mut number) = (descriptors, count as u64);
        let (mut all, mut target) = (pages as u64, hashes);
        let arguments = [
            (&raw mut descriptors).cast(),
            (&raw mut number).cast(),
            (&raw mut all).cast(),
            (&raw mut target).cast(),
        ];
        let blocks = pages.div_ceil(HASH_PAGES);
        self.launch(stream, self.hash_pages, blocks, HASH_THREADS, arguments)
    }

    /// Puts `count` copies to `pages` on a stream, which also hashes the pages: each byte is read
    /// once. A copy from address 0 writes zeros. Behind the hashes there may be more entries,
    /// `entries` in all, which become zero.
    ///
    /// # Safety
    /// `descriptors` is device memory with `count` [`CopyDescriptor`]s when the stream gets there:
    /// sources, targets and lengths multiples of 16, none empty, the targets in ascending order and
    /// without gaps exactly the pages. The hashes have room for `entries`, not fewer than the pages.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn gather_hashed(
        &self,
        stream: &Stream,
        descriptors: DevicePointer,
        count: usize,
        pages: Pages,
        entries: usize,
    ) -> Result<()> {
        let last = entries as u64;
        self.launch_on_pages(stream, self.gather_hashed, descriptors, count, pages, last)
    }

    /// Puts `count` copies from `pages` on a stream, of the pages whose hash is the one given for
    /// it. The number of the first other page goes to the 8 bytes at `bad`, device memory or pinned,
    /// if it is below what is there.
    ///
    /// # Safety
    /// As [`Kernels::gather_hashed`], with the sources in ascending order and without gaps in the
    /// pages, of which the first may begin earlier and the last end later.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn scatter_verified(
        &self,
        stream: &Stream,
        descriptors: DevicePointer,
        count: usize,
        pages: Pages,
        bad: DevicePointer,
    ) -> Result<()> {
        self.launch_on_pages(
            stream,
            self.scatter_verified,
            descriptors,
            count,
            pages,
            bad,
        )
    }

    /// As [`Kernels::gather_hashed`], of a grid of pieces and zeros behind it. Nothing has to be sent
    /// to the device first.
    ///
    /// # Safety
    /// The pieces are device memory when the stream gets there, none of them longer than the pages
    /// have room for together; the hashes have room for `entries`, not fewer than the pages.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a grid that does not begin at the first page, or has more
    /// than the pages hold; else what the driver said.
    pub unsafe fn gather_grid(
        &self,
        stream: &Stream,
        grid: &PieceGrid,
        pages: Pages,
        entries: usize,
    ) -> Result<()> {
        if grid.skipped() != 0 {
            return Err(outside(grid, pages));
        }
        self.launch_grid(stream, self.gather_grid, *grid, pages, entries as u64)
    }

    /// As [`Kernels::scatter_verified`], to a grid of pieces. Nothing has to be sent to the device
    /// first.
    ///
    /// # Safety
    /// The pieces are device memory when the stream gets there.
    ///
    /// # Errors
    /// As [`Kernels::gather_grid`], but the grid may begin in the first page.
    pub unsafe fn scatter_grid(
        &self,
        stream: &Stream,
        grid: &PieceGrid,
        pages: Pages,
        bad: DevicePointer,
    ) -> Result<()> {
        self.launch_grid(stream, self.scatter_grid, *grid, pages, bad)
    }

    /// Launches one of the two kernels that take a grid, whose arguments differ in the last one.
    fn launch_grid(
        &self,
        stream: &Stream,
        function: Handle,
        mut grid: PieceGrid,
        pages: Pages,
        mut last: u64,
    ) -> Result<()> {
        if grid.skipped() + grid.bytes() > (pages.count * PAGE_BYTES) as u64 {
            return Err(outside(&grid, pages));
        }
        let mut all = pages.count as u64;
        let (mut image, mut hashes) = (pages.address, pages.hashes);
        let arguments = [
            (&raw mut grid).cast(),
            (&raw mut image).cast(),
            (&raw mut all).cast(),
            (&raw mut hashes).cast(),
            (&raw mut last).cast(),
        ];
        let blocks = pages.count.div_ceil(HASH_PAGES);
        self.launch(stream, function, blocks, HASH_THREADS, arguments)
    }

    /// Launches one of the two kernels that copy pieces of a list and hash, whose arguments differ in
    /// the last one.
    fn launch_on_pages(
        &self,
        stream: &Stream,
        function: Handle,
        mut descriptors: DevicePointer,
        count: usize,
        pages: Pages,
        mut last: u64,
    ) -> Result<()> {
        let (mut number, mut all) = (count as u64, pages.count as u64);
        let (mut image, mut hashes) = (pages.address, pages.hashes);
        let arguments = [
            (&raw mut descriptors).cast(),
            (&raw mut number).cast(),
            (&raw mut image).cast(),
            (&raw mut all).cast(),
            (&raw mut hashes).cast(),
            (&raw mut last).cast(),
        ];
        let blocks = pages.count.div_ceil(HASH_PAGES);
        self.launch(stream, function, blocks, HASH_THREADS, arguments)
    }

    fn launch<const N: usize>(
        &self,
        stream: &Stream,
        function: Handle,
        blocks: usize,
        threads: c_uint,
        mut arguments: [*mut c_void; N],
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let blocks = c_uint::try_from(blocks.min(BLOCKS_MAX)).unwrap_or(c_uint::MAX);
        // SAFETY: the arguments are those of the kernel's declaration, and the driver copies them
        // before it returns; the caller vouches for what they point to.
        self.context.call("cuLaunchKernel", |api| unsafe {
            (api.launch)(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream.handle(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    fn function(&self, name: &CStr) -> Result<Handle> {
        let mut function = ptr::null_mut();
        // SAFETY: the module is live, the name ends with a zero.
        self.context.call("cuModuleGetFunction", |api| unsafe {
            (api.module_function)(&raw mut function, self.module, name.as_ptr())
        })?;
        Ok(function)
    }
}

fn outside(grid: &PieceGrid, pages: Pages) -> Error {
    let (skipped, bytes, pages) = (grid.skipped(), grid.bytes(), pages.count);
    let message = format!("{bytes} bytes, {skipped} behind the start of {pages} pages");
    Error::new(ErrorKind::InvalidArgument, "grid of pieces", message)
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // SAFETY: the module is ours.
        let _ = self.context.call("cuModuleUnload", |api| unsafe {
            (api.module_unload)(self.module)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_kernels_read() {
        assert_eq!(size_of::<CopyDescriptor>(), 24);
        assert_eq!(size_of::<HashDescriptor>(), 24);
    }

    #[test]
    fn the_ptx_is_old_enough_for_cuda_12_0_and_capability_8_0() {
        assert!(
            PTX.lines().any(|line| line == ".version 8.0"),
            "PTX ISA 8.0 is that of CUDA 12.0"
        );
        assert!(PTX.lines().any(|line| line == ".target sm_80"));
    }
}
