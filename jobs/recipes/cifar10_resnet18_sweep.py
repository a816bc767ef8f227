"""Search of learning rate, temperature and crop for ResNet-18 with MoCo v2 on CIFAR-10.

There are 16 trials of up to 32 epochs; all else is as in cifar10_resnet18_mocov2, whose docstring
shows how to pack the data. A trial is judged at epochs 4 and 12 (and 36 in a longer pretraining) by
its kNN accuracy at that epoch. About two thirds of the trials stop at epoch 4.

    python -m jobs sweep cifar10_resnet18_sweep --data.shards /tmp/cifar10

Two trials run at the same time if there are cores or GPUs for both. --sweep.trials 32 adds 16 more
trials to a finished sweep.
"""

import dataclasses

from hemoco.config import Choice, LogUniform, SweepConfig, Uniform
from jobs.recipes.cifar10_resnet18_mocov2 import recipe as resnet18

recipe = dataclasses.replace(
    resnet18,
    name="cifar10_resnet18_sweep",
    pretrain=dataclasses.replace(resnet18.pretrain, epochs=32),
    sweep=SweepConfig(
        space={
            "pretrain.optimizer.lr": LogUniform(0.006, 0.6),
            "pretrain.moco.temperature": Uniform(0.05, 0.4),
            "pretrain.views.crop_scale": Choice(((0.08, 1.0), (0.2, 1.0), (0.5, 1.0))),
        },
        objective="linear_probe",
        trials=16,
        grace_epochs=4,
        reduction=3,
    ),
)
