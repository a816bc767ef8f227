"""Detection transfer: learning, bit-exact resume, equality over ranks, and the results."""

import dataclasses
import io
import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hemoco.config import DetectionConfig, EncoderConfig, FasterRcnnConfig
from hemoco.distributed import rank, world_size
from hemoco.errors import CheckpointError, ShardError, TrainingError
from hemoco.models.resnet import Backbone, build_encoder
from hemoco.transfer.detection.coco_metric import decode_mask, encode_mask
from hemoco.transfer.detection.data import DetectionSample, detection_batches
from hemoco.transfer.detection.predictions import measure, predict
from hemoco.transfer.detection.training import (
    DetectionState,
    average_batch_norm,
    build_detection_state,
    detection_steps,
    evaluate_detector,
    sorted_category_ids,
    take_step,
)
from hemoco.transfer.result import TransferResult
from tests.helpers.ranks import run_ranks
from tests.helpers.small_detector import SMALL

MASKS = dataclasses.replace(
    SMALL,
    steps=4,
    global_batch_size=2,
    reference_batch_size=2,
    lr=0.02,
    warmup_steps=1,
    log_every_steps=2,
    train_sizes=(48, 64),
    precise_bn_steps=2,
)
SETTINGS: dict[str, Any] = {
    field.name: getattr(MASKS, field.name) for field in dataclasses.fields(MASKS)
}
BOXES = FasterRcnnConfig(**SETTINGS)
CATEGORIES = [{"id": 7, "name": "bright"}, {"id": 3, "name": "dark"}, {"id": 90, "name": "nowhere"}]
CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def backbone() -> Backbone:
    config = EncoderConfig(architecture="resnet10t")
    return Backbone(build_encoder(config, 0), config, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def square(left: int, top: int, side: int, **changes: Any) -> dict[str, Any]:
    mask = np.zeros((64, 64), bool)
    mask[top : top + side, left : left + side] = True
    item = {
        "category_id": 7,
        "bbox": [left, top, side, side],
        "iscrowd": 0,
        "segmentation": encode_mask(mask),
    }
    return item | {"area": side * side} | changes


def sample(image_id: int, annotations: list[dict[str, Any]] | None = None) -> DetectionSample:
    """A bright square on a dark background; its position depends on the image id."""
    left = 14 + 2 * image_id
    buffer, image = io.BytesIO(), Image.new("RGB", (64, 64), (60, 60, 60))
    ImageDraw.Draw(image).rectangle((left, 10, left + 29, 39), (220, 220, 220))
    image.save(buffer, "png")
    return DetectionSample(
        image=buffer.getvalue(),
        annotations=[square(left, 10, 30)] if annotations is None else annotations,
        image_id=image_id,
        shard="s3://b/train-000000.tar",
        key=f"k{image_id}",
        source_id=1000 + image_id,
        height=64,
        width=64,
    )


SAMPLES = [sample(number) for number in range(1, 5)]


def build(config: DetectionConfig = MASKS) -> DetectionState:
    return build_detection_state(config, backbone(), CATEGORIES, CPU, seed=0, data_digest="d")


def batches(config: DetectionConfig = MASKS) -> Any:
    return detection_batches(
        SAMPLES, config, [3, 7, 90], seed=0, start_step=0, rank=rank(), world_size=world_size()
    )


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def test_fine_tuning_moves_every_statistic_and_every_parameter() -> None:
    state = build(dataclasses.replace(MASKS, architecture="c4", rois_per_image=4))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    take_step(state, *next(batches()))
    take_step(state, *next(batches()))
    still = [
        name for name, value in state.model.state_dict().items() if torch.equal(value, before[name])
    ]
    assert not still, still


@pytest.mark.parametrize(
    "config",
    [MASKS, dataclasses.replace(BOXES, architecture="c4", rois_per_image=4)],
    ids=["fpn", "c4"],
)
def test_a_resumed_training_goes_on_bit_for_bit(config: DetectionConfig) -> None:
    whole, half, other = build(config), build(config), build(config)
    history = [step.values for step in detection_steps(whole, SAMPLES, [3, 7, 90])]
    first = detection_steps(half, SAMPLES, [3, 7, 90])
    assert [next(first).values for _ in range(2)] == history[:2]
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.rand(5)  # the state of the global generator has no effect
    assert [step.values for step in detection_steps(other, SAMPLES, [3, 7, 90])] == history[2:]
    expected = whole.model.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in other.model.state_dict().items()
    )


def test_values_are_logged_every_so_often_and_at_the_end() -> None:
    state = build(dataclasses.replace(MASKS, steps=3))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    steps = list(detection_steps(state, SAMPLES, [3, 7, 90]))
    assert torch.equal(torch.rand(1), expected)
    assert [step.step for step in steps] == [1, 2, 3] and not steps[0].values
    losses = {name: value for name, value in steps[1].values.items() if name.startswith("loss_")}
    assert len(losses) == 5 and steps[2].values["loss"] > 0
    assert steps[1].values["loss"] == pytest.approx(sum(losses.values()))
    assert steps[1].values["lr"] == pytest.approx(0.02)


