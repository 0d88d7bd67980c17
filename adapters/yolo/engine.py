"""Extends Ultralytics' `YOLO` and trainers by our model files and options."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import ultralytics
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import Optimizer
from ultralytics.models import yolo
from ultralytics.nn.tasks import load_checkpoint, yaml_model_load
from ultralytics.utils import LOGGER, ROOT, SAFE_LOAD, USER_CONFIG_DIR, YAML, checks
from ultralytics.utils.files import get_latest_run
from ultralytics.utils.torch_utils import unwrap_model

from stvit.weights.config import SPARE_PARAMETERS, limit_parameters
from stvit.weights.source import Source

from . import modules
from .checkpoint import check_local, fetch_checkpoint, trusting
from .config import RATES, check_config, check_rates, model_file, write_config
from .registration import allow_modules
from .weights import align, find_backbone, load_backbone, load_stock, transfer

__all__ = [
    "OPTIONS",
    "YOLO",
    "BackboneTrainer",
    "ClassificationTrainer",
    "DepthTrainer",
    "DetectionTrainer",
    "OBBTrainer",
    "PoseTrainer",
    "SegmentationTrainer",
    "SemanticSegmentationTrainer",
]

OPTIONS = ("pretrained_backbone", "stock_weights", *RATES)


class BackboneTrainer:
    """Adds complete transfer of weights and backbone learning rates to a trainer.

    The learning rates are keys of the model's configuration (`yolo_config`), so its checkpoints contain them.
    """

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Finds and checks the checkpoint to resume and its teacher model.

        Raises:
            stvit.PretrainedError: If a file is not safe to open.
        """
        arguments: Any = self.args  # type: ignore[attr-defined]
        if arguments.resume:
            is_named = isinstance(arguments.resume, (str, Path)) and Path(arguments.resume).exists()
            check_local(arguments.resume if is_named else get_latest_run())
        super().check_resume(overrides)  # type: ignore[misc]
        check_local(self.args.distill_model)  # type: ignore[attr-defined]

    def setup_model(self) -> Any:
        """Builds the model, as Ultralytics does, after checking the files that it opens.

        Raises:
            stvit.PretrainedError: If a file is not safe to open.
        """
        for name in (self.model, self.args.pretrained):  # type: ignore[attr-defined]
            if not (isinstance(name, str | Path) and Path(name).suffix.lower() in (".yaml", ".yml")):
                check_local(name)
        return super().setup_model()  # type: ignore[misc]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Builds the model for the data's classes and channels, and loads the weights.

        Raises:
            ValueError: If the configuration has wrong backbone rows or learning rates.
            RuntimeError: If not all weights of the backbone are transferred.
        """
        if cfg is not None:
            check_config(cfg if isinstance(cfg, dict) else yaml_model_load(cfg))
        # A checkpoint from another person can contain a small model and the configuration of a huge one.
        limit = None if weights is None else 2 * sum(p.numel() for p in weights.parameters()) + SPARE_PARAMETERS
        with limit_parameters(limit):
            model = super().get_model(cfg=cfg, weights=None, verbose=verbose)  # type: ignore[misc]
        if weights is not None:
            transfer(weights, model, getattr(weights, "loaded_keys", None))
        return model

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        """Returns Ultralytics' optimizer, with parameter groups for backbone rates."""
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        _set_backbone_rates(optimizer, model)
        return optimizer


class DetectionTrainer(BackboneTrainer, yolo.detect.DetectionTrainer):
    """Trains object detection."""


class SegmentationTrainer(BackboneTrainer, yolo.segment.SegmentationTrainer):
    """Trains instance segmentation."""


class SemanticSegmentationTrainer(BackboneTrainer, yolo.semantic.SemanticSegmentationTrainer):
    """Trains semantic segmentation."""


class PoseTrainer(BackboneTrainer, yolo.pose.PoseTrainer):
    """Trains pose estimation."""


class OBBTrainer(BackboneTrainer, yolo.obb.OBBTrainer):
    """Trains oriented object detection."""


class DepthTrainer(BackboneTrainer, yolo.depth.DepthTrainer):
    """Trains depth estimation."""


class ClassificationTrainer(BackboneTrainer, yolo.classify.ClassificationTrainer):
    """Trains classification."""


TRAINERS: dict[str, type[BackboneTrainer]] = {
    "detect": DetectionTrainer,
    "segment": SegmentationTrainer,
    "semantic": SemanticSegmentationTrainer,
    "pose": PoseTrainer,
    "obb": OBBTrainer,
    "depth": DepthTrainer,
    "classify": ClassificationTrainer,
}


