//! Every bad input and the exact message that the user sees.

use serde_json::{Value, json};

use super::*;

#[test]
fn a_wrong_value_names_key_value_expectation_and_place() {
    let whole = "expected a whole number";
    let switch = "expected true or false (also 1, 0, yes, no, on, off)";
    let absolute = "expected an absolute path, one that starts with `/`";
    let size = "expected a size above 0 like \"500GB\" or \"512MiB\", a number of bytes, or \
                \"unlimited\"";
    let mode = "expected \"0600\", \"0640\", \"0660\", \"0644\" or \"0664\": files that their owner can \
                read and write, others no more than the group, and nobody else can write";
    let free = "expected a share below 1 like \"5%\" or 0.05, a size like \"50GB\", or a number of \
                bytes";
    let watermark = "expected a share from 0.5 to 0.99 like \"90%\" or 0.9";
    let age = "expected an age of 60 seconds or more like \"7d\", \"12h\" or \"30min\", a number of \
               seconds, or \"unlimited\"";
    let cases: Vec<(&str, Value, String)> = vec![
        (
            "chunk_size",
            json!("abc"),
            format!("\"abc\": {whole}, 1 or more (tokens)"),
        ),
        (
            "chunk_size",
            json!(0),
            format!("0: {whole}, 1 or more (tokens)"),
        ),
        (
            "chunk_size",
            json!(-256),
            format!("-256: {whole}, 1 or more (tokens)"),
        ),
        (
            "chunk_size",
            json!(25.6),
            format!("25.6: {whole}, 1 or more (tokens)"),
        ),
        (
            "chunk_size",
            json!(true),
            format!("true: {whole}, 1 or more (tokens)"),
        ),
        (
            "chunk_size",
            json!([256]),
            format!("[256]: {whole}, 1 or more (tokens)"),
        ),
        (
            "cufile_buffer_size",
            json!(0),
            format!("0: {whole} from 1 to 1048576 (MiB)"),
        ),
        (
            "gds_buffer_size",
            json!("8GiB"),
            format!("\"8GiB\": {whole} from 1 to 1048576 (MiB)"),
        ),
        ("cufile_buffer_size", json!(1_048_577), {
            format!("1048577: {whole} from 1 to 1048576 (MiB)")
        }),
        ("local_cpu", json!("maybe"), format!("\"maybe\": {switch}")),
        ("local_cpu", json!(2), format!("2: {switch}")),
        ("min_load_tokens", json!("some"), {
            format!(
                "\"some\": expected auto, or{} from 0 to 1000000000 (tokens)",
                &whole[8..]
            )
        }),
        ("use_gds", json!([true]), format!("[true]: {switch}")),
        (
            "save_decode_cache",
            json!({"a": 1}),
            format!("{{\"a\":1}}: {switch}"),
        ),
        ("max_local_cpu_size", json!(-1), {
            "-1: expected a number from 0 to 1000000 (GB)".to_owned()
        }),
        ("max_local_cpu_size", json!("NaN"), {
            "\"NaN\": expected a number from 0 to 1000000 (GB)".to_owned()
        }),
        ("gds_backend", json!("hipfile"), {
            "\"hipfile\": expected cufile or posix".to_owned()
        }),
        (
            "gds_path_sharding",
            json!(1),
            "1: expected by_hash or by_gpu".to_owned(),
        ),
        (
            "durability",
            json!("fsync"),
            "\"fsync\": expected none or full".to_owned(),
        ),
        ("file_mode", json!("0666"), format!("\"0666\": {mode}")),
        ("file_mode", json!("0606"), format!("\"0606\": {mode}")),
        ("file_mode", json!("rw-"), format!("\"rw-\": {mode}")),
        ("file_mode", json!(777), format!("777: {mode}")),
        ("file_mode", json!(0.64), format!("0.64: {mode}")),
        ("max_size", json!(0), format!("0: {size}")),
        ("max_size", json!("500G"), format!("\"500G\": {size}")),
        ("max_size", json!("-1GB"), format!("\"-1GB\": {size}")),
        (
            "max_size",
            json!("99999999PiB"),
            format!("\"99999999PiB\": {size}"),
        ),
        ("max_size", json!("GB"), format!("\"GB\": {size}")),
        ("low_watermark", json!(0.3), format!("0.3: {watermark}")),
        (
            "low_watermark",
            json!("100%"),
            format!("\"100%\": {watermark}"),
        ),
        ("ttl", json!("7 days"), format!("\"7 days\": {age}")),
        ("ttl", json!(59), format!("59: {age}")),
        ("ttl", json!("-1h"), format!("\"-1h\": {age}")),
        (
            "eviction_policy",
            json!("fifo"),
            "\"fifo\": expected lru or reuse".to_owned(),
        ),
        (
            "admission",
            json!(true),
            "true: expected all or second_use".to_owned(),
        ),
        ("min_free", json!("100%"), format!("\"100%\": {free}")),
        ("min_free", json!(1.0), format!("1.0: {free}")),
        ("min_free", json!("-5%"), format!("\"-5%\": {free}")),
        ("min_free", json!(-1), format!("-1: {free}")),
        ("min_free", json!("inf%"), format!("\"inf%\": {free}")),
        ("gds_path", json!("kv"), format!("\"kv\": {absolute}")),
        (
            "gds_path",
            json!("~/kv"),
            format!("\"~/kv\": {absolute}; `~` is not expanded"),
        ),
        (
            "gds_path",
            json!("/a,b"),
            format!("\"/a,b\": {absolute}, got `b`"),
        ),
        ("gds_path", json!(["/a", "/a/"]), {
            "[\"/a\",\"/a/\"]: expected each directory only once, got `/a/`".to_owned()
        }),
        ("gds_path", json!(7), {
            "7: expected an absolute directory, several separated by commas, or a list of them"
                .to_owned()
        }),
        ("gds_path", json!("/a\u{0}"), {
            "\"/a\\u0000\": expected a path without a zero byte".to_owned()
        }),
        (
            "use_cufile",
            json!("no way"),
            format!("\"no way\": {switch}"),
        ),
        (
            "use_direct_io",
            json!(3),
            "3: expected auto, true or false".to_owned(),
        ),
        (
            "path_weights",
            json!([1, -3]),
            "[1,-3]: expected measured, equal, or a number from 0.001 to 1000000 for each path of \
             gds_path"
                .to_owned(),
        ),
        (
            "path_weights",
            json!("fast, slow"),
            "\"fast, slow\": expected measured, equal, or a number from 0.001 to 1000000 for each \
             path of gds_path"
                .to_owned(),
        ),
        (
            "local_cpu_shared",
            json!("shm/kv"),
            "\"shm/kv\": expected an absolute path, one that starts with `/`".to_owned(),
        ),
        (
            "local_cpu_shared",
            json!(true),
            "true: expected an absolute directory".to_owned(),
        ),
        (
            "page_cache",
            json!("off"),
            "\"off\": expected auto or keep or bypass".to_owned(),
        ),
        (
            "io_engine",
            json!("io_uring"),
            "\"io_uring\": expected auto or posix or uring".to_owned(),
        ),
        (
            "disk_io_threads",
            json!(257),
            format!("257: {whole} from 1 to 256 (threads)"),
        ),
        (
            "load_failure_policy",
            json!("retry"),
            "\"retry\": expected recompute or fail".to_owned(),
        ),
        ("wait_limit_seconds", json!(0.05), {
            "0.05: expected a number from 0.1 to 3600 (seconds)".to_owned()
        }),
    ];
    for (key, value, expected) in cases {
        let error = from_connector(&json!({"gds_path": "/kv", key: value})).unwrap_err();
        let place = format!("(set by `kv_connector_extra_config`, key `{key}`)");
        assert_eq!(message(&error), format!("`{key}` = {expected} {place}"));
    }
}

