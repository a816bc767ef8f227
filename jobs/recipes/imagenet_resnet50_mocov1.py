r"""ResNet-50 on ImageNet-1k, MoCo v1 for 200 epochs (He et al. 2020, section 4.1).

Expected: 60.6% linear top-1 after 53 hours on 8 V100 (figures of the official code). The shards are
those of imagenet_resnet50_mocov2; then

    python -m jobs run imagenet_resnet50_mocov1 \
        --data.shards s3://bucket/imagenet --storage s3://bucket/runs
"""

from hemoco.config import (
    DataConfig,
    EncoderConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from jobs.recipes.transfer_imagenet import recipe as measured

recipe = Recipe(
    name="imagenet_resnet50_mocov1",
    data=DataConfig(test_split="val"),
    pretrain=PretrainConfig(
        epochs=200,
        global_batch_size=256,
        knn_every_epochs=0,
        views=ViewsConfig(grayscale_first=True, jitter=1.0, hue=0.4, blur=(0.0, 0.0)),
        encoder=EncoderConfig(architecture="resnet50"),
        moco=MoCoConfig(head="linear", temperature=0.07),
        optimizer=OptimizerConfig(schedule="step"),
        stream=StreamConfig(workers=8, lanes=64),  # one lane for each of the 64 loader processes
        resources=ResourcesConfig(workers=8, cpus_per_worker=10, gpus_per_worker=1),
    ),
    transfers={name: measured.transfers[name] for name in ("linear", "knn")},
)
