"""Settings by which two runs count as doing the same thing.

There are three identities: the settings of a pretraining, the protocol of a transfer, and the
origin of a baseline. Each is a dictionary of settings by dotted names, to be compared by
`hemoco.config.config_difference`, which ignores settings that do not change a result.
"""

import ast

from hemoco.config import init_label
from hemoco.results.records import Records, done_rows
from hemoco.tracking.runs import RunFacts, metric_history, run_facts
from hemoco.tracking.tags import Tag

MEAN_OF_SEEDS = -1
"""Stands for a seed where only the mean over the seeds is known."""
_BACKBONE = (
    "pretrain.encoder.",
    "pretrain.views.size",
    "pretrain.views.mean",
    "pretrain.views.std",
)


def pretraining_settings(uri: str, records: Records) -> dict[str, str] | None:
    """Returns the settings of a run's pretraining with its seed and its data.

    None if MLflow does not have the pretraining.
    """
    facts = records.pretraining
    if facts is None:
        return None
    # A transfer-only run uses the pretraining of another run, whose parent has the data's settings.
    parent_id = facts.tags.get("mlflow.parentRunId", records.parent.run_id)
    parent = records.parent if parent_id == records.parent.run_id else run_facts(uri, parent_id)
    settings = {name: value for name, value in facts.params.items() if name.startswith("pretrain.")}
    settings["data digest"] = facts.tags.get(Tag.DATA_DIGEST, "")
    settings["data.pretrain_split"] = parent.params.get("data.pretrain_split", "")
    return settings


def transfer_protocol(records: Records, facts: RunFacts) -> dict[str, str]:
    """Returns the settings of a transfer with its metric and data, without inits and seeds."""
    prefix = f"transfers.{facts.tags[Tag.TRANSFER]}."
    own = {name: value for name, value in facts.params.items() if name.startswith(prefix)}
    if own.get(f"{prefix}data.shards"):
        splits, splits_prefix = own, f"{prefix}data."
    else:
        splits, splits_prefix = records.parent.params, "data."
    left_out = (f"{prefix}inits", f"{prefix}seeds", f"{prefix}data.")
    protocol = {name: value for name, value in own.items() if not name.startswith(left_out)}
    protocol["metric"] = facts.tags[Tag.METRIC]
    protocol["data digest"] = facts.tags.get(Tag.TRANSFER_DATA_DIGEST, "")
    for split in ("train_split", "test_split"):
        protocol[split] = splits.get(f"{splits_prefix}{split}", "")
    return protocol


def baseline_identity(records: Records, init: str) -> dict[str, str]:
    """Returns a baseline's architecture, input settings and the origin of its weights."""
    sources = set()
    for facts in records.transfers:
        for name, value in facts.params.items():
            if name.endswith(".inits"):
                sources |= {entry for entry in ast.literal_eval(value) if init_label(entry) == init}
    params = records.parent.params
    backbone = {name: value for name, value in params.items() if name.startswith(_BACKBONE)}
    return backbone | {"init": " ".join(sorted(sources))}


def curve_values(
    uri: str, records: Records, transfer: str, metric: str
) -> dict[int, dict[int, float]]:
    """Returns a transfer's values on the backbones exported during the run's own pretraining.

    Returns:
        The value by epoch and seed.
    """
    curve: dict[int, dict[int, float]] = {}
    for facts in records.curve:
        if (facts.tags[Tag.TRANSFER], facts.tags[Tag.METRIC]) == (transfer, metric):
            by_seed = {row.seed: row.value for row in done_rows(facts)}
            if by_seed:
                curve[int(facts.tags[Tag.EPOCH])] = by_seed
    training = records.pretraining
    if training is None or training.tags.get(Tag.RUN) != records.run:
        return curve
    key = f"curve/{transfer}/{metric}"
    if key in training.metrics:
        # The pretraining has the means over the seeds, also where the single runs were deleted.
        means = metric_history(uri, training.run_id, key)
        curve = {epoch: {MEAN_OF_SEEDS: mean} for epoch, mean in means} | curve
    return curve