#[test]
fn each_source_is_named_in_its_own_way() {
    let wrong = "expected true or false (also 1, 0, yes, no, on, off)";
    let by = |pairs: &[(&str, &str)]| message(&from_environment(pairs).unwrap_err());
    assert_eq!(
        by(&[("LMCACHE_LOCAL_CPU", "'maybe'")]),
        format!(
            "`local_cpu` = \"maybe\": {wrong} (set by environment variable `LMCACHE_LOCAL_CPU`)"
        )
    );
    assert_eq!(
        by(&[("KVRAIL_EXTRA_CONFIG", r#"{"use_cufile": 5}"#)]),
        format!(
            "`extra_config.use_cufile` = 5: {wrong} \
             (set by environment variable `KVRAIL_EXTRA_CONFIG`, key `use_cufile`)"
        )
    );
    assert_eq!(
        message(&from_file("extra_config: {use_cufile: .inf}").unwrap_err()),
        format!(
            "`extra_config.use_cufile` = \".inf\": {wrong} \
             (set by `/etc/gds.yaml`, key `extra_config.use_cufile`)"
        )
    );
    assert_eq!(
        message(&from_connector(&json!({"lmcache.extra_config": {"use_cufile": 5}})).unwrap_err()),
        format!(
            "`extra_config.use_cufile` = 5: {wrong} \
             (set by `kv_connector_extra_config`, key `lmcache.extra_config.use_cufile`)"
        )
    );
    assert_eq!(
        by(&[("KVRAIL_TAKEOVER", "please")]),
        format!("`takeover` = \"please\": {wrong} (set by environment variable `KVRAIL_TAKEOVER`)")
    );
}

#[test]
fn a_wrong_value_is_found_also_where_a_higher_source_hides_it() {
    let error = resolve(&ConfigSources {
        connector: Some(&json!({"gds_path": "/kv", "chunk_size": 16})),
        environment: Vec::new(),
        file: Some(("a.yaml".into(), "chunk_size: many".to_owned())),
    });
    assert_eq!(
        message(&error.unwrap_err()),
        "`chunk_size` = \"many\": expected a whole number, 1 or more (tokens) \
         (set by `a.yaml`, key `chunk_size`)"
    );
}

#[test]
fn weights_go_with_the_directories() {
    let text =
        |weights: &str| format!("gds_path: /a,/b\nextra_config: {{path_weights: {weights}}}");
    for (weights, expected) in [
        ("[1, 2.5]", PathWeights::Listed(vec![1.0, 2.5])),
        ("\"1, 2.5\"", PathWeights::Listed(vec![1.0, 2.5])),
        ("Equal", PathWeights::Equal),
        ("measured", PathWeights::Measured),
    ] {
        let store = from_file(&text(weights)).unwrap().store;
        assert_eq!(store.path_weights, expected);
        assert!(store.validate().is_ok());
    }
    assert_eq!(
        message(&from_file(&text("[1, 2, 3]")).unwrap_err()),
        "`extra_config.path_weights` = [1,2,3]: expected as many numbers as gds_path has \
         directories (2) (set by `/etc/gds.yaml`, key `extra_config.path_weights`)"
    );
}

#[test]
fn a_missing_path_says_where_to_set_it() {
    assert_eq!(
        message(&from_file("chunk_size: 256").unwrap_err()),
        "`gds_path` = nothing: expected an absolute directory, or several separated by commas (in \
         environment variable `LMCACHE_GDS_PATH`, in the file that `LMCACHE_CONFIG_FILE` names, or \
         in `kv_connector_extra_config`)"
    );
}

#[test]
fn a_file_that_is_no_mapping_names_path_and_line() {
    for (text, expected) in [
        (
            "- a\n- b\n",
            "line 1: expected a mapping of keys to values, got a list",
        ),
        (
            "gds_path",
            "line 1: expected a mapping of keys to values, got text",
        ),
        (
            "chunk_size: 1\nchunk_size: 2\n",
            "line 2, column 1: duplicate mapping key `chunk_size` is not allowed here",
        ),
        (
            "chunk_size: 256\ngds_path: [/a\n",
            "line 2, column 11: unclosed bracket '['",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "line 3, column 1: only single YAML document expected but multiple found",
        ),
        (
            "a: {b: c\n\t- d",
            "line 1, column 8: while scanning a plain scalar, found a tab",
        ),
    ] {
        let error = from_file(text).unwrap_err();
        let shown = message(&error);
        let expected = format!("read the configuration file: {expected}: `/etc/gds.yaml`");
        assert_eq!(shown, expected);
        assert_eq!(error.path(), Some(Path::new("/etc/gds.yaml")));
    }
    for empty in ["", "# nothing\n", "---\n"] {
        assert!(
            from_file(empty)
                .unwrap_err()
                .to_string()
                .starts_with("`gds_path` = nothing")
        );
    }
}

#[test]
fn an_extra_config_that_is_no_mapping_is_refused() {
    let expected = "expected a mapping, or a JSON object as text like {\"use_cufile\": false}";
    let place = "(set by environment variable `LMCACHE_EXTRA_CONFIG`)";
    let by = |text| message(&from_environment(&[("LMCACHE_EXTRA_CONFIG", text)]).unwrap_err());
    assert_eq!(
        by("[1]"),
        format!("`extra_config` = \"[1]\": {expected}, got a list {place}")
    );
    assert_eq!(
        by("{use_cufile: false}"),
        format!(
            "`extra_config` = \"{{use_cufile: false}}\": {expected}; \
             key must be a string at line 1 column 2 {place}"
        )
    );
    assert_eq!(
        message(&from_connector(&json!([1])).unwrap_err()),
        "`kv_connector_extra_config` = [1]: expected a JSON object"
    );
    assert_eq!(
        message(&from_file("extra_config: 5").unwrap_err()),
        format!(
            "`extra_config` = 5: {expected}, got a number (set by `/etc/gds.yaml`, key `extra_config`)"
        )
    );
}

#[test]
fn an_error_shows_no_secret_and_no_page_of_text() {
    for name in [
        "azure_acount_key",
        "valkey_passwort",
        "hf_tocken_token",
        "redis_urls_url",
    ] {
        let text = message(&from_file(&format!("{name}: hunter2")).unwrap_err());
        assert!(
            text.starts_with(&format!("`{name}` = (hidden): expected a known key")),
            "{text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
    }
    let text = r#"{"valkey_password": "hunter2",}"#;
    let text = message(&from_environment(&[("LMCACHE_EXTRA_CONFIG", text)]).unwrap_err());
    assert!(
        text.starts_with("`extra_config` = (hidden): expected a mapping"),
        "{text}"
    );
    let long = "é".repeat(5000);
    let text = message(&from_environment(&[("KVRAIL_CHUNK_SIZE", &long)]).unwrap_err());
    assert!(text.len() < 400 && text.contains("é..."), "{text}");
}

#[test]
fn a_configuration_made_by_hand_is_checked_too() {
    let checked = |change: fn(&mut StoreConfig)| {
        let mut config = StoreConfig::with_path("/kv");
        change(&mut config);
        message(&config.validate().unwrap_err())
    };
    assert_eq!(
        checked(|config| config.chunk_size = 0),
        "`chunk_size` = 0: expected a whole number, 1 or more"
    );
    assert_eq!(
        checked(|config| config.buffer_mib = 1 << 21),
        "`cufile_buffer_size` = 2097152: expected a whole number from 1 to 1048576"
    );
    assert_eq!(
        checked(|config| config.disk_io_threads = 0),
        "`extra_config.disk_io_threads` = 0: expected a whole number from 1 to 256"
    );
    assert_eq!(
        checked(|config| config.local_cpu_shared = Some("shm".into())),
        "`extra_config.local_cpu_shared` = `shm`: expected an absolute path, one that starts with `/`"
    );
    assert_eq!(
        checked(|config| config.max_local_cpu_size_gb = f64::NAN),
        "`max_local_cpu_size` = NaN: expected a number from 0 to 1000000"
    );
    assert_eq!(
        checked(|config| config.wait_limit_seconds = f64::INFINITY),
        "`extra_config.wait_limit_seconds` = inf: expected a number from 0.1 to 3600"
    );
    assert_eq!(
        checked(|config| config.low_watermark = 0.1),
        "`low_watermark` = 0.1: expected a number from 0.5 to 0.99"
    );
    assert_eq!(
        checked(|config| config.ttl_seconds = Some(1.0)),
        "`ttl` = 1: expected a number from 60 to 3200000000"
    );
    assert_eq!(
        checked(|config| config.max_size = Some(0)),
        "`max_size` = 0: expected 1 byte or more"
    );
    assert_eq!(
        checked(|config| config.min_free = MinFree::Share(1.0)),
        "`min_free` = 1: expected a share of 0 or more and below 1"
    );
    assert_eq!(
        checked(|config| config.gds_path.clear()),
        "`gds_path` = nothing: expected an absolute directory, or several separated by commas"
    );
    assert_eq!(
        checked(|config| config.gds_path = vec!["kv".into()]),
        "`gds_path` = `kv`: expected an absolute path, one that starts with `/`"
    );
}
