//! Tests of the whole way from sources to a configuration; `tests/errors.rs` has the messages.

mod errors;
mod names;
mod properties;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::key::KEYS;
use super::*;
use crate::error::{Error, ErrorKind, Result};

/// The page of LMCache that kvrail implements: its YAML file.
const SEED_FILE: &str = "\
# 256 Tokens per KV Chunk
chunk_size: 256
# Disable local CPU
local_cpu: false
# Path to file system, local, remote or GDS-enabled mount
gds_path: \"/mnt/gds/cache\"
# CuFile Buffer Size in MiB
cufile_buffer_size: 8192
";

/// The same page: its environment.
const SEED_ENVIRONMENT: [(&str, &str); 5] = [
    ("LMCACHE_USE_EXPERIMENTAL", "True"),
    ("LMCACHE_CHUNK_SIZE", "256"),
    ("LMCACHE_GDS_PATH", "/mnt/gds/cache"),
    ("LMCACHE_CUFILE_BUFFER_SIZE", "8192"),
    ("LMCACHE_LOCAL_CPU", "False"),
];

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn from_environment(pairs: &[(&str, &str)]) -> Result<ResolvedConfig> {
    resolve(&ConfigSources {
        environment: variables(pairs),
        ..ConfigSources::default()
    })
}

fn from_file(text: &str) -> Result<ResolvedConfig> {
    let file = Some((PathBuf::from("/etc/gds.yaml"), text.to_owned()));
    resolve(&ConfigSources {
        file,
        ..ConfigSources::default()
    })
}

fn from_connector(value: &Value) -> Result<ResolvedConfig> {
    resolve(&ConfigSources {
        connector: Some(value),
        ..ConfigSources::default()
    })
}

fn message(error: &Error) -> String {
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    text
}

