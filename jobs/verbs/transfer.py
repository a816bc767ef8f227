"""`python -m jobs transfer RECIPE --backbone URL`: the second half of a run."""

from jobs.display.live import live_display
from jobs.options import parse_transfer
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, run_name, show_results, storage_url


def main(argv: list[str]) -> None:
    """Runs a recipe's transfers from a given backbone."""
    options = parse_transfer(argv)
    name = run_name(options, options.backbone)
    from pipeline.checks import check_transfers  # torch takes seconds to import, errors should not

    check_transfers(options.recipe)
    announce(name)
    with ray_session(), live_display(name, pretrain=None, transfers=options.recipe.transfers):
        from pipeline.run import transfer_only  # Ray Train takes seconds to import, errors should not

        transfer_only(
            options.recipe,
            backbone_url=options.backbone,
            run=name,
            storage=storage_url(options.storage),
            fresh=options.fresh,
            tags=command_tags("transfer", argv[0], options),
        )
    show_results(name, options.out)
