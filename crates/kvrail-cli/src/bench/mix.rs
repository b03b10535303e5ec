//! Loads and stores at the same time, as a server has them whose prompts are found in part.

use std::sync::Mutex;
use std::time::Instant;

use super::clients::{self, Sample};
use super::random::Random;
use crate::failure::Failure;

/// Numbers of chunks that are stored in a mix are those of the wave plus this.
const NEW: u64 = 1 << 32;

/// What the chunks of one wave are for: a share is loaded, for the others new ones are stored.
#[derive(Debug, Clone)]
pub(crate) struct Mix {
    /// The chunks that are there.
    pub(crate) wave: Vec<u64>,
    /// The new ones, one for each of those.
    pub(crate) new: Vec<u64>,
    /// Places in the wave in the order in which they are taken.
    places: Vec<u64>,
    /// Whether the chunk of a place is loaded.
    is_load: Vec<bool>,
}

impl Mix {
    /// Draws which chunks of a wave are loaded: as many as the share says, in a random order.
    pub(crate) fn draw(wave: &[u64], share: f64, seed: u64) -> Self {
        let loads = (wave.len() as f64 * share).round() as usize;
        let mut random = Random::new(seed);
        let mut is_load: Vec<bool> = (0..wave.len()).map(|place| place < loads).collect();
        random.shuffle(&mut is_load);
        let mut places: Vec<u64> = (0..wave.len() as u64).collect();
        random.shuffle(&mut places);
        Self {
            wave: wave.to_vec(),
            new: wave.iter().map(|item| item + NEW).collect(),
            places,
            is_load,
        }
    }

    /// Returns whether the chunk of a place is loaded.
    pub(crate) fn is_load(&self, place: usize) -> bool {
        self.is_load.get(place).copied().unwrap_or_default()
    }

    /// Runs `load` for each chunk that is there and `store` for each new one, on a thread for each
    /// of `states`. The times of the sample are those of the loads alone: somebody waits for them.
    pub(crate) fn run<S: Send>(
        &self,
        states: &mut [S],
        load: impl Fn(&mut S, u64) -> Result<(), Failure> + Sync,
        store: impl Fn(&mut S, u64) -> Result<(), Failure> + Sync,
    ) -> Result<Sample, Failure> {
        let latencies = Mutex::new(Vec::with_capacity(self.wave.len()));
        let at = |items: &[u64], place: usize| {
            let item = items.get(place).copied();
            item.ok_or_else(|| Failure::new(format!("there is no place {place}")))
        };
        let mut sample = clients::run(states, &self.places, |state, place| {
            let place = place as usize;
            if !self.is_load(place) {
                return store(state, at(&self.new, place)?);
            }
            let start = Instant::now();
            load(state, at(&self.wave, place)?)?;
            let latency = start.elapsed();
            latencies
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .push(latency);
            Ok(())
        })?;
        sample.latencies = latencies
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_loaded_or_stored_once_and_the_share_is_kept() {
        let wave: Vec<u64> = (100..120).collect();
        let mix = Mix::draw(&wave, 0.7, 1);
        let mut states = vec![(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        let sample = mix
            .run(
                &mut states,
                |(loaded, _), item| {
                    loaded.push(item);
                    Ok(())
                },
                |(_, stored), item| {
                    stored.push(item - NEW);
                    Ok(())
                },
            )
            .unwrap();
        let loaded: Vec<u64> = states.iter().flat_map(|state| state.0.clone()).collect();
        let stored: Vec<u64> = states.iter().flat_map(|state| state.1.clone()).collect();
        assert_eq!((loaded.len(), stored.len()), (14, 6));
        assert_eq!(sample.latencies.len(), 14);
        let mut all = [loaded, stored].concat();
        all.sort_unstable();
        assert_eq!(all, wave);
        // Another round mixes in another way.
        assert_ne!(Mix::draw(&wave, 0.7, 2).is_load, mix.is_load);
    }
}
