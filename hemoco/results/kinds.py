"""Method of a pretraining and kind of a transfer, as `hemoco.config.kinds` names them."""

from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag


def kind_of(facts: RunFacts) -> str:
    """Returns the method of a pretraining's run or the kind of a transfer's; empty if unknown."""
    tag = Tag.TRANSFER_KIND if Tag.TRANSFER in facts.tags else Tag.METHOD
    return facts.tags.get(tag) or _inferred_kind(facts)


def _inferred_kind(facts: RunFacts) -> str:
    """Infers the kind of a run that hemoco 0.1.0 recorded, which wrote no tag for it.

    Only settings that a single kind has decide.
    """
    if Tag.TRANSFER not in facts.tags:
        if "pretrain.moco.queue_length" in facts.params:
            return "moco_v1" if facts.params.get("pretrain.moco.head") == "linear" else "moco_v2"
        return "moco_v3" if "pretrain.moco.hidden_size" in facts.params else ""
    settings = {name.rpartition(".")[2] for name in facts.params}
    if "fraction" in settings:
        return "low_shot"
    if "lbfgs_check" in settings:
        return "linear_probe"
    return "linear_classifier" if "schedule" in settings and "backbone_lr" not in settings else ""
