//! What a tool removes, written down as it goes.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::files::found_or_none;
use super::room::Room;
use super::root::Root;
use super::telling;
use crate::error::Result;

/// How long removals are gathered before they are written down.
const TELL_AFTER: Duration = Duration::from_millis(200);

/// Writes down that chunks are removed from below a path by other means than eviction, so that there
/// is room for others at once, not only after the janitor's next pass.
///
/// Until it ends, janitors that count and find chunks missing leave it to this to say so: what is taken
/// off twice is room that is not there.
#[derive(Debug)]
pub struct Removals {
    /// None where nobody keeps an account: none is begun.
    room: Option<Room>,
    /// Bytes that are not written down yet, and since when some were not.
    untold: Option<(u64, Instant)>,
    told: Result<()>,
}

impl Removals {
    /// Begins, before the first chunk is removed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(root: &Path) -> Result<Self> {
        let root = Root::existing(root);
        let room = match found_or_none(root.accounts())? {
            Some(_) => Some(Room::open(root, None, SystemTime::now, false)?),
            None => None,
        };
        room.as_ref().map(Room::begin_removing).transpose()?;
        Ok(Self {
            room,
            untold: None,
            told: Ok(()),
        })
    }

    /// Takes note of what was just removed.
    pub fn note(&mut self, bytes: u64) {
        let (untold, since) = self.untold.unwrap_or((0, Instant::now()));
        self.untold = Some((untold.saturating_add(bytes), since));
        if since.elapsed() >= TELL_AFTER {
            self.tell();
        }
    }

    fn tell(&mut self) {
        let (Some(room), Some((bytes, since))) = (&self.room, self.untold.take()) else {
            return;
        };
        if bytes > 0
            && let Err(error) = telling::removed(room, bytes, since)
            && self.told.is_ok()
        {
            self.told = Err(error);
        }
    }

    /// Ends.
    ///
    /// # Errors
    /// Those of the file system, the first of them: usage is too high then, until a janitor counts.
    pub fn end(mut self) -> Result<()> {
        self.tell();
        if let Some(room) = &self.room {
            room.retire()?;
        }
        self.told
    }
}