#[test]
fn the_page_of_lmcache_works_as_a_file_and_as_an_environment() {
    let mut expected = StoreConfig::with_path("/mnt/gds/cache");
    expected.buffer_mib = 8192;
    for resolved in [
        from_file(SEED_FILE).unwrap(),
        from_environment(&SEED_ENVIRONMENT).unwrap(),
    ] {
        assert_eq!(resolved.store, expected);
        assert_eq!(resolved.warnings, Vec::<String>::new());
    }
    let mut forced = SEED_ENVIRONMENT.to_vec();
    forced.push(("LMCACHE_EXTRA_CONFIG", r#"{"use_cufile": false}"#));
    let resolved = from_environment(&forced).unwrap();
    assert!(!resolved.store.use_cufile && !resolved.store.wants_cufile());
    assert_eq!(
        resolved.origins["extra_config.use_cufile"],
        "LMCACHE_EXTRA_CONFIG"
    );
    assert_eq!(resolved.warnings, Vec::<String>::new());
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = StoreConfig::with_path("/kv");
    assert_eq!(config, from_file("gds_path: /kv").unwrap().store);
    config.validate().unwrap();
    assert!(config.wants_cufile());
    assert_eq!(
        (config.chunk_size, config.buffer_mib, config.disk_io_threads),
        (256, 512, 4)
    );
    assert!(!config.local_cpu && !config.save_decode_cache && config.use_gds && config.use_cufile);
    assert_eq!(
        (config.max_local_cpu_size_gb, config.wait_limit_seconds),
        (5.0, 30.0)
    );
    assert_eq!(
        (config.max_size, config.min_free),
        (None, MinFree::Share(0.05))
    );
    assert_eq!((config.low_watermark, config.ttl_seconds), (0.9, None));
    assert_eq!(config.eviction_policy, EvictionPolicy::Lru);
    assert_eq!(config.admission, Admission::All);
    assert_eq!(
        (config.use_direct_io, config.durability, config.file_mode),
        (None, Durability::None, FileMode::default())
    );
    assert_eq!(config.gds_path_sharding, PathSharding::ByHash);
    assert_eq!(config.path_weights, PathWeights::Measured);
    assert_eq!(config.local_cpu_shared, None);
    assert_eq!(config.page_cache, PageCache::Auto);
    assert_eq!(config.io_engine, EngineChoice::Auto);
    assert_eq!(config.load_failure_policy, LoadFailurePolicy::Recompute);
}

#[test]
fn a_file_mode_needs_no_quotes() {
    for text in ["0640", "640", "0o640", "'0640'", "\"640\""] {
        let resolved = from_file(&format!("gds_path: /kv\nfile_mode: {text}")).unwrap();
        assert_eq!(resolved.store.file_mode.bits(), 0o640, "{text}");
    }
}

#[test]
fn every_source_overrides_the_ones_below_it() {
    let connector = json!({"lmcache.chunk_size": 16});
    let levels: [(&str, usize); 5] = [
        ("kv_connector_extra_config", 16),
        ("KVRAIL_CHUNK_SIZE", 32),
        ("LMCACHE_CHUNK_SIZE", 64),
        ("/etc/gds.yaml", 128),
        ("default", 256),
    ];
    for (dropped, (origin, size)) in levels.into_iter().enumerate() {
        let mut environment = variables(&[
            ("LMCACHE_GDS_PATH", "/kv"),
            ("LMCACHE_CHUNK_SIZE", "64"),
            ("KVRAIL_CHUNK_SIZE", "32"),
        ]);
        environment.truncate(4 - dropped.clamp(1, 3));
        let sources = ConfigSources {
            connector: (dropped < 1).then_some(&connector),
            environment,
            file: (dropped < 4).then(|| ("/etc/gds.yaml".into(), "chunk_size: 128".to_owned())),
        };
        let resolved = resolve(&sources).unwrap();
        assert_eq!(resolved.store.chunk_size, size, "{origin}");
        assert_eq!(resolved.origins["chunk_size"], origin);
    }
}

#[test]
fn every_key_is_taken_in_every_source_under_every_name() {
    let values = [
        ("chunk_size", json!(64), "64"),
        ("gds_path", json!(["/a", "/b"]), "/a, /b"),
        ("gds_path_sharding", json!("by_gpu"), "by_gpu"),
        ("layout", json!("lmcache"), "LMCache"),
        ("chunk_hash", json!("lmcache"), "lmcache"),
        ("pre_caching_hash_algorithm", json!("sha256"), "sha256"),
        ("cufile_buffer_size", json!(100), "100"),
        ("local_cpu", json!(true), "True"),
        ("max_local_cpu_size", json!(2.5), "2.5"),
        ("use_gds", json!(false), "off"),
        ("gds_backend", json!("posix"), "POSIX"),
        ("max_size", json!("500GB"), "500GB"),
        ("min_free", json!("10%"), "0.1"),
        ("low_watermark", json!("80%"), "0.8"),
        ("ttl", json!("7d"), "604800"),
        ("eviction_policy", json!("reuse"), "REUSE"),
        ("admission", json!("second_use"), "second_use"),
        ("durability", json!("full"), "full"),
        ("file_mode", json!("0640"), "640"),
        ("save_decode_cache", json!(true), "yes"),
        ("min_load_tokens", json!(512), "512"),
        ("extra_config.use_cufile", json!(false), "0"),
        ("extra_config.cufile_compat_mode", json!(true), "on"),
        ("extra_config.direct", json!(false), "no"),
        ("extra_config.use_direct_io", json!(true), "true"),
        (
            "extra_config.local_cpu_shared",
            json!("/dev/shm/kv"),
            " /dev/shm/kv ",
        ),
        ("extra_config.path_weights", json!([2.5]), "2.5"),
        ("extra_config.page_cache", json!("keep"), "Keep"),
        ("extra_config.io_engine", json!("uring"), "uring"),
        ("extra_config.disk_io_threads", json!(9), "9"),
        ("extra_config.load_failure_policy", json!("fail"), "fail"),
        ("extra_config.wait_limit_seconds", json!(1.5), "1.5"),
        ("extra_config.lookup_limit_seconds", json!(0.5), "0.5"),
        ("extra_config.lookup_hold_seconds", json!(0.0), "0"),
        ("extra_config.slow_limit_seconds", json!(3.0), "3.0"),
    ];
    assert_eq!(values.len(), KEYS.len());
    for (key, (name, value, text)) in KEYS.iter().zip(values) {
        assert_eq!(key.name, name);
        let base = StoreConfig::with_path("/kv");
        let mut expected = base.clone();
        (key.set)(&mut expected, &value).unwrap();
        assert_ne!(expected, base, "{name}: the test must change something");
        let mut documents = Vec::new();
        let mut names: Vec<String> = Vec::new();
        for spelled in key.names() {
            documents.push(json!({spelled: value}));
            documents.push(json!({format!("lmcache.{spelled}"): value}));
            if !spelled.contains('.') {
                names.push(spelled.to_ascii_uppercase());
            }
        }
        if key.is_nested() {
            documents.push(json!({"extra_config": {key.bare(): value}}));
            documents.push(json!({"extra_config": json!({key.bare(): text}).to_string()}));
        }
        for document in &documents {
            let sources = ConfigSources {
                connector: Some(document),
                environment: variables(&[("LMCACHE_GDS_PATH", "/kv")]),
                file: None,
            };
            assert_eq!(resolve(&sources).unwrap().store, expected, "{document}");
            let text = document.to_string().replace("lmcache.", "");
            let sources = ConfigSources {
                connector: Some(&Value::Null),
                environment: Vec::new(),
                file: Some(("a.yaml".into(), text)),
            };
            if name == "gds_path" {
                assert_eq!(resolve(&sources).unwrap().store, expected, "{document}");
            } else {
                let path = format!("gds_path: /kv\n{}", yaml(&sources));
                assert_eq!(from_file(&path).unwrap().store, expected, "{path}");
            }
        }
        for variable in names
            .iter()
            .flat_map(|n| [format!("LMCACHE_{n}"), format!("KVRAIL_{n}")])
        {
            let mut pairs = vec![("LMCACHE_GDS_PATH", "/kv")];
            pairs.retain(|(name, _)| *name != variable);
            pairs.push((&variable, text));
            let resolved = from_environment(&pairs).unwrap();
            assert_eq!(resolved.store, expected, "{variable}");
            assert_eq!(resolved.origins[name], variable);
        }
    }
}

/// Returns the file's one-line JSON as block YAML with one key a line.
fn yaml(sources: &ConfigSources<'_>) -> String {
    let (_, text) = sources.file.as_ref().unwrap();
    let entries: serde_json::Map<String, Value> = serde_json::from_str(text).unwrap();
    entries
        .iter()
        .map(|(key, value)| format!("{key}: {value}\n"))
        .collect()
}

#[test]
fn empty_values_are_unset_and_the_next_source_counts() {
    let connector = json!({"chunk_size": null, "gds_path": [], "extra_config": {}, "max_size": ""});
    let resolved = resolve(&ConfigSources {
        connector: Some(&connector),
        environment: variables(&[("LMCACHE_EXTRA_CONFIG", ""), ("KVRAIL_CHUNK_SIZE", " ")]),
        file: Some((
            "a.yaml".into(),
            "gds_path: /kv\nchunk_size: 32\nlocal_disk:\n".to_owned(),
        )),
    });
    let resolved = resolved.unwrap();
    assert_eq!(resolved.store.chunk_size, 32);
    assert_eq!(resolved.warnings, Vec::<String>::new());
    let word = from_file("gds_path: /kv\nmax_size: unlimited\nextra_config: {use_direct_io: auto}");
    assert_eq!(word.unwrap().store, StoreConfig::with_path("/kv"));
}

#[test]
fn several_paths_are_a_list_or_text_with_commas() {
    let expected = [PathBuf::from("/mnt/a"), PathBuf::from("/mnt/b c")];
    let file = from_file("gds_path: [/mnt/a, '/mnt/b c']").unwrap();
    let text = from_environment(&[("LMCACHE_GDS_PATH", "'/mnt/a, /mnt/b c,'")]).unwrap();
    assert_eq!(file.store.gds_path, expected);
    assert_eq!(text.store.gds_path, expected);
    let comma = from_connector(&json!({"gds_path": ["/mnt/a,b"]})).unwrap();
    assert_eq!(
        comma.store.gds_path,
        [Path::new("/mnt/a,b")],
        "a list's item is one path"
    );
}

#[test]
fn sizes_and_shares_have_their_units() {
    let size = |text: &str| from_connector(&json!({"gds_path": "/kv", "max_size": text}));
    for (text, bytes) in [
        ("500GB", 500_000_000_000),
        ("500 gb", 500_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5TiB", 3 << 39),
        ("2PB", 2_000_000_000_000_000),
        ("1024", 1024),
        ("7B", 7),
        ("4 KiB", 4096),
    ] {
        assert_eq!(size(text).unwrap().store.max_size, Some(bytes), "{text}");
    }
    let free = |value: Value| {
        from_connector(&json!({"gds_path": "/kv", "min_free": value}))
            .unwrap()
            .store
            .min_free
    };
    assert_eq!(free(json!("12.5%")), MinFree::Share(0.125));
    assert_eq!(free(json!(0.25)), MinFree::Share(0.25));
    assert_eq!(free(json!("0.25")), MinFree::Share(0.25));
    assert_eq!(free(json!("50GB")), MinFree::Bytes(50_000_000_000));
    assert_eq!(free(json!("1.5GiB")), MinFree::Bytes(3 << 29));
    assert_eq!(free(json!(4096)), MinFree::Bytes(4096));
    assert_eq!(free(json!(0)), MinFree::Bytes(0));
}

#[test]
fn a_key_of_lmcache_is_one_warning_however_often_it_is_given() {
    let connector =
        json!({"gds_path": "/kv", "lmcache.remote_url": "lm://a", "lmcache.mp.port": 1});
    let resolved = resolve(&ConfigSources {
        connector: Some(&connector),
        environment: variables(&[
            ("LMCACHE_REMOTE_URL", "lm://user:password@b"),
            ("LMCACHE_LOG_LEVEL", "INFO"),
            ("LMCACHE_EC_CHUNK_SIZE", "1"),
        ]),
        file: Some((
            "a.yaml".into(),
            "remote_url: c\nec: {chunk_size: 1}\nextra_config: {redis_url: r, dax.x: 1}".to_owned(),
        )),
    });
    let why = "has no effect: it is a setting of LMCache that kvrail does not implement";
    let place = "`kv_connector_extra_config`, key";
    assert_eq!(
        resolved.unwrap().warnings,
        [
            format!("`mp.port` {why} (set by {place} `lmcache.mp.port`)"),
            format!("`remote_url` {why} (set by {place} `lmcache.remote_url`)"),
            format!("`log_level` {why} (set by environment variable `LMCACHE_LOG_LEVEL`)"),
            format!("`ec_chunk_size` {why} (set by environment variable `LMCACHE_EC_CHUNK_SIZE`)"),
            format!("`ec` {why} (set by `a.yaml`, key `ec`)"),
            format!("`extra_config.dax.x` {why} (set by `a.yaml`, key `extra_config.dax.x`)"),
            format!(
                "`extra_config.redis_url` {why} (set by `a.yaml`, key `extra_config.redis_url`)"
            ),
        ]
    );
}

#[test]
fn names_of_the_environment_warn_elsewhere_and_are_silent_there() {
    let resolved = from_file("gds_path: /kv\nuse_experimental: true\n").unwrap();
    assert_eq!(
        resolved.warnings,
        [
            "`use_experimental` has no effect here: it is read from the environment only \
          (set by `/etc/gds.yaml`, key `use_experimental`)"
        ]
    );
    let resolved = from_environment(&[
        ("LMCACHE_GDS_PATH", "/kv"),
        ("LMCACHE_USE_EXPERIMENTAL", "True"),
        ("LMCACHE_CONFIG_FILE", "a.yaml"),
        ("KVRAIL_CONFIG_FILE", "a.yaml"),
        ("KVRAIL_TAKEOVER", "1"),
        ("KVRAIL_CUFILE_LIBRARY", "/opt/cuda/lib/libcufile.so.0"),
        ("KVRAIL_CUDA_LIBRARY", "libcuda.so.1"),
        ("HOME", "/home/a"),
        ("XLMCACHE_CHUNK", "1"),
        // Kubernetes sets these where a service is named `lmcache-server` or `kvrail`.
        ("LMCACHE_SERVER_SERVICE_HOST", "10.0.0.1"),
        ("LMCACHE_SERVER_SERVICE_PORT_HTTP", "80"),
        ("LMCACHE_SERVER_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("KVRAIL_SERVICE_PORT", "80"),
        ("KVRAIL_PORT", "tcp://10.0.0.1:80"),
        ("KVRAIL_PORT_80_TCP", "tcp://10.0.0.1:80"),
    ]);
    assert_eq!(resolved.unwrap().warnings, Vec::<String>::new());
}

#[test]
fn two_names_with_one_value_are_no_conflict() {
    let text = "gds_path: /kv\ncufile_buffer_size: 64\ngds_buffer_size: '64'\n";
    assert_eq!(from_file(text).unwrap().store.buffer_mib, 64);
    let ranks = from_environment(&[
        ("LMCACHE_GDS_PATH", "/kv"),
        ("LMCACHE_CUFILE_BUFFER_SIZE", "64"),
        ("KVRAIL_GDS_BUFFER_SIZE", "32"),
    ]);
    assert_eq!(
        ranks.unwrap().store.buffer_mib,
        32,
        "two sources do not conflict, one overrides"
    );
}

#[test]
fn lmcache_names_and_own_names_do_not_overlap() {
    let entries = ConfigSources {
        connector: Some(&json!({"a": 1, "extra_config": {"a": 1}})),
        environment: variables(&[("LMCACHE_A", "1")]),
        file: Some(("a.yaml".into(), "a: 1".to_owned())),
    };
    for entry in entries.entries().unwrap() {
        let mut names: Vec<&str> = super::lmcache::names(&entry).collect();
        assert!(names.len() > 90, "{names:?}");
        for name in &names {
            let own = if entry.nested {
                super::key::find_nested
            } else {
                super::key::find
            };
            assert!(own(name).is_none(), "{name}");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert!(
            count - names.len() <= 1,
            "one name stands in two lists of the connector"
        );
    }
}
