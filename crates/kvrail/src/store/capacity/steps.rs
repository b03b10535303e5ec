//! The points at which a janitor may die, so that tests can have it die at each.

use std::fmt;
use std::sync::Arc;

/// A point between two changes of what is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// The own account was written; the lease is looked at next.
    Accounted,
    /// The lease is held; nothing was done with it yet.
    Elected,
    /// Another account was taken: it has another name, and nobody else can take it any more.
    Taken,
    /// Another account was added to the own one; its file is still there.
    Absorbed,
    /// That file is removed.
    AbsorbedRemoved,
    /// A chunk is to be removed.
    Removing,
    /// The chunk is removed; nothing says so yet.
    Removed,
    /// The eviction log has it; the account does not.
    Logged,
    /// The account has it in memory and is written next.
    Counted,
    /// A pass has counted everything; the correction is not written yet.
    PassEnded,
    /// The lease is to be given up.
    Releasing,
}

impl Step {
    /// All steps, in the order in which they come first.
    pub const ALL: [Self; 11] = [
        Self::Accounted,
        Self::Elected,
        Self::Taken,
        Self::Absorbed,
        Self::AbsorbedRemoved,
        Self::Removing,
        Self::Removed,
        Self::Logged,
        Self::Counted,
        Self::PassEnded,
        Self::Releasing,
    ];
}

/// What is called at each step.
pub struct StepHook(Box<dyn Fn(Step) + Send + Sync>);

impl StepHook {
    /// Makes a hook of a function.
    pub fn new(function: impl Fn(Step) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self(Box::new(function)))
    }
}

impl fmt::Debug for StepHook {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("StepHook")
    }
}

/// Tells the hook, if there is one, that a step is reached.
pub(super) fn reach(hook: Option<&Arc<StepHook>>, step: Step) {
    if let Some(hook) = hook {
        (hook.0)(step);
    }
}
