r"""ResNet-34 from Xavier's initialisation on CIFAR-10, to compare with Kaiming's (He et al. 2015).

MoCo v2 for 20 epochs. A BN follows each convolution and removes the scale of its weights, so the
two runs should differ little. Without BN, Xavier's signals vanish in 30 layers and the network
stalls, as section 2.2 of the paper states and tests/benchmarks/depth.py initialisation shows in
minutes on two CPU cores. All else is as in cifar10_resnet18_mocov2, whose docstring shows how to
pack the data.

    python -m jobs run initialisation --data.shards /tmp/cifar10 --run xavier
    python -m jobs run initialisation --data.shards /tmp/cifar10 --run kaiming \
        --pretrain.encoder.init kaiming

`python -m jobs compare xavier kaiming` prints them side by side; MLflow overlays their curves.
"""

import dataclasses

from hemoco.config import EncoderConfig
from jobs.recipes.cifar10_resnet18_mocov2 import recipe as resnet18

recipe = dataclasses.replace(
    resnet18,
    name="initialisation",
    pretrain=dataclasses.replace(
        resnet18.pretrain,
        epochs=20,
        encoder=EncoderConfig(architecture="resnet34", stem="small", init="xavier"),
    ),
)
