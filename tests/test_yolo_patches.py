"""Shows that Ultralytics still needs each change in stvit.adapters.yolo.patches.

If a test fails, remove the change.
"""

import inspect
import sys
from typing import Any

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics.cfg import entrypoint
from ultralytics.nn.tasks import DetectionModel, parse_model
from ultralytics.utils import callbacks

from stvit.adapters.yolo import patches, registration, yolo_config


class Twice(nn.Module):
    """Layer with a method `fuse`, unknown to Ultralytics."""

    is_fused = False

    def fuse(self) -> None:
        self.is_fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def config_of(kind: str) -> dict[str, Any]:
    """Returns the configuration of a classifier whose second row is a layer of this kind."""
    backbone = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, kind, []]]
    return {"nc": 2, "scales": {"n": [1, 1, 64]}, "backbone": backbone, "head": [[-1, 1, "Classify", ["nc"]]]}


@pytest.mark.parametrize("name", ["Twice", f"{__name__}.Twice"])
def test_ultralytics_finds_only_its_own_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="Twice"):
        parse_model(config_of(name), ch=3, verbose=False)
    monkeypatch.setattr(ultralytics.nn.tasks, "Twice", None, raising=False)  # removed after the test
    patches.add_modules([Twice])
    layers, _ = parse_model(config_of("Twice"), ch=3, verbose=False)
    assert isinstance(layers[1], Twice)


def test_ultralytics_fuses_only_its_own_modules() -> None:
    model = ultralytics.YOLO("yolo26n.yaml").model
    model.model[0] = nn.Sequential(model.model[0], Twice())
    model.model[0].f, model.model[0].i = -1, 0
    model.fuse(verbose=False)
    assert not model.model[0][1].is_fused


def test_ultralytics_pools_only_tensors() -> None:
    class Maps(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x, x]

    model = ultralytics.YOLO("yolo26n.yaml").model.eval()
    maps: Any = Maps()
    maps.f, maps.i = -1, 0
    model.model[0] = maps
    with pytest.raises((AttributeError, TypeError)) as caught:
        model(torch.rand(1, 3, 64, 64), embed=[0])
    assert caught.traceback[-1].name == "adaptive_avg_pool2d"


def test_ultralytics_ignores_the_rates_of_a_backbone() -> None:
    model = DetectionModel(yolo_config("stvit_pico", scale="n", backbone_lr_scale=0.1), verbose=False)
    trainer: Any = object.__new__(ultralytics.models.yolo.detect.DetectionTrainer)
    optimizer = trainer.build_optimizer(model, name="SGD", lr=0.01)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_callbacks_are_added_once() -> None:
    events = {"on_pretrain_routine_start": registration.refuse_lost_rates}
    for _ in range(2):
        patches.add_callbacks(events)
    assert callbacks.default_callbacks["on_pretrain_routine_start"].count(registration.refuse_lost_rates) == 1


def test_the_command_of_ultralytics_takes_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(entrypoint).parameters) == ["debug"]
    original = ultralytics.YOLO
    models: list[str] = []

    class Stop(Exception):
        pass

    class Replacement:
        def __init__(self, model: str, task: str | None = None) -> None:
            models.append(model)
            raise Stop

    with pytest.raises(Stop), patches.replace_classes({"YOLO": Replacement}):
        entrypoint("yolo predict model=yolo26n.yaml")
    assert models == ["yolo26n.yaml"] and ultralytics.YOLO is original


def test_the_command_of_ultralytics_takes_no_list_of_arguments() -> None:
    assert inspect.signature(entrypoint).parameters["debug"].annotation in (str, "str")
    before = list(sys.argv)
    with patches.replace_arguments(["predict", "source=my photos"]):
        assert ultralytics.cfg.ARGV == ["yolo", "predict", "source=my photos"]
    assert sys.argv == before
