"""Model cards: README.md of a model folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import load_file

from stvit.hub.files import file_sha256
from stvit.hub.folder import read_config
from stvit.safe_text import code_span, escape_markdown, one_line
from stvit.weights.errors import is_own_model

CARD = "README.md"
# A card without it was written or changed by a person, and is left as it is.
CARD_MARK = "<!-- Written by stvit, and anew with each push. Remove this line to keep your own changes. -->"
CITATION = """@inproceedings{huang2023stvit,
  author    = {Huaibo Huang and Xiaoqiang Zhou and Jie Cao and Ran He and Tieniu Tan},
  title     = {Vision Transformer with Super Token Sampling},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""
CITATION_SECTION = f"""
## Citation

```bibtex
{CITATION}
```
"""


def model_card(folder: Path, name: str, *, license: str | None = None) -> str:
    """Returns the card of a folder: what it is, how to load it, what was measured and how, what to cite.

    Only the card of an STViT names and cites STViT. A model of timm loads without this package.

    Args:
        folder: With config.json and model.safetensors. Of its key `stvit` the card takes `weights` and `source`
            (sentences), `license`, `datasets` (ids of the Hub), and `metrics`: a list of `name`, `value` (percent),
            `dataset`, `split` and `how`.
        name: By which timm loads it, such as 'hf-hub:org/name'.
        license: Of the weights, as the Hub names it; None for what the details say, if anything.

    Raises:
        HubError: If config.json cannot be read.
    """
    config = read_config(folder)
    cfg, details = config["pretrained_cfg"], config.get("stvit", {})
    metrics = details.get("metrics", [])
    architecture, title = config["architecture"], Path(name.partition(":")[2]).resolve().name
    is_ours = is_own_model(architecture)
    license = license or details.get("license")
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["stvit", "super-token-attention"] if is_ours else [])],
        datasets=details.get("datasets"),
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w.-]+", "-", metric["dataset"]),
                dataset_name=metric["dataset"],
                dataset_split=metric.get("split"),
                metric_type="accuracy",
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in metrics
        ]
        or None,
    )
    quoted = json.dumps(one_line(name), ensure_ascii=False)  # the backslashes of a Windows path, too
    names = config.get("label_names")
    size = "x".join(str(n) for n in cfg["input_size"])
    facts = [
        f"architecture: {code_span(architecture)}, {_parameters(folder):.2f} M parameters",
        f"images: {escape_markdown(size)}, crop {escape_markdown(cfg.get('crop_pct'))}, "
        f"{escape_markdown(cfg.get('interpolation'))}, mean {_numbers(cfg['mean'])}, standard deviation "
        f"{_numbers(cfg['std'])}",
        f"classes: {escape_markdown(config['num_classes'])}{_some(list(names)) if names else ''}",
        *([f"weights: {escape_markdown(details['weights'])}"] if details.get("weights") else []),
        *([f"made from: {escape_markdown(details['source'])}"] if details.get("source") else []),
        f"sha256 of model.safetensors: `{file_sha256(folder / 'model.safetensors')}`",
        *([] if license else ["license: not stated by their owner"]),
    ]
    rows = [
        f"| {escape_markdown(m['name'])} | {m['value']:.2f} % | {escape_markdown(m['dataset'])} | "
        f"{escape_markdown(m['how'])} |"
        for m in metrics
    ]
    measured = "\n".join(["| | | on | measured |", "|---|---:|---|---|", *rows] if metrics else [])
    text = f"""
{CARD_MARK}

# {escape_markdown(title)}

{"A Super Token Vision Transformer" if is_ours else "An image classifier"} for timm.

```python
{"import stvit  # registers the architecture in timm" + chr(10) if is_ours else ""}import timm
import torch

model = timm.create_model({quoted}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
backbone = timm.create_model({quoted}, pretrained=True, features_only=True)
```

{chr(10).join(f"- {fact}" for fact in facts)}

## Results

{measured or "Not measured."}
{CITATION_SECTION if is_ours else ""}"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def write_card(folder: Path, name: str, *, license: str | None = None) -> bool:
    """Writes the card of a folder, unless a person has written or changed the one that is there.

    Args:
        folder: See `model_card`, for `name` and `license` too.
        name: By which timm loads it.
        license: Of the weights.

    Returns:
        Whether it was written.
    """
    path = folder / CARD
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8"):
        return False
    path.write_text(model_card(folder, name, license=license), encoding="utf-8")
    return True


def _parameters(folder: Path) -> float:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers)) / 1e6


def _some(names: Sequence[str]) -> str:
    """Returns the first class names, in parentheses. They may come from anybody's folders."""
    return f" ({', '.join(map(code_span, names[:10]))}{', …' if len(names) > 10 else ''})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
