//! What becomes of the records of stores that are gone: the janitor adds them to its own.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::room::Room;
use super::root::Root;
use super::steps::Step;
use crate::error::Result;
use crate::io::Folder;
use crate::store::publish::is_missing;
use crate::store::writer::writer_is_dead;

/// A record that does not change for this long belongs to a store that is gone: six of the beats
/// that each store makes.
const ACCOUNT_LIMIT: Duration = Duration::from_secs(60);
/// Records absorbed between two signs of life.
const ABSORBED_MAX: usize = 64;

/// What a janitor knows of others' records.
#[derive(Debug, Default)]
pub(super) struct Absorber {
    /// As they were seen to change last.
    watched: HashMap<String, (u64, Instant)>,
    /// Those that it has taken, to absorb them.
    taken: HashSet<String>,
}

impl Absorber {
    /// Takes over the records of stores that are gone, and says each step. Returns how many.
    pub(super) fn absorb(
        &mut self,
        root: &Root,
        room: &Room,
        reach: impl Fn(Step),
    ) -> Result<usize> {
        let sum = room.look()?;
        let folder = root.accounts()?;
        // Files that somebody absorbed and did not get to remove come first: absorbing another one
        // would make them count again.
        for name in &sum.absorbed {
            remove(&folder, name)?;
        }
        for name in &sum.broken {
            // Its owner died while making it: it never said anything.
            if writer_is_dead(name) == Some(true) {
                remove(&folder, name)?;
            }
        }
        let own = room.name();
        let now = Instant::now();
        let is_there = |name: &String| sum.records.iter().any(|named| named.name == *name);
        self.watched.retain(|name, _| is_there(name));
        self.taken.retain(is_there);
        let mut absorbed = 0;
        for named in sum.records.iter().filter(|named| named.name != own) {
            let beat = named.record.beat;
            let (seen, since) = self
                .watched
                .entry(named.name.clone())
                .or_insert((beat, now));
            if *seen != beat {
                (*seen, *since) = (beat, now);
            }
            let is_silent = now.duration_since(*since) > ACCOUNT_LIMIT;
            let is_gone =
                named.record.retired || is_silent || writer_is_dead(&named.name) == Some(true);
            if (is_gone || self.taken.contains(&named.name)) && absorbed < ABSORBED_MAX {
                let Some((name, record)) = room.take(&folder, &named.name)? else {
                    continue;
                };
                self.taken.insert(name.clone());
                reach(Step::Taken);
                room.absorb(&name, &record)?;
                reach(Step::Absorbed);
                remove(&folder, &name)?;
                self.taken.remove(&name);
                reach(Step::AbsorbedRemoved);
                absorbed += 1;
            }
        }
        Ok(absorbed)
    }
}

/// Removes a record's file that counts no more.
fn remove(folder: &Folder, name: &str) -> Result<()> {
    match folder.remove_file(name) {
        Err(error) if is_missing(&error) => Ok(()),
        result => result,
    }
}
