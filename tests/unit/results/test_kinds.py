"""The recorded method and kind are read back; for older runs they are inferred from settings."""

from typing import get_args

import pytest

from hemoco.config import (
    AnyTransferConfig,
    FasterRcnnConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    MaskRcnnConfig,
    MoCoConfig,
    MoCoV3Config,
    PretrainConfig,
    TransferConfig,
    flat_params,
)
from hemoco.config.kinds import method_name, transfer_kind
from hemoco.results.kinds import kind_of
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag


def facts(params: dict[str, str], tags: dict[str, str]) -> RunFacts:
    return RunFacts(
        run_id="r",
        status="FINISHED",
        started_s=0.0,
        ended_s=1.0,
        measured_s=None,
        tags=tags,
        params=params,
        metrics={},
        steps={},
    )


def test_kinds_are_named_after_the_classes() -> None:
    recorded = {  # runs in MLflow have these; a kind that is added needs no entry
        KnnConfig: "knn",
        LinearProbeConfig: "linear_probe",
        LowShotConfig: "low_shot",
        LinearClassifierConfig: "linear_classifier",
        FineTuneConfig: "fine_tune",
        FasterRcnnConfig: "faster_rcnn",
        MaskRcnnConfig: "mask_rcnn",
    }
    assert {config: transfer_kind(config()) for config in recorded} == recorded
    kinds = [transfer_kind(config()) for config in get_args(AnyTransferConfig)]
    assert len({*kinds}) == len(kinds)


@pytest.mark.parametrize(
    "config", [config() for config in get_args(AnyTransferConfig)], ids=transfer_kind
)
def test_the_kind_of_an_old_transfer_is_inferred_where_its_settings_show_it(
    config: TransferConfig,
) -> None:
    kind = transfer_kind(config)
    shown = kind if kind in ("linear_probe", "low_shot", "linear_classifier") else ""
    assert kind_of(facts(flat_params({"transfers.t": config}), {Tag.TRANSFER: "t"})) == shown


@pytest.mark.parametrize(
    ("moco", "name"),
    [
        (MoCoConfig(head="linear"), "moco_v1"),
        (MoCoConfig(), "moco_v2"),
        (MoCoV3Config(), "moco_v3"),
    ],
)
def test_the_method_is_recorded_and_inferred_alike(
    moco: MoCoConfig | MoCoV3Config, name: str
) -> None:
    assert method_name(moco) == name
    assert kind_of(facts(flat_params({"pretrain": PretrainConfig(moco=moco)}), {})) == name
    assert kind_of(facts({}, {})) == ""


def test_what_is_recorded_counts() -> None:
    low_shot = flat_params({"transfers.t": LowShotConfig()})
    tags = {Tag.TRANSFER: "t", Tag.TRANSFER_KIND: transfer_kind(KnnConfig())}
    assert kind_of(facts(low_shot, tags)) == "knn"
