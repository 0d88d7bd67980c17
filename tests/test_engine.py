"""The training engine with a job other than classification."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task import TrainingTask
from torch import nn

from stvit.tools.common.cli import Interrupted
from stvit.tools.common.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainDeviceConfig
from stvit.tools.common.data import open_images
from stvit.tools.common.engine import Engine, check_config, open_session, prepare_model
from stvit.tools.common.flags import section
from stvit.tools.common.job import Job, SavedWeights, StepResult
from stvit.tools.common.loaders import TrainLoader, create_val_loader
from stvit.tools.common.optimization import backward, zero_gradients

DATA_CONFIG = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "interpolation": "nearest", "crop_pct": 1.0}


@dataclass
class Config:
    data: DataConfig = section("data", DataConfig)
    model: ModelConfig = section("model", ModelConfig)
    optim: OptimConfig = section("optimizer", OptimConfig)
    device: TrainDeviceConfig = section("device", TrainDeviceConfig)
    run: RunConfig = section("run", RunConfig)


class Regression(TrainingTask):
    """A model with the mean squared error as its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(verbose=False)
        self.trainable_module = model

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.trainable_module(image)[:, 0] - target).square().mean()}


class Brightness(Job):
    """Learns the mean brightness of images.

    It counts nothing in training, its loss has two parts, and its evaluation has no loss.
    """

    best_metric = "close"
    titles = {"close": "close guesses"}  # noqa: RUF012
    counts: Mapping[str, str] = {}
    losses = ("loss_squared", "loss_constant")
    label, description = "brightness", "a regression"

    def __init__(self, config: Config, distributed: Any) -> None:
        check_config(config, distributed)
        self.images = open_images(config.data, distributed, in_chans=1, seed=config.run.seed)
        self.model = prepare_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), config, distributed)
        data_config = {**DATA_CONFIG, "crop_mode": "center"}
        augment = AugmentConfig(no_aug=True)
        self.train_loader = TrainLoader(self.images.train, config.data, augment, data_config, distributed)
        self.val_loader = create_val_loader(self.images.val, config.data, data_config, distributed)
        self.task = Regression(self.model)
        self.epochs: list[int] = []

    def begin_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def step(self, batch: Any, is_first: bool) -> StepResult:
        image, _ = batch
        loss = self.task(image, image.mean(dim=(1, 2, 3)))["loss"]
        losses = {"loss_squared": loss, "loss_constant": torch.tensor(0.5)}
        return StepResult(loss + 0.5, len(image), losses=losses)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            errors = torch.cat([model(image)[:, 0] - image.mean(dim=(1, 2, 3)) for image, _ in batches])
        return {"close": 100 * (errors.abs() < 0.1).float().mean().item()}

    def save(self, model: nn.Module, folder: Path, saved: SavedWeights) -> None:
        folder.mkdir()
        torch.save(model.state_dict(), folder / "weights.pth")
        (folder / "about.json").write_text(json.dumps(vars(saved)))

    def write_card(self, folder: Path, name: str) -> None:
        (folder / "README.md").write_text(name)

    def usage(self, folder: Path) -> str:
        return f"torch.load('{folder}/weights.pth')"


Train = Callable[..., Brightness]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def train(name: str, epochs: int, stop_in: int | None = None) -> Brightness:
        config = Config(
            data=DataConfig(dataset="sklearn/digits", batch_size=128, workers=0),
            optim=OptimConfig(
                epochs=epochs, lr=1e-2, warmup_epochs=0, sched="constant", model_ema=True, model_ema_decay=0.5
            ),
            device=TrainDeviceConfig(device="cpu"),
            run=RunConfig(output=str(tmp_path), experiment=name, resume="auto", checkpoint_steps=5),
        )
        with open_session(config) as session:
            with session.preparing():
                job = Brightness(config, session.distributed)
                engine = Engine(session, config, job)
            if stop_in is not None:
                begin = job.begin_epoch

                def stop(epoch: int) -> None:
                    begin(epoch)
                    session.stop.signum = 15 if epoch == stop_in else None

                job.begin_epoch = stop
            engine.train()
        return job

    return train


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_without_classes(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = train("whole", epochs=4)
    said = capsys.readouterr().out
    assert "a regression, on cpu; results in" in said and "validation close guesses" in said
    assert f"torch.load('{tmp_path / 'whole/best'}/weights.pth')" in said
    table = rows(tmp_path / "whole")
    columns = ["epoch", "train_loss", "train_loss_squared", "train_loss_constant", "eval_close", "ema_close", "lr"]
    assert list(table[0]) == columns
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    for row in table:
        assert float(row["train_loss_constant"]) == 0.5
        assert float(row["train_loss"]) == pytest.approx(float(row["train_loss_squared"]) + 0.5)
    best = json.loads((tmp_path / "whole/best/about.json").read_text())
    assert best["value"] == max(float(row[f"{kind}_close"]) for row in table for kind in ("eval", "ema"))
    last = torch.load(tmp_path / "whole/last/weights.pth", weights_only=True)
    assert all(torch.equal(last[name], value) for name, value in job.model.state_dict().items())


def test_gradients_of_several_steps_in_memory_of_their_own() -> None:
    """A CUDA graph writes the gradients of each step to the same memory."""
    memory = torch.zeros(3)

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: torch.Tensor, factor: float) -> torch.Tensor:
            ctx.factor = factor
            return p.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return memory.fill_(ctx.factor), None

    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    config = OptimConfig(clip_grad=None)
    zero_gradients(optimizer, keep_memory=True)
    for update in (1, 2):
        backward(Graph.apply(p, 1.0), optimizer, config, [], None, is_last=False, keep_gradients=True)
        backward(Graph.apply(p, 2.0), optimizer, config, [], None, is_last=True, keep_gradients=True)
        assert torch.equal(p, torch.full((3,), 1.0 - 3 * update))
        assert torch.equal(p.grad, torch.zeros(3))
    zero_gradients(optimizer)
    assert p.grad is None


def test_a_stopped_job_resumes_exactly(train: Train, tmp_path: Path) -> None:
    train("whole", epochs=3)
    with pytest.raises(Interrupted, match=r"terminated; saved after epoch 1, update 0 of 11") as error:
        train("stopped", epochs=3, stop_in=1)
    assert error.value.status == 143
    assert train("stopped", epochs=3).epochs == [1, 2]
    for name in ("summary.csv", "last/weights.pth", "last_ema/weights.pth", "best/weights.pth"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
