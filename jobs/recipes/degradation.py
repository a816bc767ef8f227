"""ResNet-34 without shortcuts on CIFAR-10, MoCo v2 for 20 epochs: the plain network of He et al. 2016, section 3.3.

What to compare it with: the same network with shortcuts, and the shallower plain one. After section 4.1 of the paper,
whose training is supervised, the loss of plain34 should end above both. Nobody publishes this for MoCo. All else is as
in cifar10_resnet18_mocov2, whose docstring says how to pack the data.

    python -m jobs run degradation --data.shards /tmp/cifar10 --run plain34
    python -m jobs run degradation --data.shards /tmp/cifar10 --run residual34 --pretrain.encoder.shortcuts
    python -m jobs run degradation --data.shards /tmp/cifar10 --run plain18 --pretrain.encoder.architecture resnet18

`python -m jobs compare plain34` prints the table of one run again; MLflow shows the curves of several over each other.
The same in minutes on two CPU cores, supervised: tests/benchmarks/depth.py degradation.
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
