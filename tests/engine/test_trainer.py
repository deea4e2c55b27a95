"""The trainer: exact resumption, metrics, evaluation, early stopping, errors."""

import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter, get_event_storage
from torch import Tensor, nn

from relvit_d2.data.loader import EndlessOrder
from relvit_d2.engine import signals
from relvit_d2.engine.trainer import Trainer
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal, rows
from tests.support.training import Regression, noisy, trainer


def state(output: Path) -> dict[str, object]:
    return torch.load(output / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_run(workers: int, tmp_path: Path) -> None:
    trainer(tmp_path / "uninterrupted", 20).train()
    trainer(tmp_path / "halves", 10, workers).train()
    second = trainer(tmp_path / "halves", 20, workers)
    assert second.resume(allow_changes=True)  # of MAX_ITER, which does not affect this schedule
    assert second.start_iter == 10
    second.train()
    uninterrupted, halves = state(tmp_path / "uninterrupted"), state(tmp_path / "halves")
    assert all(equal(uninterrupted[key], halves[key]) for key in ("model", "optimizer", "iteration"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_evaluation_and_the_checkpoint_before_it_remains(number: int, tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        signal.raise_signal(number)
        raise AssertionError("the evaluation was not stopped")

    def run(output: str, evaluate: Callable[[], dict[str, Any]]) -> Trainer:
        return trainer(tmp_path / output, 9, evaluate=evaluate, TEST__EVAL_PERIOD=4)

    def measured() -> dict[str, Any]:
        return {"test": {"top1": 50.0}}

    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.install(patient=False)
    try:
        with pytest.raises(signals.Interrupted):
            run("stopped", interrupted).train()
    finally:
        signals.forget()
        for each, handler in before.items():
            signal.signal(each, handler)
    assert (tmp_path / "stopped/last_checkpoint").read_text() == "model_0000003.pth"
    again = run("stopped", measured)
    assert again.resume() and again.start_iter == 4
    again.train()
    run("straight", measured).train()
    stopped, straight = state(tmp_path / "stopped"), state(tmp_path / "straight")
    assert all(equal(stopped[key], straight[key]) for key in ("model", "optimizer", "iteration"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")


def test_metrics_have_every_iteration_once_also_after_a_truncated_line(tmp_path: Path) -> None:
    trainer(tmp_path, 10).train()
    metrics = tmp_path / "metrics.json"
    # Lines of a run that was killed in iteration 12, after the checkpoint of iteration 9.
    lines = metrics.read_text() + '{"iteration": 10, "total_loss": 9}\n{"iteration": 11, "tot'
    metrics.write_text(lines)
    second = trainer(tmp_path, 20)
    second.resume(allow_changes=True)
    second.train()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(20))
    assert all({"total_loss", "loss_square", "grad_norm", "lr"} <= row.keys() for row in rows)
    assert rows[10]["total_loss"] != 9


UNREADABLE = [
    b'{"iteration": 4, "tot',
    b'\xff\xfe{"iteration": 4}',
    b"[4, 5]",
    b'{"iteration": "4", "total_loss": 1.0}',
    b'{"iteration": true}',
    b'{"iteration": -1}',
    b'{"iteration": 9, "set/AP": "high"}',  # of the checkpoint's iteration, whose values are kept
    b'{"iteration": 9, "set/AP": {}}',
    b'{"iteration": 9, "set/AP": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b"{}",
]


def test_unreadable_lines_of_the_metrics_are_moved_to_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path / "straight", 20).train()
    run = tmp_path / "run"
    trainer(run, 10).train()
    metrics = run / "metrics.json"
    intact = metrics.read_bytes().splitlines()
    for more in (UNREADABLE, UNREADABLE[:2]):
        metrics.write_bytes(b"\n".join([*intact[:3], *more, *intact[3:]]))
        caplog.clear()
        second = trainer(run, 20)
        second.resume(allow_changes=True)
        second.before_train()
        assert metrics.read_bytes().splitlines() == intact[:9]
        assert f"has {len(more)} unreadable line(s): they were moved to '{run}/metrics_unreadable.txt'" in caplog.text
    second.train()
    assert rows(run) == rows(tmp_path / "straight")
    assert (run / "metrics_unreadable.txt").read_bytes().splitlines() == [*UNREADABLE, *UNREADABLE[:2]]


@pytest.mark.parametrize("lost", [range(10), [0], [3, 5, 8]])
def test_lost_rows_of_the_metrics_are_reported(
    lost: Sequence[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, 11).train()
    metrics = tmp_path / "metrics.json"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for i, line in enumerate(lines) if i not in lost))
    if len(lost) == 10:
        metrics.unlink()
    second = trainer(tmp_path, 20)
    second.resume(allow_changes=True)
    second.train()
    assert f"lacks {len(lost)} of the 10 rows before the checkpoint, the first of iteration {lost[0]}:" in caplog.text
    assert [row["iteration"] for row in rows(tmp_path)] == [i for i in range(20) if i not in lost]


def test_a_resumed_run_keeps_metrics_that_it_does_not_compute_again(tmp_path: Path) -> None:
    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]

    trainer(tmp_path, 6, evaluate=lambda: {"set": {"AP": 3.0}}).train()
    before = rows()
    assert before[5]["set/AP"] == 3.0
    for more in ({"iterations": 6}, {"iterations": 9, "evaluate": lambda: {"set": {"AP": 4.0}}}):
        again = trainer(tmp_path, **more)
        assert again.resume(allow_changes=True)
        again.train()
        assert rows()[:6] == before
    assert [(row["iteration"], row.get("set/AP")) for row in rows()[5:]] == [(5, 3.0), (6, None), (7, None), (8, 4.0)]
    trainer(tmp_path, 1, evaluate=lambda: {"set": {"AP": 5.0}}).train()
    trainer(tmp_path, 1).train()  # not resumed
    assert "set/AP" not in rows()[0]


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    assert not trainer(tmp_path, 3).resume()


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path) -> None:
    trainer(tmp_path, 6).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000004.pth", "model_final.pth"]
    assert state(tmp_path)["iteration"] == 5
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_finite_is_reported_with_its_images(tmp_path: Path) -> None:
    class Broken(Regression):
        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            return {"loss_square": super().forward(batch)["loss_square"] * float("nan")}

    with pytest.raises(UserError, match="'loss_square' became nan at iteration 0"):
        trainer(tmp_path, 3, model=Broken()).train()
    written = json.loads((tmp_path / "not_finite_0.json").read_text())
    order = EndlessOrder(10, 4, 0, 0)
    assert written == {"iteration": 0, "term": "loss_square", "images": [str(i) for _, i in order.keys(0)]}
    trainer(tmp_path, 3).train()
    assert not (tmp_path / "not_finite_0.json").exists()


def test_gradients_that_are_not_finite_are_reported_with_their_images(tmp_path: Path) -> None:
    class Steep(Regression):
        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            loss = super().forward(batch)["loss_square"]
            return {"loss_square": loss + (next(self.parameters()) * 0).sum().sqrt()}

    steep = trainer(tmp_path, 8, model=Steep())
    with pytest.raises(
        UserError, match=r"'grad_norm' became nan at iteration 0, .*json lists the images: .* then restart$"
    ):
        steep.train()
    assert json.loads((tmp_path / "not_finite_0.json").read_text())["term"] == "grad_norm"


def test_the_error_mentions_an_intact_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, 8)
    forward = run.model.forward
    run.model.forward = lambda batch: {k: v / (0 if run.iter == 6 else 1) for k, v in forward(batch).items()}
    with pytest.raises(UserError, match=r"inf at iteration 6, .* and the last checkpoint is intact: .* with --resume"):
        run.train()


