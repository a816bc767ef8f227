"""ResNet-18 on CIFAR-10 with MoCo v3 (Chen, Xie, He 2021), scaled down.

The paper has no small images. Stem, crops, normalisation and the absence of blur are those of
cifar10_resnet18_mocov2, whose docstring shows how to pack the data. The heads are narrower, as in
solo-learn's recipe, which reaches 93.1% (online linear, 1,000 epochs, its own LARS). This recipe
has not been trained to its end.

    python -m jobs run cifar10_resnet18_mocov3 --data.shards /tmp/cifar10 --pretrain.epochs 20
"""

import dataclasses

from hemoco.config import MoCoV3Config, OptimizerConfig
from jobs.recipes.cifar10_resnet18_mocov2 import recipe as v2

recipe = dataclasses.replace(
    v2,
    name="cifar10_resnet18_mocov3",
    pretrain=dataclasses.replace(
        v2.pretrain,
        views=dataclasses.replace(v2.pretrain.views, saturation=0.2, solarize=(0.0, 0.2)),
        encoder=dataclasses.replace(v2.pretrain.encoder, zero_init_last=True),
        moco=MoCoV3Config(embedding_size=256, hidden_size=2048, temperature=0.2),
        optimizer=OptimizerConfig(
            kind="lars",
            lr=0.6 * 512 / 256,
            weight_decay=1e-6,
            schedule="cosine_per_step",
            warmup_epochs=10,
        ),
    ),
)
