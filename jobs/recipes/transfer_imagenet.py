r"""ResNet-50 on ImageNet-1k: linear protocols of MoCo v1, v2 and v3, kNN, and few labels.

Expected top-1 of `linear`, the official protocol of v1 and v2: 60.6% (v1), 67.5% (v2, 200 epochs),
71.1% (v2, 800 epochs), after 8 to 12 hours on 8 V100. Expected top-1 of `linear_v3`, that of v3:
68.9%, 72.8% and 74.6% after 100, 300 and 1000 epochs. These are the figures of the official code.

The shards need the splits train and val; then, from any backbone,

    python -m jobs transfer transfer_imagenet --data.shards s3://bucket/imagenet --backbone URL \
        [--only linear knn]
"""

from hemoco.config import (
    DataConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    Recipe,
    StreamConfig,
)

recipe = Recipe(
    name="transfer_imagenet",
    data=DataConfig(test_split="val"),
    transfers={
        "linear": LinearClassifierConfig(
            inits=("pretrained",),
            workers=8,
            cpus=10,
            gpus=1,
            stream=StreamConfig(workers=8, lanes=64),
        ),
        "linear_v3": LinearClassifierConfig(
            inits=("pretrained",),
            epochs=90,
            global_batch_size=1024,
            lr=0.4,
            schedule="cosine",
            workers=8,
            cpus=10,
            gpus=1,
            stream=StreamConfig(workers=8, lanes=64),
        ),
        "knn": KnnConfig(gpus=1, cpus=10),
        "linear_probe": LinearProbeConfig(
            gpus=1, cpus=10, lrs=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0), weight_decays=(0.0, 1e-6, 1e-5)
        ),
        "low_shot_1_percent": LowShotConfig(gpus=1, cpus=10, fraction=0.01, draws=3),
        "low_shot_10_percent": LowShotConfig(gpus=1, cpus=10, fraction=0.1, draws=3),
        "fine_tune": FineTuneConfig(
            workers=8, cpus=10, gpus=1, stream=StreamConfig(workers=8, lanes=64)
        ),
    },
)
