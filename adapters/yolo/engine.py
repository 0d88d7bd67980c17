"""Ultralytics' YOLO and its trainers, with our model files, weights for backbones and learning rates of their own."""

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

from stvit.adapters.yolo import modules
from stvit.adapters.yolo.config import RATES, check_config, check_rates, model_file, write_config
from stvit.adapters.yolo.hub import PREFIXES, check_local, fetch_checkpoint, trusting
from stvit.adapters.yolo.registration import allow_modules
from stvit.adapters.yolo.weights import align, find_backbone, load_backbone, load_stock, transfer
from stvit.weights.config import SPARE_PARAMETERS, limit_parameters

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
    """What our trainers add to Ultralytics': weights that arrive whole, and the backbone's learning rates.

    The rates are keys of the model's configuration (`yolo_config`), and so stay with it in its checkpoints.
    """

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Finds the checkpoint to resume, as Ultralytics does, and checks it and the teacher that it names.

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
        """Builds the model, as Ultralytics does, from files that are safe to open.

        Raises:
            stvit.PretrainedError: If one is not.
        """
        for name in (self.model, self.args.pretrained):  # type: ignore[attr-defined]
            if not (isinstance(name, str | Path) and Path(name).suffix.lower() in (".yaml", ".yml")):
                check_local(name)
        return super().setup_model()  # type: ignore[misc]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Builds the model for the data's classes and channels, and loads the weights into it.

        Raises:
            ValueError: If the configuration is wrong about its backbone.
            RuntimeError: If not all of the backbone arrives.
        """
        if cfg is not None:
            check_config(cfg if isinstance(cfg, dict) else yaml_model_load(cfg))
        # The configuration in somebody's checkpoint may be of another size than the weights beside it.
        limit = None if weights is None else 2 * sum(p.numel() for p in weights.parameters()) + SPARE_PARAMETERS
        with limit_parameters(limit):
            model = super().get_model(cfg=cfg, weights=None, verbose=verbose)  # type: ignore[misc]
        if weights is not None:
            transfer(weights, model, getattr(weights, "loaded_keys", None))
        return model

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        """Ultralytics' optimizer, with groups of their own for the backbone where it has its own rates."""
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        _set_backbone_rates(optimizer, model)
        return optimizer


class DetectionTrainer(BackboneTrainer, yolo.detect.DetectionTrainer):
    """Trains a detector."""


class SegmentationTrainer(BackboneTrainer, yolo.segment.SegmentationTrainer):
    """Trains instance segmentation."""


class SemanticSegmentationTrainer(BackboneTrainer, yolo.semantic.SemanticSegmentationTrainer):
    """Trains semantic segmentation."""


class PoseTrainer(BackboneTrainer, yolo.pose.PoseTrainer):
    """Trains pose estimation."""


