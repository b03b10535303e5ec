//! What the driver knows about each chunk.

use super::CHUNKS;

/// Whether a chunk is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody has published it since it was removed.
    Absent,
    /// It was published, and only eviction may take it away.
    Present,
    /// A fault, a crash or damage leaves it open.
    Either,
}

#[derive(Debug, Clone)]
struct Chunk {
    state: State,
    /// Processes in which a store that was given up may still publish it.
    may_appear: Vec<u64>,
    /// Commands about it that are under way.
    stores: u32,
    others: u32,
    /// It was set aside while stores of it were under way: whose file that was is not known.
    doubt: bool,
    /// Counts every change, so that a lookup knows what changed meanwhile.
    version: u64,
    /// How often it had been evicted, and the epoch, when it was known to be there.
    evictions: u64,
    epoch: u64,
}

/// What a look at a chunk's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// It may be so.
    Fine,
    /// It is gone, the log does not say why, and faults or deaths since then may be why.
    LostToFault,
    /// It is gone, and there is no reason why.
    Lost,
    /// It is there, and cannot be.
    Ghost,
}

/// The model of the store.
#[derive(Debug)]
pub(super) struct Model {
    chunks: Vec<Chunk>,
    /// Changes whenever something happens that may keep an eviction from being written down.
    epoch: u64,
    /// What was found to be impossible.
    pub(super) wrong: Vec<String>,
}

impl Default for Model {
    fn default() -> Self {
        let chunk = Chunk {
            state: State::Absent,
            may_appear: Vec::new(),
            stores: 0,
            others: 0,
            doubt: false,
            version: 0,
            evictions: 0,
            epoch: 0,
        };
        Self {
            chunks: vec![chunk; CHUNKS as usize],
            epoch: 0,
            wrong: Vec::new(),
        }
    }
}

impl Model {
    fn chunk(&mut self, index: u64) -> &mut Chunk {
        &mut self.chunks[index as usize]
    }

    /// Faults begin or end, or a process dies.
    pub(super) fn disturb(&mut self) {
        self.epoch += 1;
    }

    /// Returns whether a store may begin: stores of one chunk may meet each other. `evictions` of
    /// it are known so far.
    pub(super) fn begin_store(&mut self, index: u64, evictions: u64) -> bool {
        let epoch = self.epoch;
        let chunk = self.chunk(index);
        if chunk.others > 0 {
            return false;
        }
        if chunk.stores == 0 && chunk.state != State::Present {
            // It may be published and evicted before its store says that it is there.
            (chunk.evictions, chunk.epoch) = (evictions, epoch);
        }
        chunk.stores += 1;
        chunk.version += 1;
        true
    }

    /// Returns whether something else may begin: it is alone with the chunk then.
    pub(super) fn begin_other(&mut self, index: u64) -> bool {
        let chunk = self.chunk(index);
        let free = chunk.others == 0 && chunk.stores == 0;
        if free {
            chunk.others += 1;
            chunk.version += 1;
        }
        free
    }

    /// A store ended in process `generation`; `is_damaging` when bytes may have changed on their
    /// way to the disk.
    pub(super) fn end_store(
        &mut self,
        index: u64,
        answer: &str,
        is_damaging: bool,
        generation: u64,
    ) {
        let chunk = self.chunk(index);
        chunk.stores -= 1;
        chunk.version += 1;
        match answer {
            "stored" if is_damaging || chunk.doubt => chunk.state = State::Either,
            "stored" => chunk.state = State::Present,
            // The process remembers it, or its file is there: nothing new is known. Or there was
            // no room, and nothing was written.
            "present" | "full" => {}
            // Failed, or the process was killed.
            _ => {
                chunk.may_appear.push(generation);
                if chunk.state == State::Absent {
                    chunk.state = State::Either;
                }
            }
        }
        chunk.doubt &= chunk.stores > 0;
    }

