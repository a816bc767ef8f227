"""The file of a tiny recipe that fits labelled shards, but for its detector: they have no boxes."""

RECIPE = """
from hemoco.config import *
recipe = Recipe(
    name="tiny",
    data=DataConfig(test_split="train"),
    pretrain=PretrainConfig(
        global_batch_size=16, moco=MoCoConfig(queue_length=64, bn_group_size=2), stream=StreamConfig(workers=0, lanes=4)
    ),
    transfers={"knn": KnnConfig(neighbours=5), "cells": FasterRcnnConfig()},
)
"""
