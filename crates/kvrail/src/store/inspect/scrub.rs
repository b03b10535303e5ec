//! How far a verification has come, as text that it can go on from.

use serde::{Deserialize, Serialize};

use crate::chunk::{ChunkKey, Part};
use crate::error::{Error, ErrorKind, Result};

/// The state of a verification that can be interrupted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubState {
    /// The version of this text: 1.
    pub version: u32,
    /// The store's directory, as text.
    pub directory: String,
    /// Which chunks are checked: `all`, or the sample as the user wrote it.
    pub selection: String,
    /// What decides which chunks a sample takes.
    pub seed: u64,
    /// The name of the namespace's directory of the last chunk that was checked, with all before.
    pub namespace: String,
    /// Its group.
    pub group: u32,
    /// Its part.
    pub rank: Part,
    /// Its key in hex.
    pub key: String,
    /// Chunks checked so far.
    pub checked: u64,
    /// Their bytes.
    pub checked_bytes: u64,
    /// Damaged ones of those.
    pub damaged: u64,
}

impl ScrubState {
    /// The version that this library writes and reads.
    pub const VERSION: u32 = 1;
    /// Bytes of the text at most.
    pub const BYTES_MAX: usize = 64 << 10;

    /// Reads the text of a state.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] when it is none, or of another version.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let damaged = |message: String| Error::new(ErrorKind::Damaged, message);
        if text.len() > Self::BYTES_MAX {
            return Err(damaged(format!("state of {} bytes", text.len())));
        }
        let state: Self = serde_json::from_slice(text)
            .map_err(|error| damaged("state of a verification".into()).with_source(error))?;
        if state.version != Self::VERSION {
            let (found, expected) = (state.version, Self::VERSION);
            return Err(damaged(format!(
                "state of version {found}, expected {expected}"
            )));
        }
        state.place()?;
        Ok(state)
    }

    /// Returns the text of the state.
    pub fn encode(&self) -> Vec<u8> {
        // Numbers and texts only: that cannot fail.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Returns group, rank and key of the last chunk that was checked.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] when the key is none.
    pub fn place(&self) -> Result<(u32, Part, ChunkKey)> {
        let key = ChunkKey::from_hex(&self.key).map_err(|error| {
            Error::new(ErrorKind::Damaged, "state of a verification").with_source(error)
        })?;
        Ok((self.group, self.rank, key))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> ScrubState {
        ScrubState {
            version: 1,
            directory: "/mnt/kv".into(),
            selection: "5%".into(),
            seed: 7,
            namespace: "m-0123456789abcdef".into(),
            group: 0,
            rank: 3.into(),
            key: "ab".repeat(16),
            checked: 5,
            checked_bytes: 5 << 20,
            damaged: 1,
        }
    }

    #[test]
    fn a_state_round_trips_and_another_version_is_refused() {
        let state = state();
        assert_eq!(ScrubState::parse(&state.encode()).unwrap(), state);
        let next = ScrubState {
            version: 2,
            ..state.clone()
        };
        let error = ScrubState::parse(&next.encode()).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
        let bad = ScrubState {
            key: "AB".repeat(16),
            ..state
        };
        assert!(ScrubState::parse(&bad.encode()).is_err());
    }

    proptest! {
        #[test]
        fn damaged_states_are_errors(at in 0_usize..200, byte in any::<u8>(), end in 0_usize..400) {
            let mut text = state().encode();
            let at = at % text.len();
            text[at] = byte;
            text.truncate(end);
            if let Ok(parsed) = ScrubState::parse(&text) {
                prop_assert_eq!(ScrubState::parse(&parsed.encode()).unwrap(), parsed);
            }
        }
    }
}
