"""A tiny recipe as a file. It fits labelled shards except for its detector, which needs boxes."""

RECIPE = """
from hemoco.config import *
recipe = Recipe(
    name="tiny",
    data=DataConfig(test_split="train"),
    pretrain=PretrainConfig(
        global_batch_size=16,
        moco=MoCoConfig(queue_length=64, bn_group_size=2),
        stream=StreamConfig(workers=0, lanes=4),
    ),
    transfers={"knn": KnnConfig(neighbours=5), "cells": FasterRcnnConfig()},
)
"""