def measured(output: Path, values: list[float], iterations: int, **overrides: Any) -> Trainer:
    """Return a trainer whose evaluations after iterations 2, 4, ... return ``values`` in turn."""
    found: list[Trainer] = []

    def evaluate() -> dict[str, Any]:
        return {"set": {"AP": values[found[0].iter // 2]}}

    keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 2, "TEST__BEST_METRIC": "set/AP"} | overrides
    found.append(trainer(output, iterations, evaluate=evaluate, **keys))
    return found[0]


@pytest.mark.parametrize("cut", [None, 4, 6, 8])
def test_the_best_model_is_saved_and_patience_ends_the_run(cut: int | None, tmp_path: Path) -> None:
    values = [3.0, 5.0, float("nan"), 5.0, 4.0, 9.0, 9.0]
    keys: dict[str, Any] = {"TEST__PATIENCE": 3, "SOLVER__CHECKPOINT_PERIOD": 1}
    run = measured(tmp_path, values, 14, **keys)
    if cut is not None:  # interrupt the evaluation after so many iterations, and resume

        def killed() -> None:
            raise KeyboardInterrupt

        evaluation = run.checkpointer.checkpointables["evaluation"]
        whole = evaluation._evaluate
        evaluation._evaluate = lambda: killed() if run.iter + 1 == cut else whole()
        with pytest.raises(KeyboardInterrupt):
            run.train()
        run = measured(tmp_path, values, 14, **keys)
        assert run.resume()
        assert run.start_iter == cut
    run.train()
    assert run.stopped
    assert run.iter == 9  # 5.0 came after iteration 3; nan, 5.0 and 4.0 are not better
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["iteration"], best["value"]) == (3, 5.0)
    assert equal(best["model"], torch.load(tmp_path / "model_0000003.pth", weights_only=True)["model"])
    assert state(tmp_path)["iteration"] == 9
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    again = measured(tmp_path, values, 14, **keys)
    assert again.resume()
    again.train()
    assert (again.stopped, again.iter) == (True, 9)


def test_a_run_that_stopped_early_continues_with_more_patience(tmp_path: Path) -> None:
    values = [5.0, 3.0, 4.0, 2.0, 1.0, 9.0, 9.0]
    keys: dict[str, Any] = {"SOLVER__CHECKPOINT_PERIOD": 1}
    uninterrupted = measured(tmp_path / "uninterrupted", values, 14, TEST__PATIENCE=4, **keys)
    uninterrupted.train()
    for patience in (2, 2, 4):
        run = measured(tmp_path / "parts", values, 14, TEST__PATIENCE=patience, **keys)
        run.resume()
        run.train()
        assert run.stopped
        assert run.iter == (5 if patience == 2 else 9)
    assert uninterrupted.iter == run.iter
    assert state(tmp_path / "uninterrupted")["evaluation"] == state(tmp_path / "parts")["evaluation"]


def test_a_best_value_is_valid_for_its_metric_and_test_sets_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def best_after(iterations: int, metric: str, test: str) -> int:
        def evaluate() -> dict[str, Any]:
            return {"set": {"AP": -run.iter, "AP50": -run.iter}}

        keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 2, "TEST__BEST_METRIC": metric, "DATASETS__TEST": (test,)}
        run = trainer(tmp_path, iterations, evaluate=evaluate, **keys)
        run.resume(allow_changes=True)
        run.train()
        return torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"]

    assert best_after(2, "set/AP", "one") == 1
    assert best_after(4, "set/AP", "one") == 1
    with caplog.at_level("INFO"):
        assert best_after(6, "set/AP50", "one") == 3  # the evaluation after the checkpoint is repeated
    assert "discarded: TEST.BEST_METRIC was set/AP on one, now it is set/AP50 on one" in caplog.text
    assert best_after(8, "set/AP50", "two") == 5


