"""Checkpoints: reading, writing and their errors."""

import copy
import shutil
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
from torch import nn

from relvit_d2.engine.checkpoint import Checkpointer, check_space
from relvit_d2.engine.run_setup import move_earlier_run
from relvit_d2.engine.weights import load_trained
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal, rows
from tests.support.scripts import digests
from tests.support.training import Regression, trainer


def test_files_that_are_not_checkpoints_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"model": {"other.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    for name, message in (
        ("text.pth", "not a readable checkpoint"),
        ("other.pth", "fits only 0.0%"),
        ("no.pth", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            Checkpointer(Regression(), "").load(str(tmp_path / name))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickles"])
def test_a_damaged_checkpoint_is_reported_as_damaged(new: bool, tmp_path: Path) -> None:
    """Truncated at any length; a zip archive also with any byte changed."""
    path, model = tmp_path / "model.pth", Regression()
    torch.save({"model": model.state_dict(), "iteration": 3}, path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"incomplete or damaged .* earlier checkpoint") as caught:
            Checkpointer(model, "").load(str(path))
        assert "PICKLE" not in str(caught.value)
    for i in range(0, len(content) if new else 0, 37):
        path.write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
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


def test_other_errors_than_those_of_reading_and_writing_are_raised_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    checkpointer = Checkpointer(Regression(), str(tmp_path))
    checkpointer.save("model_final")
    message = "CUDA error: out of memory"
    checkpointer.validate = fail
    with pytest.raises(RuntimeError, match=message):
        checkpointer.load(str(tmp_path / "model_final.pth"))
    checkpointer.validate = None
    checkpointer.load(str(tmp_path / "model_final.pth"))
    monkeypatch.setattr(torch, "save", fail)
    message = "DataLoader worker (pid 7) is killed by signal"
    with pytest.raises(RuntimeError, match="worker"):
        checkpointer.save("model_final")
    message = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    with pytest.raises(UserError, match="could not be written with"):
        checkpointer.save("model_final")


@pytest.mark.parametrize("allow_changes", [False, True])
def test_a_checkpoint_of_another_program_is_not_resumed(allow_changes: bool, tmp_path: Path) -> None:
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


def flip(path: Path, value: torch.Tensor) -> None:
    """Flip one bit of ``value``, which the file must contain once."""
    content, stored = bytearray(path.read_bytes()), value.contiguous().numpy().tobytes()
    assert content.count(stored) == 1
    content[content.find(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)


def test_one_changed_bit_of_any_tensor_is_detected(tmp_path: Path) -> None:
    trainer(tmp_path, 3).train()
    path = tmp_path / "model_final.pth"
    intact, saved = path.read_bytes(), torch.load(path, weights_only=True)
    moments = [state["exp_avg_sq"] for state in saved["optimizer"]["state"].values()]
    for value in (*saved["model"].values(), *moments):
        path.write_bytes(intact)
        flip(path, value)
        torch.load(path, weights_only=True)  # torch does not detect it
        with pytest.raises(UserError, match=r"model_final.pth' is incomplete or damaged"):
            Checkpointer(Regression(), "").load(str(path))


def test_a_checkpoint_without_a_digest_is_resumed_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, 3).train()
    path = tmp_path / "model_final.pth"
    saved = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in saved.items() if key not in ("digest", "run")}, path)
    with caplog.at_level("INFO"):
        assert trainer(tmp_path, 6).resume(allow_changes=True)
    assert "model_final.pth' has no digest" in caplog.text


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_weights(path: Path) -> None:
    flip(path, torch.load(path, weights_only=True)["model"]["net.0.weight"])


