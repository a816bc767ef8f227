"""`python -m jobs run RECIPE`: pretraining -> transfers -> comparison."""

from jobs.display.live import live_display
from jobs.options import ReportOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, run_name, show_results, storage_url


def main(argv: list[str]) -> None:
    """Runs or resumes a whole run; a finished one prints its table."""
    options = parse_options("run", argv, ReportOptions)
    name = run_name(options)
    from pipeline.checks import check_pretraining, check_transfers  # torch takes seconds to import, errors should not

    check_pretraining(options.recipe)
    check_transfers(options.recipe)
    announce(name)
    with ray_session(), live_display(name, pretrain=options.recipe, transfers=options.recipe.transfers):
        from pipeline.run import pretrain_then_transfer  # Ray Train takes seconds to import, errors should not

        pretrain_then_transfer(
            options.recipe,
            run=name,
            storage=storage_url(options.storage),
            fresh=options.fresh,
            tags=command_tags("run", argv[0], options),
        )
    show_results(name, options.out)
