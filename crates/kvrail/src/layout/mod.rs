//! How a KV cache lies in memory, and which memory a chunk's payload is made of.
//!
//! Layer `l`, block `b` lies at `offset(l) + b * block_stride(l)`, `block_bytes(l)` long, inside
//! one region. That one affine formula covers all layouts of vLLM 0.32: with the layer outermost
//! (`LB...`) every (layer, block) is a run of its own; with the block outermost (`BL...`) the runs
//! of a block's layers follow each other and merge into one.
//!
//! All validation happens when a [`KvLayout`] is made; planning has only the block ids to check.
//! This module knows neither files nor devices.

mod heads;
mod kv_layout;
mod plan;
mod token_order;

pub use heads::{HeadBytes, HeadPiece};
pub use kv_layout::{KvLayout, LayerSpan, Regular};
pub use plan::{MemoryRange, TransferPlan};
pub use token_order::{SideOrder, TokenOrder, TokenShape};
