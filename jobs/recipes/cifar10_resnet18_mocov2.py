"""ResNet-18 on CIFAR-10, the official MoCo demo's recipe (facebookresearch/moco, colab notebook).

Expected: kNN 82.6% after 200 epochs on the lossless images, at 20 s per epoch on a V100. On two CPU
cores an epoch takes minutes per 10,000 images, so train for a few epochs only there.

The images must be in class folders, `train/<class>/` and `test/<class>/`, or in zips of these.
torchvision downloads CIFAR-10, and this Python program writes it so:

    from pathlib import Path
    from torchvision.datasets import CIFAR10

    for split in ("train", "test"):
        images = CIFAR10("/tmp/download", train=split == "train", download=True)
        for number, (image, label) in enumerate(images):
            folder = Path("/tmp/images", split, images.classes[label])
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:05d}.png")

Then

    python -m jobs pack /tmp/images /tmp/cifar10
    python -m jobs run cifar10_resnet18_mocov2 --data.shards /tmp/cifar10 --pretrain.epochs 2

Departs from the demo in the linear probe, which sees cached features instead of augmented images.
"""

from hemoco.config import (
    EncoderConfig,
    KnnConfig,
    LinearProbeConfig,
    LowShotConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ViewsConfig,
)

recipe = Recipe(
    name="cifar10_resnet18_mocov2",
    pretrain=PretrainConfig(
        epochs=200,
        global_batch_size=512,
        log_every_steps=5,
        checkpoint_every_steps=50,
        knn_every_epochs=1,
        views=ViewsConfig(
            size=32,
            crop_scale=(0.08, 1.0),
            blur=(0.0, 0.0),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
        ),
        encoder=EncoderConfig(architecture="resnet18", stem="small"),
        moco=MoCoConfig(
            head="linear", queue_length=4096, momentum=0.99, temperature=0.1, bn_group_size=64
        ),
        optimizer=OptimizerConfig(lr=0.06, weight_decay=5e-4),
    ),
    transfers={
        "knn": KnnConfig(),
        "linear_probe": LinearProbeConfig(),
        "low_shot": LowShotConfig(),
    },
)
