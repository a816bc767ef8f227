"""`python -m jobs transfer RECIPE --backbone URL`: the second half of a run."""

import dataclasses

from cluster.checkout import CHECKOUT, git_facts
from hemoco.errors import UsageError
from jobs.options import RunOptions, parse_options
from jobs.session import print_comparison, publish, ray_session, run_name, storage_url
from pipeline.study import check_transfers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of `transfer`."""

    backbone: str = ""
    """URL or path of a backbone.safetensors."""
    only: tuple[str, ...] = ()
    """Transfers to run; default: all of the recipe."""
    out: str = ""
    """Folder for comparison.json, .csv, .md and report.html; default: the run's folder in $HEMOCO_HOME/reports."""


def main(argv: list[str]) -> None:
    """Runs a recipe's transfers from a given backbone."""
    options = parse_options("transfer", argv, Options)
    recipe = options.recipe
    if not options.backbone:
        raise UsageError("transfer needs --backbone URL, the backbone.safetensors that `pretrain` named at its end")
    unknown = sorted(set(options.only) - recipe.transfers.keys())
    if unknown:
        known = ", ".join(recipe.transfers)
        raise UsageError(f"--only {unknown[0]}: recipe {recipe.name} has no such transfer; it has {known}")
    if options.only:
        kept = {name: config for name, config in recipe.transfers.items() if name in options.only}
        options = dataclasses.replace(options, recipe=dataclasses.replace(recipe, transfers=kept))
    name = run_name(options, options.backbone)
    check_transfers(options.recipe)
    with ray_session():
        from pipeline.graph import transfer_only  # Ray Train takes seconds to import, errors should not

        transfer_only(
            options.recipe,
            backbone_url=options.backbone,
            run=name,
            storage=storage_url(options.storage),
            fresh=options.fresh,
            tags=git_facts(CHECKOUT),
        )
    publish(name, print_comparison(name, options.out))
