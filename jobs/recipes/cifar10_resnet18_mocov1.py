"""ResNet-18 on CIFAR-10 with augmentation, temperature and schedule of MoCo v1 (He et al. 2020).

There are no published figures for this combination: size, batch, queue, momentum and BN groups are
those of the official CIFAR-10 demo, as in cifar10_resnet18_mocov2, whose docstring shows how to
pack the data.

    python -m jobs run cifar10_resnet18_mocov1 --data.shards /tmp/cifar10 --pretrain.epochs 2
"""

import dataclasses

from jobs.recipes.cifar10_resnet18_mocov2 import recipe as v2

recipe = dataclasses.replace(
    v2,
    name="cifar10_resnet18_mocov1",
    pretrain=dataclasses.replace(
        v2.pretrain,
        views=dataclasses.replace(v2.pretrain.views, grayscale_first=True, jitter=1.0, hue=0.4),
        moco=dataclasses.replace(v2.pretrain.moco, temperature=0.07),
        optimizer=dataclasses.replace(v2.pretrain.optimizer, schedule="step"),
    ),
)