def test_a_state_of_other_data_is_refused_and_its_config_is_flat() -> None:
    state = build()
    with pytest.raises(CheckpointError, match="digest other"):
        state.load_state_dict(state.state_dict() | {"data_digest": "other"})
    assert state.params["transfer.anchor_sizes"] and state.params["transfer.steps"] == "4"


def test_averaged_statistics_are_the_plain_mean_over_batches() -> None:
    state = build()
    stream = batches()
    three_batches = [next(stream) for _ in range(3)]
    norms = {
        name: module
        for name, module in state.model.named_modules()
        if isinstance(module, _BatchNorm)
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    weights = [parameter.clone() for parameter in state.model.parameters()]
    average_batch_norm(state, iter(three_batches), 3)
    for name, norm in norms.items():
        assert norm.momentum == 0.1 and len(seen[name]) == 3
        means = torch.stack([inputs.mean((0, 2, 3)) for inputs in seen[name]])
        variances = torch.stack([inputs.var((0, 2, 3)) for inputs in seen[name]])
        # not equal, since float32 is summed in another order
        torch.testing.assert_close(norm.running_mean, means.mean(dim=0), **CLOSE)
        torch.testing.assert_close(norm.running_var, variances.mean(dim=0), **CLOSE)
    assert all(torch.equal(*pair) for pair in zip(weights, state.model.parameters(), strict=True))


class OnRank(NamedTuple):
    """Measurements of one process."""

    statistics: dict[str, Tensor]
    averaged: dict[str, Tensor]
    values: dict[str, float]
    weight: Tensor
    predictions: list[dict[str, Any]]
    file: bytes
    error: str


def on_rank() -> OnRank:
    config = dataclasses.replace(MASKS, train_sizes=(64,))  # equal sizes, so there is no padding
    state = build(config)
    stream = batches(config)
    values = take_step(state, *next(stream))
    trained_statistics = statistics(state.model)
    state.model.roi_heads.score_thresh = 0.0  # so that every image has predictions
    result = evaluate_detector(state, SAMPLES, SAMPLES, CATEGORIES)
    predictions = predict(state.model, SAMPLES, [3, 7, 90], config)
    if rank() == world_size() - 1:  # the loss is not finite on the last rank only
        with torch.no_grad():
            state.model.rpn.head.cls_logits.bias.fill_(math.nan)
    try:
        take_step(state, *next(stream))
    except TrainingError as error:
        stream.close()
        return OnRank(
            statistics=trained_statistics,
            averaged=statistics(state.model),
            values=values,
            weight=state.model.roi_heads.box_predictor.cls_score.weight.detach(),
            predictions=predictions,
            file=result.files["predictions.json"],
            error=str(error),
        )
    raise AssertionError("the step was taken")


@pytest.fixture(scope="module")
def alone() -> OnRank:
    return on_rank()


@pytest.fixture(scope="module")
def ranks() -> list[OnRank]:
    by_rank: list[OnRank] = run_ranks(on_rank, 2)
    return by_rank


def test_two_ranks_have_the_statistics_of_one_process(alone: OnRank, ranks: list[OnRank]) -> None:
    for each in ranks:
        torch.testing.assert_close(each.statistics, alone.statistics, **CLOSE)
        assert all(
            torch.equal(each.averaged[name], ranks[0].averaged[name]) for name in each.averaged
        )


def test_two_ranks_report_the_same_and_have_the_same_weights(ranks: list[OnRank]) -> None:
    assert ranks[0].values == ranks[1].values
    assert torch.equal(ranks[0].weight, ranks[1].weight)


def test_ranks_share_the_images_that_are_predicted(alone: OnRank, ranks: list[OnRank]) -> None:
    def predicted_images(process: OnRank) -> set[int]:
        return {item["image_id"] for item in process.predictions}

    assert predicted_images(alone) == {1, 2, 3, 4}
    assert [predicted_images(process) for process in ranks] == [{1, 3}, {2, 4}]
    assert ranks[0].file == ranks[1].file
    predictions = ranks[0].predictions + ranks[1].predictions
    gathered = sorted(predictions, key=lambda item: int(item["image_id"]))
    assert json.loads(ranks[0].file) == [
        item | {"image_id": 1000 + item["image_id"]} for item in gathered
    ]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(
    alone: OnRank, ranks: list[OnRank]
) -> None:
    for each in (alone, *ranks):
        assert each.error.startswith(
            "the loss is nan at step 2 (lr 0.02): lower mask_rcnn.lr or add mask_rcnn.warmup"
        )


def run_detection(
    config: DetectionConfig, train: list[DetectionSample], test: list[DetectionSample], seed: int
) -> TransferResult:
    """Runs a whole transfer in this process."""
    state = build_detection_state(config, backbone(), CATEGORIES, CPU, seed=seed, data_digest="")
    steps = detection_steps(state, train, sorted_category_ids(CATEGORIES))
    history = [(step.step, step.values) for step in steps if step.values]
    return dataclasses.replace(evaluate_detector(state, train, test, CATEGORIES), history=history)


def test_a_loss_that_grows_over_all_bounds_ends_training() -> None:
    config = dataclasses.replace(BOXES, lr=1e30, steps=20, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"lower faster_rcnn\.lr"):
        run_detection(config, SAMPLES, SAMPLES[:1], seed=0)


def test_predictions_are_those_of_torchvisions_own_evaluation() -> None:
    state = build(dataclasses.replace(MASKS, max_detections=40))
    average_batch_norm(state, batches(), 2)
    model = state.model.eval()
    model.roi_heads.score_thresh = 0.0
    image = SAMPLES[0].decode().float() / 255
    with torch.no_grad():
        (expected,) = model([image])
    predictions = predict(model, SAMPLES[:1], [3, 7, 90], MASKS)
    assert len(predictions) == 40 and {item["image_id"] for item in predictions} == {1}
    corners = expected["boxes"].tolist()
    assert [item["bbox"] for item in predictions] == [
        pytest.approx([x, y, r - x, b - y], abs=1e-4) for x, y, r, b in corners
    ]
    assert [item["category_id"] for item in predictions] == [
        [0, 3, 7, 90][label] for label in expected["labels"].tolist()
    ]
    for item, mask in zip(predictions, expected["masks"], strict=True):
        assert np.array_equal(decode_mask(item["segmentation"], 64, 64), (mask[0] > 0.5).numpy())


def as_predictions(samples: list[DetectionSample]) -> list[dict[str, Any]]:
    return [
        item | {"image_id": s.image_id, "score": 0.9} for s in samples for item in s.annotations
    ]


def test_ground_truth_as_predictions_scores_one_and_crowds_do_no_harm() -> None:
    samples = [
        sample(1),
        sample(2, [square(5, 5, 9), square(30, 30, 20, iscrowd=1)]),
        sample(3, []),
    ]
    result = measure(MASKS, samples, as_predictions(samples), CATEGORIES)
    assert (result.metric, result.value) == ("mask_ap", pytest.approx(1))
    assert result.metrics["box_ap"] == pytest.approx(1)
    assert measure(BOXES, samples, as_predictions(samples), CATEGORIES).metric == "box_ap"
    voc_config = dataclasses.replace(BOXES, metric="voc")
    voc = measure(voc_config, samples, as_predictions(samples), CATEGORIES)
    assert (voc.metric, voc.value) == ("box_ap50", pytest.approx(1))


def test_images_with_more_objects_than_detections_are_counted() -> None:
    crowded = sample(1, [square(x, y, 4) for x in range(0, 60, 12) for y in range(0, 60, 12)])
    result = measure(MASKS, [crowded, sample(2)], [], CATEGORIES)
    assert result.metrics["images_over_max_detections"] == 1 and result.value == 0


def test_the_predictions_file_has_the_coco_ids_if_they_are_unique() -> None:
    def predictions_file(samples: list[DetectionSample]) -> Any:
        result = measure(MASKS, samples, as_predictions(samples), CATEGORIES)
        return json.loads(result.files["predictions.json"])

    predictions = predictions_file(SAMPLES)
    assert [item["image_id"] for item in predictions] == [1001, 1002, 1003, 1004]
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= predictions[0].keys()
    equal_ids = [dataclasses.replace(each, source_id=5) for each in SAMPLES]
    assert [item["image_id"] for item in predictions_file(equal_ids)] == [1, 2, 3, 4]


def test_boxes_without_masks_are_drawn() -> None:
    annotation = {"category_id": 7, "bbox": [1, 2, 9, 9], "iscrowd": 0, "area": 81}
    plain = [dataclasses.replace(SAMPLES[0], annotations=[annotation])]
    result = measure(BOXES, plain, as_predictions(plain), CATEGORIES)
    assert Image.open(io.BytesIO(result.images["detections"])).format == "PNG"


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    config = dataclasses.replace(MASKS, precision="bfloat16", steps=2)
    first, again, other = (run_detection(config, SAMPLES, SAMPLES[:1], seed) for seed in (5, 5, 6))
    assert first == again and first.history != other.history
    assert first.history[-1][0] == 2 and first.value == first.metrics[first.metric]


def test_it_finds_a_square_that_it_was_trained_on() -> None:
    config = dataclasses.replace(MASKS, steps=60, warmup_steps=5, train_sizes=(64,), proposals=20)
    result = run_detection(config, SAMPLES, SAMPLES[:2], seed=0)
    assert result.metrics["mask_ap50"] > 0.4 and math.isfinite(result.history[-1][1]["loss"])


def test_training_images_without_any_object_are_refused() -> None:
    with pytest.raises(ShardError, match="none of the 1 training images"):
        run_detection(MASKS, [sample(1, [])], [sample(1)], seed=0)


def test_labels_follow_the_sorted_ids_of_categories() -> None:
    assert sorted_category_ids(CATEGORIES) == [3, 7, 90]
