//! The names that LMCache 0.5.6 knows and kvrail does not implement: names only, no meaning.
//!
//! A configuration written for LMCache starts kvrail with one warning for each of these; a name
//! that is in neither project is a misspelling.

use super::source::{Entry, Rank};

/// Keys at the top level of LMCache's YAML file, with its deprecated names.
const TOP_LEVEL: &str = "\
    app_id audit_actual_remote_url blend_check_layers blend_min_tokens blend_recompute_ratios \
    blend_special_str blend_thresholds blocking_timeout_secs cache_policy \
    chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_auto_exit_timeout_hours \
    chunk_statistics_auto_start_statistics chunk_statistics_strategy controller_pull_url \
    controller_reply_url controller_url enable_async_loading enable_blending enable_chunk_statistics \
    enable_controller enable_hidden_state_cache enable_kv_events enable_lazy_memory_allocator \
    enable_p2p enable_pd enable_scheduler_bypass_lookup enable_xpyd external_backends \
    external_lookup_client hidden_state_layers hidden_states_retrieve_mode hit_miss_ratio \
    internal_api_server_enabled internal_api_server_host internal_api_server_include_index_list \
    internal_api_server_port_start internal_api_server_socket_path_prefix \
    lazy_memory_expand_trigger_ratio lazy_memory_initial_ratio lazy_memory_safe_size \
    lazy_memory_step_ratio lmcache_instance_id lmcache_worker_heartbeat_delay_time \
    lmcache_worker_heartbeat_time lmcache_worker_ids lmcache_worker_port lmcache_worker_ports \
    local_cpu_use_hugepages local_disk local_disk_path_sharding lookup_server_worker_ids \
    lookup_timeout_ms maru_path maru_pool_size max_hidden_state_cpu_size max_local_disk_size \
    mp_host mp_port nixl_backends nixl_buffer_device nixl_buffer_size \
    nixl_peer_alloc_port nixl_peer_host nixl_peer_init_port nixl_peer_port nixl_proxy_host \
    nixl_proxy_port nixl_receiver_port nixl_role numa_mode p2p_host p2p_init_ports p2p_lookup_ports \
    pd_allocation_timeout_sec pd_backend_mode pd_bidirectional pd_buffer_device pd_buffer_size \
    pd_condition_poll_interval_sec pd_max_prefill_len pd_peer_alloc_port pd_peer_host \
    pd_peer_init_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_role pd_shutdown_timeout_sec \
    pd_skip_proxy_notification pin_check_interval_sec pin_timeout_sec plugin_locations \
    priority_limit py_enable_gc remote_config_url remote_serde \
    remote_storage_plugins remote_url reserve_local_cpu_size retrieve_locations \
    run_script_api_enabled runtime_plugin_locations save_unfull_chunk script_allowed_imports \
    storage_plugins store_location transfer_channel use_gpu_connector_v3 use_layerwise";

