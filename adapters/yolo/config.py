"""Makes model files from the YOLO26 files of the installed Ultralytics.

A configuration is a complete Ultralytics model file with a timm backbone or with super token attention. It has these
additional keys:
    stock_layers: For each row, the number of the same row in Ultralytics' file, or -1 for a new row.
    backbone_lr_scale, layer_decay: Learning rates of the backbone, see `yolo_config`.
"""

import json
import os
import re
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import ultralytics
import yaml
from ultralytics.utils import ROOT, USER_CONFIG_DIR, YAML

from stvit.adapters.backbone import create_net, feature_maps

__all__ = [
    "RATES",
    "TASK_SUFFIXES",
    "check_config",
    "check_rates",
    "model_file",
    "stoken_config",
    "write_config",
    "yolo_config",
]

TASK_SUFFIXES = {
    "detect": "",
    "segment": "-seg",
    "semantic": "-sem",
    "pose": "-pose",
    "obb": "-obb",
    "depth": "-depth",
    "classify": "-cls",
}
SCALES = "nsmlx"
# A detector with its pair costs at most 1.25 times as much as the stock one, in GFLOPs and in latency on a CPU.
PAIRS = dict(zip(SCALES, ("stvit_femto", "stvit_pico", "stvit_nano", "stvit_tiny", "stvit_small"), strict=True))
STOKEN_SIZES = {8: 4, 16: 2, 32: 1}  # by the stride of the feature map: each cell covers 32x32 image pixels
RATES = ("backbone_lr_scale", "layer_decay")

_NAME = re.compile(r"yolo26(?P<scale>[nslmx]?)-(?P<backbone>.+?)(?P<suffix>-(?:seg|sem|pose|obb|depth|cls))?\.ya?ml")
# Modules whose arguments begin with channels, kernel size and stride.
_STRIDED = ("Conv", "DWConv", "GhostConv", "SCDown", "LightConv", "Conv2", "RepConv")
_FIXED_STRIDE = ("ADown", "AConv", "Focus")
_KEEPS_WIDTH = ("C2PSA", "C2fPSA", "PSA")

Row = list[Any]


def yolo_config(
    backbone: str,
    task: str = "detect",
    scale: str = "",
    backbone_lr_scale: float | None = None,
    layer_decay: float | None = None,
    **model_args: Any,
) -> dict[str, Any]:
    """Returns the configuration of a YOLO26 with a timm backbone.

    The backbone replaces the rows of Ultralytics' backbone down to the deepest stride. Neck and head do not change, so
    published weights fit them.

    Args:
        backbone: Name of a timm model with feature maps at strides 8, 16 and 32, such as 'stvit_small' or
            'convnext_atto'.
        task: 'detect', 'segment', 'semantic', 'pose', 'obb', 'depth' or 'classify'.
        scale: Size of neck and head: 'n', 's', 'm', 'l' or 'x'. '' lets the name of the file decide.
        backbone_lr_scale: Learning rate of the backbone, divided by that of the other layers.
        layer_decay: Learning rate of each layer of the backbone, divided by that of the next deeper layer.
        model_args: Other arguments of the timm model, such as `drop_path_rate` or `stoken_size`.

    Returns:
        Configuration for `stvit.adapters.yolo.YOLO`. It can be stored in a YAML file.

    Raises:
        ValueError: If an argument is wrong, or the installed Ultralytics has no file for the task.
    """
    stock = _stock_config(task)
    config = {**stock, **_scale_key(scale), **check_rates(backbone_lr_scale, layer_decay)}
    rows = deepcopy(stock["backbone"] + stock["head"])
    strides = _strides(rows)
    depth = len(stock["backbone"])

    features = _measure(backbone, model_args)
    ends = _stage_ends(rows[:depth], strides[:depth])
    deepest = min(32, max(ends))  # classifiers have no deeper feature maps; deeper rows stay Ultralytics'
    start = ends[deepest] + 1  # first row that does not change
    inputs = {r for i, row in enumerate(rows[start:], start) for r in _input_rows(row, i) if r < start}
    needed = sorted({strides[r] for r in inputs} | {deepest})
    if not inputs <= set(ends.values()):
        raise ValueError(f"the backbone of Ultralytics {ultralytics.__version__} has an unsupported structure")

    reductions = [reduction for _, reduction in features]
    if not set(needed) <= set(reductions):
        raise ValueError(
            f"the backbone {backbone} has feature maps at strides {reductions}, this model needs {needed}; choose "
            "another backbone"
        )
    # If several feature maps have the same stride, the last is the deepest.
    indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in needed]
    replaced: list[Row] = [[-1, 1, "nn.Identity", []] for _ in range(start)]
    replaced[0] = [-1, 1, "TimmBackbone", ["c2", backbone, indices, *([_to_lists(model_args)] if model_args else [])]]
    for n, (stride, index) in enumerate(zip(needed, indices, strict=True)):
        replaced[ends[stride]] = [0, 1, "Index", [features[index][0], n]]
    if rows[start][2] in _KEEPS_WIDTH:  # the row expects the width of Ultralytics' own backbone
        replaced[start - 2], width = replaced[start - 1], rows[start - 1][3][0]
        replaced[start - 1] = [-1, 1, "Conv", [width, 1, 1]]
    rows[:start] = replaced
    config.update(backbone=rows[:depth], head=rows[depth:])
    config["stock_layers"] = [-1] * start + list(range(start, len(rows)))
    return config


