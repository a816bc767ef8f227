r"""ResNet-50 on ImageNet-1k, MoCo v3 for 1000 epochs (Chen, Xie, He 2021).

Expected: 74.6% linear top-1. The settings are those of imagenet_resnet50_mocov3_100ep with the
learning rate, weight decay and momentum that the paper gives for this length.

    python -m jobs run imagenet_resnet50_mocov3_1000ep \
        --data.shards s3://bucket/imagenet --storage s3://bucket/runs
"""

import dataclasses

from hemoco.config import MoCoV3Config
from jobs.recipes.imagenet_resnet50_mocov3_100ep import recipe as shorter

recipe = dataclasses.replace(
    shorter,
    name="imagenet_resnet50_mocov3_1000ep",
    pretrain=dataclasses.replace(
        shorter.pretrain,
        epochs=1000,
        moco=MoCoV3Config(momentum=0.996),
        optimizer=dataclasses.replace(
            shorter.pretrain.optimizer, lr=0.3 * 4096 / 256, weight_decay=1.5e-6
        ),
    ),
)
