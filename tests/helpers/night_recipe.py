"""The recipe of the cluster tests: a pretraining over two hosts that fits two cores."""

from hemoco.config import (
    EncoderConfig,
    FineTuneConfig,
    KnnConfig,
    LinearProbeConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)

recipe = Recipe(
    name="night",
    pretrain=PretrainConfig(
        epochs=8,  # three times the steps that pass until the last fault of the night
        global_batch_size=128,
        log_every_steps=1,
        checkpoint_every_steps=5,
        knn_every_epochs=0,
        export_every_epochs=4,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(architecture="test_resnet"),
        moco=MoCoConfig(queue_length=512, bn_group_size=16),
        optimizer=OptimizerConfig(lr=0.05),
        stream=StreamConfig(workers=0, lanes=8),
        resources=ResourcesConfig(workers=2),
    ),
    transfers={
        "knn": KnnConfig(neighbours=20),
        "probe": LinearProbeConfig(epochs=5),
        "fine_tune": FineTuneConfig(
            workers=2,
            inits=("pretrained",),
            epochs=1,
            global_batch_size=64,
            size=32,
            resize=32,
            stream=StreamConfig(workers=0, lanes=8),
        ),
    },
    curve=("knn",),
)
