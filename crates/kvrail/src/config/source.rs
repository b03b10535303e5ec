//! The sources of settings, each turned into a flat list of entries that know where they stood.

use std::cmp::Reverse;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::key::EXTRA_CONFIG;
use super::value::kind;
use super::yaml;
use crate::error::{Error, Result};

/// The name of the connector's dictionary in vLLM's `--kv-transfer-config`.
const CONNECTOR: &str = "kv_connector_extra_config";
/// LMCache's own prefix for its keys in that dictionary.
const CONNECTOR_PREFIX: &str = "lmcache.";
/// Characters of a value that an error shows: enough to find it, and no page of JSON in a log line.
const SHOWN_CHARACTERS: usize = 80;
/// Parts of names whose values belong into no log.
const SECRETS: [&str; 7] = [
    "passw",
    "secret",
    "credential",
    "connection_string",
    "_url",
    "_token_",
    "account_key",
];
/// Ends of such names; inside of a name they are common words (`min_load_tokens`).
const SECRET_ENDS: [&str; 2] = ["_key", "token"];

/// Where the settings of one store come from, handed in as data.
#[derive(Debug, Clone, Default)]
pub struct ConfigSources<'a> {
    /// `kv_connector_extra_config`, a JSON object; highest rank.
    ///
    /// Its keys are taken with and without LMCache's prefix `lmcache.`.
    pub connector: Option<&'a Value>,
    /// The environment as (name, value) pairs; only `KVRAIL_*` and `LMCACHE_*` are looked at, and
    /// the first ranks above the second.
    pub environment: Vec<(String, String)>,
    /// The YAML file that `LMCACHE_CONFIG_FILE` names: its path, and the text that the caller read.
    pub file: Option<(PathBuf, String)>,
}

/// The rank of a source: the greater one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    File,
    LmcacheEnvironment,
    KvrailEnvironment,
    Connector,
}

/// Where an entry stood.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) rank: Rank,
    /// The short form: a variable's name, the file's path, the dictionary's name.
    pub(super) label: String,
    /// The key inside of it as the user wrote it; `None` where the label says all.
    written: Option<String>,
}

impl Origin {
    /// Returns the name as the user wrote it.
    pub(super) fn name(&self) -> &str {
        self.written.as_ref().unwrap_or(&self.label)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Rank::KvrailEnvironment | Rank::LmcacheEnvironment => {
                write!(out, "environment variable `{}`", self.label)?;
            }
            Rank::File | Rank::Connector => write!(out, "`{}`", self.label)?,
        }
        self.written
            .iter()
            .try_for_each(|key| write!(out, ", key `{key}`"))
    }
}

/// One setting as a source has it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// The key without a source's prefix and without the mapping it stands in.
    pub(super) name: String,
    /// Whether it stands inside `extra_config`.
    pub(super) nested: bool,
    pub(super) value: Value,
    pub(super) origin: Origin,
}

impl Entry {
    /// Returns the name with the mapping it stands in.
    pub(super) fn full_name(&self) -> String {
        if self.nested {
            format!("{EXTRA_CONFIG}.{}", self.name)
        } else {
            self.name.clone()
        }
    }

    /// Returns the error of this entry: key, value, what was expected, and where it is set.
    pub(super) fn error(&self, expected: impl fmt::Display) -> Error {
        let expected = format!("{expected} (set by {})", self.origin);
        Error::config(&self.full_name(), self.shown(), expected)
    }

    /// Returns the value for a log: shortened, and hidden where a name says that it is secret.
    pub(super) fn shown(&self) -> String {
        let text = self.value.to_string();
        // A whole mapping that could not be read is searched for names of secrets itself.
        let name = if self.name == EXTRA_CONFIG {
            &text
        } else {
            &self.name
        }
        .to_ascii_lowercase();
        if SECRETS.iter().any(|part| name.contains(part))
            || SECRET_ENDS.iter().any(|end| name.ends_with(end))
        {
            return "(hidden)".to_owned();
        }
        match text.char_indices().nth(SHOWN_CHARACTERS) {
            Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
            None => text,
        }
    }
}

impl ConfigSources<'_> {
    /// Returns every entry of every source, the highest rank first.
    pub(super) fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = self.connector.map_or(Ok(Vec::new()), connector)?;
        entries.extend(environment(&self.environment)?);
        if let Some((path, text)) = &self.file {
            entries.extend(file(path, text)?);
        }
        entries.sort_by_key(|entry| Reverse(entry.origin.rank));
        Ok(entries)
    }
}

