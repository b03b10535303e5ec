//! What a store has to tell people: few lines, each once, then rarely.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time during which notices of one kind are only counted.
const QUIET_TIME: Duration = Duration::from_secs(60);
/// Notices that wait to be taken; older ones are dropped.
const NOTICES_MAX: usize = 100;

/// How important a notice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeLevel {
    /// Somebody should look at it.
    Warning,
    /// Good to know.
    Info,
}

/// A line for the log of whoever runs the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// How important it is.
    pub level: NoticeLevel,
    /// One sentence with paths and causes.
    pub message: String,
}

/// What a notice is about: the unit of rate limiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    Start,
    Engine,
    EngineChosen,
    Namespace,
    ReadOnly,
    NoSpace,
    StoreFailed,
    ChunkDamaged,
    LoadFailed,
    SetAsideFailed,
    LookupFailed,
    CufileFailed,
    CufileGivenUp,
    PathOut,
    PathBack,
    Capacity,
    Tier,
    TierFull,
    Panic,
}

/// The notices of a store.
#[derive(Debug, Default)]
pub(super) struct Notices {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Notice>,
    topics: HashMap<Topic, Quiet>,
}

#[derive(Debug)]
struct Quiet {
    until: Instant,
    withheld: u64,
}

impl Notices {
    pub(super) fn warn(&self, topic: Topic, message: impl FnOnce() -> String) {
        self.add(topic, NoticeLevel::Warning, Instant::now(), message);
    }

    pub(super) fn info(&self, topic: Topic, message: impl FnOnce() -> String) {
        self.add(topic, NoticeLevel::Info, Instant::now(), message);
    }

    fn add(
        &self,
        topic: Topic,
        level: NoticeLevel,
        now: Instant,
        message: impl FnOnce() -> String,
    ) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut withheld = 0;
        // What is said at the start, or once for each path, is said in full: there is no flood of it.
        if !matches!(
            topic,
            Topic::Start | Topic::EngineChosen | Topic::Namespace | Topic::CufileGivenUp
        ) {
            match state.topics.get_mut(&topic) {
                Some(quiet) if now < quiet.until => {
                    quiet.withheld += 1;
                    return;
                }
                Some(quiet) => withheld = quiet.withheld,
                None => {}
            }
            state.topics.insert(
                topic,
                Quiet {
                    until: now + QUIET_TIME,
                    withheld: 0,
                },
            );
        }
        let mut message = message();
        if withheld > 0 {
            message.push_str(&format!(
                " ({withheld} more like it since the last such line)"
            ));
        }
        if state.waiting.len() == NOTICES_MAX {
            state.waiting.pop_front();
        }
        state.waiting.push_back(Notice { level, message });
    }

    /// Takes what has come since the last call.
    pub(super) fn take(&self) -> Vec<Notice> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_one_line_and_a_count() {
        let notices = Notices::default();
        let start = Instant::now();
        let add = |after: u64| {
            let now = start + Duration::from_secs(after);
            notices.add(Topic::StoreFailed, NoticeLevel::Warning, now, || {
                "failed".into()
            });
        };
        (0..50).for_each(add);
        assert_eq!(notices.take().len(), 1);
        add(61);
        let later = notices.take();
        assert_eq!(later.len(), 1);
        assert!(later[0].message.contains("49 more"), "{}", later[0].message);
    }

    #[test]
    fn the_queue_is_bounded() {
        let notices = Notices::default();
        (0..500).for_each(|index| notices.info(Topic::Start, || index.to_string()));
        let waiting = notices.take();
        assert_eq!(waiting.len(), NOTICES_MAX);
        assert_eq!(waiting.last().unwrap().message, "499");
    }
}