/// Keys of LMCache's `extra_config`.
const NESTED: &str = "\
    allocation_attempt_delay_secs app_profile audit_actual_remote_url audit_backend_enabled \
    audit_calc_checksum audit_exclude_cmds audit_verify_checksum aws_access_key_id \
    aws_secret_access_key azure_account_key azure_account_url azure_connection_string \
    azure_sas_token chunk_statistics_async_preprocess_chunks chunk_statistics_async_queue_capacity \
    chunk_statistics_file_max_count chunk_statistics_file_output_dir \
    chunk_statistics_file_rotation_size chunk_statistics_mem_bf_expected_chunks \
    chunk_statistics_mem_bf_false_positive_rate connection_timeout credentials_path disable_tls \
    enable_cache_usage_details_in_response enable_nixl_storage enable_sparse fallback_policy \
    first_rank_max_local_cpu_size force_store_wait fs_base_path fs_connector_read_ahead_size \
    fs_connector_relative_tmp_dir fs_connector_use_odirect full_sync_batch_interval_ms \
    full_sync_batch_size full_sync_max_poll_attempts full_sync_max_retry_count \
    full_sync_retry_delay_s full_sync_startup_delay_s full_sync_status_poll_interval_s \
    get_blocking_failed_threshold gpu_to_numa_mapping heartbeat_url infinistore_link_type \
    internal_api_server_access_log internal_api_server_log_level kv_msg_batch_size \
    kv_msg_batch_timeout lmcache_rpc_port lookup_backoff_time maru_eager_map maru_instance_id \
    maru_max_inflight maru_timeout_ms maru_use_async_rpc max_alloc_attempts max_retries \
    nixl_async_put nixl_backend nixl_backend_params nixl_enable_prog_thread nixl_endpoint_list \
    nixl_path nixl_path_sharding nixl_pool_size nixl_presence_cache nixl_presence_cache_only \
    nixl_sync_mode nixl_use_hugepages p2p_max_retry_count p2p_socket_recv_timeout_ms \
    p2p_socket_send_timeout_ms password ping_interval ping_timeout redis_url \
    remote_enable_mla_worker_id_as0 request_timeout resp_num_threads s3_enable_s3express \
    s3_num_io_threads s3_prefer_http2 s3_region save_chunk_meta save_only_first_rank shm_name \
    storage_root_dir tls_enable transfer_timeout use_exists_sync use_odirect username \
    valkey_database valkey_enable_ttl valkey_mode valkey_num_workers valkey_password \
    valkey_sync_num_workers valkey_ttl_sec valkey_username waiting_time_for_recovery \
    worker_socket_recv_timeout_ms worker_socket_send_timeout_ms";

/// Beginnings of keys of LMCache's `extra_config` that end in a plugin's or a metric's name.
const NESTED_PREFIXES: &str = "\
    bigtable_ dax. eic_ hf3fs_ histogram_bucket_ local_cpu. mooncake_ remote_storage_plugin. \
    rust_raw_block. sagemaker_hyperpod_ storage_plugin.";

/// Keys that only LMCache's vLLM connector reads, from its own dictionary.
const CONNECTOR: &str = "\
    discard_partial_chunks lmcache_rpc_port max_offload_tokens max_tokens_per_load \
    skip_last_n_tokens";

/// Variables of LMCache that are no key of its file, without `LMCACHE_` and in lower case.
const ENVIRONMENT: &str = "\
    device_backend disable_banner force_skip_save gpu_staging_buffer_bytes log_level \
    mp_transfer_mode mq_timeout musa_handle_transfer musa_native_kv_transfer offload_rpc_port \
    request_telemetry_endpoint request_telemetry_type rocm_enable_batch_memcpy server_url \
    track_usage usage_track_interval usage_track_url";

/// Beginnings of such variables.
const ENVIRONMENT_PREFIXES: &str = "\
    aerospike_ controller_ coordinator_ ec_ plugin_ resp_ runtime_plugin_";

/// Returns whether LMCache knows the entry's name where it stands.
pub(super) fn knows(entry: &Entry) -> bool {
    let name = entry.name.as_str();
    let begins = |prefixes: &str| {
        prefixes
            .split_whitespace()
            .any(|prefix| name.starts_with(prefix))
    };
    if names(entry).any(|known| known == name) {
        return true;
    }
    match entry.origin.rank {
        // What is written as kvrail's own is meant for kvrail.
        Rank::KvrailEnvironment => false,
        _ if entry.nested => begins(NESTED_PREFIXES),
        Rank::LmcacheEnvironment => begins(ENVIRONMENT_PREFIXES),
        Rank::File => name == "ec" || name.starts_with("ec_"),
        Rank::Connector => name.starts_with("mp."),
    }
}

/// Returns LMCache's names that could stand where the entry stands.
pub(super) fn names(entry: &Entry) -> impl Iterator<Item = &'static str> + use<> {
    let lists: [&'static str; 2] = match entry.origin.rank {
        Rank::KvrailEnvironment => ["", ""],
        _ if entry.nested => [NESTED, ""],
        Rank::File => [TOP_LEVEL, ""],
        Rank::Connector => [TOP_LEVEL, CONNECTOR],
        Rank::LmcacheEnvironment => [TOP_LEVEL, ENVIRONMENT],
    };
    lists.into_iter().flat_map(str::split_whitespace)
}
