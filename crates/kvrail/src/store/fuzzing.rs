//! The parsers of what is read from disk, each over any bytes: none panics, and what one takes it
//! writes again the same.
//!
//! The targets of `fuzz/` call these with bytes that libFuzzer finds, the tests below with its
//! corpus and random changes to that.

use serde_json::{Map, Value};

use super::bandwidth_record::{encode_record, parse_record};
use super::directory::{chunk_name, is_fan_out_name, parse_chunk_name, parse_part_name, part_name};
use super::inspect::ScrubState;
use super::manifest::parse_manifest;
use super::namespace::{Namespace, parse_directory_name};
use super::quarantine::{QuarantineName, Reason};
use super::writer::{is_writers_name, writer_is_dead};
use crate::chunk::{ChunkFormat, ChunkHead, PAGE_BYTES, PageTable};
use crate::config::{ConfigSources, resolve};
use crate::lmcache::{FilePlace, HEAD_BYTES, LmcacheKey, TensorHead};

/// A chunk's first page.
pub fn head(bytes: &[u8]) {
    if let Ok(head) = ChunkHead::decode(bytes) {
        let mut again = [0; PAGE_BYTES];
        assert!(head.encode_into(&mut again).is_ok());
        assert_eq!(again, bytes, "what is taken is what is written");
        let root = ChunkHead::check(bytes, &head.fields, &head.format);
        assert!(matches!(root, Ok(root) if root == head.root));
        // No length that follows from a head overflows.
        let format = head.format;
        assert!(format.file_bytes() > format.table_offset());
        assert!(format.page_count() <= format.table_entries());
    }
    let _ = ChunkHead::decode(bytes.get(8..).unwrap_or_default());
}

/// A page table, behind three bytes that are the shape.
pub fn page_table(bytes: &[u8]) {
    let Some((shape, table)) = bytes.split_first_chunk::<3>() else {
        return;
    };
    let shape = shape.map(|side| usize::from(side) * 100);
    let Ok(format) = ChunkFormat::new(shape) else {
        return;
    };
    if let Some(decoded) = PageTable::decode(&format, table) {
        let mut again = vec![0; format.table_bytes()];
        decoded.encode_into(&mut again);
        assert_eq!(again, table);
        assert_eq!(
            decoded.pages(0..format.page_count()).len(),
            format.page_count()
        );
    }
}

/// A manifest.
pub fn manifest(bytes: &[u8]) {
    let Ok(found) = parse_manifest(bytes) else {
        return;
    };
    let Ok(ours) = Namespace::new("fuzz/model", Map::new()) else {
        return;
    };
    let same = found == *ours.document();
    let differences = ours.differences(&found);
    assert!(!same || differences.is_empty());
    if let Value::Object(fields) = found {
        let model = fields.get("model").and_then(Value::as_str);
        if let Ok(theirs) = Namespace::new(model.unwrap_or_default(), fields.clone()) {
            let name = theirs.directory_name();
            assert!(parse_directory_name(&name).is_some(), "{name}");
        }
    }
}

/// The name of any file or folder.
pub fn names(bytes: &[u8]) {
    let Ok(name) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Some(key) = parse_chunk_name(name) {
        assert_eq!(chunk_name(&key), name);
    }
    if let Some((group, part)) = parse_part_name(name) {
        assert_eq!(part_name(group, part), name);
    }
    if let Some(aside) = QuarantineName::parse(name) {
        assert_eq!(aside.to_string(), name);
    }
    if let Some((slug, id)) = parse_directory_name(name) {
        assert_eq!(format!("{slug}-{id}"), name);
        assert!(!name.contains('/') && !name.starts_with('.'));
    }
    assert!(!is_fan_out_name(name) || name.len() == 3);
    let _ = (is_writers_name(name), writer_is_dead(name));
}

/// The state of a verification, and the reason beside a chunk in quarantine.
pub fn state(bytes: &[u8]) {
    if let Ok(state) = ScrubState::parse(bytes) {
        let again = ScrubState::parse(&state.encode());
        assert!(matches!(again, Ok(again) if again == state));
        assert!(state.place().is_ok());
    }
    let _ = Reason::parse(bytes);
}

/// The record of a path's bandwidth.
pub fn bandwidth(bytes: &[u8]) {
    if let Ok(found) = parse_record(bytes) {
        let again = parse_record(&encode_record(found));
        assert!(matches!(again, Ok(again) if again == found));
        assert!(found.mb_per_s > 0, "a weight is never 0");
    }
}