fn connector(value: &Value) -> Result<Vec<Entry>> {
    let entries = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Object(entries) => entries,
        other => return Err(Error::config(CONNECTOR, other, "a JSON object")),
    };
    let entries = entries.iter().map(|(key, value)| Entry {
        name: key.strip_prefix(CONNECTOR_PREFIX).unwrap_or(key).to_owned(),
        nested: false,
        value: value.clone(),
        origin: Origin {
            rank: Rank::Connector,
            label: CONNECTOR.to_owned(),
            written: Some(key.clone()),
        },
    });
    flatten(entries)
}

fn environment(variables: &[(String, String)]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (variable, text) in variables {
        let (rank, key) = if let Some(key) = variable.strip_prefix("KVRAIL_") {
            (Rank::KvrailEnvironment, key)
        } else if let Some(key) = variable.strip_prefix("LMCACHE_") {
            (Rank::LmcacheEnvironment, key)
        } else {
            continue;
        };
        if is_service_link(key, text) {
            continue;
        }
        let entry = Entry {
            name: key.to_ascii_lowercase(),
            nested: false,
            value: Value::String(unquote(text).to_owned()),
            origin: Origin {
                rank,
                label: variable.clone(),
                written: None,
            },
        };
        if key.bytes().any(|byte| byte.is_ascii_lowercase()) {
            let upper = variable.to_ascii_uppercase();
            return Err(entry.error(format!("the name in upper case, `{upper}`")));
        }
        entries.push(entry);
    }
    flatten(entries.into_iter())
}

/// Returns whether Kubernetes set the variable because a service is named `lmcache` or `kvrail`.
///
/// It sets `<SERVICE>_SERVICE_HOST`, `_SERVICE_PORT`, `_SERVICE_PORT_<NAME>`, `_PORT` and
/// `_PORT_<n>_<PROTOCOL>...` in every pod of the namespace: nobody's settings, and no misspelling.
fn is_service_link(key: &str, text: &str) -> bool {
    let key = format!("_{key}");
    let port = key
        .rfind("_PORT")
        .and_then(|at| key.get(at + "_PORT".len()..));
    key.ends_with("_SERVICE_HOST")
        || key.ends_with("_SERVICE_PORT")
        || key.contains("_SERVICE_PORT_")
        || (port == Some("") && text.contains("://"))
        || ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| {
            key.split_once(protocol).is_some_and(|(before, after)| {
                let number = before.rsplit_once("_PORT_").map(|(_, number)| number);
                let number = number.is_some_and(|number| number.parse::<u16>().is_ok());
                number && ["", "_ADDR", "_PORT", "_PROTO"].contains(&after)
            })
        })
}

/// Removes one pair of quotes around a value, which env files of container tools leave there.
fn unquote(text: &str) -> &str {
    let text = text.trim();
    let inner = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(text)
}

fn file(path: &Path, text: &str) -> Result<Vec<Entry>> {
    let entries = yaml::mapping(path, text)?;
    flatten(entries.into_iter().map(|(key, value)| Entry {
        name: key.clone(),
        nested: false,
        value,
        origin: Origin {
            rank: Rank::File,
            label: path.display().to_string(),
            written: Some(key),
        },
    }))
}

/// Replaces each `extra_config` by the entries inside of it.
fn flatten(entries: impl Iterator<Item = Entry>) -> Result<Vec<Entry>> {
    let mut flat = Vec::new();
    for entry in entries {
        if entry.name != EXTRA_CONFIG {
            flat.push(entry);
            continue;
        }
        for (name, value) in nested(&entry)? {
            let mut origin = entry.origin.clone();
            origin.written = Some(match &entry.origin.written {
                Some(outer) => format!("{outer}.{name}"),
                None => name.clone(),
            });
            flat.push(Entry {
                name,
                nested: true,
                value,
                origin,
            });
        }
    }
    Ok(flat)
}

/// Returns the mapping of an `extra_config`, which may also be given as JSON text.
fn nested(entry: &Entry) -> Result<Map<String, Value>> {
    let expected = "a mapping, or a JSON object as text like {\"use_cufile\": false}";
    match &entry.value {
        Value::Null => Ok(Map::new()),
        Value::Object(entries) => Ok(entries.clone()),
        Value::String(text) if text.trim().is_empty() => Ok(Map::new()),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Object(entries)) => Ok(entries),
            Ok(other) => Err(entry.error(format!("{expected}, got {}", kind(&other)))),
            Err(error) => Err(entry.error(format!("{expected}; {error}"))),
        },
        other => Err(entry.error(format!("{expected}, got {}", kind(other)))),
    }
}
