r"""ResNet-50 on ImageNet-1k, MoCo v2 for 800 epochs (Chen et al. 2020, table 1).

Expected: 71.1% linear top-1. The settings are those of imagenet_resnet50_mocov2; the cosine
schedule is four times as long.

    python -m jobs run imagenet_resnet50_mocov2_800ep \
        --data.shards s3://bucket/imagenet --storage s3://bucket/runs
"""

import dataclasses

from jobs.recipes.imagenet_resnet50_mocov2 import recipe as shorter

recipe = dataclasses.replace(
    shorter,
    name="imagenet_resnet50_mocov2_800ep",
    pretrain=dataclasses.replace(shorter.pretrain, epochs=800),
)
