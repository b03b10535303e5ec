//! Lowering the account, which must not be done twice.
//!
//! What a janitor has removed or found missing is taken off by its own record. If it hangs in the
//! meantime, another one takes over, counts, and takes the same off; when the first comes back and
//! tells as well, room is given away that is not there. So what cannot be told at once is not told:
//! the account says too much then, until the next count.

use std::time::{Duration, Instant};

use super::room::Room;
use crate::error::Result;

/// How late may be told what was removed or counted. A lease holds for longer.
const LATE: Duration = Duration::from_secs(1);

/// Takes off what was removed since `began`. Returns whether it was in time for that.
///
/// # Errors
/// Those of writing the record; nothing is taken off then, also not later.
pub(super) fn removed(room: &Room, bytes: u64, began: Instant) -> Result<bool> {
    tell(
        room,
        began,
        || room.removed(bytes),
        || room.not_removed(bytes),
    )
}

/// Takes off (`bytes` is negative) what a count that ended at `since` has found missing.
///
/// # Errors
/// As [`removed`].
pub(super) fn missing(room: &Room, bytes: i64, since: Instant) -> Result<bool> {
    tell(room, since, || room.correct(bytes), || room.correct(-bytes))
}

fn tell(room: &Room, since: Instant, say: impl Fn(), unsay: impl Fn()) -> Result<bool> {
    if since.elapsed() > LATE {
        return Ok(false);
    }
    say();
    let told = room.flush();
    if told.is_ok() && since.elapsed() <= LATE {
        return Ok(true);
    }
    unsay();
    // What was written late, or perhaps in spite of an error, is written over.
    told.and_then(|()| room.flush()).map(|()| false)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::root::Root;
    use super::*;
    use crate::io::Permissions;

    fn room(path: &std::path::Path) -> Room {
        let root = Root::new(path, Permissions::default());
        let room = Room::open(root, Some(1000), SystemTime::now, true).unwrap();
        room.claim(500).unwrap();
        room.stored(500);
        room.flush().unwrap();
        room
    }

    #[test]
    fn what_is_told_in_time_counts_and_what_is_late_does_not() {
        let root = tempfile::tempdir().unwrap();
        let room = room(root.path());
        let used = || room.look().unwrap().used;
        assert!(removed(&room, 100, Instant::now()).unwrap());
        assert_eq!(used(), 400);
        assert!(missing(&room, -50, Instant::now()).unwrap());
        assert_eq!(used(), 350);
        let late = Instant::now().checked_sub(2 * LATE).unwrap();
        assert!(!removed(&room, 100, late).unwrap());
        assert!(!missing(&room, -50, late).unwrap());
        room.flush().unwrap();
        assert_eq!(used(), 350);
    }

    #[test]
    fn what_could_not_be_written_is_not_told_later() {
        let root = tempfile::tempdir().unwrap();
        let room = room(root.path());
        // A file in the folder's place: nothing can be written.
        let (folder, aside) = (root.path().join(".kvrail"), root.path().join("aside"));
        std::fs::rename(&folder, &aside).unwrap();
        std::fs::write(&folder, "").unwrap();
        assert!(removed(&room, 100, Instant::now()).is_err());
        assert!(missing(&room, -50, Instant::now()).is_err());
        std::fs::remove_file(&folder).unwrap();
        std::fs::rename(&aside, &folder).unwrap();
        room.flush().unwrap();
        assert_eq!(room.look().unwrap().used, 500);
    }
}
