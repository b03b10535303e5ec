//! The limit of loads from memory: plain copies of as many bytes by as many threads.
//!
//! Each item is copied in one piece, from memory of its own to the memory that loads go to. Both
//! are as large as all chunks of a wave, so that neither side finds its bytes in the CPU's caches
//! unless the other does. No pieces, no hash.

use super::clients::{self, Sample};
use super::kv_memory::KvMemory;
use super::random::Random;
use super::submission::slot_of;
use crate::failure::Failure;

/// The side that only copies.
pub(crate) struct Memcpy {
    /// One payload for each slot.
    images: Vec<Vec<u8>>,
    threads: usize,
}

impl Memcpy {
    /// Makes the memory to copy from, for as many chunks as `target` has slots.
    pub(crate) fn new(target: &KvMemory, payload_bytes: usize, threads: usize) -> Self {
        let images = (0..target.slots())
            .map(|slot| {
                let mut image = vec![0; payload_bytes];
                Random::new(slot as u64).fill(&mut image);
                image
            })
            .collect();
        Self { images, threads }
    }

    /// Copies the chunks of a wave to the slots of `target`.
    pub(crate) fn load(&self, target: &KvMemory, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.threads], wave, |(), item| {
            let slot = slot_of(wave, item);
            let image = self.images.get(slot);
            let image = image.ok_or_else(|| Failure::new(format!("there is no slot {slot}")))?;
            target.copy_whole(slot, image)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::Model;
    use super::*;

    #[test]
    fn every_byte_of_the_wave_is_copied_and_no_other() {
        let geometry = Model::Synthetic256k.geometries().remove(0);
        let target = KvMemory::new(geometry, 3).unwrap();
        let bytes = geometry.payload_bytes();
        let memcpy = Memcpy::new(&target, bytes, 2);
        target.poison().unwrap();
        let mut untouched = vec![0; bytes];
        target.region().copy_out(2 * bytes, &mut untouched).unwrap();
        memcpy.load(&target, &[40, 41]).unwrap();
        let mut found = vec![0; bytes];
        for slot in 0..2 {
            target.region().copy_out(slot * bytes, &mut found).unwrap();
            assert_eq!(found, memcpy.images[slot]);
        }
        target.region().copy_out(2 * bytes, &mut found).unwrap();
        assert_eq!(found, untouched);
        assert!(memcpy.load(&target, &[1, 2, 3, 4]).is_err());
    }
}
