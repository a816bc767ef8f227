"""`python -m jobs transfer RECIPE --backbone URL`: the second half of a run."""

from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import check_writable
from jobs.display.live import live_display
from jobs.options import TransferOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, show_results


def main(argv: list[str]) -> None:
    """Measures a recipe's transfers from a given backbone, or resumes them."""
    options = parse_options("transfer", argv, TransferOptions)
    # imported late: torch takes seconds, and wrong usage is reported at once
    from pipeline.checks import check_transfers

    indexes = ShardIndexes()
    check_transfers(options.recipe, indexes)
    announce(options.run)
    display = live_display(
        options.run, pretrain=None, transfers=options.recipe.transfers, indexes=indexes
    )
    with ray_session(), display:
        # imported late: Ray Train takes seconds
        from pipeline.run import transfer_only

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
