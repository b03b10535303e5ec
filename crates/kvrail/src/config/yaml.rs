//! The YAML file as JSON values, with its errors in one line that names the place.

use std::path::Path;

use serde_json::{Map, Value};

use super::value::kind;
use crate::error::{Error, ErrorKind, Result};

/// Parses the text of the file at `path`, which holds one mapping or nothing.
pub(super) fn mapping(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match parse(path, text)? {
        Value::Null => Ok(Map::new()),
        Value::Object(entries) => Ok(entries),
        other => {
            let got = kind(&other);
            Err(error(
                path,
                "line 1",
                &format!("expected a mapping of keys to values, got {got}"),
            ))
        }
    }
}

fn parse(path: &Path, text: &str) -> Result<Value> {
    // As text, an infinity is refused by the key that it was given to, which says more.
    let options = serde_saphyr::options! {
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::AsString,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|cause| {
        let place = cause.location().map_or_else(
            || "line 1".to_owned(),
            |location| format!("line {}, column {}", location.line(), location.column()),
        );
        let cause = cause
            .without_snippet()
            .render_with_formatter(&serde_saphyr::UserMessageFormatter);
        // The parser's message can span lines; the error is one line in a log.
        let cause = cause.split_whitespace().collect::<Vec<_>>().join(" ");
        error(
            path,
            &place,
            cause
                .strip_suffix(&format!(" at {place}"))
                .unwrap_or(&cause),
        )
    })
}

fn error(path: &Path, place: &str, cause: &str) -> Error {
    let message = format!("read the configuration file: {place}: {cause}");
    Error::new(ErrorKind::InvalidConfig, message).with_path(path)
}