def stoken_config(task: str = "detect", scale: str = "") -> dict[str, Any]:
    """Returns the configuration of a YOLO26 with super token attention.

    A `StokenAttention` row follows the backbone stages at strides 8 and 16, and each row of the neck that the head
    reads. Each cell covers 32x32 image pixels.

    Args:
        task: Task, as in `yolo_config`.
        scale: Size of neck and head, as in `yolo_config`.

    Returns:
        Configuration for `stvit.adapters.yolo.YOLO`.

    Raises:
        ValueError: If an argument is wrong, or the installed Ultralytics has no file for the task.
    """
    stock = _stock_config(task)
    rows = stock["backbone"] + stock["head"]
    strides = _strides(rows)
    ends = _stage_ends(stock["backbone"], strides[: len(stock["backbone"])])
    last = rows[-1][0]
    places = {ends[8], ends[16], *(last if isinstance(last, list) else [])}

    made: list[Row] = []
    stock_layers: list[int] = []
    moved: dict[int, int] = {}  # number of the new row that has the output of a row in Ultralytics' file
    depth = 0
    for i, (froms, *rest) in enumerate(deepcopy(rows)):
        if isinstance(froms, list):
            froms = [moved.get(r, r) for r in froms]
        else:
            froms = moved.get(froms, froms)
        made.append([froms, *rest])
        stock_layers.append(i)
        if i in places:
            made.append([-1, 1, "StokenAttention", ["c2", STOKEN_SIZES[strides[i]]]])
            stock_layers.append(-1)
        moved[i] = len(made) - 1
        if i < len(stock["backbone"]):
            depth = len(made)
    config = {**stock, **_scale_key(scale)}
    return {**config, "backbone": made[:depth], "head": made[depth:], "stock_layers": stock_layers}