/// The first page of a file of LMCache's, and its name.
pub fn lmcache(bytes: &[u8]) {
    if let Ok(head) = TensorHead::decode(bytes) {
        assert_eq!(head.encode(), *bytes, "what is taken is what is written");
        assert!(head.check(bytes).is_ok());
        assert!(head.file_bytes() > HEAD_BYTES);
    }
    let Ok(name) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(key) = LmcacheKey::parse(name) {
        assert_eq!(key.to_string(), name);
    }
    if let Some(place) = FilePlace::parse(name) {
        assert!(place.name().is_ok_and(|again| again == name));
        assert!(!name.contains('/') && place.folder().len() <= 5);
    }
}

/// A configuration file, and the same as the value of a variable.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let sources = ConfigSources {
        connector: None,
        environment: Vec::new(),
        file: Some(("/kv.yaml".into(), text.to_owned())),
    };
    if let Ok(resolved) = resolve(&sources) {
        assert!(resolved.store.validate().is_ok());
    }
    let variables = [
        "KVRAIL_EXTRA_CONFIG",
        "LMCACHE_GDS_PATH",
        "KVRAIL_MIN_FREE",
        "KVRAIL_FILE_MODE",
    ];
    for name in variables {
        let sources = ConfigSources {
            connector: None,
            environment: vec![(name.to_owned(), text.to_owned())],
            file: None,
        };
        let _ = resolve(&sources);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 8] = [
        ("head", head),
        ("page_table", page_table),
        ("manifest", manifest),
        ("names", names),
        ("state", state),
        ("bandwidth", bandwidth),
        ("config", config),
        ("lmcache", lmcache),
    ];

    fn corpus(name: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../fuzz/corpus")
            .join(name);
        let files = std::fs::read_dir(folder).unwrap();
        let texts: Vec<_> = files
            .map(|file| std::fs::read(file.unwrap().path()).unwrap())
            .collect();
        assert!(texts.len() > 1, "the corpus of {name} was not found");
        texts
    }

    #[test]
    fn the_corpus_finds_nothing() {
        for (name, target) in TARGETS {
            corpus(name).iter().for_each(|bytes| target(bytes));
        }
    }

    /// A corpus whose files are all refused at the first byte shows nothing.
    #[test]
    fn the_corpus_holds_what_is_taken() {
        let any =
            |name: &str, taken: fn(&[u8]) -> bool| corpus(name).iter().any(|bytes| taken(bytes));
        assert!(any("head", |bytes| ChunkHead::decode(bytes).is_ok()));
        assert!(any("manifest", |bytes| parse_manifest(bytes).is_ok()));
        assert!(any("state", |bytes| ScrubState::parse(bytes).is_ok()));
        assert!(any("bandwidth", |bytes| parse_record(bytes).is_ok()));
        assert!(any("state", |bytes| Reason::parse(bytes).is_some()));
        assert!(any("lmcache", |bytes| TensorHead::decode(bytes).is_ok()));
        let name = |bytes: &[u8]| std::str::from_utf8(bytes).unwrap_or_default().to_owned();
        assert!(
            corpus("lmcache")
                .iter()
                .any(|bytes| FilePlace::parse(&name(bytes)).is_some())
        );
        assert!(
            corpus("names")
                .iter()
                .any(|bytes| QuarantineName::parse(&name(bytes)).is_some())
        );
        assert!(
            corpus("names")
                .iter()
                .any(|bytes| is_writers_name(&name(bytes)))
        );
        assert!(
            corpus("names")
                .iter()
                .any(|bytes| parse_directory_name(&name(bytes)).is_some())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn changes_to_the_corpus_find_nothing(
            pick in any::<usize>(),
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..8),
            cut in proptest::option::of(any::<usize>()),
        ) {
            for (name, target) in TARGETS {
                let texts = corpus(name);
                let mut bytes = texts[pick % texts.len()].clone();
                let length = bytes.len().max(1);
                for (at, byte) in &changes {
                    if let Some(target) = bytes.get_mut(at % length) {
                        *target = *byte;
                    }
                }
                if let Some(cut) = cut {
                    bytes.truncate(cut % length);
                }
                target(&bytes);
            }
        }
    }
}
