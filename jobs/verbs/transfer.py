"""`python -m jobs transfer RECIPE --backbone URL`: the second half of a run."""

from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import check_writable
from jobs.display.live import live_display
from jobs.options import TransferOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, show_results


def main(argv: list[str]) -> None:
    """Runs a recipe's transfers from a given backbone."""
    options = parse_options("transfer", argv, TransferOptions)
    from pipeline.checks import check_transfers  # torch takes seconds to import, errors should not

    indexes = ShardIndexes()
    check_transfers(options.recipe, indexes)
    announce(options.run)
    with (
        ray_session(),
        live_display(
            options.run, pretrain=None, transfers=options.recipe.transfers, indexes=indexes
        ),
    ):
        from pipeline.run import (
            transfer_only,
        )  # Ray Train takes seconds to import, errors should not

        check_writable(options.storage)
        transfer_only(
            options.recipe,
            indexes=indexes,
            backbone_url=options.backbone,
            run=options.run,
            storage=options.storage,
            fresh=options.fresh,
            tags=command_tags("transfer", argv[0], options),
        )
    show_results(options.run, options.out)
