"""`python -m jobs pretrain RECIPE`: the first half of a run."""

from jobs.display.live import live_display
from jobs.options import RunOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session, run_name, storage_url


def main(argv: list[str]) -> None:
    """Pretrains or resumes, then says where the backbone lies."""
    options = parse_options("pretrain", argv, RunOptions)
    name = run_name(options)
    from pipeline.checks import check_pretraining  # torch takes seconds to import, errors should not

    check_pretraining(options.recipe)
    announce(name)
    with ray_session(), live_display(name, pretrain=options.recipe, transfers={}):
        from pipeline.run import pretrain_only  # Ray Train takes seconds to import, errors should not

        done = pretrain_only(
            options.recipe,
            run=name,
            storage=storage_url(options.storage),
            fresh=options.fresh,
            tags=command_tags("pretrain", argv[0], options),
        )
    print(f"run {name}: backbone {done.backbone_url}")
    for key, value in sorted(done.metrics.items()):
        print(f"  {key} {value:.4f}")
