"""`python -m jobs pretrain RECIPE`: the first half of a run."""

from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import check_writable
from jobs.display.live import live_display
from jobs.options import RunOptions, parse_options
from jobs.recorded_command import command_tags
from jobs.session import announce, ray_session


def main(argv: list[str]) -> None:
    """Pretrains or resumes, then says where the backbone lies."""
    options = parse_options("pretrain", argv, RunOptions)
    from pipeline.checks import (
        check_pretraining,
    )  # torch takes seconds to import, errors should not

    indexes = ShardIndexes()
    check_pretraining(options.recipe, indexes)
    announce(options.run)
    with (
        ray_session(),
        live_display(options.run, pretrain=options.recipe, transfers={}, indexes=indexes),
    ):
        from pipeline.run import (
            pretrain_only,
        )  # Ray Train takes seconds to import, errors should not

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
