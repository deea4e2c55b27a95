"""relvit-d2 doctor in a complete environment, in incomplete ones, and the command that it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.custom_data import write_yolo

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ("-m", "relvit_d2", "doctor")


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, cwd=ROOT)


def value(output: str, name: str) -> str:
    """The second column of the table's row ``name``."""
    match = re.search(rf"^ *{re.escape(name)} +(.*)$", output, re.MULTILINE)
    assert match, f"no row {name} in:\n{output}"
    return match[1]


def test_a_whole_environment_can_train(tmp_path: Path) -> None:
    import torch

    done = run(sys.executable, *DOCTOR, DETECTRON2_DATASETS=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert value(done.stdout, "torch") == torch.__version__
    assert re.match(r"(float32|bfloat16): \w+", value(done.stdout, "precision auto"))
    assert str(tmp_path) in value(done.stdout, "data root")
    assert re.match(r"\d+ known but not there: relvit-d2 prepare-data NAME", value(done.stdout, "other data sets"))
    assert "voc_2007" not in done.stdout and "coco_2017" not in done.stdout
    assert not list(tmp_path.iterdir()), "the doctor writes nothing"


def test_data_sets_are_counted(samples: Path) -> None:
    done = run(sys.executable, *DOCTOR, DETECTRON2_DATASETS=str(samples))
    assert value(done.stdout, "voc_2007_trainval") == "54 images"
    assert value(done.stdout, "voc_2007_test") == "26 images"


def test_a_folder_of_the_user_is_reported(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "cells")
    done = run(sys.executable, *DOCTOR, "--data", root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert value(done.stdout, "custom data") == f"{root}, format yolo"
    assert int(value(done.stdout, "train").removesuffix(" images")) == len(list((root / "images/train").iterdir()))
    missing = run(sys.executable, *DOCTOR, "--data", tmp_path / "nothing")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert re.search("^error: the data folder '.*nothing' does not exist", missing.stderr)


def test_without_packages_the_command_that_installs_them_is_printed() -> None:
    done = run(sys.executable, "-S", *DOCTOR, PYTHONPATH="")
    assert done.returncode == 1
    assert done.stderr == ""
    assert value(done.stdout, "torch") == "missing"
    assert "make setup" in done.stdout.splitlines()[-1]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an environment with all packages of this one except Detectron2, pip included."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "detectron2" not in path.name:
            (packages / path.name).symlink_to(path)
    (next((tmp_path / "venv").glob("lib/python3*/site-packages")) / "packages.pth").write_text(str(packages))
    return tmp_path / "venv" / "bin" / "python"


def test_the_printed_command_installs_a_missing_detectron2(python: Path, tmp_path: Path) -> None:
    """With the real wheel."""
    done = run(python, *DOCTOR, DETECTRON2_DATASETS=str(tmp_path))
    assert done.returncode == 1, done.stdout
    assert value(done.stdout, "detectron2") == "missing"
    (command,) = (line.strip() for line in done.stdout.partition("missing:\n")[2].splitlines())
    assert "relvit_d2 doctor --install-detectron2" in command
    other = run(python, "-m", "relvit_d2", "check-data", "streets_train")
    assert other.returncode == 1
    assert other.stderr == "error: the package detectron2 is not installed: run relvit-d2 doctor --install-detectron2\n"

    repair = run("bash", "-c", command)
    if "could not be reached" in repair.stderr:
        pytest.skip("no package index within reach: the real wheel was not installed")
    assert repair.returncode == 0, repair.stderr
    assert "Detectron2 0.7.2 is installed" in repair.stdout  # and has been imported, modeling included
    installed = list(tmp_path.glob("venv/lib/python3*/site-packages/*"))
    assert {path.name for path in installed if path.is_dir()} == {"detectron2", "sal_detectron2-0.7.2.dist-info"}
    check = run(python, "-m", "pip", "check")
    assert not [line for line in check.stdout.splitlines() if "detectron2" in line]
    assert describe(python)[0] == "wheel sal-detectron2 0.7.2 from a package index"


def describe(python: Path) -> list[str]:
    """The origin and the limitations of that environment's Detectron2."""
    code = "from relvit_d2.cli.doctor import *; print(detectron2_origin(), *detectron2_limitations(), sep='\\n')"
    return run(python, "-c", code).stdout.splitlines()


ORIGINS = {
    "commit 1f2e3d of https://example.org/d2": {"url": "https://example.org/d2", "vcs_info": {"commit_id": "1f2e3d"}},
    "editable install from file:///src/d2": {"url": "file:///src/d2", "dir_info": {"editable": True}},
    "installed from file:///src/d2": {"url": "file:///src/d2", "dir_info": {}},
}


def test_the_origin_and_the_limitations_of_another_detectron2_are_printed(python: Path, tmp_path: Path) -> None:
    """A copy of the installed one, with pip's record of a source (PEP 610), and with its limitations removed."""
    import detectron2

    site = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    copy = shutil.copytree(detectron2.__path__[0], site / "detectron2", symlinks=True)
    origin, *limitations = describe(python)
    assert origin == f"in {copy}, not installed by pip"
    zoo_limitation = "detectron2.model_zoo needs setuptools older than 82 (facebookresearch/detectron2#5494)"
    assert zoo_limitation in limitations

    info = site / "detectron2-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    zoo = copy / "model_zoo" / "model_zoo.py"
    zoo.write_text(zoo.read_text().replace("pkg_resources", "importlib"))
    for origin, direct_url in ORIGINS.items():
        (info / "direct_url.json").write_text(json.dumps(direct_url))
        expected = [line for line in limitations if line != zoo_limitation]
        assert describe(python) == [f"detectron2 0.6, {origin}", *expected]