class OBBTrainer(BackboneTrainer, yolo.obb.OBBTrainer):
    """Trains detection of oriented boxes."""


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
    """Ultralytics' YOLO, which also finds our model files and trainers.

    All that Ultralytics' does it does as it stands. In addition it takes the name of one of our model files
    (`model_file`), a configuration (`yolo_config`) or a detector on the Hugging Face Hub ('hf-hub:org/name', with
    '@revision' if need be; no code of its checkpoint is run), and four options, here or in `train`:
        pretrained_backbone: Weights of the backbone: a timm tag, 'hf-hub:org/name', a file; True for timm's own of its
            name.
        stock_weights: Published YOLO26 weights for neck and head, 'yolo26s.pt', of the same scale.
        backbone_lr_scale: Learning rate of the backbone, over that of the rest.
        layer_decay: Learning rate of each layer of the backbone, over that of the next deeper one.

    No code of a checkpoint is run, whether it is a local file, one that Ultralytics downloads, or on the Hub. A file
    that holds more than a detector is refused; `trust=True` opens it all the same, in everything that this object does,
    unless it is on the Hub.
    """

    # Of a model from a model file the tensors that were loaded: training draws the others again, under its seed. None
    # where all count, as those of a checkpoint.
    loaded_keys: list[str] | None = None
    # From the Hub, by somebody else's hand.
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
        """
        Args:
            model: As for Ultralytics' YOLO; the name of one of our model files; a configuration; 'hf-hub:org/name'.
            task: As for Ultralytics' YOLO.
            verbose: As for Ultralytics' YOLO.
            pretrained_backbone: See above.
            stock_weights: See above.
            backbone_lr_scale: See above.
            layer_decay: See above.
            trust: See above.

        Raises:
            ValueError: If the model file, the backbone or an option is not as described.
            RuntimeError: If weights cannot be read, are not safe to open or do not fit; mostly a
                `stvit.PretrainedError`, which is one.
        """
        is_published = isinstance(model, (str, Path)) and str(model).strip().startswith(PREFIXES)
        if isinstance(model, dict):
            model = _write_custom(model)
        elif isinstance(model, (str, Path)):
            model = _find_model_file(_local(str(model).strip()))
            # Before Ultralytics makes an object of another class of it, as of a name with "-world" in it.
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
        """Leaves of the publisher's data the name: a data file of theirs may say what to download, and to run."""
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
        """Loads what fits, as Ultralytics' YOLO does; rows that have moved find their weights where they were."""
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

    def train(  # type: ignore[override]  # as Ultralytics', whose YOLO is a module by name
        self,
        trainer: Any = None,
        *,
        pretrained_backbone: str | Path | bool | None = None,
        stock_weights: str | Path | None = None,
        backbone_lr_scale: float | None = None,
        layer_decay: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains as Ultralytics' YOLO does.

        Args:
            trainer: As for Ultralytics' YOLO.
            pretrained_backbone: See the class.
            stock_weights: See the class.
            backbone_lr_scale: See the class.
            layer_decay: See the class.
            kwargs: Arguments of training, as for Ultralytics' YOLO.

        Raises:
            ValueError: If an option is not as described, or contradicts another argument.
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
            raise ValueError(f"resume goes on with the run's own {', '.join(given)}: leave it out")
        if self.is_published and kwargs.get("resume") is True:
            raise ValueError("a detector on the Hub holds nothing to resume from: train without resume")
        self._configure(pretrained_backbone, stock_weights, backbone_lr_scale, layer_decay)
        loaded_keys = self.loaded_keys
        pretrained = kwargs.get("pretrained", True)
        if loaded_keys and (pretrained is False or isinstance(pretrained, (str, Path))):
            raise ValueError(
                f"pretrained={pretrained} throws away what pretrained_backbone or stock_weights loaded: give one or "
                "the other"
            )
        if "model" in kwargs:  # from a command line: the name, where self.overrides has the path
            kwargs["model"] = self.overrides["model"]
        if trainer is None and isinstance(kwargs.get("data"), (list, tuple)):
            trainer = self._smart_load("trainer")  # else each set is trained by Ultralytics' own, in another process
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
        """Tunes the training's arguments as Ultralytics' YOLO does.

        Args:
            args: As for Ultralytics' YOLO.
            kwargs: As for Ultralytics' YOLO.

        Raises:
            stvit.PretrainedError: If a file among the arguments is not safe to open.
        """
        self._check_files(kwargs)
        with trusting(self.trust):
            return super().tune(*args, **kwargs)

    def _check_files(self, kwargs: dict[str, Any]) -> None:
        """Checks the checkpoints among the arguments of a training, and those in its file of arguments (`cfg`)."""
        arguments = YAML.load(checks.check_yaml(kwargs["cfg"])) if kwargs.get("cfg") else self.overrides
        for key in ("pretrained", "distill_model"):
            check_local({**self.overrides, **arguments, **kwargs}.get(key), self.trust)

    def export(self, **kwargs: Any) -> str:
        """Exports as Ultralytics' YOLO does.

        Args:
            kwargs: Arguments of the export, as for Ultralytics' YOLO.

        Raises:
            ValueError: If the format cannot hold a model with our modules. Nothing is written or installed then.
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
        pretrained = pretrained_backbone is not None and pretrained_backbone is not False
        of_backbone = [*(["pretrained_backbone"] if pretrained else []), *rates]
        if not of_backbone and stock_weights is None:
            return
        self._check_is_pytorch_model()
        model: Any = self.model
        backbone = find_backbone(model)
        if of_backbone and backbone is None:
            raise ValueError(f"{of_backbone[0]} is for models on a timm backbone, such as yolo26n-stvit_pico.yaml")
        keys = []
        if stock_weights is not None:
            keys += load_stock(model, stock_weights, trust=self.trust)
        if backbone is not None and pretrained:
            load_backbone(backbone, pretrained_backbone)
            keys += [f"model.0.net.{key}" for key in backbone.net.state_dict()]
        model.yaml.update(rates)
        if self.loaded_keys is not None:
            self.loaded_keys = self.loaded_keys + keys
        # Training then begins from this model and its configuration, and not from the model file once more.
        self.ckpt = self.ckpt or {"model": self.model}
        self.predictor = None


def check_format(model: Any, format: Any) -> None:
    """Refuses an export format that Ultralytics converts stock models to, and models with our modules never.

    Args:
        model: What would be exported.
        format: The `format` argument of the export; None for Ultralytics' default.

    Raises:
        ValueError: If the format is refused.
    """
    if str(format).lower() != "imx" or not isinstance(model, nn.Module):
        return
    ours = (modules.TimmBackbone, modules.StokenAttention, modules.C2STA)
    kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, ours)})
    if kinds:
        raise ValueError(
            f"format='imx' is not supported for a model with {', '.join(kinds)}: Ultralytics converts only YOLOv8n and "
            "YOLO11n to it; export to onnx, openvino, ncnn, coreml or torchscript"
        )


def _set_backbone_rates(optimizer: Optimizer, model: nn.Module) -> None:
    """Splits the backbone's parameters off the groups of an optimizer that has taken no step yet."""
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
            options["param_group"] = "backbone_bias"  # warm-up has a rate of its own for 'bias'
        for rate in sorted(split):
            optimizer.add_param_group({**options, "params": split[rate], "lr": group["lr"] * rate})
    if not any(param.requires_grad for param in backbone.parameters()):
        return
    LOGGER.info(
        f"The backbone {backbone.name} learns at {min(rates.values()):.3g} to {max(rates.values()):.3g} times the "
        "learning rate of the rest"
    )


def _local(name: str) -> str:
    """The path of a checkpoint on the Hub, downloaded and safe to open; other names as they are."""
    return str(fetch_checkpoint(name)) if name.startswith(PREFIXES) else name


def _find_model_file(name: str) -> str:
    """The path of one of our model files; other names as they are, for Ultralytics to look up."""
    if not re.fullmatch(r"yolo26[nslmx]?-[^/\\]+\.ya?ml", name):
        return name
    unified = re.sub(r"^yolo26[nslmx]", "yolo26", name)
    if Path(name).exists() or Path(unified).exists() or any((ROOT / "cfg" / "models").glob(f"*/{unified}")):
        return name
    return str(model_file(name))


def _write_custom(config: dict[str, Any]) -> str:
    """Writes a configuration as a file, for Ultralytics takes no other, under a name that says its scale."""
    check_config(config)
    text = json.dumps(config, sort_keys=True, default=str)
    scale = config.get("scale", "")
    folder = Path(USER_CONFIG_DIR) / "stvit" / hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(
        write_config({key: config[key] for key in config if key != "scale"}, folder / f"yolo26{scale}-custom.yaml")
    )
