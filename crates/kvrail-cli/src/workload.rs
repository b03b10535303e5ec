//! Requests as a serving engine sees them, made up from a seed: which chunks each prompt has.

use crate::bench::Random;

/// What the prompts of a trace are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Workload {
    /// A few long system prompts that many share, each with a short question of its own
    System,
    /// Conversations that come back with all that was said before
    Turns,
    /// Documents of a collection in front of a question; few of them are asked about often
    Rag,
    /// Prompts that never come again
    Once,
    /// All of these, a quarter of the requests each
    Mix,
}

impl Workload {
    pub(crate) const ALL: [Self; 5] = [Self::System, Self::Turns, Self::Rag, Self::Once, Self::Mix];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Turns => "turns",
            Self::Rag => "rag",
            Self::Once => "once",
            Self::Mix => "mix",
        }
    }
}

/// One request: when it comes, and the keys of its prompt's chunks from the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) at_milliseconds: i64,
    pub(crate) chunks: Vec<u64>,
}

/// System prompts, and chunks of the longest of them: 16 x 256 tokens.
const SYSTEM_PROMPTS: u64 = 24;
const SYSTEM_CHUNKS: u64 = 16;
/// Documents that can be asked about, and chunks of the longest of them: 40 x 256 tokens.
const DOCUMENTS: u64 = 3000;
const DOCUMENT_CHUNKS: u64 = 40;
/// Turns of a conversation on average, chunks that one adds at most, and the mean pause before the
/// next one.
const TURNS: u64 = 6;
const TURN_CHUNKS: u64 = 6;
const TURN_PAUSE_MILLISECONDS: f64 = 180_000.0;
/// Chunks of the longest prompt that never comes again.
const ONCE_CHUNKS: u64 = 64;
/// Mean time between requests: 4 in a second, as a few GPUs see.
const REQUEST_PAUSE_MILLISECONDS: f64 = 250.0;

/// Makes requests; the same seed makes the same ones.
#[derive(Debug)]
pub(crate) struct Trace {
    random: Random,
    workload: Workload,
    now: f64,
    /// Conversations: when the next turn comes, the chunks so far, turns left.
    waiting: Vec<(f64, Vec<u64>, u64)>,
    fresh: u64,
}

impl Trace {
    pub(crate) fn new(workload: Workload, seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            workload,
            now: 1.8e12,
            waiting: Vec::new(),
            fresh: 1 << 40,
        }
    }

    /// Returns a number between 0 and 1, 1 excluded.
    fn share(&mut self) -> f64 {
        (self.random.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random.next() % limit
    }

    /// Returns an exponentially distributed time.
    fn pause(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.share()).ln()
    }

    /// Returns one of `count` things, the first ones far more often: Zipf with exponent about 1.
    fn popular(&mut self, count: u64) -> u64 {
        let limit = (count as f64 + 1.0).ln();
        (((self.share() * limit).exp() - 1.0) as u64).min(count - 1)
    }

    /// Returns content that never was before.
    fn fresh(&mut self) -> u64 {
        self.fresh += 1;
        self.fresh
    }

    /// Adds a chunk: its key depends on all before it, as vLLM's hashes do.
    fn push(chunks: &mut Vec<u64>, content: u64) {
        let parent = chunks.last().copied().unwrap_or(0x5a5a);
        let mut mixed = Random::new(parent ^ content.rotate_left(17));
        chunks.push(mixed.next());
    }

    /// Adds `count` chunks of something that others may have too.
    fn push_shared(chunks: &mut Vec<u64>, kind: u64, number: u64, count: u64) {
        for place in 0..count {
            Self::push(chunks, kind << 56 | number << 16 | place);
        }
    }

    fn push_fresh(&mut self, chunks: &mut Vec<u64>, count: u64) {
        for _ in 0..count {
            let content = self.fresh();
            Self::push(chunks, content);
        }
    }

    fn system_prompt(&mut self) -> Vec<u64> {
        let number = self.popular(SYSTEM_PROMPTS);
        let mut chunks = Vec::new();
        Self::push_shared(&mut chunks, 1, number, 4 + number % (SYSTEM_CHUNKS - 3));
        chunks
    }

    fn document(&mut self) -> Vec<u64> {
        let number = self.popular(DOCUMENTS);
        let mut chunks = Vec::new();
        // One short instruction, the same for all, then the document.
        Self::push_shared(&mut chunks, 2, 0, 1);
        Self::push_shared(&mut chunks, 3, number, 8 + number % (DOCUMENT_CHUNKS - 7));
        chunks
    }

    /// Returns the next turn of a conversation that is due, or the first one of a new one.
    fn turn(&mut self) -> Vec<u64> {
        let due = self.waiting.iter().position(|(at, _, _)| *at <= self.now);
        let (mut chunks, left) = match due {
            Some(index) => {
                let (_, chunks, left) = self.waiting.swap_remove(index);
                (chunks, left)
            }
            None => (self.system_prompt(), 1 + self.below(2 * TURNS)),
        };
        let added = 1 + self.below(TURN_CHUNKS);
        self.push_fresh(&mut chunks, added);
        if left > 1 {
            let at = self.now + self.pause(TURN_PAUSE_MILLISECONDS);
            self.waiting.push((at, chunks.clone(), left - 1));
        }
        chunks
    }

    fn once(&mut self) -> Vec<u64> {
        let count = 8 + self.below(ONCE_CHUNKS - 7);
        let mut chunks = Vec::new();
        self.push_fresh(&mut chunks, count);
        chunks
    }
}

impl Iterator for Trace {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        self.now += self.pause(REQUEST_PAUSE_MILLISECONDS);
        let workload = match self.workload {
            Workload::Mix => match self.below(4) {
                0 => Workload::System,
                1 => Workload::Turns,
                2 => Workload::Rag,
                _ => Workload::Once,
            },
            one => one,
        };
        let chunks = match workload {
            Workload::System => {
                let mut chunks = self.system_prompt();
                let question = 1 + self.below(3);
                self.push_fresh(&mut chunks, question);
                chunks
            }
            Workload::Rag => {
                let mut chunks = self.document();
                self.push_fresh(&mut chunks, 1);
                chunks
            }
            Workload::Turns => self.turn(),
            Workload::Once | Workload::Mix => self.once(),
        };
        Some(Request {
            at_milliseconds: self.now as i64,
            chunks,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_seed_makes_one_trace_and_workloads_share_what_they_should() {
        for workload in Workload::ALL {
            let first: Vec<_> = Trace::new(workload, 7).take(500).collect();
            assert_eq!(first, Trace::new(workload, 7).take(500).collect::<Vec<_>>());
            assert_ne!(first, Trace::new(workload, 8).take(500).collect::<Vec<_>>());
            assert!(first.is_sorted_by_key(|request| request.at_milliseconds));
            let total: usize = first.iter().map(|request| request.chunks.len()).sum();
            let distinct: HashSet<_> = first.iter().flat_map(|request| &request.chunks).collect();
            let again = 1.0 - distinct.len() as f64 / total as f64;
            let expected = match workload {
                Workload::Once => 0.0..0.001,
                Workload::System => 0.6..0.95,
                Workload::Turns | Workload::Rag | Workload::Mix => 0.1..0.95,
            };
            assert!(expected.contains(&again), "{workload:?}: {again}");
        }
    }
}
