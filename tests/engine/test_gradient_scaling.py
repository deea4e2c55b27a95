"""Training in float16: gradient scaling, skipped steps, its limits, resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from torch import Tensor, nn

from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.trainer import Trainer
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal, rows
from tests.support.training import Regression, trainer


def scaled(output: Path, iterations: int, scale: float = 2.0**16, growth: int = 2000, **keys: Any) -> Trainer:
    """Return a trainer in float16 with an initial scale that doubles after ``growth`` steps without overflow."""
    run = trainer(output, iterations, **{"SOLVER__PRECISION": "float16"} | keys)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": scale, "growth_interval": growth})
    return run


def plain_model() -> Regression:
    """A model without dropout, which draws for each part and process."""
    torch.manual_seed(0)
    model = Regression()
    model.net[2] = nn.Identity()
    return model


class Recorder(HookBase):
    """Records the weights, AdamW's step count, and the learning rate after every iteration."""

    trainer: Trainer

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.steps: list[float] = []
        self.rates: list[float] = []

    def after_step(self) -> None:
        self.weights.append([p.detach().clone() for p in self.trainer.model.parameters()])
        self.steps.append(next((float(s["step"]) for s in self.trainer.optimizer.state.values()), 0.0))
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


def test_steps_that_overflow_change_nothing_but_the_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, recorder = scaled(tmp_path, 30, scale=2.0**24, growth=4), Recorder()
    start = [p.detach().clone() for p in run.model.parameters()]
    run.register_hooks([recorder])
    with caplog.at_level("INFO"):
        run.train()
    scale, skipped, good = 2.0**24, 0, 0
    for i, row in enumerate(rows(tmp_path)):
        overflow = "grad_norm" not in row
        skipped += overflow
        assert row["grad_scale"] == scale and row["skipped_steps"] == skipped
        assert equal(recorder.weights[i], recorder.weights[i - 1] if i else start) == overflow
        assert recorder.steps[i] == i + 1 - skipped
        assert recorder.rates[i] == row["lr"] == run.schedule(i)
        good = 0 if overflow else good + 1
        scale *= 0.5 if overflow else 2.0 if good % 4 == 0 else 1.0
    assert 5 < skipped < 25
    assert caplog.text.count("the step is skipped and the gradient scale") == skipped
    assert f"{skipped} of 30 steps were skipped" in caplog.text
    assert caplog.text.count("float16 is slow on a CPU") == 1


def test_gradients_are_clipped_after_the_scale_is_removed(tmp_path: Path) -> None:
    """Norms and steps depend on the scale only by rounding, and are those of float32 up to float16's precision."""
    runs = {"float32": trainer(tmp_path / "float32", 6, model=plain_model())}
    runs |= {str(scale): scaled(tmp_path / str(scale), 6, scale, model=plain_model()) for scale in (16.0, 256.0)}
    for run in runs.values():
        run.train()
    exact, *found = (rows(tmp_path / name) for name in runs)
    assert min(row["grad_norm"] for row in exact) > 1  # SOLVER.CLIP_GRADIENTS.CLIP_VALUE
    for other in found:
        for name in ("grad_norm", "total_loss"):
            assert [row[name] for row in other] == pytest.approx([row[name] for row in exact], rel=1e-2)
            assert [row[name] for row in other] == pytest.approx([row[name] for row in found[0]], rel=1e-3)


def test_accumulated_gradients_equal_those_of_the_batch_in_float16(tmp_path: Path) -> None:
    for parts in (1, 4):
        run = scaled(tmp_path / str(parts), 6, 256.0, model=plain_model(), SOLVER__GRAD_ACCUM_STEPS=parts)
        run.train()
    whole, parted = (rows(tmp_path / str(parts)) for parts in (1, 4))
    for name in ("grad_norm", "total_loss"):
        assert [row[name] for row in parted] == pytest.approx([row[name] for row in whole], rel=1e-2)


def test_a_resumed_run_in_float16_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """The checkpoint is within the skipped steps, and the scale grows again after it."""
    keys: dict[str, Any] = {"scale": 2.0**20, "growth": 3, "SOLVER__EMA__ENABLED": True}
    scaled(tmp_path / "straight", 20, **keys).train()
    scaled(tmp_path / "halves", 5, **keys).train()
    second = trainer(tmp_path / "halves", 20, SOLVER__PRECISION="float16", SOLVER__EMA__ENABLED=True)
    assert second.resume(allow_changes=True) and second.start_iter == 5 and second.scaler.skipped == 5
    second.train()
    straight, halves = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("straight", "halves")
    )
    assert all(equal(straight[key], halves[key]) for key in ("model", "optimizer", "scaler", "ema", "iteration"))
    assert rows(tmp_path / "straight") == rows(tmp_path / "halves")
    assert straight["scaler"]["skipped"] + straight["ema"]["updates"] == 20


