"""Learning rate schedules of a training."""

from pathlib import Path

import pytest
from torch import nn

from stvit.tools import train_det
from stvit.tools.common.cli import CommandError
from stvit.tools.common.config import OptimConfig
from stvit.tools.common.flags import to_recipe
from stvit.tools.common.optimization import create_optimizer, current_lr, find_schedule_problems
from stvit.tools.common.runs import write_recipe

UPDATES = 10  # of an epoch


def rates(**settings: object) -> list[float]:
    """Returns the learning rate of each update of a training, as the engine sets it."""
    config = OptimConfig(**{"lr": 1.0, "min_lr": 0.0, "warmup_epochs": 0, "warmup_lr": 0.0, **settings})
    optimizer, scheduler = create_optimizer(config, nn.Linear(2, 2), UPDATES)
    found = []
    for epoch in range(config.epochs):
        for update in range(UPDATES):
            found.append(current_lr(optimizer))
            scheduler.step_update(epoch * UPDATES + update + 1)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize("on_updates", [False, True])
def test_multistep_decays_after_its_epochs(on_updates: bool) -> None:
    found = rates(epochs=4, sched="multistep", decay_milestones=[2, 3], sched_on_updates=on_updates)
    expected = [1.0] * 20 + [0.1] * 10 + [0.01] * 10
    late = [19, 29] if on_updates else []  # timm decays one update early
    assert [rate for i, rate in enumerate(found) if i not in late] == pytest.approx(
        [rate for i, rate in enumerate(expected) if i not in late]
    )


def test_poly_is_linear_by_default() -> None:
    found = rates(epochs=4, sched="poly", sched_on_updates=True)
    assert found == pytest.approx([1 - i / 40 for i in range(40)])
    squared = rates(epochs=4, sched="poly", sched_on_updates=True, decay_rate=2.0)
    assert squared == pytest.approx([(1 - i / 40) ** 2 for i in range(40)])


def test_warmup_of_updates() -> None:
    found = rates(epochs=2, sched="constant", sched_on_updates=True, warmup_updates=4)
    assert found[:6] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("on_updates", [False, True])
def test_no_warmup(on_updates: bool) -> None:
    assert rates(epochs=1, sched="constant", sched_on_updates=on_updates, warmup_updates=0) == [1.0] * UPDATES


@pytest.mark.parametrize(
    ("recipe", "flags", "epochs", "updates"),
    [
        ("", [], 0, 500),
        ("", ["--warmup-epochs=2"], 2, None),
        ("", ["--warmup-epochs=0", "--no-sched-on-updates"], 0, None),
        ("", ["--warmup-updates=0"], 0, 0),
        ("warmup_updates: 50", ["--warmup-epochs=2"], 2, None),
        ("warmup_epochs: 2", [], 2, None),
        ("warmup_epochs: 2", ["--warmup-updates=7"], 2, 7),
    ],
)
def test_the_later_warmup_counts(
    recipe: str, flags: list[str], epochs: int, updates: int | None, tmp_path: Path
) -> None:
    """Also in the recipe that a run writes."""
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = train_det.parse_args([f"--config={tmp_path / 'recipe.yaml'}", *flags])
    write_recipe(tmp_path, to_recipe(config))
    for read in (config, train_det.parse_args([f"--config={tmp_path / 'config.yaml'}"])):
        assert (read.optim.warmup_epochs, read.optim.warmup_updates) == (epochs, updates)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_updates": 20}, "--warmup-updates 20 is not shorter than the training of 2 epochs of 10 updates"),
        ({"warmup_updates": 19}, None),
        ({"warmup_epochs": 2}, "--warmup-epochs 2 is not shorter than the training of 2 epochs of 10 updates"),
        ({"sched": "multistep", "decay_milestones": [1]}, None),
        ({"sched": "multistep", "decay_milestones": [1, 2, 99]}, "does not decay after epoch 2, 99 (--decay-milest"),
    ],
)
def test_schedules_longer_than_the_training(settings: dict[str, object], said: str | None) -> None:
    config = OptimConfig(**{"epochs": 2, "warmup_epochs": 0, **settings})
    problems = find_schedule_problems(config, UPDATES)
    assert problems == [] if said is None else len(problems) == 1 and said in problems[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_updates": 4}, "--warmup-updates 4 needs --sched-on-updates.*, or --warmup-epochs N instead"),
        ({"sched": "multistep"}, "--sched multistep needs --decay-milestones"),
        ({"sched": "cosin"}, "cannot create optimizer adamw with schedule cosin"),
    ],
)
def test_wrong_schedules(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        create_optimizer(OptimConfig(lr=1.0, **settings), nn.Linear(2, 2), UPDATES)
