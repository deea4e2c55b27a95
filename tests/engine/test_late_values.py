"""Training that launches an iteration before it reads the values of the previous one, as on a GPU."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from torch import Tensor

from relvit_d2.data.loader import EndlessOrder
from relvit_d2.engine import signals
from relvit_d2.engine.iteration_values import IterationValues
from relvit_d2.engine.trainer import Trainer
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal, rows
from tests.support.training import Regression, trainer


class Recorder(HookBase):
    """Records the order of launches, hooks and logged losses, and the weights after each iteration."""

    trainer: Trainer

    def __init__(self, model: Regression) -> None:
        self.order: list[str] = []
        model.register_forward_hook(lambda *_: self.order.append(f"launch {self.trainer.iter}"))

    def before_step(self) -> None:
        self.order.append(f"before {self.trainer.iter}")

    def after_step(self) -> None:
        storage = self.trainer.storage
        assert storage.latest()["total_loss"][1] == storage.iter == self.trainer.iter
        self.order.append(f"after {self.trainer.iter}")


class Failing(Regression):
    """A model whose loss is NaN from the pass ``first`` on, counted from 0."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.passes, self.first = 0, first

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        return {"loss_square": super().forward(batch)["loss_square"] * (math.nan if self.passes > self.first else 1.0)}


def late(output: Path, iterations: int, **keys: Any) -> Trainer:
    run = trainer(output, iterations, **keys)
    run.reads_late = True
    return run


def final(output: Path) -> dict[str, Any]:
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert sorted(path.name for path in one.glob("*.pth")) == sorted(path.name for path in other.glob("*.pth"))
    first, second = final(one), final(other)
    assert all(equal(first[key], second[key]) for key in ("model", "optimizer", "ema", "iteration"))


def test_metrics_and_checkpoints_do_not_depend_on_when_values_are_read(tmp_path: Path) -> None:
    """Weights of checkpoints and evaluations are those of their iteration."""

    def evaluated(run: Trainer) -> None:
        state = run.model.state_dict()
        evaluation = run.checkpointer.checkpointables["evaluation"]
        evaluation._evaluate = lambda: {"set": {"AP": sum(value.sum().item() for value in state.values())}}

    keys: dict[str, Any] = {"evaluate": dict, "SOLVER__EMA__ENABLED": True, "TEST__EVAL_PERIOD": 7}
    keys |= {"SOLVER__GRAD_ACCUM_STEPS": 2, "TEST__BEST_METRIC": "set/AP"}
    for make, name in ((trainer, "in_turn"), (late, "late")):
        run = make(tmp_path / name, 18, **keys)
        evaluated(run)
        run.train()
    assert_same(tmp_path / "in_turn", tmp_path / "late")
    for path in (tmp_path / "late").glob("model_0*.pth"):
        one, other = (
            torch.load(folder / path.name, weights_only=True) for folder in (path.parent, tmp_path / "in_turn")
        )
        assert equal(one["model"], other["model"])
        assert one["scalars"]["total_loss"] == other["scalars"]["total_loss"]


def test_an_iteration_is_launched_before_the_hooks_of_the_previous_one(tmp_path: Path) -> None:
    """Except after an iteration that is saved."""
    model = Regression()
    recorder = Recorder(model)
    run = late(tmp_path, 4, model=model, SOLVER__CHECKPOINT_PERIOD=2)
    run.register_hooks([recorder])
    run.train()
    assert recorder.order == [
        *("before 0", "launch 0", "launch 1", "after 0", "before 1", "after 1"),
        *("before 2", "launch 2", "launch 3", "after 2", "before 3", "after 3"),
    ]


def test_a_resumed_run_equals_one_that_reads_in_turn(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"SOLVER__EMA__ENABLED": True}
    trainer(tmp_path / "straight", 20, **keys).train()
    for iterations in (9, 20):
        run = late(tmp_path / "parts", iterations, **keys)
        run.resume(allow_changes=True)
        run.train()
    one, other = final(tmp_path / "straight"), final(tmp_path / "parts")
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "ema"))
    assert rows(tmp_path / "straight") == rows(tmp_path / "parts")


@pytest.mark.parametrize("first", [0, 3, 5, 6, 9, 10])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_bad_checkpoint(first: int, tmp_path: Path) -> None:
    """Checkpoints are due after iterations 4, 9 and 10."""
    run = late(tmp_path, 11, model=Failing(first))
    with pytest.raises(UserError, match=f"'loss_square' became nan at iteration {first}, "):
        run.train()
    written = json.loads((tmp_path / "not_finite_0.json").read_text())
    images = [str(i) for _, i in EndlessOrder(10, 4, 0, 0).keys(first)]
    assert written == {"iteration": first, "term": "loss_square", "images": images}
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000004.pth", "model_0000009.pth"][: (first > 4) + (first > 9)]
    for name in names:
        assert all(value.isfinite().all() for value in torch.load(tmp_path / name)["model"].values())
    assert [row["iteration"] for row in rows(tmp_path) if "total_loss" in row] == list(range(first))


def test_a_signal_ends_the_run_after_the_iteration_that_was_launched(tmp_path: Path) -> None:
    trainer(tmp_path / "straight", 12).train()
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.install(patient=False)
    torch.manual_seed(0)
    model = Regression()
    calls: list[int] = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    model.register_forward_hook(interrupt)
    try:
        with pytest.raises(signals.Interrupted):
            late(tmp_path / "parts", 12, model=model).train()
    finally:
        signals.forget()
        for number, handler in before.items():
            signal.signal(number, handler)
    newest = (tmp_path / "parts/last_checkpoint").read_text()
    assert newest == "model_0000003.pth" and [row["iteration"] for row in rows(tmp_path / "parts")] == [0, 1, 2, 3]
    run = late(tmp_path / "parts", 12)
    assert run.resume() and run.start_iter == 4
    run.train()
    one, other = final(tmp_path / "straight"), final(tmp_path / "parts")
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "iteration"))
    assert rows(tmp_path / "straight") == rows(tmp_path / "parts")


def test_values_are_means_by_name_in_order() -> None:
    means = {"accuracy_x": torch.tensor(0.5), "total_loss": torch.tensor(2.0), "grad_norm": torch.tensor(math.inf)}
    values = IterationValues(7, means, 0.1, 0.2, 15)
    assert values.read() == ({"accuracy_x": 0.5, "total_loss": 2.0, "grad_norm": math.inf}, 15)
    assert list(values.read()[0]) == list(means)
    assert (values.iteration, values.rate, values.data_time, values.is_loss_finite()) == (7, 0.1, 0.2, True)
    assert not IterationValues(0, {"total_loss": torch.tensor(math.nan)}, 0.1, 0.2, 0).is_loss_finite()
