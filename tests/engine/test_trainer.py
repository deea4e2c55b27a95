"""The trainer's promises: exact resume, metrics once, readable checkpoints, faults as sentences."""

import copy
import json
import re
import time
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter, get_event_storage
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from relvit_d2.data.loader import EndlessBatches, EndlessOrder
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.encoders import build_encoder
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.trainer import Trainer
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal


class Regression(nn.Module):
    """A model whose every step draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss_square": (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()}


def config(output: Path, iterations: int) -> CfgNode:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32"])
    cfg.merge_from_list(
        ["SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", min(2, iterations - 1), "SOLVER.IMS_PER_BATCH", 4]
    )
    cfg.merge_from_list(["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.CHECKPOINT_PERIOD", 5])
    return cfg


def noisy(sample: int) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.random.standard_normal(4)).float() + sample


def trainer(
    output: Path,
    iterations: int,
    workers: int = 0,
    model: nn.Module | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    mapper: Callable[[int], Tensor] = noisy,
    **overrides: Any,
) -> Trainer:
    torch.manual_seed(0)
    cfg = config(output, iterations)
    cfg.merge_from_list([part for key, value in overrides.items() for part in (key.replace("__", "."), value)])

    def batches(start: int) -> EndlessBatches:
        order = EndlessOrder(10, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, start, parts=cfg.SOLVER.GRAD_ACCUM_STEPS)
        return EndlessBatches(range(10), mapper, torch.stack, order, cfg.SEED, workers)

    return Trainer(cfg, model or Regression(), 10, batches, evaluate)


def state(output: Path) -> dict[str, object]:
    return torch.load(output / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_straight_run(workers: int, tmp_path: Path) -> None:
    trainer(tmp_path / "straight", 20).train()
    trainer(tmp_path / "halves", 10, workers).train()
    second = trainer(tmp_path / "halves", 20, workers)
    assert second.resume(allow_changes=True)  # MAX_ITER, which this schedule does not look at
    assert second.start_iter == 10
    second.train()
    straight, halves = state(tmp_path / "straight"), state(tmp_path / "halves")
    assert all(equal(straight[key], halves[key]) for key in ("model", "optimizer", "iteration"))


def test_metrics_hold_every_iteration_once_also_after_a_cut_line(tmp_path: Path) -> None:
    trainer(tmp_path, 10).train()
    metrics = tmp_path / "metrics.json"
    # What a run that was killed in iteration 12 leaves beyond the checkpoint of iteration 9.
    lines = metrics.read_text() + '{"iteration": 10, "total_loss": 9}\n{"iteration": 11, "tot'
    metrics.write_text(lines)
    second = trainer(tmp_path, 20)
    second.resume(allow_changes=True)
    second.train()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(20))
    assert all({"total_loss", "loss_square", "grad_norm", "lr"} <= row.keys() for row in rows)
    assert rows[10]["total_loss"] != 9


def test_a_resumed_run_keeps_the_figures_that_it_does_not_measure_anew(tmp_path: Path) -> None:
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
    trainer(tmp_path, 1).train()  # anew, not resumed
    assert "set/AP" not in rows()[0]


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    assert not trainer(tmp_path, 3).resume()


def test_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path) -> None:
    trainer(tmp_path, 6).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000004.pth", "model_final.pth"]
    assert state(tmp_path)["iteration"] == 5
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_finite_names_itself(tmp_path: Path) -> None:
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


def test_gradients_that_are_not_finite_under_finite_losses_name_the_images_too(tmp_path: Path) -> None:
    class Steep(Regression):
        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            loss = super().forward(batch)["loss_square"]
            return {"loss_square": loss + (next(self.parameters()) * 0).sum().sqrt()}

    steep = trainer(tmp_path, 8, model=Steep())
    with pytest.raises(UserError, match=r"'grad_norm' became nan at iteration 0, .*json: look .* then start again$"):
        steep.train()
    assert json.loads((tmp_path / "not_finite_0.json").read_text())["term"] == "grad_norm"


def test_the_last_checkpoint_is_good_where_there_is_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, 8)
    forward = run.model.forward
    run.model.forward = lambda batch: {k: v / (0 if run.iter == 6 else 1) for k, v in forward(batch).items()}
    with pytest.raises(UserError, match=r"inf at iteration 6, .* and the last checkpoint is good: .* with --resume"):
        run.train()


def test_decay_reaches_matrices_only() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    model = Regression()
    model.pos_embed = nn.Parameter(torch.zeros(3, 3))
    model.swin = next(m for m in build_encoder("swin_tiny").modules() if isinstance(m, WindowAttention))
    optimizer = build_optimizer(cfg, model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"net.0.weight", "net.3.weight", "swin.qkv.weight", "swin.proj.weight"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_layer_decay_slows_blocks_by_their_depth(tmp_path: Path) -> None:
    """The patches learn least, each block faster than the one before, what is no encoder in full."""
    encoder = build_encoder("vit_nano", patch_size=4, img_size=32)
    model = nn.Sequential(encoder, nn.Linear(2, 2))
    cfg = config(tmp_path, 1)
    plain = build_optimizer(cfg, model)
    assert all(group["scale"] == 1 for group in plain.param_groups)
    cfg.SOLVER.LAYER_DECAY = 0.5
    optimizer = build_optimizer(cfg, model)
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    told = {name: scales[id(p)] for name, p in encoder.named_parameters()}
    assert told["vit.patch_embed.proj.weight"] == told["vit.pos_embed"] == told["vit.cls_token"] == 0.5**5
    assert [told[f"vit.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert told["vit.norm.weight"] == scales[id(model[1].weight)] == 1
    cfg.SOLVER.LAYER_DECAY = 0.0
    with pytest.raises(UserError, match="LAYER_DECAY"):
        build_optimizer(cfg, model)


def test_clipping_is_by_the_global_norm() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    norm = build_clipper(cfg, model)()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before / before.norm(), atol=1e-6, rtol=1e-5)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    with pytest.raises(UserError, match="CLIP_TYPE 'value'"):
        build_clipper(cfg, model)


def test_precision_says_why() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu).dtype == torch.float32
    assert choose_precision("bfloat16", cpu).dtype == torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert choose_precision("auto", cpu).dtype == (torch.bfloat16 if native else torch.float32)
    with pytest.raises(UserError, match="float16"):
        choose_precision("float16", cpu)
    with choose_precision("bfloat16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with choose_precision("float32", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"model": {"other.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    for name, words in (
        ("text.pth", "not a readable checkpoint"),
        ("other.pth", "fits only 0.0%"),
        ("no.pth", "is no file that exists"),
    ):
        with pytest.raises(UserError, match=words):
            Checkpointer(Regression(), "").load(str(tmp_path / name))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickles"])
def test_a_damaged_checkpoint_is_called_so_and_no_code_is_advised(new: bool, tmp_path: Path) -> None:
    """Cut off at any length; a zip archive also with any byte changed."""
    path, model = tmp_path / "model.pth", Regression()
    torch.save({"model": model.state_dict(), "iteration": 3}, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"incomplete or damaged .* earlier checkpoint") as caught:
            Checkpointer(model, "").load(str(path))
        assert "PICKLE" not in str(caught.value)
    for place in range(0, len(whole) if new else 0, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            Checkpointer(model, "").load(str(path))
        except UserError as error:
            assert "PICKLE" not in str(error)
    for foreign in (Namespace(a=1), Fraction(1, 2)):
        torch.save({"model": model.state_dict(), "more": foreign}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=r"set MODEL.ALLOW_PICKLE True"):
            Checkpointer(model, "").load(str(path))


def test_a_checkpoint_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for url in ("http://127.0.0.1:9/model.pth", "http://no.such.host.invalid/a.pth", "nothing://a.pth"):
        with pytest.raises(UserError, match=rf"'{url}' .*MODEL.WEIGHTS"):
            Checkpointer(Regression(), "").load(url)
    source, target = Regression(), Regression()
    Checkpointer(source, str(tmp_path)).save("model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        Checkpointer(target, "").load(f"http://127.0.0.1:{server.server_port}/model.pth", [])
        server.shutdown()
    assert all(map(torch.equal, source.state_dict().values(), target.state_dict().values()))


@pytest.mark.parametrize("path", [None, ""])
def test_no_path_loads_nothing(path: Any, tmp_path: Path) -> None:
    model = Regression()
    before = copy.deepcopy(model.state_dict())
    assert Checkpointer(model, str(tmp_path)).load(path) == {}
    torch.testing.assert_close(model.state_dict(), before)


def test_only_what_the_reading_and_the_writing_raise_is_a_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(words)

    checkpointer = Checkpointer(Regression(), str(tmp_path))
    checkpointer.save("model_final")
    words = "CUDA error: out of memory"
    checkpointer.accept = fail
    with pytest.raises(RuntimeError, match=words):
        checkpointer.load(str(tmp_path / "model_final.pth"))
    checkpointer.accept = None
    checkpointer.load(str(tmp_path / "model_final.pth"))
    monkeypatch.setattr(torch, "save", fail)
    words = "DataLoader worker (pid 7) is killed by signal"
    with pytest.raises(RuntimeError, match="worker"):
        checkpointer.save("model_final")
    words = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    with pytest.raises(UserError, match="could not be written with"):
        checkpointer.save("model_final")


@pytest.mark.parametrize("allow_changes", [False, True])
def test_a_checkpoint_of_another_program_is_not_gone_on_with(allow_changes: bool, tmp_path: Path) -> None:
    torch.save({"model": Regression().state_dict(), "iteration": 3}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(UserError, match=r"not written by this trainer .*'config'.* MODEL.WEIGHTS"):
        trainer(tmp_path, 6).resume(allow_changes)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = Regression()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    model.net[0] = nn.Linear(5, 8)
    # 40 of the 73 values that the model has now: 8 x 5 weights of another shape.
    with pytest.raises(UserError, match=r"fits only 45.2%.* \(net.0.weight \[8, 4\], here \[8, 5\]\)"):
        Checkpointer(model, "").load(str(tmp_path / "model.pth"))


def test_resuming_with_other_parameters_is_one_sentence(tmp_path: Path) -> None:
    trainer(tmp_path, 3).train()
    second = trainer(tmp_path, 6)
    second.checkpointer.checkpointables["optimizer"] = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(UserError, match="parameter group"):
        second.resume(allow_changes=True)


def measured(output: Path, values: list[float], iterations: int, **overrides: Any) -> Trainer:
    """A trainer whose evaluation after iterations 2, 4, ... finds ``values`` in turn."""
    found: list[Trainer] = []

    def evaluate() -> dict[str, Any]:
        return {"set": {"AP": values[found[0].iter // 2]}}

    keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 2, "TEST__BEST_METRIC": "set/AP"} | overrides
    found.append(trainer(output, iterations, evaluate=evaluate, **keys))
    return found[0]


@pytest.mark.parametrize("cut", [None, 4, 6, 8])
def test_the_best_model_is_kept_and_patience_ends_the_run(cut: int | None, tmp_path: Path) -> None:
    values = [3.0, 5.0, float("nan"), 5.0, 4.0, 9.0, 9.0]
    keys: dict[str, Any] = {"TEST__PATIENCE": 3, "SOLVER__CHECKPOINT_PERIOD": 1}
    run = measured(tmp_path, values, 14, **keys)
    if cut is not None:  # cut short in the evaluation after so many iterations, and resumed

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


def test_more_patience_resumes_what_patience_had_ended(tmp_path: Path) -> None:
    values = [5.0, 3.0, 4.0, 2.0, 1.0, 9.0, 9.0]
    keys: dict[str, Any] = {"SOLVER__CHECKPOINT_PERIOD": 1}
    straight = measured(tmp_path / "straight", values, 14, TEST__PATIENCE=4, **keys)
    straight.train()
    for patience in (2, 2, 4):
        run = measured(tmp_path / "parts", values, 14, TEST__PATIENCE=patience, **keys)
        run.resume()
        run.train()
        assert run.stopped
        assert run.iter == (5 if patience == 2 else 9)
    assert straight.iter == run.iter
    assert state(tmp_path / "straight")["evaluation"] == state(tmp_path / "parts")["evaluation"]


def test_a_best_value_counts_for_its_metric_and_test_sets_only(
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
        assert best_after(6, "set/AP50", "one") == 3  # what followed the checkpoint is done again
    assert "forgotten: it was set/AP on one, now it is set/AP50 on one" in caplog.text
    assert best_after(8, "set/AP50", "two") == 5


def test_of_a_loss_the_least_is_best(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0])
    evaluate = lambda: {"held_out": {"loss": next(values)}}  # noqa: E731
    keys: dict[str, Any] = {"TEST__EVAL_PERIOD": 1, "TEST__BEST_METRIC": "held_out/loss"}
    trainer(tmp_path, 3, evaluate=evaluate, **keys).train()
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["value"] == 1.0


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    trainer(tmp_path, 9, SOLVER__CHECKPOINT_PERIOD=2, SOLVER__CHECKPOINT_MAX_TO_KEEP=2).train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000005.pth",
        "model_0000007.pth",
        "model_final.pth",
    ]


def test_the_rate_follows_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        scaled = trainer(tmp_path, 20, SOLVER__REFERENCE_BATCH=16)
    plain = trainer(tmp_path, 20)
    assert [scaled.schedule(i) for i in range(20)] == pytest.approx([plain.schedule(i) / 4 for i in range(20)])
    assert "learning rate 0.000125: SOLVER.BASE_LR 0.0005 times SOLVER.IMS_PER_BATCH 4" in caplog.text


def slow(sample: int) -> Tensor:
    time.sleep(0.004)
    return noisy(sample)


def test_a_loader_that_is_the_bottleneck_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, 60, mapper=slow).train()
    assert caplog.text.count("reading the data is the bottleneck") == 1
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("iter ")]
    assert [line.split()[1] for line in lines] == ["20/60", "40/60", "60/60"]
    for line in lines:
        assert re.search(r"eta +\d.* images/s  data +\d+%  memory \d+\.\d GiB", line)


class Collected(EventWriter):
    """What a user's own writer sees."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def write(self) -> None:
        self.seen |= {name: at for name, (_, at) in get_event_storage().latest().items()}


def test_a_users_writer_sees_every_number(tmp_path: Path) -> None:
    writer = Collected()
    run = trainer(tmp_path, 4, evaluate=lambda: {"set": {"AP": 1.0}})
    run.register_hooks([PeriodicWriter([writer], period=1)])
    run.train()
    assert {"total_loss": 3, "set/AP": 3, "lr": 3}.items() <= writer.seen.items()


def test_accumulated_parts_are_the_batch(tmp_path: Path) -> None:
    def losses(output: Path, parts: int) -> list[float]:
        still = Regression()
        still.net[2] = nn.Identity()  # dropout draws for each part anew
        trainer(output, 6, model=still, SOLVER__GRAD_ACCUM_STEPS=parts).train()
        return [json.loads(line)["total_loss"] for line in (output / "metrics.json").read_text().splitlines()]

    torch.manual_seed(0)
    whole = losses(tmp_path / "whole", 1)
    torch.manual_seed(0)
    assert losses(tmp_path / "parts", 4) == pytest.approx(whole, rel=1e-5)