    /// A load ended.
    pub(super) fn end_load(&mut self, index: u64, answer: &str) {
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
                    .push(format!("chunk {index}: loaded although it was gone"));
            }
            // A chunk that seems damaged is set aside, also when only reading it went wrong.
            "damaged" | "killed" => chunk.state = State::Either,
            _ => {}
        }
    }

    /// Verification set a chunk aside, whatever else was under way.
    pub(super) fn set_aside(&mut self, index: u64) {
        let chunk = self.chunk(index);
        chunk.version += 1;
        chunk.state = State::Either;
        chunk.doubt = chunk.stores > 0;
    }

    /// A stranger removed a chunk's file.
    pub(super) fn end_remove(&mut self, index: u64) {
        let chunk = self.chunk(index);
        chunk.others -= 1;
        chunk.vanish();
    }

    /// Returns what tells whether chunks changed during a lookup.
    pub(super) fn versions(&self, first: u64, count: u64) -> Vec<u64> {
        let range = first as usize..(first + count) as usize;
        self.chunks[range]
            .iter()
            .map(|chunk| chunk.version)
            .collect()
    }

    /// A lookup found `found` chunks; `before` are the versions when it began.
    pub(super) fn end_lookup(&mut self, first: u64, before: &[u64], found: usize) {
        for (offset, version) in before.iter().take(found).enumerate() {
            let index = first + offset as u64;
            let chunk = self.chunk(index);
            // A store under way may have published it and not have said so yet.
            let is_settled = chunk.version == *version && chunk.stores == 0;
            if is_settled && chunk.state == State::Absent {
                self.wrong
                    .push(format!("chunk {index}: found although it was gone"));
            }
        }
    }

    /// Returns whether nothing is under way that may change a chunk, so that it can be looked at.
    pub(super) fn is_quiet(&self, index: u64) -> bool {
        let chunk = &self.chunks[index as usize];
        chunk.stores == 0 && chunk.others == 0
    }

    /// Returns whether a chunk's file is gone and the log does not say so, as far as is known here.
    pub(super) fn is_missed(&self, index: u64, is_there: bool, evictions: u64) -> bool {
        let chunk = &self.chunks[index as usize];
        chunk.state == State::Present && !is_there && evictions <= chunk.evictions
    }

    /// Compares what is known with whether the file is there, and learns from it.
    pub(super) fn audit(&mut self, index: u64, is_there: bool, evictions: u64) -> Finding {
        let epoch = self.epoch;
        let is_missed = self.is_missed(index, is_there, evictions);
        let chunk = self.chunk(index);
        if is_there {
            if chunk.state == State::Absent {
                return Finding::Ghost;
            }
            if chunk.state == State::Present {
                (chunk.evictions, chunk.epoch) = (evictions, epoch);
            }
            return Finding::Fine;
        }
        let is_explained = chunk.epoch != epoch;
        chunk.vanish();
        match (is_missed, is_explained) {
            (false, _) => Finding::Fine,
            (true, true) => Finding::LostToFault,
            (true, false) => Finding::Lost,
        }
    }

    /// Returns whether a chunk must load if its file is there.
    pub(super) fn must_load(&self, index: u64) -> bool {
        self.chunks[index as usize].state == State::Present
    }

    /// Stores that were given up in processes other than these have ended for certain: all their
    /// threads are gone.
    pub(super) fn settle(&mut self, alive: &[u64]) {
        for chunk in &mut self.chunks {
            chunk.may_appear.retain(|process| alive.contains(process));
        }
    }
}

impl Chunk {
    /// Its file is gone.
    fn vanish(&mut self) {
        self.version += 1;
        self.state = if self.may_appear.is_empty() {
            State::Absent
        } else {
            State::Either
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_seen_and_what_may_be_is_not() {
        let mut model = Model::default();
        assert!(model.begin_store(1, 0) && model.begin_store(1, 0) && !model.begin_other(1));
        model.end_store(1, "stored", false, 7);
        model.end_store(1, "failed", false, 7);
        assert!(model.must_load(1));
        assert!(model.begin_other(1) && !model.begin_store(1, 0));
        model.end_remove(1);
        assert!(model.begin_other(1));
        model.end_load(1, "loaded");
        assert!(
            model.wrong.is_empty(),
            "the failed store may have come later"
        );
        model.settle(&[8]);
        assert_eq!(model.audit(1, false, 0), Finding::Fine);
        assert_eq!(
            model.audit(1, true, 0),
            Finding::Ghost,
            "its process is dead"
        );
        assert!(model.begin_other(2));
        model.end_load(2, "loaded");
        assert_eq!(model.wrong.len(), 1, "nobody ever stored it");
        let before = model.versions(2, 2);
        model.end_lookup(2, &before, 2);
        assert_eq!(model.wrong.len(), 3);
        assert!(model.begin_store(4, 0));
        let before = model.versions(4, 1);
        model.end_lookup(4, &before, 1);
        assert_eq!(model.wrong.len(), 3, "published, and not acknowledged yet");
        assert!(model.begin_other(3));
        model.end_load(3, "wrong");
        assert_eq!(model.wrong.len(), 4);
    }

    #[test]
    fn what_is_gone_was_evicted_or_lost_to_a_fault_or_is_a_failure() {
        let mut model = Model::default();
        let stored = |model: &mut Model, evictions| {
            assert!(model.begin_store(1, evictions));
            model.end_store(1, "stored", false, 7);
        };
        stored(&mut model, 3);
        assert_eq!(model.audit(1, false, 4), Finding::Fine, "the log has it");
        assert_eq!(
            model.audit(1, true, 4),
            Finding::Ghost,
            "evicted, and back again"
        );
        stored(&mut model, 4);
        assert_eq!(model.audit(1, false, 4), Finding::Lost);
        stored(&mut model, 4);
        model.disturb();
        assert_eq!(model.audit(1, true, 4), Finding::Fine);
        assert_eq!(
            model.audit(1, false, 4),
            Finding::Lost,
            "it was there after the fault"
        );
        stored(&mut model, 4);
        model.disturb();
        assert_eq!(model.audit(1, false, 4), Finding::LostToFault);
        // Set aside by a verification while it is stored: either file may have been meant.
        assert!(model.begin_store(1, 4));
        model.set_aside(1);
        model.end_store(1, "stored", false, 7);
        assert!(!model.must_load(1));
        assert_eq!(model.audit(1, false, 4), Finding::Fine);
    }
}
