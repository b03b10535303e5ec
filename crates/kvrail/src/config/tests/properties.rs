//! Random input of every source: an error or a configuration that is in range, and never a panic.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value};

use super::*;
use crate::error::ErrorKind;

/// Names that reach the parsers, and others.
fn name() -> impl Strategy<Value = String> {
    let known: Vec<&str> = KEYS
        .iter()
        .flat_map(super::super::key::Key::names)
        .collect();
    prop_oneof![
        6 => proptest::sample::select(known).prop_map(str::to_owned),
        1 => Just("extra_config".to_owned()),
        1 => Just("remote_url".to_owned()),
        1 => "[a-zA-Z_.]{0,20}",
        1 => any::<String>(),
    ]
}

/// Texts that are near to what the parsers take.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[-+]?[0-9]{0,25}(\\.[0-9]{0,5})?(e[0-9]{1,3})? ?(%|[kKmMgGtTpP]?i?[bB]?)",
        "(/[a-z~]{0,4}){0,3},? ?(/[a-z]{0,3})?",
        "(true|False|auto|unlimited|posix|by_gpu|fail|full|inf|NaN|~)",
        "\\{\"[a-z_]{0,12}\": ?[0-9a-z\"]{0,6}\\}?",
        any::<String>(),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0.0..2.0_f64).prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((name(), inner), 0..4).prop_map(Value::from_iter),
        ]
    })
}

fn document() -> impl Strategy<Value = Value> {
    vec((name(), value()), 0..4).prop_map(|entries| Value::Object(Map::from_iter(entries)))
}

fn check(sources: &ConfigSources<'_>) {
    match resolve(sources) {
        Ok(resolved) => {
            resolved.store.validate().unwrap();
            assert_eq!(resolved.origins.len(), KEYS.len());
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(!error.to_string().is_empty());
        }
    }
}

proptest! {
    #[test]
    fn any_connector_dictionary_is_judged(mut given in document(), path in any::<bool>()) {
        if let (true, Some(entries)) = (path, given.as_object_mut()) {
            entries.insert("gds_path".to_owned(), "/kv".into());
        }
        check(&ConfigSources { connector: Some(&given), ..ConfigSources::default() });
    }

    #[test]
    fn any_environment_is_judged(
        pairs in vec((prop_oneof!["LMCACHE_", "KVRAIL_", ""], name(), text()), 0..4),
    ) {
        let environment = pairs
            .into_iter()
            .map(|(prefix, name, text)| (prefix + &name.to_ascii_uppercase(), text))
            .chain([("LMCACHE_GDS_PATH".to_owned(), "/kv".to_owned())])
            .collect();
        check(&ConfigSources { environment, ..ConfigSources::default() });
    }

    #[test]
    fn any_text_of_a_file_is_judged(text in prop_oneof![
        any::<String>(),
        "([a-z_]{1,12}: ?[-\\[\\]{}&*!|>'\"%@`#,?:a-z0-9. ]{0,20}\n){0,6}",
        document().prop_map(|given| given.to_string()),
        (0..3000_usize, "[\\[{]").prop_map(|(depth, bracket)| bracket.repeat(depth)),
    ]) {
        let file = Some(("a.yaml".into(), text));
        check(&ConfigSources { file, ..ConfigSources::default() });
    }

    #[test]
    fn a_document_means_the_same_as_a_file_and_as_a_dictionary(given in document()) {
        // A dictionary strips a prefix that a file does not have.
        prop_assume!(!given.to_string().contains("lmcache."));
        let path = ("LMCACHE_GDS_PATH".to_owned(), "/kv".to_owned());
        let file = resolve(&ConfigSources {
            file: Some(("a.yaml".into(), given.to_string())),
            environment: vec![path.clone()],
            ..ConfigSources::default()
        });
        let connector = resolve(&ConfigSources {
            connector: Some(&given),
            environment: vec![path],
            ..ConfigSources::default()
        });
        if let (Ok(mut file), Ok(mut connector)) = (file, connector) {
            // The path may come from the document, which only the dictionary ranks above it.
            file.store.gds_path.clear();
            connector.store.gds_path.clear();
            prop_assert_eq!(file.store, connector.store);
        }
    }
}
