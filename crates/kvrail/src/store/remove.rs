//! Removing chunks because a caller wants them gone.

use std::sync::Arc;

use super::capacity::Removals;
use super::directory::Location;
use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::is_missing;
use super::shared::StoreShared;
use crate::error::Result;

/// Removes the chunks of `places`. Returns the bytes of each, 0 where there was none or it stayed.
///
/// What is being stored meanwhile may be there afterwards. Waits for the file system.
pub(super) fn remove_chunks(store: &StoreShared, places: &[Place]) -> Vec<u64> {
    let mut removed = vec![0; places.len()];
    if !store.may_write {
        return removed;
    }
    for mount in &store.mounts {
        let here = |place: &Place| Arc::ptr_eq(mount, store.mount(place.1, &place.2));
        if mount.health.is_out() || !places.iter().any(here) {
            continue;
        }
        let mut removals = match Removals::open(&mount.root) {
            Ok(removals) => removals,
            Err(error) => {
                warn(store, &error.to_string());
                continue;
            }
        };
        for (place, removed) in places.iter().zip(&mut removed) {
            if !here(place) {
                continue;
            }
            match remove_one(mount, place) {
                Ok(bytes) => {
                    *removed = bytes;
                    removals.note(bytes);
                    store.present.remove(place);
                    store.known.note(*place, false);
                    store.tier.remove(place);
                }
                Err(error) => warn(store, &error.to_string()),
            }
        }
        if let Err(error) = removals.end() {
            warn(store, &error.to_string());
        }
    }
    removed
}

/// Removes one chunk's file; returns its bytes, 0 when there is none.
fn remove_one(mount: &Mount, (group, rank, key): &Place) -> Result<u64> {
    let location = Location::chunk(*group, *rank, key);
    let folder = mount
        .directory
        .open()
        .and_then(|namespace| namespace.folder(location.folder.as_deref().unwrap_or_default()));
    let folder = match folder {
        Err(error) if is_missing(&error) => return Ok(0),
        folder => folder?,
    };
    let Some(status) = folder.status(&location.name)? else {
        return Ok(0);
    };
    match folder.remove_file(&location.name) {
        Err(error) if is_missing(&error) => Ok(0),
        Err(error) => Err(error),
        Ok(()) => Ok(status.bytes),
    }
}

fn warn(store: &StoreShared, message: &str) {
    store
        .notices
        .warn(Topic::Capacity, || format!("not removed: {message}"));
}
