"""Atomic writes, encodings and output paths."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, make_folder, remove_leftovers, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("relvit_d2", "tools", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py"))


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text, judged by its arguments; ``path.open()`` of an archive is omitted."""
    function, keys = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "read_text" and call.args:  # an encoding, or a file of importlib.metadata, which is UTF-8
        return False
    if {"text", "universal_newlines"} & keys.keys() or name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen"):
        return False
    method = isinstance(function, ast.Attribute) and name == "open"
    mode = keys.get("mode", dict(enumerate(call.args)).get(0 if method else 1, ast.Constant("" if method else "r")))
    return isinstance(mode, ast.Constant) and str(mode.value) in ("r", "w", "a", "x", "r+", "w+", "a+")


def test_text_is_utf8_whatever_the_locale() -> None:
    """Every call that opens text has an encoding, except ``write_text`` of ``relvit_d2.utils.files``."""
    missing = []
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call):
                given = {keyword.arg for keyword in call.keywords}
                ours = ast.unparse(call.func) == "write_text"
                old = path.name == "setup_env.py" and "universal_newlines" in given  # for a Python without encoding=
                if not (ours or old or "encoding" in given):
                    missing.append(f"{path}:{call.lineno}: {ast.unparse(call)}")
    assert not missing


def test_names_of_files_are_written_as_their_bytes(tmp_path: Path) -> None:
    """A name that the locale does not decode holds lone surrogates, which UTF-8 refuses."""
    write_text(tmp_path / "names.txt", "ä " + os.fsdecode(b"\xff\n"))
    assert (tmp_path / "names.txt").read_bytes() == "ä ".encode() + b"\xff\n"


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
        with pytest.raises(UserError, match=f"'{folder}' cannot be created .*choose another folder"):
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


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/results.json", {"AP": float("inf"), "rows": [1.5, float("nan")]})
    assert json.loads((tmp_path / "deep/results.json").read_text()) == {"AP": None, "rows": [1.5, None]}


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = {f".model.pth.{os.getppid()}.part", "other/.model.pth.9.part", "model.pth"}
    for name in (*kept, f".model.pth.{gone.pid}.part", f".config.yaml.{os.getpid()}.part", ".part", ".x.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == kept | {".part"}
