//! Names that cannot be right: what the error says, and which one was meant.

use serde_json::json;

use super::*;

#[test]
fn a_misspelt_key_gets_the_nearest_known_one() {
    let by_file = |text: &str| message(&from_file(text).unwrap_err());
    assert_eq!(
        by_file("chunk_sise: 256"),
        "`chunk_sise` = 256: expected a known key, the nearest is `chunk_size` \
         (set by `/etc/gds.yaml`, key `chunk_sise`)"
    );
    assert_eq!(
        by_file("Chunk_Size: 256"),
        "`Chunk_Size` = 256: expected a known key, the nearest is `chunk_size` \
         (set by `/etc/gds.yaml`, key `Chunk_Size`)"
    );
    assert_eq!(
        by_file("local_dsk: /a"),
        "`local_dsk` = \"/a\": expected a known key, the nearest is `local_disk` \
         (set by `/etc/gds.yaml`, key `local_dsk`)"
    );
    assert_eq!(
        by_file("extra_config: {use_cufiel: false}"),
        "`extra_config.use_cufiel` = false: expected a known key, the nearest is \
         `extra_config.use_cufile` (set by `/etc/gds.yaml`, key `extra_config.use_cufiel`)"
    );
    assert_eq!(
        by_file("extra_config: {chunk_size: 256}"),
        "`extra_config.chunk_size` = 256: expected `chunk_size` outside of `extra_config` \
         (set by `/etc/gds.yaml`, key `extra_config.chunk_size`)"
    );
    assert_eq!(
        message(&from_connector(&json!({"lmcache.gds_paths": "/kv"})).unwrap_err()),
        "`gds_paths` = \"/kv\": expected a known key, the nearest is `gds_path` \
         (set by `kv_connector_extra_config`, key `lmcache.gds_paths`)"
    );
    for (variable, nearest) in [
        ("KVRAIL_CHUNKSIZE", "KVRAIL_CHUNK_SIZE"),
        ("LMCACHE_CHUNKSIZE", "LMCACHE_CHUNK_SIZE"),
        ("LMCACHE_CONFIGFILE", "LMCACHE_CONFIG_FILE"),
        ("LMCACHE_LOGLEVEL", "LMCACHE_LOG_LEVEL"),
        ("LMCACHE_TAKEOVER", "KVRAIL_TAKEOVER"),
        ("KVRAIL_TAKE_OVER", "KVRAIL_TAKEOVER"),
    ] {
        let text = message(&from_environment(&[(variable, "1")]).unwrap_err());
        let end = format!(
            "= \"1\": expected a known key, the nearest is `{nearest}` \
             (set by environment variable `{variable}`)"
        );
        assert!(text.ends_with(&end), "{text}");
    }
}

#[test]
fn a_variable_in_lower_case_is_told_its_name() {
    assert_eq!(
        message(&from_environment(&[("LMCACHE_chunk_size", "1")]).unwrap_err()),
        "`chunk_size` = \"1\": expected the name in upper case, `LMCACHE_CHUNK_SIZE` \
         (set by environment variable `LMCACHE_chunk_size`)"
    );
}

#[test]
fn a_key_like_no_other_gets_the_list() {
    assert_eq!(
        message(&from_file("extra_config: {zzz: 1}").unwrap_err()),
        "`extra_config.zzz` = 1: expected a known key, one of extra_config.use_cufile, \
         extra_config.cufile_compat_mode, extra_config.direct, extra_config.use_direct_io, \
         extra_config.local_cpu_shared, extra_config.path_weights, extra_config.page_cache, extra_config.io_engine, \
         extra_config.disk_io_threads, extra_config.load_failure_policy, \
         extra_config.wait_limit_seconds, extra_config.lookup_limit_seconds, \
         extra_config.lookup_hold_seconds, extra_config.slow_limit_seconds \
         (set by `/etc/gds.yaml`, key `extra_config.zzz`)"
    );
    // What is written as kvrail's own is not excused by LMCache's list.
    let text = message(&from_environment(&[("KVRAIL_PD_ROLE", "sender")]).unwrap_err());
    assert!(text.starts_with("`pd_role` = \"sender\": expected a known key, one of KVRAIL_CH"));
}

#[test]
fn two_names_with_two_values_in_one_source_are_refused() {
    let text = "gds_path: /kv\ncufile_buffer_size: 8192\ngds_buffer_size: 4096\n";
    assert_eq!(
        message(&from_file(text).unwrap_err()),
        "`gds_buffer_size` = 4096: expected the same value as `cufile_buffer_size` = 8192, another \
         name of the same key in the same source (set by `/etc/gds.yaml`, key `gds_buffer_size`)"
    );
    let both = json!({"chunk_size": 16, "lmcache.chunk_size": 32});
    assert_eq!(
        message(&from_connector(&both).unwrap_err()),
        "`chunk_size` = 32: expected the same value as `chunk_size` = 16, another name of the same \
         key in the same source (set by `kv_connector_extra_config`, key `lmcache.chunk_size`)"
    );
}
