"""`python -m jobs run RECIPE`: pretraining, transfers, comparison."""

from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import check_writable
from jobs.display.live import live_display
from jobs.options import ReportOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, show_results


def main(argv: list[str]) -> None:
    """Runs or resumes a whole run; prints the table of a finished one."""
    options = parse_options("run", argv, ReportOptions)
    # imported late: torch takes seconds, and wrong usage is reported at once
    from pipeline.checks import check_pretraining, check_transfers

    indexes = ShardIndexes()
    check_pretraining(options.recipe, indexes)
    check_transfers(options.recipe, indexes)
    announce(options.run)
    display = live_display(
        options.run, pretrain=options.recipe, transfers=options.recipe.transfers, indexes=indexes
    )
    with ray_session(), display:
        # imported late: Ray Train takes seconds
        from pipeline.run import pretrain_then_transfer

        check_writable(options.storage)
        pretrain_then_transfer(
            options.recipe,
            indexes=indexes,
            run=options.run,
            storage=options.storage,
            fresh=options.fresh,
            tags=command_tags("run", argv[0], options),
        )
    show_results(options.run, options.out)