@pytest.mark.parametrize("damage", [remove, empty, truncate, change_weights])
@pytest.mark.parametrize("count", [1, 2])
def test_damaged_newest_checkpoints_are_passed_over(
    damage: Callable[[Path], None], count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run continues from the one before, and ends like an uninterrupted run."""
    trainer(tmp_path / "straight", 17).train()
    output = tmp_path / "run"
    trainer(output, 15).train()  # checkpoints of iterations 4, 9 and, as model_final.pth, 14
    newest = [output / "model_final.pth", output / "model_0000009.pth"][:count]
    for path in newest:
        damage(path)
    again = trainer(output, 17)
    assert again.resume(allow_changes=True)
    assert again.start_iter == (10 if count == 1 else 5)
    passed_over = [line for line in caplog.messages if line.startswith("passed over: ")]
    named = newest[:1] if damage is remove else newest  # the pointer names the first one only
    assert [any(str(path) in line for line in passed_over) for path in named] == [True] * len(named)
    assert len(passed_over) == len(named)
    again.train()
    one, other = (torch.load(tmp_path / run / "model_final.pth", weights_only=True) for run in ("straight", "run"))
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "iteration"))
    assert rows(tmp_path / "straight") == rows(output)


def test_without_an_intact_checkpoint_a_run_does_not_start_again(tmp_path: Path) -> None:
    trainer(tmp_path, 7).train()
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    for _ in range(2):
        before = digests(tmp_path)
        with pytest.raises(
            UserError, match=r"no intact checkpoint .*model_final.pth' is incomplete .* without --resume"
        ):
            trainer(tmp_path, 7).resume()
        assert before == digests(tmp_path)
        (tmp_path / "last_checkpoint").unlink(missing_ok=True)


@pytest.mark.parametrize("content", [None, b"", b"..", b"folder", b"\xff\x00model\x1b", b"x" * 5000])
def test_a_damaged_pointer_is_passed_over(content: bytes | None, tmp_path: Path) -> None:
    trainer(tmp_path, 7).train()
    pointer = tmp_path / "last_checkpoint"
    pointer.unlink()
    (tmp_path / "folder").mkdir()
    if content is not None:
        pointer.write_bytes(content)
    again = trainer(tmp_path, 7)
    if content == b"..":
        with pytest.raises(UserError, match=r"last_checkpoint' contains '\.\.', not the name of a file in its folder"):
            again.resume()
    else:
        assert again.resume()
        assert again.start_iter == 7


@pytest.mark.parametrize("outside", ["../other/model_final.pth", "{}/other/model_final.pth"])
def test_a_pointer_that_leads_out_of_the_folder_is_refused(outside: str, tmp_path: Path) -> None:
    for run in ("other", "run"):
        trainer(tmp_path / run, 3).train()
    (tmp_path / "run/last_checkpoint").write_text(outside.format(tmp_path))
    again = trainer(tmp_path / "run", 3)
    with pytest.raises(UserError, match="not the name of a file in its folder"):
        again.resume()
    with pytest.raises(UserError, match="not the name of a file in its folder"):
        load_trained(again.cfg, Regression(), tmp_path / "run")


@pytest.mark.parametrize("beside", ["", "encoder.safetensors"])
def test_a_checkpoint_of_another_task_is_an_error_that_names_the_encoder(beside: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, 1)
    run.train()
    path = tmp_path / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert load_trained(run.cfg, Regression(), path)["config"] == checkpoint["config"]
    del checkpoint["digest"]
    for config in (checkpoint["config"].replace("TASK: detection", "SEED: ["), 3):  # not of this package
        torch.save(checkpoint | {"config": config}, path)
        load_trained(run.cfg, Regression(), path)
    torch.save(checkpoint | {"config": checkpoint["config"].replace("TASK: detection", "TASK: pretrain")}, path)
    if beside:
        (tmp_path / beside).touch()
    expected = (
        f"set MODEL.WEIGHTS to '{tmp_path / beside}'" if beside else "set MODEL.WEIGHTS to its encoder.safetensors"
    )
    with pytest.raises(UserError, match=rf"model_final.pth' is a checkpoint of the task pretrain, .*{expected}"):
        load_trained(run.cfg, Regression(), path)


def test_checkpoints_of_an_earlier_run_in_the_folder_are_ignored(tmp_path: Path) -> None:
    trainer(tmp_path, 12).train()  # checkpoints of iterations 4, 9 and 11
    trainer(tmp_path, 8).train()  # 4 and 7
    shutil.copy(tmp_path / "earlier_run/model_0000009.pth", tmp_path / "model_0000006.pth")
    truncate(tmp_path / "model_final.pth")
    again = trainer(tmp_path, 8)
    assert again.resume()
    assert again.start_iter == 5
    for path in ("model_best.pth", "report.html", "inference/results.json", "earlier_run/model_0000099.pth"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    fresh = trainer(tmp_path, 8)
    fresh._prepare_output()  # a start without --resume, killed before its first checkpoint
    assert not trainer(tmp_path, 8).resume()
    # Nothing of the earlier run is taken for a file of the new one, and it can still be continued.
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["config.yaml", "run.json"]
    assert not (tmp_path / "inference").exists() and (tmp_path / "earlier_run/inference/results.json").exists()
    earlier = trainer(tmp_path / "earlier_run", 8)
    assert earlier.resume()
    assert earlier.start_iter == 5
    assert not (tmp_path / "earlier_run/model_0000099.pth").exists()  # of the run before


def test_an_interrupted_move_of_an_earlier_run_is_completed(tmp_path: Path) -> None:
    names = ["inference", "last_checkpoint", "metrics.json", "model_0000009.pth", "model_final.pth"]

    def write(folder: Path, *names: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name == "inference":
                (folder / name).mkdir()
                (folder / name / "results.json").touch()
            else:
                (folder / name).touch()

    for count in range(len(names) + 1):
        output = tmp_path / str(count)
        write(output / "earlier_run", "inference", "model_0000099.pth")
        if count:
            write(output / "earlier_run.part", *names[:count])
        write(output, *names[count:])
        for _ in range(2):
            move_earlier_run(output)
            assert [path.name for path in output.iterdir()] == ["earlier_run"]
            assert sorted(path.name for path in (output / "earlier_run").iterdir()) == names


class Wide(Regression):
    """A model whose checkpoints consist of values rather than of names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 1))


@pytest.mark.parametrize("keep", [0, 2])
def test_a_run_needs_the_disk_space_that_it_computes(keep: int, tmp_path: Path) -> None:
    run = trainer(tmp_path, 10, model=Wide(), SOLVER__CHECKPOINT_PERIOD=2, SOLVER__CHECKPOINT_MAX_TO_KEEP=keep)
    run.train()
    written = sum(file.stat().st_size for file in tmp_path.glob("model_*.pth"))
    assert written < run._checkpoint_bytes() < 1.5 * written


def test_a_disk_without_space_for_the_checkpoints_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, free / 2)
    with pytest.raises(
        UserError, match=r"the checkpoints in '.*' need [\d,]+ MiB, but [\d,]+ MiB are free: free space"
    ):
        check_space(tmp_path, 2 * free)
    assert not caplog.messages
    check_space(tmp_path, 2 * free, least=free / 2)
    assert "MiB are free: free space, choose another OUTPUT_DIR, or keep fewer" in caplog.messages[0]
    with pytest.raises(UserError, match="MiB are free"):
        check_space(tmp_path, 4 * free, least=2 * free)
