"""A detector small enough to be trained in a test."""

from hemoco.config import MaskRcnnConfig

SMALL = MaskRcnnConfig(
    train_sizes=(64,),
    test_size=64,
    max_size=64,
    anchor_sizes=(8, 16, 32, 48, 64),
    fpn_channels=16,
    box_features=32,
    rois_per_image=16,
    proposals=50,
    max_detections=10,
)
