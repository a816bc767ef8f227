"""Which test injects which fault of ../shared/reference/infra.md, section 4, and looks at what is required then."""

import re

import pytest

from tests.helpers.module_paths import module_path

FAULTS = {
    1: [  # worker killed
        "broken_runs.test_killed_worker_resumes_and_repeats_the_losses_of_the_unbroken_run",
        "broken_runs.test_final_weights_of_a_run_broken_twice_are_those_of_the_unbroken_one_bit_for_bit",
    ],
    2: [  # preempted by SIGTERM
        "broken_runs.test_kill_costs_at_most_the_steps_since_a_checkpoint_and_sigterm_none",
        "fan_out.test_training_process_that_is_told_to_go_away_says_so_at_the_next_step",
        "night.test_preemption_costs_no_step",
    ],
    3: [  # node lost
        "night.test_every_fault_was_survived_without_a_hand",
        "night.test_run_shrank_to_one_host_and_grew_again",
        "night.test_no_fault_cost_more_than_the_steps_since_the_last_checkpoint",
    ],
    4: [  # network partition
        "night.test_every_fault_was_survived_without_a_hand",
        "night.test_global_batches_of_all_attempts_are_those_of_an_unbroken_run",
        "checkpoint.test_a_stale_attempt_leaves_later_attempts_alone",
    ],
    5: ["night.test_link_that_loses_packets_for_a_second_at_a_time_costs_no_restart"],
    6: [  # head lost
        "night.test_lost_head_is_named_with_what_to_do",
        "night.test_every_fault_was_survived_without_a_hand",
        "submit_jobs.test_a_head_that_has_gone_is_one_clear_error",
    ],
    7: [  # driver killed
        "night.test_every_fault_was_survived_without_a_hand",
        "night.test_mlflow_has_one_run_of_each_kind_and_no_orphan",
    ],
    8: [  # S3 answers 503
        "fetch.test_a_burst_of_refusals_costs_only_retries",
        "fetch.test_waits_grow_to_a_bound",
        "stream_faults.test_faults_on_the_way_change_no_batch",
    ],
    9: [  # connection reset in mid body
        "fetch.test_after_a_reset_it_goes_on_at_the_byte_where_it_broke",
        "stream_faults.test_faults_on_the_way_change_no_batch",
    ],
    10: [  # truncated, also between two members of a tar
        "fetch.test_after_a_truncation_it_goes_on_at_the_byte_where_it_broke",
        "fetch.test_a_replaced_or_cut_shard_is_never_taken",
        "tar_samples.test_no_cut_anywhere_gives_a_shorter_list",
    ],
    11: [  # S3 sends nothing
        "fetch.test_after_a_stall_it_asks_again_for_the_rest",
        "fetch.test_a_stall_longer_than_the_budget_ends_with_it",
    ],
    12: [  # S3 down for longer than it is waited for
        "stream_faults.test_a_storage_that_stays_away_ends_the_run_in_one_line",
        "storage_stops.test_storage_that_stops_while_a_checkpoint_is_due_ends_the_run_in_one_line_and_nothing_is_lost",
        "storage_stops.test_a_storage_that_stops_in_mid_run_ends_the_command_in_one_line_and_the_same_words_go_on",
    ],
    13: [  # corrupt shard
        "reader.test_flipped_bytes_cost_their_samples_and_no_others",
        "batches.test_bad_samples_are_replaced_by_the_next_good_one_and_listed",
        "batches.test_too_many_bad_samples_are_an_error_in_one_line",
    ],
    14: [  # shard replaced in mid run
        "stream_faults.test_a_shard_that_changes_in_mid_run_is_named",
        "fetch.test_a_replaced_or_cut_shard_is_never_taken",
    ],
    15: [  # shard deleted, empty, keys twice
        "fetch.test_a_missing_shard_is_named",
        "stream_faults.test_a_shard_that_changes_in_mid_run_is_named",
        "stream_faults.test_empty_shards_are_passed_over",
        "tar_samples.test_of_members_of_one_name_the_first_counts_and_the_others_are_named",
    ],
    16: [  # checkpoint half written
        "storage_stops.test_a_process_killed_in_the_upload_of_a_checkpoint_leaves_the_one_before_as_the_newest",
        "checkpoint.test_interrupted_writes_are_no_checkpoints",
        "checkpoint.test_pruning_does_not_count_interrupted_writes",
    ],
    17: [  # newest checkpoint corrupt
        "checkpoint.test_damaged_checkpoints_are_skipped_with_a_warning",
        "checkpoint.test_lost_and_cut_states_do_not_verify",
        "two_s3_servers.test_the_newest_sound_checkpoint_is_resumed_and_older_ones_go",
    ],
    18: [  # all of them corrupt
        "checkpoint.test_refuses_to_restart_from_zero_when_all_are_damaged",
        "two_s3_servers.test_a_run_does_not_start_anew_where_all_checkpoints_are_damaged",
    ],
    19: [  # cache disk full
        "shard_cache.test_a_full_disk_is_no_obstacle",
        "shard_cache.test_a_file_that_cannot_grow_is_no_obstacle",
        "shard_cache.test_the_least_recently_used_goes_first_and_what_is_open_stays_readable",
        "features.test_features_beyond_the_bound_are_not_kept",
    ],
    20: [  # /dev/shm full
        "host_faults.test_a_dev_shm_too_small_for_buffers_is_named_with_what_is_needed_and_what_to_set",
        "host_faults.test_a_dev_shm_without_room_for_a_lock_is_named",
        "preflight_command.test_shared_memory_is_compared_with_that_of_one_process_and_of_all",
    ],
    21: [  # MLflow down at the start, in mid run
        "cli.test_unreachable_mlflow_is_one_line_within_seconds",
        "mlflow_faults.test_a_server_killed_in_mid_run_has_every_point_once_after_its_restart",
        "mlflow_faults.test_what_an_attempt_kept_before_it_was_killed_is_delivered_by_the_next",
        "metric_queue.test_what_cannot_be_delivered_at_the_end_is_kept_and_the_command_named",
    ],
    22: ["mlflow_faults.test_training_logs_keeps_and_goes_on_while_a_slow_server_has_answered_nothing"],
    23: [  # clock skew
        "two_s3_servers.test_a_clock_that_is_off_is_named",
        "preflight_command.test_the_clock_is_read_off_the_s3_server",
    ],
    24: [  # NaN
        "train.test_non_finite_loss_stops_before_the_parameters_change",
        "host_faults.test_gradients_that_are_not_finite_stop_before_weights_that_no_checkpoint_may_hold",
        "train.test_float16_skips_the_step_of_gradients_that_overflow",
        "pipeline.test_a_loss_that_is_not_finite_names_the_last_good_checkpoint",
        "classifier.test_a_loss_that_is_not_finite_stops_before_the_step",
        "detection.test_a_loss_that_is_not_finite_on_one_rank_stops_all",
    ],
    25: [  # host out of memory
        "host_faults.test_memory_that_runs_out_names_step_size_and_checkpoint_and_the_run_goes_on",
        "host_faults.test_memory_that_runs_out_in_the_reading_names_what_was_read",
        "host_faults.test_a_loader_process_that_the_kernel_kills_is_named",
        "host_faults.test_a_unit_that_lost_a_loader_process_is_tried_again",
        "fan_out.test_unit_that_is_killed_each_time_is_given_up_with_its_reason",
        "broken_runs.test_killed_worker_resumes_and_repeats_the_losses_of_the_unbroken_run",
    ],
    26: [  # submitted twice
        "fan_out.test_second_driver_of_a_run_is_refused_while_the_first_is_at_it",
        "submit_jobs.test_the_same_words_join_and_ctrl_c_leaves_the_job_running",
        "submit_jobs.test_other_words_under_a_running_name_are_refused",
    ],
    27: [  # misspelt setting
        "cli.test_misspelt_flag_gets_a_suggestion",
        "cli.test_unknown_recipe_is_wrong_usage_with_a_suggestion",
        "cli.test_setting_out_of_range_is_wrong_usage",
        "submit.test_a_misspelt_flag_never_leaves_this_machine",
    ],
    28: [  # wrong bucket, no keys, no rights
        "two_s3_servers.test_a_missing_bucket_is_named",
        "two_s3_servers.test_a_wrong_key_and_a_wrong_secret_are_told_apart",
        "two_s3_servers.test_who_may_only_read_reads_and_is_told_the_right_to_write",
        "storage.test_missing_keys_say_which_variables_to_set",
        "preflight_command.test_faults_of_the_access_are_told_apart",
    ],
    29: [  # another world size on resume
        "broken_runs.test_run_that_lost_a_core_goes_on_with_one_worker_on_the_same_global_batches",
        "stream_elastic.test_order_and_exactly_once_hold_over_kills_and_changes_of_the_world_size",
        "night.test_global_batches_of_all_attempts_are_those_of_an_unbroken_run",
        "checkpoint.test_resources_and_loader_workers_may_change",
    ],
    30: [  # checkpoint of other settings
        "checkpoint.test_another_config_is_refused_with_the_difference",
        "checkpoint.test_other_data_are_refused",
        "pipeline.test_other_settings_under_an_old_name_are_refused_with_the_difference",
    ],
    31: [  # bombs, truncated images, none at all
        "decode.test_bombs_and_fuzzed_files_are_refused_within_little_memory",
        "decode.test_a_file_cut_off_anywhere_is_refused",
        "batches.test_bad_samples_are_replaced_by_the_next_good_one_and_listed",
    ],
    32: [  # names that lead out of a tar, links
        "tar_samples.test_links_and_devices_are_named_and_not_read",
        "tar_samples.test_stock_webdataset_finds_the_same_keys_and_images",
        "sources.test_names_that_lead_out_of_an_archive_are_refused",
    ],
    33: [  # pickles
        "tar_samples.test_pickles_are_never_loaded",
        "checkpoint.test_code_in_a_checkpoint_is_not_run",
        "checkpoint.test_files_of_other_kinds_are_refused",
    ],
    34: [  # pipe: URLs
        "stream_faults.test_urls_that_are_no_storage_are_refused",
        "tar_list.test_commands_are_no_sources",
    ],
    35: [  # one transfer fails
        "pipeline.test_one_failing_transfer_leaves_the_others_alone_and_is_tried_again",
        "fan_out.test_failing_unit_leaves_the_others_alone_and_is_not_tried_again",
        "fan_out.test_unit_is_tried_again_after_what_may_pass",
    ],
    36: [  # floods, and folders that cannot be written
        "host_faults.test_training_does_without_a_home",
        "host_faults.test_a_second_driver_is_refused_by_ray_alone_where_there_is_no_home",
        "host_faults.test_training_goes_on_where_its_log_cannot_be_written",
        "host_faults.test_a_flood_of_bad_samples_is_a_few_lines_of_log_and_a_list_of_bounded_length",
        "metric_queue.test_a_long_outage_moves_the_older_points_out_of_memory",
        "metric_queue.test_trouble_with_the_storage_is_warned_of_once_and_not_raised",
        "features.test_folder_that_cannot_be_made_is_no_error",
    ],
}
"""By number of the row: module and test."""


def test_every_fault_is_here() -> None:
    assert FAULTS.keys() == set(range(1, 37))


@pytest.mark.parametrize("number", FAULTS)
def test_the_fault_has_its_tests(number: int) -> None:
    assert FAULTS[number]
    for name in FAULTS[number]:
        module, test = name.split(".")
        assert re.search(rf"^ *def {test}\(", module_path(module).read_text(), re.MULTILINE), name