def model_file(name: str | Path) -> Path:
    """Writes a model file by its name and returns the path.

    Args:
        name: One of
            - 'yolo26s-stvit_small-seg.yaml': scale of neck and head, name of a timm backbone, and task
            - 'yolo26m-stvit.yaml': the STViT backbone whose cost suits the scale
            - 'yolo26n-stokenattention.yaml': Ultralytics' own backbone with super token attention

    Returns:
        Path of the file in Ultralytics' configuration directory. Ultralytics' own `YOLO` also accepts this path. The
        file can be overwritten later, so edit only a copy.

    Raises:
        ValueError: If the name has another form, or the backbone is unknown or not suitable.
    """
    name = str(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a model file: expected a name like yolo26n-stvit_pico.yaml, with a scale (n, s, m, l or "
            f"x), a backbone, and for other tasks than detection one of "
            f"{', '.join(suffix for suffix in TASK_SUFFIXES.values() if suffix)}"
        )
    scale, backbone = match["scale"], match["backbone"]
    task = {suffix: task for task, suffix in TASK_SUFFIXES.items()}[match["suffix"] or ""]
    if backbone == "stokenattention":
        config = stoken_config(task)
    elif backbone.startswith("stoken"):
        raise ValueError(f"{name!r} is not a model file; did you mean yolo26{scale}-stokenattention.yaml?")
    else:
        config = yolo_config(PAIRS[scale or "n"] if backbone == "stvit" else backbone, task)
    return write_config(config, Path(USER_CONFIG_DIR) / "stvit" / ultralytics.__version__ / name)


def write_config(config: dict[str, Any], path: Path) -> Path:
    """Writes a configuration as a YAML model file and returns its path.

    Several processes can write the same file at the same time. Readers never see a partial file.

    Args:
        config: Configuration as returned by `yolo_config` or `stoken_config`.
        path: File to write. Nothing happens if it has the same text already.
    """
    lines = [
        f"# Written by stvit from the YOLO26 of Ultralytics {ultralytics.__version__}. Edit a copy with another name."
    ]
    for key, value in config.items():
        if key in ("backbone", "head"):
            lines += ["", f"{key}:"] + [f"  - {_flow(row)}" for row in value]
        elif key == "scales":
            lines += [f"{key}:"] + [f"  {scale}: {_flow(factors)}" for scale, factors in value.items()]
        else:
            lines.append(f"{key}: {_flow(value)}")
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        try:
            os.replace(file.name, path)
        except PermissionError:  # on Windows, while another process reads the file or writes the same text
            os.unlink(file.name)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                raise
    return path


def check_config(config: dict[str, Any]) -> None:
    """Checks the backbone rows and the learning rates of a model file.

    Ultralytics would fail later, in a convolution, with an unclear message.

    Raises:
        ValueError: If a row is wrong, selects a feature map that does not exist or states wrong channels, or if a
            learning rate is wrong.
    """
    if not isinstance(config.get("backbone"), list) or not isinstance(config.get("head"), list):
        raise ValueError("a model file must have the lists 'backbone' and 'head'; yolo_config() returns such a file")
    check_rates(config.get("backbone_lr_scale"), config.get("layer_decay"))
    rows = config["backbone"] + config["head"]
    first = rows[0]
    if first[2] != "TimmBackbone":
        return
    if len(first[3]) not in (3, 4) or not isinstance(first[3][2], list):
        raise ValueError(
            f"row 0 of the model file: expected a row like [-1, 1, TimmBackbone, [c2, stvit_small, [1, 2, 3]]], got "
            f"{first}"
        )
    name, out_indices = first[3][1], first[3][2]
    features = _measure(name, first[3][3] if len(first[3]) == 4 else {})
    for i, (froms, _, kind, args) in enumerate(rows):
        if kind != "Index" or froms not in (0, -i):
            continue
        channels, index = args[0], args[1] if len(args) > 1 else 0
        if not -len(out_indices) <= index < len(out_indices):
            raise ValueError(
                f"row {i} of the model file selects feature map {index}, but row 0 returns {len(out_indices)}"
            )
        if out_indices[index] < len(features) and features[out_indices[index]][0] != channels:
            raise ValueError(
                f"row {i} of the model file: feature map {index} of {name} has {features[out_indices[index]][0]} "
                f"channels, got {channels}"
            )


def _stock_config(task: str) -> dict[str, Any]:
    if task not in TASK_SUFFIXES:
        raise ValueError(f"task must be one of {', '.join(TASK_SUFFIXES)}, got {task!r}")
    name = f"yolo26{TASK_SUFFIXES[task]}.yaml"
    # By path, because a name would select a file in the working directory first.
    found = sorted((ROOT / "cfg" / "models").glob(f"*/{name}"))
    if not found:
        raise ValueError(f"Ultralytics {ultralytics.__version__} has no {name}, which task {task!r} needs")
    return dict(YAML.load(found[0]))


def _scale_key(scale: str) -> dict[str, str]:
    if scale and scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    return {"scale": scale} if scale else {}


def check_rates(backbone_lr_scale: Any, layer_decay: Any) -> dict[str, float]:
    """Returns the given learning rates of the backbone as keys of a configuration.

    Args:
        backbone_lr_scale: See `yolo_config`; None if not given.
        layer_decay: See `yolo_config`; None if not given.

    Raises:
        ValueError: If a rate is not a positive number, or `layer_decay` is above 1.
    """
    rates = {
        key: value for key, value in zip(RATES, (backbone_lr_scale, layer_decay), strict=True) if value is not None
    }
    for key, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            hint = "; pass freeze=1 to freeze the backbone" if value == 0 else ""
            hint = "; YAML reads 1e-1 as text, write 0.1" if isinstance(value, str) else hint
            raise ValueError(f"{key} must be a positive number, got {value!r}{hint}")
        if key == "layer_decay" and value > 1.0:
            raise ValueError(f"layer_decay must be at most 1, got {value!r}")
    return {key: float(value) for key, value in rates.items()}


def _input_rows(row: Row, i: int) -> list[int]:
    """Returns the numbers of the rows that row `i` reads."""
    froms = row[0] if isinstance(row[0], list) else [row[0]]
    return [i + r if r < 0 else r for r in froms]


def _strides(rows: list[Row]) -> list[int]:
    """Returns the stride of the output of each row, in image pixels."""
    strides: list[float] = []
    for i, row in enumerate(rows):
        kind, args = row[2], row[3]
        source = _input_rows(row, i)[0]
        stride = strides[source] if source >= 0 else 1.0
        if kind in _STRIDED and len(args) > 2:
            stride *= args[2]
        elif kind in _FIXED_STRIDE:
            stride *= 2
        elif kind == "nn.Upsample":
            stride /= args[1]
        strides.append(stride)
    return [int(stride) for stride in strides]


def _stage_ends(rows: list[Row], strides: list[int]) -> dict[int, int]:
    """Returns the last row of a backbone at each stride.

    At the deepest stride this is the second row, because later rows belong to the neck.
    """
    ends = {stride: i for i, stride in enumerate(strides)}
    deepest = max(strides)
    ends[deepest] = min(strides.index(deepest) + 1, len(rows) - 1)
    return ends


def _measure(backbone: str, model_args: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns channels and stride of each feature map of a backbone.

    The values are checked with images that are not square.
    """
    return _measure_json(backbone, json.dumps(_to_lists(model_args), sort_keys=True))


@cache
def _measure_json(backbone: str, model_args_json: str) -> list[tuple[int, int]]:
    model_args = json.loads(model_args_json)
    size = (128, 192)
    with torch.device("meta"):
        net = create_net(backbone, **model_args)
        feature_info = feature_maps(net, backbone)
        try:
            maps = net.eval().forward_intermediates(
                torch.zeros(1, 3, *size), output_fmt="NCHW", intermediates_only=True
            )
        except Exception as error:  # the model's code can refuse a size with any exception
            hint = "; pass strict_img_size=False" if "swin" in backbone else ""
            raise ValueError(
                f"the backbone {backbone} does not accept images of any size, which a detector needs "
                f"({str(error) or type(error).__name__}){hint}"
            ) from error
    features = [(info["num_chs"], info["reduction"]) for info in feature_info]
    seen = [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]
    if seen != [(channels, size[0] // reduction, size[1] // reduction) for channels, reduction in features]:
        raise ValueError(
            f"the backbone {backbone} declares feature maps (channels, stride) {features}, but returns maps of shapes "
            f"{seen} for images of {size}"
        )
    return features


def _to_lists(value: Any) -> Any:
    """Replaces tuples by lists, which YAML files can store."""
    if isinstance(value, dict):
        return {key: _to_lists(entry) for key, entry in value.items()}
    return [_to_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _flow(value: Any) -> str:
    """Returns a value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
