"""Information in a file for those who use it."""

from typing import Any

import timm
import torch

import stvit

from ..common.evaluation import class_names

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def file_metadata(
    model: Any, name: str, data_config: dict[str, Any], *, dtype: str, features: bool, class_map: str | None
) -> dict[str, Any]:
    """Returns the metadata of a file, in JSON types.

    Args:
        model: The model.
        name: Name of the model.
        data_config: Preprocessing of the model.
        dtype: Precision of the file.
        features: Whether the file returns feature maps.
        class_map: File of class names; None for the names stored with the weights.

    Raises:
        CommandError: If the file of class names cannot be read or does not fit the model.
    """
    metadata: dict[str, Any] = {"model": name, "dtype": dtype}
    if features:
        # A model of feature maps lists them in the order of its outputs.
        metadata |= {"strides": model.feature_info.reduction(), "channels": model.feature_info.channels()}
    else:
        metadata["num_classes"] = model.num_classes
        names = class_names(class_map, model)
        if names is not None:
            metadata["class_names"] = names
    for key in _PREPROCESSING:
        metadata[key] = list(data_config[key]) if isinstance(data_config[key], tuple) else data_config[key]
    return metadata | {"stvit": stvit.__version__, "torch": str(torch.__version__), "timm": timm.__version__}
