"""`python -m jobs pretrain RECIPE`: the first half of a run."""

from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import check_writable
from jobs.display.live import live_display
from jobs.options import RunOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session


def main(argv: list[str]) -> None:
    """Pretrains or resumes, then prints the URL of the backbone."""
    options = parse_options("pretrain", argv, RunOptions)
    # imported late: torch takes seconds, and wrong usage is reported at once
    from pipeline.checks import check_pretraining

    indexes = ShardIndexes()
    check_pretraining(options.recipe, indexes)
    announce(options.run)
    display = live_display(options.run, pretrain=options.recipe, transfers={}, indexes=indexes)
    with ray_session(), display:
        # imported late: Ray Train takes seconds
        from pipeline.run import pretrain_only

        check_writable(options.storage)
        done = pretrain_only(
            options.recipe,
            indexes=indexes,
            run=options.run,
            storage=options.storage,
            fresh=options.fresh,
            tags=command_tags("pretrain", argv[0], options),
        )
    print(f"run {options.run}: backbone {done.backbone_url}")
    for key, value in sorted(done.metrics.items()):
        print(f"  {key} {value:.4f}")
