//! Entries that are no key of kvrail: read elsewhere, LMCache's own, or misspelt.

use super::key::{self, EXTRA_CONFIG, KEYS};
use super::lmcache;
use super::source::{Entry, Rank};
use super::value;
use crate::error::{Error, Result};

/// Names that are read from the environment only: they decide what happens before a store is open.
const ENVIRONMENT_ONLY: [&str; 5] = [
    "config_file",
    "cuda_library",
    "cufile_library",
    "takeover",
    "use_experimental",
];

/// Those of them whose value is a path.
const PATHS: [&str; 3] = ["config_file", "cuda_library", "cufile_library"];

/// The variables of those names.
const VARIABLES: [&str; 7] = [
    "KVRAIL_CONFIG_FILE",
    "KVRAIL_CUDA_LIBRARY",
    "KVRAIL_CUFILE_LIBRARY",
    "KVRAIL_TAKEOVER",
    "KVRAIL_USE_EXPERIMENTAL",
    "LMCACHE_CONFIG_FILE",
    "LMCACHE_USE_EXPERIMENTAL",
];

/// Likeness (1 is equal) from which a known name is suggested: with less than six tenths of the
/// letters in place it is another word, and a list says more than a guess.
const ALIKE: f64 = 0.6;

/// Returns the warning that an entry deserves, if any.
///
/// # Errors
///
/// A name that nobody knows, and a switch of the environment that is none.
pub(super) fn judge(entry: &Entry) -> Result<Option<String>> {
    let rank = entry.origin.rank;
    let in_environment = rank == Rank::KvrailEnvironment || rank == Rank::LmcacheEnvironment;
    if in_environment && VARIABLES.contains(&entry.origin.label.as_str()) {
        if !PATHS.contains(&entry.name.as_str()) && !value::is_unset(&entry.value) {
            value::boolean(&entry.value).map_err(|expected| entry.error(expected))?;
        }
        return Ok(None);
    }
    if !in_environment && !entry.nested && ENVIRONMENT_ONLY.contains(&entry.name.as_str()) {
        return Ok(Some(format!(
            "`{}` has no effect here: it is read from the environment only (set by {})",
            entry.name, entry.origin
        )));
    }
    if !lmcache::knows(entry) {
        return Err(unknown(entry));
    }
    // The value stays out of the log: among LMCache's keys are passwords of its remote stores.
    Ok((!value::is_unset(&entry.value)).then(|| {
        format!(
            "`{}` has no effect: it is a setting of LMCache that kvrail does not implement (set by {})",
            entry.full_name(),
            entry.origin
        )
    }))
}

fn unknown(entry: &Entry) -> Error {
    if entry.nested && key::find(&entry.name).is_some() {
        return entry.error(format!("`{}` outside of `{EXTRA_CONFIG}`", entry.name));
    }
    let known = candidates(entry);
    let mut nearest: Option<(f64, &str)> = None;
    for name in &known {
        let alike = strsim::normalized_damerau_levenshtein(&entry.name.to_ascii_lowercase(), name);
        // The first of equals stays: kvrail's own keys come first.
        if alike >= ALIKE && nearest.is_none_or(|(best, _)| alike > best) {
            nearest = Some((alike, name));
        }
    }
    match nearest {
        Some((_, name)) => entry.error(format!(
            "a known key, the nearest is `{}`",
            spelled(entry, name)
        )),
        None => {
            let names: Vec<String> = own_names(entry).map(|name| spelled(entry, name)).collect();
            entry.error(format!("a known key, one of {}", names.join(", ")))
        }
    }
}

/// Returns kvrail's names that could stand where the entry stands.
fn own_names(entry: &Entry) -> impl Iterator<Item = &'static str> + use<> {
    let nested = entry.nested;
    KEYS.iter()
        .filter(move |key| !nested || key.is_nested())
        .flat_map(|key| std::iter::once(key.bare()).chain(key.aliases.iter().copied()))
        .chain((!nested).then_some(EXTRA_CONFIG))
}

/// Returns every name that could have been meant.
fn candidates(entry: &Entry) -> Vec<&'static str> {
    let mut names: Vec<&str> = own_names(entry).collect();
    match entry.origin.rank {
        Rank::KvrailEnvironment => names.extend(ENVIRONMENT_ONLY),
        Rank::LmcacheEnvironment => {
            names.extend(ENVIRONMENT_ONLY);
            names.extend(lmcache::names(entry));
        }
        Rank::File | Rank::Connector => names.extend(lmcache::names(entry)),
    }
    names
}

/// Returns a name as it would stand in the entry's source.
fn spelled(entry: &Entry, name: &str) -> String {
    let prefix = match entry.origin.rank {
        _ if entry.nested => return format!("{EXTRA_CONFIG}.{name}"),
        Rank::File | Rank::Connector => return name.to_owned(),
        Rank::KvrailEnvironment => "KVRAIL",
        // Only kvrail takes the connector's name over.
        Rank::LmcacheEnvironment if name == "takeover" => "KVRAIL",
        Rank::LmcacheEnvironment => "LMCACHE",
    };
    format!("{prefix}_{}", name.to_ascii_uppercase())
}
