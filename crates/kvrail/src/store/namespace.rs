//! The namespace: all that must be equal for stored bytes to be interchangeable.

use serde_json::{Map, Value};

use crate::chunk::FORMAT_VERSION;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of an identity at most; it is read from disk as well.
pub(super) const IDENTITY_BYTES_MAX: usize = 4 << 20;

/// Hex digits of an id.
const ID_DIGITS: usize = 16;

/// Characters of a model's name kept in a directory name.
const SLUG_CHARACTERS_MAX: usize = 64;

/// An identity, and the directory that follows from it.
///
/// The id is the first 16 hex digits of the BLAKE3 hash of the canonical JSON (keys sorted, no
/// white space) of `{"format_version", "identity", "model"}`. Instances whose bytes or hashes
/// cannot agree land in different directories by construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    id: String,
    slug: String,
    document: Value,
}

impl Namespace {
    /// Makes the namespace of `model` with everything else that decides about the bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the identity is beyond 4 MiB of JSON.
    pub fn new(model: &str, identity: Map<String, Value>) -> Result<Self> {
        let document = serde_json::json!({
            "format_version": FORMAT_VERSION,
            "identity": Value::Object(identity),
            "model": model,
        });
        let invalid = |message: String| Error::new(ErrorKind::InvalidArgument, message);
        // serde_json sorts the keys of a `Value`, which makes the text canonical.
        let text = serde_json::to_vec(&document)
            .map_err(|error| invalid("identity as JSON".into()).with_source(error))?;
        if text.len() > IDENTITY_BYTES_MAX / 2 {
            return Err(invalid(format!("identity of {} bytes of JSON", text.len())));
        }
        let id = blake3::hash(&text)
            .to_hex()
            .chars()
            .take(ID_DIGITS)
            .collect();
        Ok(Self {
            id,
            slug: slug(model),
            document,
        })
    }

    /// Returns the id: 16 hex digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the directory's name: a readable form of the model's name, and the id.
    pub fn directory_name(&self) -> String {
        format!("{}-{}", self.slug, self.id)
    }

    /// Returns the document that the id is the hash of, as `manifest.json` holds it.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Returns the start of the directory names of all namespaces of this model's name.
    pub(super) fn slug(&self) -> &str {
        &self.slug
    }

    /// Returns how this namespace differs from another document, a line for each value.
    pub fn differences(&self, other: &Value) -> Vec<String> {
        differences(&self.document, other)
    }
}

/// Returns a name for directories: letters, digits, `.`, `_` and `-` of the model's last two parts.
fn slug(model: &str) -> String {
    let parts: Vec<&str> = model.split('/').filter(|part| !part.is_empty()).collect();
    let tail = parts
        .get(parts.len().saturating_sub(2)..)
        .unwrap_or_default()
        .join("-");
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = tail
        .chars()
        .map(|c| if safe(c) { c } else { '_' })
        .take(SLUG_CHARACTERS_MAX)
        .collect();
    // A leading dot would hide the directory, an empty name would be none.
    match name.trim_start_matches('.') {
        "" => "model".into(),
        name => name.into(),
    }
}

/// Reads the name of a namespace's directory: its slug and its id; `None` for any other name.
pub(super) fn parse_directory_name(name: &str) -> Option<(&str, &str)> {
    let (start, id) = name.rsplit_once('-')?;
    let is_id = id.len() == ID_DIGITS
        && id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (is_id && slug(start) == start).then_some((start, id))
}

/// Returns how two namespace documents differ, a line for each value: `here` is ours.
pub fn differences(ours: &Value, theirs: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    compare("", ours, theirs, &mut lines);
    lines
}

/// Characters of a value in a line: enough to tell two hashes of 64 digits apart.
const VALUE_CHARACTERS_MAX: usize = 80;

