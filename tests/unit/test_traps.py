"""Which test catches which trap of ../shared/reference/ssl.md, section 5."""

import re

import pytest

from tests.helpers.module_paths import module_path

TRAPS = {
    1: ["shuffle_bn.test_bn_groups_of_keys_differ_from_those_of_queries"],
    2: ["moco.test_keys_come_back_in_the_order_of_their_images"],
    3: [
        "moco.test_keys_are_normalised_with_other_images_than_their_queries",
        "moco_v3.test_every_batch_norm_is_over_all_ranks",
    ],
    4: ["train.test_key_encoder_moves_only_by_its_momentum"],
    5: [
        "train.test_keys_are_embedded_after_exactly_one_moving_average",
        "train.test_two_parts_train_as_the_whole_batch_does",
    ],
    6: ["moco.test_key_batch_norm_statistics_are_its_own"],
    7: ["moco.test_key_parameters_start_equal_and_get_no_gradient"],
    8: ["moco.test_moving_average_is_not_lost_to_low_precision"],
    9: ["moco.test_positives_are_not_among_the_negatives_until_enqueued"],
    10: ["train.test_two_ranks_train_as_one_process_does"],
    11: ["moco.test_queue_wraps_without_dropping_the_tail"],
    12: ["moco.test_queue_wraps_without_dropping_the_tail"],
    13: ["train.test_saved_and_loaded_training_goes_on_bit_for_bit"],
    14: ["info_nce.test_equal_embeddings_cost_v3_four_t_log_n"],
    15: [
        "moco_v3.test_two_ranks_train_as_one_process_does",
        "info_nce.test_v3s_positives_begin_at_the_ranks_first_key",
    ],
    16: [
        "recipes.test_learning_rates_are_the_tables",
        "recipes.test_momentum_of_v3_is_the_tables",
    ],
    17: ["train.test_two_ranks_train_as_one_process_does"],
    18: ["optim.test_five_steps_equal_lars_written_out"],
    19: ["optim.test_weight_decay_is_on_all_parameters_in_one_group"],
    20: [
        "transforms.test_rates_and_ranges_are_those_of_the_config",
        "transforms.test_grey_comes_before_or_after_the_jitter",
    ],
    21: ["transforms.test_blur_is_pillows_to_a_grey_level_and_a_half"],
    22: ["transforms.test_real_images_come_out_about_standardised"],
    23: ["stream_elastic.test_order_and_exactly_once_hold_over_kills_and_changes_of_the_world_size"],
    24: [
        "batches.test_ranks_together_have_the_batches_of_one",
        "batches.test_every_epoch_delivers_its_steps_and_no_image_twice",
    ],
    25: ["batches.test_resuming_gives_the_batches_that_were_left_bit_for_bit"],
    26: [
        "train.test_float16_skips_the_step_of_gradients_that_overflow",
        "train.test_float16_is_saved_with_its_scale",
    ],
    27: ["moco.test_bfloat16_keeps_head_and_logits_in_float32"],
    28: [
        "linear_probe.test_same_seed_gives_the_same_result_and_the_backbone_stays_as_it_is",
        "classifier.test_a_frozen_backbone_stays_bit_for_bit",
    ],
    29: [
        "linear_probe.test_classifier_starts_as_in_the_paper",
        "classifier.test_the_linear_protocol_trains_two_tensors_as_the_official_code",
        "resnet.test_output_equals_torchvisions_for_the_same_weights",
    ],
    30: [
        "features.test_cached_features_are_the_live_ones_bit_for_bit_and_not_computed_again",
        "features.test_other_backbones_images_and_transforms_have_other_features",
    ],
    31: [
        "knn.test_votes_equal_a_slow_loop",
        "knn.test_nearest_neighbour_of_an_image_is_itself",
    ],
    32: ["imports.test_a_missing_tensor_is_named"],
    33: [
        "detector.test_everything_is_trained_and_only_norms_do_not_decay",
        "detector.test_lr_is_two_hundredths_for_16_images_and_steps_are_its_inverse",
        "detection.test_fine_tuning_moves_every_statistic_and_every_parameter",
    ],
    34: [
        "coco.test_ground_truth_as_predictions_scores_one_in_all_metrics",
        "detection.test_ground_truth_as_predictions_scores_one_and_crowds_do_no_harm",
    ],
    35: ["export.test_detectron2_file_has_its_names_and_layout"],
    36: [
        "voc_metric.test_ground_truth_as_predictions_scores_one_in_all_metrics",
        "voc_metric.test_difficult_objects_and_crowds_neither_count_nor_hurt",
    ],
    37: ["train.test_a_constant_encoder_raises_the_alarm_after_the_first_epoch"],
    38: ["advice.test_a_queue_longer_than_a_quarter_of_the_data_is_doubted"],
}
"""By number: module and test."""


def test_every_trap_is_here() -> None:
    assert TRAPS.keys() == set(range(1, 39))


@pytest.mark.parametrize("number", TRAPS)
def test_the_trap_has_its_tests(number: int) -> None:
    for name in TRAPS[number]:
        module, test = name.split(".")
        assert re.search(rf"^def {test}\(", module_path(module).read_text(), re.MULTILINE), name
