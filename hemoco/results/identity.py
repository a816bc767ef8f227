"""What of two runs is the same: the protocol of a transfer, the origin of a baseline, the settings of a pretraining.

Each is a dictionary of settings by their dotted names, to be compared by `hemoco.config.config_difference`, which
leaves out what only says where and how fast something is computed.
"""

import ast

from hemoco.config import init_label
from hemoco.results.records import Records, done_rows
from hemoco.tracking.runs import RunFacts, metric_history, run_facts
from hemoco.tracking.tags import Tag

MEAN_OF_SEEDS = -1
"""In place of a seed where only the mean over the seeds is known."""
_BACKBONE = (
    "pretrain.encoder.",
    "pretrain.views.size",
    "pretrain.views.mean",
    "pretrain.views.std",
)


def pretraining_settings(uri: str, records: Records) -> dict[str, str] | None:
    """The settings of a run's pretraining, its seed included, and its data; None where MLflow does not know them."""
    facts = records.pretraining
    if facts is None:
        return None
    above = facts.tags.get("mlflow.parentRunId", records.parent.run_id)
    parent = records.parent if above == records.parent.run_id else run_facts(uri, above)
    data = {
        "data digest": facts.tags.get(Tag.DATA_DIGEST, ""),
        "data.pretrain_split": parent.params.get("data.pretrain_split", ""),
    }
    return {
        name: value for name, value in facts.params.items() if name.startswith("pretrain.")
    } | data


def transfer_protocol(records: Records, facts: RunFacts) -> dict[str, str]:
    """The settings of a transfer, without inits and seeds, with its metric and its data."""
    prefix = f"transfers.{facts.tags[Tag.TRANSFER]}."
    own = {name: value for name, value in facts.params.items() if name.startswith(prefix)}
    data = own if own.get(f"{prefix}data.shards") else records.parent.params
    of_data = f"{prefix}data." if data is own else "data."
    left_out = (f"{prefix}inits", f"{prefix}seeds", f"{prefix}data.")
    return {name: value for name, value in own.items() if not name.startswith(left_out)} | {
        "metric": facts.tags[Tag.METRIC],
        "data digest": facts.tags.get(Tag.TRANSFER_DATA_DIGEST, ""),
        **{split: data.get(f"{of_data}{split}", "") for split in ("train_split", "test_split")},
    }


def baseline_identity(records: Records, init: str) -> dict[str, str]:
    """What makes a baseline of a run what it is: the architecture, its input, and where the weights come from."""
    lists = [
        value
        for facts in records.transfers
        for name, value in facts.params.items()
        if name.endswith(".inits")
    ]
    sources = {
        entry for found in lists for entry in ast.literal_eval(found) if init_label(entry) == init
    }
    backbone = {
        name: value for name, value in records.parent.params.items() if name.startswith(_BACKBONE)
    }
    return backbone | {"init": " ".join(sorted(sources))}


def curve_values(
    uri: str, records: Records, transfer: str, metric: str
) -> dict[int, dict[int, float]]:
    """By epoch and seed: a transfer from the backbones that the run's own pretraining exported on its way."""
    curve: dict[int, dict[int, float]] = {}
    for facts in records.curve:
        if (facts.tags[Tag.TRANSFER], facts.tags[Tag.METRIC]) == (transfer, metric):
            by_seed = {row.seed: row.value for row in done_rows(facts)}
            curve |= {int(facts.tags[Tag.EPOCH]): by_seed} if by_seed else {}
    key, training = f"curve/{transfer}/{metric}", records.pretraining
    if (
        training is not None
        and training.tags.get(Tag.RUN) == records.run
        and key in training.metrics
    ):
        # where the runs of the single measurements are gone
        curve = {
            epoch: {MEAN_OF_SEEDS: mean}
            for epoch, mean in metric_history(uri, training.run_id, key)
        } | curve
    return curve
