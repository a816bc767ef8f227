"""The pages of docs/reference are those that the code would write now."""

import dataclasses
import itertools
import re

import pytest
import torch

from hemoco.config import MoCoV3Config, PretrainConfig
from hemoco.data.stream.bad_samples import BAD_REASONS
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.train.pretrain import build_state, train_steps
from tests.helpers.reference_files import SMALL
from tests.helpers.write_reference import FOLDER, PAGES, page


@pytest.mark.parametrize("name", PAGES)
def test_page_is_not_stale(name: str) -> None:
    command = "uv run python -m tests.helpers.write_reference"
    stored = (FOLDER / name).read_text(encoding="utf-8")
    assert stored == page(name), f"docs/reference/{name} is stale: {command} writes it anew"


def test_every_setting_has_a_meaning() -> None:
    page_lines = (FOLDER / "settings.md").read_text(encoding="utf-8").splitlines()
    bare = [
        line
        for line, meaning in itertools.pairwise(page_lines)
        if line.startswith("- **`") and re.match(r"\s*(\*Rule|$)", meaning)
    ]
    assert bare == [], "these have no docstring under their field"


@pytest.mark.parametrize("queue", [True, False])
def test_metrics_of_a_pretraining_are_those_it_records(queue: bool) -> None:
    config = dataclasses.replace(SMALL, epochs=1, log_every_steps=1, knn_every_epochs=0)
    if not queue:
        config = dataclasses.replace(config, moco=MoCoV3Config(embedding_size=8, hidden_size=16))
    expected = _names_on_the_page() - (set() if queue else {"queue_age"})
    expected |= {f"bad_samples/{reason.replace(' ', '_')}" for reason in BAD_REASONS}
    assert _recorded_names(config) == expected


def _names_on_the_page() -> set[str]:
    text = (FOLDER / "record.md").read_text(encoding="utf-8")
    section = text.partition("## Metrics of a pretraining")[2].partition("At some steps")[0]
    return set(re.findall(r"^- `(\w+)`:", section, re.M))


def _recorded_names(config: PretrainConfig) -> set[str]:
    size, count = config.views.size, config.global_batch_size
    crops = torch.randint(256, (count, 2, 3, size, size), dtype=torch.uint8)
    batch = Batch(crops, ["key"] * count, StreamPosition(0, 0))
    state = build_state(config, torch.device("cpu"), data_digest="digest")
    (metrics,) = train_steps(state, [batch], steps_per_epoch=1)
    return set(metrics.values)
