"""Model files: the installed Ultralytics' own YOLO26 files, with another backbone or with super token attention.

A configuration made here is a whole Ultralytics model file with further keys at its top:
    stock_layers: For each row the row of Ultralytics' file that it is, or -1.
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

from stvit.adapters.yolo.modules import create_net, feature_maps

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
PAIRS = dict(zip(SCALES, ("stvit_pico", "stvit_nano", "stvit_tiny", "stvit_small", "stvit_base"), strict=True))
STOKEN_SIZES = {8: 4, 16: 2, 32: 1}  # of a map at a stride: cells of 32 pixels of the image
RATES = ("backbone_lr_scale", "layer_decay")

_NAME = re.compile(r"yolo26(?P<scale>[nslmx]?)-(?P<backbone>.+?)(?P<suffix>-(?:seg|sem|pose|obb|depth|cls))?\.ya?ml")
# Rows with a stride: their arguments begin with channels, kernel size, stride.
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
    """The installed Ultralytics' YOLO26 for a task, on a timm backbone.

    The backbone takes the rows of Ultralytics' backbone down to its deepest stride; neck and head stay what they are,
    in their places, so that published weights fit them.

    Args:
        backbone: A timm model with feature maps at strides 8, 16 and 32, such as 'stvit_small' or 'convnext_atto'.
        task: 'detect', 'segment', 'semantic', 'pose', 'obb', 'depth' or 'classify'.
        scale: Size of neck and head, one of 'n', 's', 'm', 'l', 'x'; '' leaves it to the name of the file.
        backbone_lr_scale: Learning rate of the backbone, over that of the rest.
        layer_decay: Learning rate of each layer of the backbone, over that of the next deeper one.
        model_args: Further arguments of the timm model, such as `drop_path_rate` or `stoken_size`.

    Returns:
        The configuration, which `stvit.adapters.yolo.YOLO` takes as it is, and any YAML file can hold.

    Raises:
        ValueError: If an argument is not as described, or the installed Ultralytics has no such file.
    """
    stock = _stock_config(task)
    config = {**stock, **_scale_key(scale), **check_rates(backbone_lr_scale, layer_decay)}
    rows = deepcopy(stock["backbone"] + stock["head"])
    strides = _strides(rows)
    depth = len(stock["backbone"])

    features = _measure(backbone, model_args)
    ends = _stage_ends(rows[:depth], strides[:depth])
    deepest = min(32, max(ends))  # where the pyramids of classifiers end; what is deeper stays Ultralytics'
    start = ends[deepest] + 1  # of what stays of Ultralytics' rows
    stays_from = {r for i, row in enumerate(rows[start:], start) for r in _froms(row, i) if r < start}
    needed = sorted({strides[r] for r in stays_from} | {deepest})
    if not stays_from <= set(ends.values()):
        raise ValueError(f"the backbone of Ultralytics {ultralytics.__version__} is built in a way unknown here")

    reductions = [reduction for _, reduction in features]
    if not set(needed) <= set(reductions):
        raise ValueError(
            f"the backbone {backbone} has feature maps at strides {reductions}, this model needs {needed}: take one "
            "with a pyramid of maps"
        )
    # Of several maps at a stride the last has seen most.
    indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in needed]
    taken: list[Row] = [[-1, 1, "nn.Identity", []] for _ in range(start)]
    taken[0] = [-1, 1, "TimmBackbone", ["c2", backbone, indices, *([_plain(model_args)] if model_args else [])]]
    for n, (stride, index) in enumerate(zip(needed, indices, strict=True)):
        taken[ends[stride]] = [0, 1, "Index", [features[index][0], n]]
    if rows[start][2] in _KEEPS_WIDTH:  # it expects the width that Ultralytics' own row would have
        taken[start - 2], width = taken[start - 1], rows[start - 1][3][0]
        taken[start - 1] = [-1, 1, "Conv", [width, 1, 1]]
    rows[:start] = taken
    config.update(backbone=rows[:depth], head=rows[depth:])
    config["stock_layers"] = [-1] * start + list(range(start, len(rows)))
    return config


def stoken_config(task: str = "detect", scale: str = "") -> dict[str, Any]:
    """The installed Ultralytics' YOLO26 for a task, with super token attention in backbone and head.

    A row of `StokenAttention` follows the backbone's stages at strides 8 and 16, and each map that the head proper
    takes; cells are of 32 pixels of the image.

    Args:
        task: As for `yolo_config`.
        scale: As for `yolo_config`.

    Returns:
        The configuration.

    Raises:
        ValueError: If an argument is not as described, or the installed Ultralytics has no such file.
    """
    stock = _stock_config(task)
    rows = stock["backbone"] + stock["head"]
    strides = _strides(rows)
    ends = _stage_ends(stock["backbone"], strides[: len(stock["backbone"])])
    last = rows[-1][0]
    places = {ends[8], ends[16], *(last if isinstance(last, list) else [])}

    made: list[Row] = []
    stock_layers: list[int] = []
    moved: dict[int, int] = {}  # where what a row of Ultralytics' file gives is found
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
    """The path of a model file of ours, made from the installed Ultralytics' own.

    Args:
        name: 'yolo26n-stvit_pico.yaml', 'yolo26s-stvit_small-seg.yaml': the scale of neck and head, the backbone (any
            of timm's with feature maps), the task; 'yolo26m-stvit.yaml': the backbone that pairs with the scale;
            'yolo26n-stokenattention.yaml': Ultralytics' own backbone, with super token attention.

    Returns:
        The path, which Ultralytics' own `YOLO` takes too once this package is imported. The file lies in Ultralytics'
        configuration folder and is written anew from time to time: edit a copy of it.

    Raises:
        ValueError: If the name is not of this kind, or what it names cannot be made.
    """
    name = str(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} names no model file: it must be like yolo26n-stvit_pico.yaml, with a scale of n, s, m, l or x, "
            f"a backbone, and one of {', '.join(suffix for suffix in TASK_SUFFIXES.values() if suffix)} for other tasks"
        )
    scale, backbone = match["scale"], match["backbone"]
    task = {suffix: task for task, suffix in TASK_SUFFIXES.items()}[match["suffix"] or ""]
    if backbone == "stokenattention":
        config = stoken_config(task)
    elif backbone.startswith("stoken"):
        raise ValueError(f"{name!r} names no model file, is it yolo26{scale}-stokenattention.yaml?")
    else:
        config = yolo_config(PAIRS[scale or "n"] if backbone == "stvit" else backbone, task)
    return write_config(config, Path(USER_CONFIG_DIR) / "stvit" / ultralytics.__version__ / name)


def write_config(config: dict[str, Any], path: Path) -> Path:
    """Writes a configuration as a model file, atomically, because several processes may do so at the same time."""
    lines = [
        f"# Made by stvit from the YOLO26 of Ultralytics {ultralytics.__version__}; edit a copy under another name."
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
        except PermissionError:  # on Windows while another process reads or writes it, who has the same text
            os.unlink(file.name)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                raise
    return path


def check_config(config: dict[str, Any]) -> None:
    """Checks what a model file says of its backbone, where Ultralytics would fail inside a convolution.

    Raises:
        ValueError: If rows pick maps that the backbone has not, or give them other channels; or a rate is none.
    """
    if not isinstance(config.get("backbone"), list) or not isinstance(config.get("head"), list):
        raise ValueError("a model file needs the rows of a backbone and of a head, yolo_config() makes it")
    check_rates(config.get("backbone_lr_scale"), config.get("layer_decay"))
    rows = config["backbone"] + config["head"]
    first = rows[0]
    if first[2] != "TimmBackbone":
        return
    if len(first[3]) not in (3, 4) or not isinstance(first[3][2], list):
        raise ValueError(
            f"row 0 of the model file must be like [-1, 1, TimmBackbone, [c2, stvit_small, [1, 2, 3]]], got {first}"
        )
    name, out_indices = first[3][1], first[3][2]
    features = _measure(name, first[3][3] if len(first[3]) == 4 else {})
    for i, (froms, _, kind, args) in enumerate(rows):
        if kind != "Index" or froms not in (0, -i):
            continue
        channels, index = args[0], args[1] if len(args) > 1 else 0
        if not -len(out_indices) <= index < len(out_indices):
            raise ValueError(f"row {i} of the model file picks map {index}, row 0 gives {len(out_indices)}")
        if out_indices[index] < len(features) and features[out_indices[index]][0] != channels:
            raise ValueError(
                f"row {i} of the model file says that map {index} of {name} has {channels} channels, it has "
                f"{features[out_indices[index]][0]}"
            )


def _stock_config(task: str) -> dict[str, Any]:
    if task not in TASK_SUFFIXES:
        raise ValueError(f"task must be one of {', '.join(TASK_SUFFIXES)}, got {task!r}")
    name = f"yolo26{TASK_SUFFIXES[task]}.yaml"
    # By its place, for by name Ultralytics would take a file of the working folder first.
    found = sorted((ROOT / "cfg" / "models").glob(f"*/{name}"))
    if not found:
        raise ValueError(f"Ultralytics {ultralytics.__version__} has no {name}, which this task is made from")
    return dict(YAML.load(found[0]))


def _scale_key(scale: str) -> dict[str, str]:
    if scale and scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    return {"scale": scale} if scale else {}


def check_rates(backbone_lr_scale: Any, layer_decay: Any) -> dict[str, float]:
    """Those of the backbone's rates that are given, as keys of a configuration.

    Raises:
        ValueError: If one is none.
    """
    rates = {
        key: value for key, value in zip(RATES, (backbone_lr_scale, layer_decay), strict=True) if value is not None
    }
    for key, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            hint = "; freeze=1 keeps a backbone as it is" if value == 0 else ""
            hint = "; to YAML 1e-1 is text, write 0.1" if isinstance(value, str) else hint
            raise ValueError(f"{key} must be a number over 0, got {value!r}{hint}")
        if key == "layer_decay" and value > 1.0:
            raise ValueError(f"layer_decay must be at most 1, got {value!r}")
    return {key: float(value) for key, value in rates.items()}


def _froms(row: Row, i: int) -> list[int]:
    """The rows that a row takes, counted from the first."""
    froms = row[0] if isinstance(row[0], list) else [row[0]]
    return [i + r if r < 0 else r for r in froms]


def _strides(rows: list[Row]) -> list[int]:
    """Pixels of the image for a pixel of what each row gives."""
    strides: list[float] = []
    for i, row in enumerate(rows):
        kind, args = row[2], row[3]
        source = _froms(row, i)[0]
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
    """For each stride of a backbone its last row; of the deepest its second, for others that follow are the neck's."""
    ends = {stride: i for i, stride in enumerate(strides)}
    deepest = max(strides)
    ends[deepest] = min(strides.index(deepest) + 1, len(rows) - 1)
    return ends


def _measure(backbone: str, model_args: dict[str, Any]) -> list[tuple[int, int]]:
    """Channels and reduction of a backbone's maps, seen to be so on images that are no square."""
    return _measured(backbone, json.dumps(_plain(model_args), sort_keys=True))


@cache
def _measured(backbone: str, model_args_json: str) -> list[tuple[int, int]]:
    model_args = json.loads(model_args_json)
    size = (128, 192)
    with torch.device("meta"):
        net = create_net(backbone, **model_args)
        feature_info = feature_maps(net, backbone)
        try:
            maps = net.eval().forward_intermediates(
                torch.zeros(1, 3, *size), output_fmt="NCHW", intermediates_only=True
            )
        except Exception as error:  # the model's own code, which may refuse a size in any way
            hint = "; strict_img_size=False makes it" if "swin" in backbone else ""
            raise ValueError(
                f"the backbone {backbone} does not take images of any size, as a detector must "
                f"({str(error) or type(error).__name__}){hint}"
            ) from error
    features = [(info["num_chs"], info["reduction"]) for info in feature_info]
    seen = [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]
    if seen != [(channels, size[0] // reduction, size[1] // reduction) for channels, reduction in features]:
        raise ValueError(f"the backbone {backbone} says its maps are {features}, and gives {seen} for images of {size}")
    return features


def _plain(value: Any) -> Any:
    """Tuples as lists, which a YAML file has."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
