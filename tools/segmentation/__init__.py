"""Training, evaluation and prediction of semantic segmentation models."""
