r"""ResNet-50 on ImageNet-1k, MoCo v3 for 100 epochs (Chen, Xie, He 2021).

Expected: 68.9% linear top-1. The recipe is made for 16 GPUs of 32 GB. Only the global batch of 4096
matters: any number of workers that divides it trains the same.

    python -m jobs run imagenet_resnet50_mocov3_100ep \
        --data.shards s3://bucket/imagenet --storage s3://bucket/runs
"""

from hemoco.config import (
    DataConfig,
    EncoderConfig,
    MoCoV3Config,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from jobs.recipes.transfer_imagenet import recipe as measured

recipe = Recipe(
    name="imagenet_resnet50_mocov3_100ep",
    data=DataConfig(test_split="val"),
    pretrain=PretrainConfig(
        epochs=100,
        global_batch_size=4096,
        precision="float16",
        knn_every_epochs=0,
        views=ViewsConfig(saturation=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2)),
        encoder=EncoderConfig(architecture="resnet50", zero_init_last=True),
        moco=MoCoV3Config(),
        optimizer=OptimizerConfig(
            kind="lars",
            lr=0.6 * 4096 / 256,
            weight_decay=1e-6,
            schedule="cosine_per_step",
            warmup_epochs=10,
        ),
        stream=StreamConfig(workers=8, lanes=128),  # one lane for each of the 128 loader processes
        resources=ResourcesConfig(workers=16, cpus_per_worker=10, gpus_per_worker=1),
    ),
    transfers={name: measured.transfers[name] for name in ("linear_v3", "knn")},
)
