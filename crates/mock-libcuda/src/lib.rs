//! A libcuda without a GPU, for tests: it exports the driver's C functions, on memory that
//! the CPU cannot touch by its device address. Work on a stream runs when somebody waits for it, or
//! meanwhile (`KVRAIL_MOCK_PACE=own`).
//!
//! Beside the driver's functions: `kvrail_mock_script`, `kvrail_mock_count`, `kvrail_mock_balance`,
//! `kvrail_mock_own_pace` and `kvrail_mock_translate` (see crate mock-support). Environment: `KVRAIL_MOCK_DEVICES` (2),
//! `KVRAIL_MOCK_MEMORY_MIB` (1024, for each device), `KVRAIL_MOCK_CUDA_SCRIPT`.
#![expect(unsafe_code, reason = "a C library")]
#![allow(
    unreachable_pub,
    clippy::multiple_unsafe_ops_per_block,
    reason = "exported C functions, each a line or two of pointer access"
)]

mod control;
#[macro_use]
mod driver;
mod asked_by_cufile;
mod kernels;
mod memory;
mod objects;
mod pace;
mod streams;
mod work;
