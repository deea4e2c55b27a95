"""Files appear whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relvit_d2.errors import UserError
from relvit_d2.files import appearing, make_folder, remove_leftovers, write_json, write_text


def test_a_failure_leaves_what_was_there_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), appearing(path) as part:
        part.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_a_folder_is_made_or_refused_in_one_sentence(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(UserError, match=f"'{folder}' cannot be made .*choose another folder"):
            make_folder(folder)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "kept.txt"
    write_text(path, "old")
    with pytest.raises(UserError, match=r"kept.txt.*No space left.*choose another folder$"), appearing(path) as part:
        part.symlink_to(full)
        part.write_text("new")
    assert path.read_text() == "old"


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/results.json", {"AP": float("inf"), "rows": [1.5, float("nan")]})
    assert json.loads((tmp_path / "deep/results.json").read_text()) == {"AP": None, "rows": [1.5, None]}


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stay = {f".model.pth.{os.getppid()}.part", "other/.model.pth.9.part", "model.pth"}
    for name in (*stay, f".model.pth.{gone.pid}.part", f".config.yaml.{os.getpid()}.part", ".part", ".x.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == stay | {".part"}