@pytest.mark.parametrize("damage", ["absent", "truncated", "older"])
@pytest.mark.parametrize("has_source", [True, False])
def test_a_damaged_best_model_is_written_again_or_reported(
    damage: str, has_source: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values, keys = [3.0, 5.0, 4.0, 2.0, 1.0], {"SOLVER__CHECKPOINT_PERIOD": 1}
    measured(tmp_path, values, 6, **keys).train()
    best = tmp_path / "model_best.pth"
    before = torch.load(best, weights_only=True)
    assert (before["iteration"], before["value"]) == (3, 5.0)
    if damage == "older":
        torch.save(before | {"iteration": 1, "digest": None}, best)
    else:
        best.write_bytes(best.read_bytes()[:-9])
    if damage == "absent":
        best.unlink()
    if not has_source:
        (tmp_path / "model_0000003.pth").unlink()
    again = measured(tmp_path, values, 10, **keys)
    assert again.resume(allow_changes=True)
    again.train()
    after = torch.load(best, weights_only=True)
    if has_source:
        assert equal(before, after)
        assert "it was written again from" in caplog.text
    else:  # the evaluation of the checkpoint is repeated
        assert (after["iteration"], after["value"]) == (5, 4.0)
        assert "the best value 5 is discarded" in caplog.text
    again = measured(tmp_path, values, 10, **keys)
    caplog.clear()
    again.resume()
    again.train()
    assert "model_best" not in caplog.text
    assert equal(after, torch.load(best, weights_only=True))


def test_losses_are_minimised(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0])
    evaluate = lambda: {"held_out": {"loss": next(values)}}  # noqa: E731
    keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 1, "TEST__BEST_METRIC": "held_out/loss"}
    trainer(tmp_path, 3, evaluate=evaluate, **keys).train()
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["value"] == 1.0


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer(tmp_path, 9, SOLVER__CHECKPOINT_PERIOD=2, SOLVER__CHECKPOINT_MAX_TO_KEEP=2).train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000005.pth",
        "model_0000007.pth",
        "model_final.pth",
    ]


