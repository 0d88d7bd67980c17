"""Object detection: COCO data, metrics, and the parts of the commands."""