/// Returns a value as JSON, cut where it is long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(VALUE_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// Walks two documents and notes what is different, by path.
fn compare(path: &str, ours: &Value, theirs: &Value, lines: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(left), Value::Object(right)) => {
            for key in left
                .keys()
                .chain(right.keys().filter(|key| !left.contains_key(*key)))
            {
                let below = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                let side = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                compare(&below, &side(left), &side(right), lines);
            }
        }
        // Lists of the same length are compared entry by entry; in others entries have no partner.
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (ours, theirs)) in left.iter().zip(right).enumerate() {
                compare(&format!("{path}[{index}]"), ours, theirs, lines);
            }
        }
        (Value::Array(left), Value::Array(right)) => {
            let (ours, theirs) = (left.len(), right.len());
            lines.push(format!("{path}: {ours} entries here, {theirs} there"));
        }
        _ if ours == theirs => {}
        _ => {
            let (ours, theirs) = (short(ours), short(theirs));
            lines.push(format!("{path}: {ours} here, {theirs} there"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn namespace(model: &str, identity: Value) -> Namespace {
        Namespace::new(model, identity.as_object().unwrap().clone()).unwrap()
    }

    #[test]
    fn the_id_depends_on_every_value_and_not_on_key_order() {
        let first = namespace("m", json!({"dtype": "bf16", "tp": 2}));
        assert_eq!(first, namespace("m", json!({"tp": 2, "dtype": "bf16"})));
        assert_ne!(
            first.id(),
            namespace("m", json!({"tp": 4, "dtype": "bf16"})).id()
        );
        assert_ne!(
            first.id(),
            namespace("n", json!({"tp": 2, "dtype": "bf16"})).id()
        );
        assert_eq!(first.id().len(), 16);
    }

    #[test]
    fn names_never_leave_the_directory() {
        for (model, expected) in [
            ("meta-llama/Llama-3.1-8B", "meta-llama-Llama-3.1-8B"),
            ("/data/models/org/../..", "..-.."),
            ("../../etc", "..-etc"),
            ("", ""),
            ("a b\n", "a_b_"),
        ] {
            let name = namespace(model, json!({})).directory_name();
            let slug = name.rsplit_once('-').unwrap().0;
            assert!(!slug.starts_with('.') && !slug.contains('/'), "{name}");
            let trimmed = expected.trim_start_matches('.');
            assert_eq!(slug, if trimmed.is_empty() { "model" } else { trimmed });
        }
    }

    #[test]
    fn directory_names_are_read_back_and_others_are_not() {
        for model in [
            "meta-llama/Llama-3.1-8B",
            "",
            "../../etc",
            "a b",
            &"x".repeat(300),
        ] {
            let name = namespace(model, json!({})).directory_name();
            let (slug, id) = parse_directory_name(&name).unwrap();
            assert_eq!(format!("{slug}-{id}"), name);
        }
        let id = "0123456789abcdef";
        for name in [
            format!("..-{id}"),
            format!("a/b-{id}"),
            format!("-{id}"),
            format!("m-{}", id.to_uppercase()),
            format!("m-{id}0"),
            format!("m {id}"),
            id.to_owned(),
        ] {
            assert_eq!(parse_directory_name(&name), None, "{name}");
        }
    }

    #[test]
    fn differences_are_named_by_path() {
        let ours = namespace(
            "m",
            json!({"weights": {"size": 1, "name": "a"}, "new": true}),
        );
        let theirs = namespace("m", json!({"weights": {"size": 2, "name": "a"}}));
        let lines = ours.differences(theirs.document());
        assert_eq!(
            lines,
            [
                "identity.new: true here, null there",
                "identity.weights.size: 1 here, 2 there"
            ]
        );
        assert!(ours.differences(ours.document()).is_empty());
    }

    #[test]
    fn lists_are_compared_entry_by_entry_and_long_values_are_cut() {
        let with = |layers: Value, text: &str| namespace("m", json!({"l": layers, "t": text}));
        let ours = with(json!([["a", 1], ["b", 1]]), "x");
        let lines = |other: &Namespace| ours.differences(other.document());
        let other = with(json!([["a", 1], ["b", 2]]), "x");
        assert_eq!(lines(&other), ["identity.l[1][1]: 1 here, 2 there"]);
        let other = with(json!([["a", 1]]), "x");
        assert_eq!(lines(&other), ["identity.l: 2 entries here, 1 there"]);
        let other = with(json!([["a", 1], ["b", 1]]), &"\u{e9}".repeat(1000));
        let line = lines(&other).join("");
        assert!(
            line.ends_with("\u{e9}... there") && line.chars().count() < 120,
            "{line}"
        );
    }
}