def test_the_learning_rate_scales_with_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        scaled = trainer(tmp_path, 20, SOLVER__REFERENCE_BATCH=16)
    plain = trainer(tmp_path, 20)
    assert [scaled.schedule(i) for i in range(20)] == pytest.approx([plain.schedule(i) / 4 for i in range(20)])
    assert "learning rate 0.000125: SOLVER.BASE_LR 0.0005 times SOLVER.IMS_PER_BATCH 4" in caplog.text


def slow(sample: int) -> Tensor:
    time.sleep(0.004)
    return noisy(sample)


def test_slow_data_loading_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, 60, mapper=slow).train()
    assert caplog.text.count("data loading is the bottleneck") == 1
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("iter ")]
    assert [line.split()[1] for line in lines] == ["20/60", "40/60", "60/60"]
    for line in lines:
        assert re.search(r"eta +\d.* images/s  data +\d+%  memory \d+\.\d GiB", line)


class Recorder(EventWriter):
    """A custom writer that records the iterations of the metrics."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def write(self) -> None:
        self.seen |= {name: at for name, (_, at) in get_event_storage().latest().items()}


def test_a_custom_writer_gets_all_metrics(tmp_path: Path) -> None:
    writer = Recorder()
    run = trainer(tmp_path, 4, evaluate=lambda: {"set": {"AP": 1.0}})
    run.register_hooks([PeriodicWriter([writer], period=1)])
    run.train()
    assert {"total_loss": 3, "set/AP": 3, "lr": 3}.items() <= writer.seen.items()


def test_accumulated_gradients_equal_those_of_the_batch(tmp_path: Path) -> None:
    def losses(output: Path, parts: int) -> list[float]:
        model = Regression()
        model.net[2] = nn.Identity()  # dropout would draw for each part
        trainer(output, 6, model=model, SOLVER__GRAD_ACCUM_STEPS=parts).train()
        return [json.loads(line)["total_loss"] for line in (output / "metrics.json").read_text().splitlines()]

    torch.manual_seed(0)
    whole = losses(tmp_path / "whole", 1)
    torch.manual_seed(0)
    assert losses(tmp_path / "parts", 4) == pytest.approx(whole, rel=1e-5)
