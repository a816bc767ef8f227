"""Transfers that detect and segment: Faster and Mask R-CNN, COCO and VOC metrics."""
