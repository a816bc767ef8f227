r"""ResNet-50 on COCO 2017: Mask R-CNN with FPN and C4, schedules 1x and 2x.

These are the protocols of He et al. 2020, table 5. Published box / mask AP on val2017, for three
initialisations (MoCo v1 for 200 epochs on IN-1M):

    transfer  MoCo v1      random       supervised
    fpn_1x    38.5 / 35.1  31.0 / 28.5  38.9 / 35.4
    fpn_2x    40.8 / 36.9  36.7 / 33.7  40.6 / 36.8
    c4_1x     38.5 / 33.6  26.4 / 29.3  38.2 / 33.3
    c4_2x     40.7 / 35.4  35.6 / 31.4  40.0 / 34.7

Differences of 0.3 are noise. The shards need the splits train2017 and val2017, packed from the
images and `annotations/instances_*.json`; then

    python -m jobs transfer transfer_coco --data.shards s3://bucket/coco --backbone URL \
        [--only fpn_1x]

With fewer GPUs set workers and global_batch_size: lr and steps follow by the linear rule.
"""

import dataclasses

from hemoco.config import DataConfig, MaskRcnnConfig, Recipe

_FPN = MaskRcnnConfig(inits=("pretrained", "random", "supervised"), workers=8, cpus=10, gpus=1)
_C4 = dataclasses.replace(_FPN, architecture="c4")

recipe = Recipe(
    name="transfer_coco",
    data=DataConfig(train_split="train2017", test_split="val2017"),
    transfers={
        "fpn_1x": _FPN,
        "fpn_2x": dataclasses.replace(_FPN, steps=180_000),
        "c4_1x": _C4,
        "c4_2x": dataclasses.replace(_C4, steps=180_000),
    },
)
