//! From sources to one configuration: which entry of a key wins, and what there is to say about it.

use std::collections::{BTreeMap, BTreeSet};

use super::foreign;
use super::key::{self, KEYS, Key, LMCACHE_HASH};
use super::source::{ConfigSources, Entry};
use super::store_config::{PATH_WEIGHTS, StoreConfig};
use super::value;
use crate::error::{Error, Result};

/// A configuration, and what there is to say about how it came to be.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedConfig {
    /// The settings, typed and in range.
    pub store: StoreConfig,
    /// One sentence for each setting that has no effect, for the log.
    pub warnings: Vec<String>,
    /// Where each key's value came from: `default`, a variable's name, the file's path, or
    /// `kv_connector_extra_config`.
    pub origins: BTreeMap<&'static str, String>,
}

/// Resolves the sources into one configuration.
///
/// # Errors
///
/// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) for a file that is no YAML mapping,
/// an unknown key (with the nearest known one), a value of the wrong type or out of range, two
/// names of one key with different values in one source, and a missing `gds_path`.
pub fn resolve(sources: &ConfigSources<'_>) -> Result<ResolvedConfig> {
    let mut warnings = Vec::new();
    let mut warned = BTreeSet::new();
    let mut settings: Vec<(&'static Key, Entry)> = Vec::new();
    for entry in sources.entries()? {
        let key = if entry.nested {
            key::find_nested
        } else {
            key::find
        }(&entry.name);
        if let Some(key) = key {
            if !value::is_unset(&entry.value) {
                settings.push((key, entry));
            }
        } else if let Some(warning) = foreign::judge(&entry)?
            && warned.insert(entry.full_name())
        {
            warnings.push(warning);
        }
    }
    let mut store = StoreConfig::unset();
    let mut winners = BTreeMap::new();
    for key in KEYS {
        let entries = settings.iter().filter(|(other, _)| other.name == key.name);
        if let Some(winner) = winner(key, entries.map(|(_, entry)| entry))? {
            set(key, winner, &mut store)?;
            winners.insert(key.name, winner);
        }
    }
    if store.gds_path.is_empty() {
        return Err(missing_path());
    }
    if let Some(expected) = store.weights_expected()
        && let Some(entry) = winners.get(PATH_WEIGHTS)
    {
        return Err(entry.error(expected));
    }
    if !store.hashes_as_lmcache()
        && let Some(entry) = winners.get(LMCACHE_HASH)
    {
        warnings.push(format!(
            "`{LMCACHE_HASH}` has no effect: chunks are named by vLLM's hashes unless `layout` or \
             `chunk_hash` is lmcache (set by {})",
            entry.origin
        ));
    }
    let origin = |name| {
        winners
            .get(name)
            .map_or("default", |entry| &entry.origin.label)
            .to_owned()
    };
    let origins = KEYS
        .iter()
        .map(|key| (key.name, origin(key.name)))
        .collect();
    Ok(ResolvedConfig {
        store,
        warnings,
        origins,
    })
}

/// Returns the entry that counts, of one key's entries with the highest rank first.
///
/// Every entry is read, so that a wrong value is found where a higher source hides it today.
fn winner<'a>(key: &Key, entries: impl Iterator<Item = &'a Entry>) -> Result<Option<&'a Entry>> {
    let mut best: Option<(&Entry, StoreConfig)> = None;
    for entry in entries {
        let mut read = StoreConfig::unset();
        set(key, entry, &mut read)?;
        match &best {
            None => best = Some((entry, read)),
            Some((first, value)) if first.origin.rank == entry.origin.rank && *value != read => {
                return Err(entry.error(format!(
                    "the same value as `{}` = {}, another name of the same key in the same source",
                    first.origin.name(),
                    first.shown()
                )));
            }
            Some(_) => {}
        }
    }
    Ok(best.map(|(entry, _)| entry))
}

fn set(key: &Key, entry: &Entry, store: &mut StoreConfig) -> Result<()> {
    (key.set)(store, &entry.value).map_err(|expected| entry.error(expected))
}

fn missing_path() -> Error {
    let expected = "an absolute directory, or several separated by commas (in environment variable \
                    `LMCACHE_GDS_PATH`, in the file that `LMCACHE_CONFIG_FILE` names, or in \
                    `kv_connector_extra_config`)";
    Error::config("gds_path", "nothing", expected)
}
