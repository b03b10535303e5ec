//! A libcufile without a GPU, for tests: it reads and writes real files, by the aliases of the
//! device memory that the libcuda mock gave out.
//!
//! Beside cuFile's functions: `kvrail_mockfile_script`, `_count`, `_balance` (see mock-support).
//! Environment: `KVRAIL_MOCK_LIBCUDA`, the path of the libcuda mock, `KVRAIL_MOCK_CUFILE_SCRIPT`,
//! `KVRAIL_MOCK_ONLY_P2PDMA`: there is no nvidia-fs.
#![expect(unsafe_code, reason = "a C library")]
#![allow(
    unreachable_pub,
    clippy::multiple_unsafe_ops_per_block,
    reason = "exported C functions, each a line or two of pointer access"
)]

mod control;
mod cuda;
mod cufile;
mod registry;
