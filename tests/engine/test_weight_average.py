"""The moving average of the weights: its rule, resumption, files and the best model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import WeightAverage
from tests.support.runs import equal
from tests.support.training import Regression, trainer


class Normalised(Regression):
    """A model with buffers, one of them an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def averaged(output: Path, iterations: int, decay: float = 0.9, **keys: Any) -> Trainer:
    torch.manual_seed(0)  # of the initial weights
    standard: dict[str, Any] = {"model": Normalised(), "SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": decay}
    return trainer(output, iterations, **standard | keys)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_recursion_over_the_saved_weights(decay: float, tmp_path: Path) -> None:
    """Update k keeps min(decay, 1 - k^-0.75) of the average; buffers are the last ones. Decay 0: the weights."""
    averaged(tmp_path, 12, decay, SOLVER__CHECKPOINT_PERIOD=1).train()
    names = [name for name, _ in Normalised().named_parameters()]
    mean = {name: torch.zeros((), dtype=torch.float64) for name in names}
    for k in range(1, 13):
        saved = load(tmp_path / ("model_final.pth" if k == 12 else f"model_{k - 1:07d}.pth"))
        weights, found = saved["model"], saved["ema"]["model"]
        kept = min(decay, 1 - k**-0.75)
        for name in names:
            mean[name] = kept * mean[name] + (1 - kept) * weights[name].double()
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), mean[name], rtol=1e-5, atol=1e-7)
        assert found.keys() == weights.keys() and saved["ema"]["updates"] == k
        assert equal(
            {n: v for n, v in found.items() if n not in names}, {n: weights[n] for n in weights if n not in names}
        )
        assert equal(found, dict(weights)) == (decay == 0 or k == 1)
    exported = load(tmp_path / "model_final_ema.pth")
    assert equal(exported["model"], found) and exported["iteration"] == 11


def test_a_resumed_run_has_the_average_of_an_uninterrupted_run(tmp_path: Path) -> None:
    averaged(tmp_path / "straight", 20).train()
    averaged(tmp_path / "halves", 10).train()
    second = averaged(tmp_path / "halves", 20)
    assert second.resume(allow_changes=True)
    second.train()
    straight, halves = (load(tmp_path / name / "model_final.pth") for name in ("straight", "halves"))
    assert all(equal(straight[key], halves[key]) for key in ("model", "ema", "optimizer"))
    straight, halves = (load(tmp_path / name / "model_final_ema.pth") for name in ("straight", "halves"))
    assert equal(straight["model"], halves["model"])


def test_a_finished_run_writes_a_lost_file_again(tmp_path: Path) -> None:
    averaged(tmp_path, 6).train()
    before = load(tmp_path / "model_final_ema.pth")
    (tmp_path / "model_final_ema.pth").unlink()
    again = averaged(tmp_path, 6)
    assert again.resume()
    again.train()
    assert equal(before, load(tmp_path / "model_final_ema.pth"))


def test_the_average_may_be_enabled_and_disabled_on_resumption(tmp_path: Path) -> None:
    averaged(tmp_path, 5, SOLVER__EMA__ENABLED=False).train()
    second = averaged(tmp_path, 10)
    second.resume(allow_changes=True)
    assert second.average and second.average.updates == 0
    second.train()
    assert load(tmp_path / "model_final.pth")["ema"]["updates"] == 5
    third = averaged(tmp_path, 12, SOLVER__EMA__ENABLED=False)
    assert third.resume(allow_changes=True)
    third.train()
    assert "ema" not in load(tmp_path / "model_final.pth")


def test_the_weights_are_replaced_within_the_block_only() -> None:
    model = Normalised()
    average = WeightAverage(model, 0.5)
    for _ in range(3):
        nn.init.normal_(next(model.parameters()))
        average.update()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.applied():
        assert equal(dict(model.state_dict()), average.state_dict()["model"]) and not equal(
            dict(model.state_dict()), own
        )
        raise ZeroDivisionError
    assert equal(dict(model.state_dict()), own)


def measured(output: Path, iterations: int, values: list[float]) -> Trainer:
    """Return a trainer whose evaluations after iterations 2, 4, ... return ``values`` in turn."""
    found: list[Trainer] = []
    evaluate: Callable[[], dict[str, Any]] = lambda: {"set_ema": {"AP": values[found[0].iter // 2]}}  # noqa: E731
    keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 2, "TEST__BEST_METRIC": "set_ema/AP", "SOLVER__CHECKPOINT_PERIOD": 1}
    found.append(averaged(output, iterations, evaluate=evaluate, **keys))
    return found[0]


@pytest.mark.parametrize("damaged", ["model_best.pth", "model_best_ema.pth"])
def test_the_average_of_the_best_iteration_is_kept(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured(tmp_path, 6, [3.0, 5.0, 4.0]).train()
    files = [tmp_path / name for name in ("model_best.pth", "model_best_ema.pth")]
    best, kept = [load(file) for file in files], load(tmp_path / "model_0000003.pth")
    assert [content["iteration"] for content in best] == [3, 3]
    assert equal(best[0]["model"], kept["model"]) and equal(best[1]["model"], kept["ema"]["model"])
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[:-9])
    again = measured(tmp_path, 8, [3.0, 5.0, 4.0, 1.0])
    assert again.resume(allow_changes=True)
    again.train()
    assert f"'{path}' is incomplete or damaged" in caplog.text and "it was written again from" in caplog.text
    assert equal(best, [load(file) for file in files])


def test_a_run_with_an_average_needs_the_disk_space_that_it_computes(tmp_path: Path) -> None:
    class Wide(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 1))

    run = averaged(tmp_path, 10, model=Wide(), SOLVER__CHECKPOINT_PERIOD=2)
    run.train()
    written = sum(file.stat().st_size for file in tmp_path.glob("model_*.pth"))
    assert written < run._checkpoint_bytes() < 1.5 * written


def test_a_frozen_parameter_keeps_its_value_exactly(tmp_path: Path) -> None:
    model = Normalised()
    frozen = next(model.parameters()).requires_grad_(False).clone()
    averaged(tmp_path, 9, model=model).train()
    exported: dict[str, Tensor] = load(tmp_path / "model_final_ema.pth")["model"]
    assert torch.equal(exported["net.0.weight"], frozen)
