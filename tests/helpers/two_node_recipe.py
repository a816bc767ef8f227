"""A pretraining of a few steps and one transfer, for docs/how-to/run-on-your-own-machines.md."""

from hemoco.config import (
    EncoderConfig,
    KnnConfig,
    MoCoConfig,
    PretrainConfig,
    Recipe,
    StreamConfig,
    ViewsConfig,
)

recipe = Recipe(
    name="two_nodes",
    pretrain=PretrainConfig(
        epochs=1,
        global_batch_size=64,
        log_every_steps=1,
        knn_every_epochs=0,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(architecture="test_resnet"),
        moco=MoCoConfig(queue_length=64, bn_group_size=16),
        stream=StreamConfig(workers=0, lanes=8),
    ),
    transfers={"knn": KnnConfig(neighbours=5, inits=("pretrained",))},
)
