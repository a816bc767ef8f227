"""`python -m jobs pretrain RECIPE`: the first half of a run."""

from jobs.options import RunOptions, parse_options
from jobs.session import ray_session, run_name, storage_url
from pipeline.graph import pretrain_only


def main(argv: list[str]) -> None:
    """Pretrains or resumes, then says where the backbone lies."""
    options = parse_options("pretrain", argv, RunOptions)
    name = run_name(options)
    with ray_session():
        done = pretrain_only(options.recipe, run=name, storage=storage_url(options.storage), fresh=options.fresh)
    print(f"run {name}: backbone {done.backbone_url}")
    for key, value in sorted(done.metrics.items()):
        print(f"  {key} {value:.4f}")
