"""Checkpoints: reading, writing and their errors."""

import copy
from argparse import Namespace
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.utils.errors import UserError
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
