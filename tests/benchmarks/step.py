"""The cost of a training step beside the official MoCo, lightly and solo-learn, on CPU or one GPU.

    uv run python tests/benchmarks/step.py [step] [loss] [ddp] [augment]
        [--device cpu|cuda] [--rounds 5]
        [--moco-checkout DIR] [--solo-checkout DIR] [--data DIR] [--quick]

Without names, all sections run. Each way is warmed up; then all take turns, round by round, and
figures are medians over the rounds of ratios within a round, with their range. On the CPU one
thread and its CPU time count, on a GPU the device's time. A library that is unavailable is printed
as a gap. Neither Ray, MLflow nor webdataset is needed.

- step: one optimiser step of each library, on images made beforehand.
- loss: memory and time of the loss against the queue, beside logits concatenated.
- ddp: two processes that average gradients, beside two that do not; always on the CPU.
- augment: hemoco's augmentation of a batch, beside torchvision's of its samples.

lightly, and what solo-learn needs, come by `uv run --with` where they are not installed. The
official code and solo-learn come from checkouts: DIR/moco/builder.py of
github.com/facebookresearch/moco as of commit 132aea9, before it was removed; DIR/solo of
github.com/vturrisi/solo-learn (the release on PyPI demands torch 1.9).
"""

import argparse
import functools
from pathlib import Path

import step_augment
import step_ddp
import step_loss
import step_table
import torch
from big_sets import add_data_option
from machine import describe_machine

SECTIONS = ("step", "loss", "ddp", "augment")


def main() -> None:
    """Measures the sections that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moco-checkout", type=Path, help="folder with moco/builder.py")
    parser.add_argument("--solo-checkout", type=Path, help="folder with solo/methods/mocov2plus.py")
    add_data_option(parser, required=False)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that it runs; the figures mean nothing",
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here")
    chosen = options.sections or SECTIONS
    torch.set_num_threads(1)
    torch.manual_seed(0)
    describe = functools.partial(describe_machine, ("torch", "torchvision", "timm", "numpy"))
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one thread, CPU time"
    print(
        describe(f"{where}; {options.rounds} rounds{'; QUICK' if options.quick else ''}"),
        flush=True,
    )
    if "step" in chosen:
        checkouts = {"official": options.moco_checkout, "solo-learn": options.solo_checkout}
        step_table.measure(options.device, options.rounds, checkouts, quick=options.quick)
    if "loss" in chosen:
        step_loss.measure(options.device, options.rounds, quick=options.quick)
    if "ddp" in chosen:
        step_ddp.measure(options.rounds, quick=options.quick)
    if "augment" in chosen:
        step_augment.measure(options.device, options.rounds, options.data, quick=options.quick)
    print(describe("at the end"))


if __name__ == "__main__":
    main()
