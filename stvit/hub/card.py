"""Model cards (README.md): one template for classifiers, detectors and Spaces."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCardData
from safetensors.torch import load_file

from stvit.hub.files import file_sha256
from stvit.hub.folder import WEIGHTS, Details, FolderConfig, Metric, read_config
from stvit.safe_text import code_span, escape_markdown, one_line
from stvit.weights.source import Source, is_own_model

__all__ = ["CARD", "CARD_MARK", "Card", "class_list", "is_edited", "model_card", "table", "write_card"]

CARD = "README.md"
# A card without this line was written or edited by a person. It is never replaced.
CARD_MARK = "<!-- Written by stvit, and replaced by each push. Remove this line to keep your changes. -->"
NOT_MEASURED = "Not measured."
TAGS = ("stvit", "super-token-attention")
CITATION = """@inproceedings{huang2023stvit,
  author    = {Huaibo Huang and Xiaoqiang Zhou and Jie Cao and Ran He and Tieniu Tan},
  title     = {Vision Transformer with Super Token Sampling},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""


@dataclass
class Card:
    """Contents of a card. Texts are Markdown.

    Attributes:
        metadata: Header that the Hub reads.
        title: Heading, as plain text.
        summary: Text below the heading.
        code: Lines of Python that load the model.
        image: Picture with its caption.
        facts: Items of a list.
        results: Section with measured results; empty for a card without one.
        is_stvit: Whether the model has super token attention. Only these cards cite the paper.
    """

    metadata: CardData
    title: str
    summary: str
    code: str = ""
    image: str = ""
    facts: list[str] = field(default_factory=list)
    results: str = ""
    is_stvit: bool = False

    def render(self) -> str:
        """Returns the text of README.md."""
        parts = [f"---\n{self.metadata.to_yaml()}\n---", CARD_MARK, f"# {escape_markdown(self.title)}", self.summary]
        if self.code:
            parts.append(f"```python\n{self.code}\n```")
        if self.image:
            parts.append(self.image)
        if self.facts:
            parts.append("\n".join(f"- {fact}" for fact in self.facts))
        if self.results:
            parts.append(f"## Results\n\n{self.results}")
        if self.is_stvit:
            parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
        return "\n\n".join(parts) + "\n"


def is_edited(path: Path) -> bool:
    """Returns whether a person wrote or edited a card."""
    return CARD_MARK not in path.read_text(encoding="utf-8")


def write_card(folder: Path, name: str, *, license: str | None = None) -> bool:
    """Writes the card of a model folder.

    A card that a person wrote or edited is kept.

    Args:
        folder: Folder with model.safetensors and config.json.
        name: Name that loads the model in timm, such as 'hf-hub:org/name'.
        license: License of the weights, in the Hub's spelling; None for the license in config.json.

    Returns:
        Whether the card was written.

    Raises:
        HubError: If config.json cannot be read.
    """
    path = folder / CARD
    if path.exists() and is_edited(path):
        return False
    path.write_text(model_card(folder, name, license=license), encoding="utf-8")
    return True


def model_card(folder: Path, name: str, *, license: str | None = None) -> str:
    """Returns the card of a classifier. `write_card` has the arguments."""
    config = read_config(folder)
    is_stvit = is_own_model(config.architecture)
    title = Path(Source.parse_model_name(name).full_name).resolve().name
    license = license or config.details.license
    return Card(
        metadata=ModelCardData(
            license=license,
            library_name="timm",
            pipeline_tag="image-classification",
            tags=["image-classification", "timm", *(TAGS if is_stvit else ())],
            datasets=config.details.datasets or None,
            model_name=title,
            eval_results=[_eval_result(metric) for metric in config.details.metrics] or None,
        ),
        title=title,
        summary="A Super Token Vision Transformer for timm." if is_stvit else "An image classifier for timm.",
        code=_code(name, is_stvit),
        facts=_facts(folder, config, license),
        results=_results(config.details),
        is_stvit=is_stvit,
    ).render()


def _code(name: str, is_stvit: bool) -> str:
    quoted = json.dumps(one_line(name), ensure_ascii=False)  # escapes the backslashes of a Windows path
    lines = ["import stvit  # registers the architecture in timm"] if is_stvit else []
    return "\n".join(
        [
            *lines,
            "import timm",
            "import torch",
            "",
            f"model = timm.create_model({quoted}, pretrained=True).eval()",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            f"backbone = timm.create_model({quoted}, pretrained=True, features_only=True)",
        ]
    )


def _facts(folder: Path, config: FolderConfig, license: str | None) -> list[str]:
    cfg, details = config.pretrained_cfg, config.details
    size = "x".join(str(side) for side in cfg["input_size"])
    classes = escape_markdown(cfg.get("num_classes"))
    names = list(cfg.get("label_names") or [])
    return [
        f"architecture: {code_span(config.architecture)}, {_count_parameters(folder):.2f} M parameters",
        f"images: {escape_markdown(size)}, crop {escape_markdown(cfg.get('crop_pct'))}, "
        f"{escape_markdown(cfg.get('interpolation'))}, mean {_numbers(cfg['mean'])}, standard deviation "
        f"{_numbers(cfg['std'])}",
        f"classes: {classes} ({class_list(names, 10)})" if names else f"classes: {classes}",
        *([f"weights: {escape_markdown(details.weights)}"] if details.weights else []),
        *([f"converted from: {escape_markdown(details.source)}"] if details.source else []),
        f"sha256 of {WEIGHTS}: `{file_sha256(folder / WEIGHTS)}`",
        *([] if license else ["license: not stated by the owner"]),
    ]


def _results(details: Details) -> str:
    rows = [[escape_markdown(m.name), f"{m.value:.2f} %", escape_markdown(m.dataset), escape_markdown(m.how)]
            for m in details.metrics]  # fmt: skip
    return table(["metric", "value", "dataset", "measured"], rows) if rows else NOT_MEASURED


def _eval_result(metric: Metric) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=re.sub(r"[^\w.-]+", "-", metric.dataset),
        dataset_name=metric.dataset,
        dataset_split=metric.split,
        metric_type="accuracy",
        metric_name=metric.name,
        metric_value=metric.value,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. The second column is aligned to the right."""
    alignment = ["---:" if column == 1 else "---" for column in range(len(header))]
    return "\n".join([f"| {' | '.join(header)} |", f"|{'|'.join(alignment)}|", *(f"| {' | '.join(r)} |" for r in rows)])


def class_list(names: Sequence[Any], limit: int) -> str:
    """Returns the first class names as Markdown code.

    Markdown and HTML in the names have no effect.
    """
    return ", ".join(map(code_span, names[:limit])) + (", …" if len(names) > limit else "")


def _count_parameters(folder: Path) -> float:
    """Returns the number of parameters in millions, without the buffers of BatchNorm."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    tensors = load_file(folder / WEIGHTS)
    return sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers)) / 1e6


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
