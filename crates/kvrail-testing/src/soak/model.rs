//! What the driver knows about each chunk.

use super::CHUNKS;

/// Whether a chunk is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody has published it since it was removed.
    Absent,
    /// It was published and nothing took it away.
    Present,
    /// A fault, a crash or damage leaves it open.
    Either,
}

#[derive(Debug, Clone)]
struct Chunk {
    state: State,
    /// A store that was given up may still publish it.
    may_appear: bool,
    /// Commands about it that are under way.
    stores: u32,
    others: u32,
    /// Counts every change, so that a lookup knows what changed meanwhile.
    version: u64,
}

/// The model of the store.
#[derive(Debug)]
pub struct Model {
    chunks: Vec<Chunk>,
    /// What was found to be impossible.
    pub wrong: Vec<String>,
}

impl Default for Model {
    fn default() -> Self {
        let chunk = Chunk {
            state: State::Absent,
            may_appear: false,
            stores: 0,
            others: 0,
            version: 0,
        };
        Self {
            chunks: vec![chunk; CHUNKS as usize],
            wrong: Vec::new(),
        }
    }
}

impl Model {
    fn chunk(&mut self, index: u64) -> &mut Chunk {
        &mut self.chunks[index as usize]
    }

    /// Returns whether a store may begin: stores of one chunk may meet each other.
    pub fn begin_store(&mut self, index: u64) -> bool {
        let chunk = self.chunk(index);
        let free = chunk.others == 0;
        if free {
            chunk.stores += 1;
            chunk.version += 1;
        }
        free
    }

    /// Returns whether something else may begin: it is alone with the chunk then.
    pub fn begin_other(&mut self, index: u64) -> bool {
        let chunk = self.chunk(index);
        let free = chunk.others == 0 && chunk.stores == 0;
        if free {
            chunk.others += 1;
            chunk.version += 1;
        }
        free
    }

    /// A store ended; `is_damaging` when bytes may have changed on their way to the disk.
    pub fn end_store(&mut self, index: u64, answer: &str, is_damaging: bool) {
        let chunk = self.chunk(index);
        chunk.stores -= 1;
        chunk.version += 1;
        match answer {
            "stored" if is_damaging => chunk.state = State::Either,
            "stored" => chunk.state = State::Present,
            // The process remembers it, or its file is there: nothing new is known.
            "present" => {}
            // Failed, or the process was killed.
            _ => {
                chunk.may_appear = true;
                if chunk.state == State::Absent {
                    chunk.state = State::Either;
                }
            }
        }
    }

    /// A load ended.
    pub fn end_load(&mut self, index: u64, answer: &str) {
        let chunk = self.chunk(index);
        chunk.others -= 1;
        chunk.version += 1;
        let state = chunk.state;
        match answer {
            "wrong" => self
                .wrong
                .push(format!("chunk {index}: other bytes than stored")),
            "loaded" if state == State::Absent => {
                self.wrong
                    .push(format!("chunk {index}: loaded although it was removed"));
            }
            // A chunk that seems damaged is set aside, also when only reading it went wrong.
            "damaged" | "killed" => chunk.state = State::Either,
            _ => {}
        }
    }

    /// A stranger removed a chunk's file.
    pub fn end_remove(&mut self, index: u64) {
        let chunk = self.chunk(index);
        chunk.others -= 1;
        chunk.version += 1;
        chunk.state = if chunk.may_appear {
            State::Either
        } else {
            State::Absent
        };
    }

    /// Returns what tells whether chunks changed during a lookup.
    pub fn versions(&self, first: u64, count: u64) -> Vec<u64> {
        let range = first as usize..(first + count) as usize;
        self.chunks[range]
            .iter()
            .map(|chunk| chunk.version)
            .collect()
    }

    /// A lookup found `found` chunks; `before` are the versions when it began.
    pub fn end_lookup(&mut self, first: u64, before: &[u64], found: usize) {
        for (offset, version) in before.iter().take(found).enumerate() {
            let index = first + offset as u64;
            let chunk = self.chunk(index);
            // A store under way may have published it and not have said so yet.
            let is_settled = chunk.version == *version && chunk.stores == 0;
            if is_settled && chunk.state == State::Absent {
                self.wrong
                    .push(format!("chunk {index}: found although it was removed"));
            }
        }
    }

    /// Returns the chunks that must be there.
    pub fn present(&self) -> Vec<u64> {
        let indices = 0..CHUNKS;
        indices
            .filter(|index| self.chunks[*index as usize].state == State::Present)
            .collect()
    }

    /// Returns the chunks that must not be there.
    pub fn absent(&self) -> Vec<u64> {
        let indices = 0..CHUNKS;
        indices
            .filter(|index| self.chunks[*index as usize].state == State::Absent)
            .collect()
    }

    /// Stores that were given up have ended for certain: all their threads are gone.
    pub fn settle(&mut self) {
        self.chunks
            .iter_mut()
            .for_each(|chunk| chunk.may_appear = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_seen_and_what_may_be_is_not() {
        let mut model = Model::default();
        assert!(model.begin_store(1) && model.begin_store(1) && !model.begin_other(1));
        model.end_store(1, "stored", false);
        model.end_store(1, "failed", false);
        assert_eq!(model.present(), [1]);
        assert!(model.begin_other(1) && !model.begin_store(1));
        model.end_remove(1);
        assert!(model.begin_other(1));
        model.end_load(1, "loaded");
        assert!(
            model.wrong.is_empty(),
            "the failed store may have come later"
        );
        assert!(model.begin_other(2));
        model.end_load(2, "loaded");
        assert_eq!(model.wrong.len(), 1, "nobody ever stored it");
        let before = model.versions(2, 2);
        model.end_lookup(2, &before, 2);
        assert_eq!(model.wrong.len(), 3);
        assert!(model.begin_store(4));
        let before = model.versions(4, 1);
        model.end_lookup(4, &before, 1);
        assert_eq!(model.wrong.len(), 3, "published, and not acknowledged yet");
        assert!(model.begin_other(3));
        model.end_load(3, "wrong");
        assert_eq!(model.wrong.len(), 4);
    }
}
