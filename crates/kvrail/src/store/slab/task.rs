//! One task: its answers as they come.

use super::results::{Results, TaskId};
use crate::sync::{Arc, Mutex, PoisonError};

/// How the store of an object ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ObjectEnding {
    /// It was written and has its name.
    Stored,
    /// It was there already, or is being written.
    AlreadyPresent,
    /// It is not there: there was no room, no buffer in time, or an error.
    #[default]
    Missed,
}

/// A task that somebody works on. It is done when the last hold of it is dropped, whoever has it
/// and for whatever reason: what has no answer by then has the default, which is a miss.
#[derive(Debug)]
pub(super) struct Task<T: Copy + Default> {
    id: TaskId,
    answers: Mutex<Vec<T>>,
    results: Arc<Results<T>>,
}

impl<T: Copy + Default> Task<T> {
    pub(super) fn begin(id: TaskId, count: usize, results: &Arc<Results<T>>) -> Arc<Self> {
        results.begin();
        Arc::new(Self {
            id,
            answers: Mutex::new(vec![T::default(); count]),
            results: Arc::clone(results),
        })
    }

    /// Notes the answer for the object at `index`.
    pub(super) fn answer(&self, index: usize, answer: T) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = answers.get_mut(index) {
            *slot = answer;
        }
    }
}

impl<T: Copy + Default> Drop for Task<T> {
    fn drop(&mut self) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let answers = std::mem::take(&mut *answers);
        self.results.end(self.id, answers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_done_with_its_last_hold_and_what_was_not_answered_is_a_miss() {
        let results = Arc::new(Results::new().unwrap());
        let task = Task::<bool>::begin(3, 2, &results);
        let other = Arc::clone(&task);
        other.answer(1, true);
        other.answer(2, true);
        drop(other);
        assert_eq!(results.take(3), None);
        drop(task);
        assert_eq!(results.take(3), Some(vec![false, true]));
    }
}
