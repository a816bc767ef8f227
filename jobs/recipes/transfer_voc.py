r"""ResNet-50-C4 Faster R-CNN on VOC: trained on trainval 07+12, tested on test 07.

This is the protocol of He et al. 2020, table 2. Published AP / AP50 / AP75 by the 11-point metric
of VOC 2007 (here `box_ap_11point`, `box_ap50_11point`, which is the headline, and
`box_ap75_11point`), means of five runs with a deviation of 0.2 in AP and AP50:

    random                 33.8 / 60.2 / 33.1
    supervised             53.5 / 81.3 / 58.8
    MoCo v1                55.9 / 81.5 / 62.6
    MoCo v2, 200 epochs    57.0 / 82.4 / 63.6
    MoCo v2, 800 epochs    57.4 / 82.5 / 64.0

The shards are packed from both VOC folders, whose unlisted images get a split of their own; then

    python -m jobs transfer transfer_voc --data.shards s3://bucket/voc --backbone URL
"""

from hemoco.config import DataConfig, FasterRcnnConfig, Recipe

recipe = Recipe(
    name="transfer_voc",
    data=DataConfig(train_split="train+val", test_split="test"),
    transfers={
        "c4_24k": FasterRcnnConfig(
            inits=("pretrained", "random", "supervised"),
            seeds=(0, 1, 2, 3, 4),
            architecture="c4",
            steps=24_000,
            milestones=(18 / 24, 22 / 24),
            warmup_steps=100,
            train_sizes=tuple(range(480, 801, 32)),
            metric="voc07",
            workers=8,
            cpus=10,
            gpus=1,
        )
    },
)
