"""Detection and segmentation transfers: Faster and Mask R-CNN, COCO and VOC metrics."""