@pytest.mark.parametrize("before", ["float32", "float16"])
def test_the_precision_may_change_on_resumption(before: str, tmp_path: Path) -> None:
    after = "float32" if before == "float16" else "float16"
    trainer(tmp_path, 5, SOLVER__PRECISION=before).train()
    second = trainer(tmp_path, 10, SOLVER__PRECISION=after)
    assert second.resume(allow_changes=True) and second.scaler.skipped == 0
    second.train()
    assert [("grad_scale" in row) for row in rows(tmp_path)] == [before == "float16"] * 5 + [after == "float16"] * 5


class Failing(Regression):
    """A model whose loss is NaN in the first ``count`` iterations."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.count -= 1
        return {"loss_square": super().forward(batch)["loss_square"] * (float("nan") if self.count >= 0 else 1.0)}


def test_a_loss_that_is_not_finite_ends_the_run_after_ten_iterations(tmp_path: Path) -> None:
    trainer(tmp_path / "nine", 12, model=Failing(9), SOLVER__PRECISION="float16").train()
    found = rows(tmp_path / "nine")
    assert ["total_loss" in row for row in found] == [False] * 9 + [True] * 3
    ten = trainer(tmp_path / "ten", 12, model=Failing(10), SOLVER__PRECISION="float16")
    with pytest.raises(
        UserError,
        match=r"^'loss_square' became nan at iteration 9 in float16 with a gradient scale of 128, the 10th iteration "
        r"in a row, .*/not_finite_\*.json lists the images.*: check them, .*SOLVER.PRECISION float32, then",
    ):
        ten.train()
    assert (tmp_path / "ten/not_finite_0.json").is_file()


def test_failing_iterations_are_counted_across_a_resumption(tmp_path: Path) -> None:
    trainer(tmp_path, 5, model=Failing(99), SOLVER__PRECISION="float16").train()
    second = trainer(tmp_path, 12, model=Failing(99), SOLVER__PRECISION="float16")
    second.resume(allow_changes=True)
    with pytest.raises(UserError, match="at iteration 9 in float16"):
        second.train()


def test_overflow_at_the_lowest_scale_ends_the_run(tmp_path: Path) -> None:
    class Steep(Regression):
        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            loss = super().forward(batch)["loss_square"]
            return {"loss_square": loss + (next(self.parameters()) * 0).sum().sqrt()}  # its gradient is NaN

    steep = trainer(tmp_path, 30, model=Steep(), SOLVER__PRECISION="float16")
    message = (
        r"^'grad_norm' became nan at iteration 16 in float16 with a gradient scale of 1, .*SOLVER.PRECISION float32"
    )
    with pytest.raises(UserError, match=message):
        steep.train()


def constant(sample: int) -> Tensor:
    return torch.full((4,), sample / 8)


def train_here(folder: str) -> None:
    """In each process: train in both precisions, and save the states that all processes must share."""
    output, states = Path(folder, str(comm.get_world_size())), []
    for precision in ("float32", "float16"):
        keys: dict[str, Any] = {"SOLVER__EMA__ENABLED": True, "mapper": constant, "model": plain_model()}
        run = scaled(output / precision, 8, 2.0**20, SOLVER__PRECISION=precision, **keys)
        run.train()
        assert run.average
        states.append({"scaler": run.scaler.state_dict(), "ema": run.average.state_dict()})
    torch.save(states, output / f"{comm.get_rank()}.pt")
    comm.synchronize()


def test_all_processes_have_one_average_and_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is that of one process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for processes in (1, 2):
        launch(train_here, processes, dist_url="auto", args=(str(tmp_path),))
    alone, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1/0.pt", "2/0.pt", "2/1.pt"))
    assert equal(first, second)
    assert first[1]["scaler"]["skipped"] > 0 and first[1]["ema"]["updates"] == 8 - first[1]["scaler"]["skipped"]
    torch.testing.assert_close(first[0]["ema"]["model"], alone[0]["ema"]["model"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("capability", "bfloat16", "expected"),
    [((6, 1), False, "float32"), ((7, 0), False, "float16"), ((7, 5), False, "float16"), ((8, 6), True, "bfloat16")],
)
def test_auto_follows_the_compute_capability_of_the_gpu(
    capability: tuple[int, int], bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")).name == expected
