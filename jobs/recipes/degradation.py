r"""ResNet-34 without shortcuts on CIFAR-10: the plain network of He et al. 2016, section 3.3.

MoCo v2 for 20 epochs. Compare it with the same network with shortcuts, and with the shallower plain
one. By section 4.1 of the paper, where training is supervised, the loss of plain34 should end above
both. There are no published figures for MoCo. All else is as in cifar10_resnet18_mocov2, whose
docstring shows how to pack the data.

    python -m jobs run degradation --data.shards /tmp/cifar10 --run plain34
    python -m jobs run degradation --data.shards /tmp/cifar10 --run residual34 \
        --pretrain.encoder.shortcuts
    python -m jobs run degradation --data.shards /tmp/cifar10 --run plain18 \
        --pretrain.encoder.architecture resnet18

`python -m jobs compare plain34 residual34 plain18` prints them side by side; MLflow overlays their
curves. tests/benchmarks/depth.py degradation shows the same effect in minutes on two CPU cores,
supervised.
"""

import dataclasses

from hemoco.config import EncoderConfig
from jobs.recipes.cifar10_resnet18_mocov2 import recipe as resnet18

recipe = dataclasses.replace(
    resnet18,
    name="degradation",
    pretrain=dataclasses.replace(
        resnet18.pretrain,
        epochs=20,
        encoder=EncoderConfig(architecture="resnet34", stem="small", shortcuts=False),
    ),
)
