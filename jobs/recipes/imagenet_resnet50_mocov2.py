r"""ResNet-50 on ImageNet-1k, MoCo v2 for 200 epochs (Chen et al. 2020, table 1).

Expected: 67.5% linear top-1 after 53 hours on 8 V100 (figures of the official code). The shards
need the splits train and val, packed by `python -m jobs pack IMAGENET s3://bucket/imagenet`; then

    python -m jobs run imagenet_resnet50_mocov2 \
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
    name="imagenet_resnet50_mocov2",
    data=DataConfig(test_split="val"),
    pretrain=PretrainConfig(
        epochs=200,
        global_batch_size=256,
        knn_every_epochs=0,
        views=ViewsConfig(),
        encoder=EncoderConfig(architecture="resnet50"),
        moco=MoCoConfig(),
        optimizer=OptimizerConfig(),
        stream=StreamConfig(workers=8, lanes=64),  # one lane for each of the 64 loader processes
        resources=ResourcesConfig(workers=8, cpus_per_worker=10, gpus_per_worker=1),
    ),
    transfers={name: measured.transfers[name] for name in ("linear", "knn")},
)
