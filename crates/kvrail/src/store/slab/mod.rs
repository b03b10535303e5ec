//! Objects in a slab: a serving cache's host memory, whose pieces are stored and loaded as chunks.
//!
//! A cache such as LMCache keeps objects of a few fixed lengths anywhere in one large piece of host
//! memory, for many models and ranks at a time, and hands over keys and addresses. Here an object
//! is a chunk. Its kind, which is all that must be equal for bytes to be interchangeable, is a
//! namespace with a length; a KV cache of the whole slab is attached for each group and rank, whose
//! blocks are so small that every object is a run of them.
//!
//! - [`SlabStore`] takes tasks, which never wait, and runs the threads that work on them
//! - `kinds` opens a store for each kind when it is first used
//! - `task` gathers the answers of a task; `results` keeps them, and signals an event
//! - `dispatch` is a thread with a bounded queue

mod dispatch;
mod kinds;
mod object;
mod results;
mod slab_store;
mod task;
#[cfg(test)]
mod tests;

pub use kinds::KindId;
pub use object::{ObjectName, Slab, SlabObject};
pub use results::TaskId;
pub use slab_store::SlabStore;
pub use task::ObjectEnding;
