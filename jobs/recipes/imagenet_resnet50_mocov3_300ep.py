r"""ResNet-50 on ImageNet-1k, MoCo v3 for 300 epochs (Chen, Xie, He 2021).

Expected: 72.8% linear top-1. The settings are those of imagenet_resnet50_mocov3_100ep with half the
learning rate.

    python -m jobs run imagenet_resnet50_mocov3_300ep \
        --data.shards s3://bucket/imagenet --storage s3://bucket/runs
"""

import dataclasses

from jobs.recipes.imagenet_resnet50_mocov3_100ep import recipe as shorter

recipe = dataclasses.replace(
    shorter,
    name="imagenet_resnet50_mocov3_300ep",
    pretrain=dataclasses.replace(
        shorter.pretrain,
        epochs=300,
        optimizer=dataclasses.replace(shorter.pretrain.optimizer, lr=0.3 * 4096 / 256),
    ),
)