class YOLO(ultralytics.YOLO):
    """Ultralytics' `YOLO` with our model files, trainers and options.

    In addition to all that Ultralytics' class accepts, `model` can be the name of one of our model files
    (`model_file`), a configuration (`yolo_config`), or a detector on the Hugging Face Hub ('hf-hub:org/name' or
    'hf-hub:org/name@revision').

    There are four additional options, which can be passed here or to `train`:
        pretrained_backbone: Weights of the backbone: a timm tag, 'hf-hub:org/name', or a file. True loads the default
            weights of the timm model.
        stock_weights: Published YOLO26 weights for neck and head, such as 'yolo26s.pt'. The scale must be the same.
        backbone_lr_scale: Learning rate of the backbone, divided by that of the other layers.
        layer_decay: Learning rate of each layer of the backbone, divided by that of the next deeper layer.

    No checkpoint can run code. A file that contains more than a detector is refused. With `trust=True`, all methods of
    this object also open such files, except from the Hub.
    """

    # Names of the tensors that were loaded into a model from a model file. Training initializes the others again, with
    # its own seed. None if all tensors count as loaded, as those of a checkpoint do.
    loaded_keys: list[str] | None = None
    # Whether the model comes from the Hub.
    is_published = False
    trust = False

    def __init__(
        self,
        model: str | Path | dict[str, Any] | ultralytics.engine.model.Model = "yolo26n.pt",
        task: str | None = None,
        verbose: bool = False,
        *,
        pretrained_backbone: str | Path | bool | None = None,
        stock_weights: str | Path | None = None,
        backbone_lr_scale: float | None = None,
        layer_decay: float | None = None,
        trust: bool = False,
    ) -> None:
        """Opens or builds the model, and loads the weights of the options.

        Args:
            model: Anything that Ultralytics' `YOLO` accepts, name of one of our model files, configuration, or
                'hf-hub:org/name'.
            task: As in Ultralytics' `YOLO`.
            verbose: As in Ultralytics' `YOLO`.
            pretrained_backbone: Weights of the backbone, see the class.
            stock_weights: Weights of neck and head, see the class.
            backbone_lr_scale: Factor on the learning rate of the backbone, see the class.
            layer_decay: Factor on the learning rate from layer to layer, see the class.
            trust: Whether to open files that contain more than a detector, and run their code.

        Raises:
            ValueError: If the model file, the backbone or an option is wrong.
            RuntimeError: If weights cannot be read, are not safe to open or do not fit. Often a
                `stvit.PretrainedError`, which is a subclass.
        """
        is_published = isinstance(model, (str, Path)) and Source.parse_hub(model) is not None
        if isinstance(model, dict):
            model = _write_custom(model)
        elif isinstance(model, (str, Path)):
            model = _find_model_file(_local(str(model).strip()))
            # Checked first, because Ultralytics turns this object into one of another class for some names ("-world").
            if not model.lower().endswith((".yaml", ".yml")):
                check_local(model, trust)
        self.trust = trust
        super().__init__(model=model, task=task, verbose=verbose)
        if is_published:
            self._forget_data()
        self._configure(pretrained_backbone, stock_weights, backbone_lr_scale, layer_decay)

    def _new(self, cfg: str, task: str | None = None, verbose: bool = False) -> None:
        config = yaml_model_load(cfg)
        check_config(config)
        super()._new(cfg, task=task, verbose=verbose)
        if find_backbone(self.model) is not None or "stock_layers" in config:
            self.loaded_keys = []

    def _forget_data(self) -> None:
        """Keeps only the name of the publisher's data file.

        Such a file could download and run code.
        """
        self.ckpt.pop("train_args", None)
        if self.overrides.get("data"):
            self.overrides["data"] = Path(str(self.overrides["data"])).name
        self.is_published = True

    def _load(self, weights: str, task: str | None = None) -> None:
        if SAFE_LOAD and Path(weights).is_file():
            allow_modules(weights)
        super()._load(weights, task=task)

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Ultralytics' classes for each task, with our trainers."""
        return {
            task: {**classes, "trainer": TRAINERS.get(task, classes["trainer"])}
            for task, classes in super().task_map.items()
        }

    def load(self, weights: str | Path | dict[str, Any] | nn.Module = "yolo26n.pt") -> "YOLO":
        """Loads all weights that fit, as Ultralytics' `YOLO` does.

        Rows whose number has changed also find their weights.

        Args:
            weights: As in Ultralytics' `YOLO`, or 'hf-hub:org/name'.

        Raises:
            stvit.PretrainedError: If the file is not safe to open.
        """
        if isinstance(weights, (str, Path)):
            weights = _local(str(weights))
            check_local(weights, self.trust)
        if isinstance(weights, str) and isinstance(self.model, nn.Module):
            source = load_checkpoint(weights)[0]
            aligned = align(source, self.model)
            super().load(weights if aligned is source else aligned)
        else:
            super().load(weights)
        self.loaded_keys = None
        return self

    def train(  # type: ignore[override]  # nn.Module.train has other arguments, also in Ultralytics
        self,
        trainer: Any = None,
        *,
        pretrained_backbone: str | Path | bool | None = None,
        stock_weights: str | Path | None = None,
        backbone_lr_scale: float | None = None,
        layer_decay: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains the model, as Ultralytics' `YOLO` does.

        Args:
            trainer: As in Ultralytics' `YOLO`.
            pretrained_backbone: Weights of the backbone, see the class.
            stock_weights: Weights of neck and head, see the class.
            backbone_lr_scale: Factor on the learning rate of the backbone, see the class.
            layer_decay: Factor on the learning rate from layer to layer, see the class.
            kwargs: Training arguments of Ultralytics.

        Raises:
            ValueError: If an option is wrong or contradicts another argument.
            RuntimeError: If weights cannot be read, are not safe to open or do not fit.
        """
        given = {
            key: value
            for key, value in zip(
                OPTIONS, (pretrained_backbone, stock_weights, backbone_lr_scale, layer_decay), strict=True
            )
            if value is not None
        }
        if given and kwargs.get("resume"):
            raise ValueError(
                f"{', '.join(given)} cannot be changed when a run is resumed; remove it, the run keeps its own value"
            )
        if self.is_published and kwargs.get("resume") is True:
            raise ValueError("a detector from the Hub has no training state to resume; remove resume=True")
        self._configure(pretrained_backbone, stock_weights, backbone_lr_scale, layer_decay)
        loaded_keys = self.loaded_keys
        pretrained = kwargs.get("pretrained", True)
        if loaded_keys and (pretrained is False or isinstance(pretrained, (str, Path))):
            raise ValueError(
                f"pretrained={pretrained} would discard the weights loaded by pretrained_backbone or stock_weights; "
                "remove one of them"
            )
        if "model" in kwargs:  # the command passes the name; self.overrides has the path
            kwargs["model"] = self.overrides["model"]
        if trainer is None and isinstance(kwargs.get("data"), (list, tuple)):
            # Otherwise Ultralytics starts a process with its own trainer for each data set.
            trainer = self._smart_load("trainer")
        model: Any = self.model
        if loaded_keys is not None:
            model.loaded_keys = loaded_keys
        try:
            self._check_files(kwargs)
            with trusting(self.trust):
                return super().train(trainer=trainer, **kwargs)
        finally:
            self.is_published = self.is_published and model is self.model
            model.__dict__.pop("loaded_keys", None)
            if model is not self.model:
                self.loaded_keys = None

    def tune(self, *args: Any, **kwargs: Any) -> Any:
        """Tunes the training arguments, as Ultralytics' `YOLO` does.

        Args:
            args: As in Ultralytics' `YOLO`.
            kwargs: As in Ultralytics' `YOLO`.

        Raises:
            stvit.PretrainedError: If a checkpoint in the arguments is not safe to open.
        """
        self._check_files(kwargs)
        with trusting(self.trust):
            return super().tune(*args, **kwargs)

    def _check_files(self, kwargs: dict[str, Any]) -> None:
        """Checks the checkpoints in training arguments, also in those of a `cfg` file."""
        arguments = YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else self.overrides
        for key in ("pretrained", "distill_model"):
            check_local({**self.overrides, **arguments, **kwargs}.get(key), self.trust)

    def export(self, **kwargs: Any) -> str:
        """Exports the model, as Ultralytics' `YOLO` does, and returns the path.

        Args:
            kwargs: Export arguments of Ultralytics.

        Raises:
            ValueError: If the format does not support models with our modules. Nothing is written or installed.
        """
        check_format(self.model, kwargs.get("format") or self.overrides.get("format"))
        return super().export(**kwargs)

    def _configure(
        self,
        pretrained_backbone: str | Path | bool | None,
        stock_weights: str | Path | None,
        backbone_lr_scale: float | None,
        layer_decay: float | None,
    ) -> None:
        rates = check_rates(backbone_lr_scale, layer_decay)
        pretrained = None if pretrained_backbone is False else pretrained_backbone
        of_backbone = [*([] if pretrained is None else ["pretrained_backbone"]), *rates]
        if not of_backbone and stock_weights is None:
            return
        self._check_is_pytorch_model()
        model: Any = self.model
        backbone = find_backbone(model)
        if of_backbone and backbone is None:
            raise ValueError(f"{of_backbone[0]} needs a model with a timm backbone, such as yolo26n-stvit_pico.yaml")
        keys = []
        if stock_weights is not None:
            keys += load_stock(model, stock_weights, trust=self.trust)
        if backbone is not None and pretrained is not None:
            load_backbone(backbone, pretrained)
            keys += [f"model.0.net.{key}" for key in backbone.net.state_dict()]
        model.yaml.update(rates)
        if self.loaded_keys is not None:
            self.loaded_keys = self.loaded_keys + keys
        # With a checkpoint, training starts from this model and its configuration instead of the model file.
        self.ckpt = self.ckpt or {"model": self.model}
        self.predictor = None


def check_format(model: Any, format: Any) -> None:
    """Refuses export formats that do not support models with our modules.

    Args:
        model: Model to export.
        format: `format` argument of the export; None for Ultralytics' default.

    Raises:
        ValueError: If the format is not supported.
    """
    if str(format).lower() != "imx" or not isinstance(model, nn.Module):
        return
    ours = (modules.TimmBackbone, modules.StokenAttention, modules.C2STA)
    kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, ours)})
    if kinds:
        raise ValueError(
            f"format='imx' is not supported for a model with {', '.join(kinds)}, because Ultralytics converts only "
            "YOLOv8n and YOLO11n to it; export to onnx, openvino, ncnn, coreml or torchscript"
        )


def _set_backbone_rates(optimizer: Optimizer, model: nn.Module) -> None:
    """Moves the backbone's parameters to groups with their own learning rates.

    The optimizer must not have taken a step.
    """
    detector: Any = unwrap_model(model)
    detector = getattr(detector, "student_model", detector)
    backbone = find_backbone(detector)
    factor, decay = (detector.yaml.get(key, 1.0) for key in RATES) if backbone is not None else (1.0, 1.0)
    if backbone is None or factor == decay == 1.0:
        return
    rates = {id(param): factor for param in backbone.parameters()}
    if decay != 1.0:
        for group in param_groups_layer_decay(backbone.net, layer_decay=decay):
            rates.update({id(param): factor * group["lr_scale"] for param in group["params"]})
    for group in list(optimizer.param_groups):
        split: dict[float, list[nn.Parameter]] = {}
        for param in group["params"]:
            if id(param) in rates:
                split.setdefault(rates[id(param)], []).append(param)
        group["params"] = [param for param in group["params"] if id(param) not in rates]
        options = {key: value for key, value in group.items() if key != "params"}
        if options.get("param_group") == "bias":
            options["param_group"] = "backbone_bias"  # Ultralytics' warm-up sets another learning rate for 'bias'
        for rate in sorted(split):
            optimizer.add_param_group({**options, "params": split[rate], "lr": group["lr"] * rate})
    if not any(param.requires_grad for param in backbone.parameters()):
        return
    LOGGER.info(
        f"The backbone {backbone.name} trains at {min(rates.values()):.3g} to {max(rates.values()):.3g} times the "
        "learning rate of the other layers"
    )


def _local(name: str) -> str:
    """Downloads a checkpoint of the Hub and returns its path.

    Other names are returned unchanged.
    """
    return name if Source.parse_hub(name) is None else str(fetch_checkpoint(name))


def _find_model_file(name: str) -> str:
    """Returns the path of one of our model files.

    Other names are returned unchanged, so that Ultralytics finds them.
    """
    if not re.fullmatch(r"yolo26[nslmx]?-[^/\\]+\.ya?ml", name):
        return name
    unified = re.sub(r"^yolo26[nslmx]", "yolo26", name)
    if Path(name).exists() or Path(unified).exists() or any((ROOT / "cfg" / "models").glob(f"*/{unified}")):
        return name
    return str(model_file(name))


def _write_custom(config: dict[str, Any]) -> str:
    """Writes a configuration to a file whose name contains the scale.

    Ultralytics accepts only files.
    """
    check_config(config)
    text = json.dumps(config, sort_keys=True, default=str)
    scale = config.get("scale", "")
    folder = Path(USER_CONFIG_DIR) / "stvit" / hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(
        write_config({key: config[key] for key in config if key != "scale"}, folder / f"yolo26{scale}-custom.yaml")
    )
