"""relvit-d2 doctor in a whole environment, in one that lacks packages, and the command that it prints."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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
    note = value(done.stdout, "voc_2007_train").removeprefix("not usable ")
    assert "VOCdevkit/VOC2007" in value(done.stdout, note)
    assert done.stdout.count("VOCdevkit/VOC2007") == 1, "four splits, one reason"
    assert not list(tmp_path.iterdir()), "the doctor only looks"


def test_data_sets_are_counted(samples: Path) -> None:
    done = run(sys.executable, *DOCTOR, DETECTRON2_DATASETS=str(samples))
    assert value(done.stdout, "voc_2007_trainval") == "54 images"
    assert value(done.stdout, "voc_2007_test") == "26 images"


def test_an_environment_without_packages_is_told_the_command() -> None:
    done = run(sys.executable, "-S", *DOCTOR, PYTHONPATH="")
    assert done.returncode == 1
    assert done.stderr == ""
    assert value(done.stdout, "torch") == "missing"
    assert "make setup" in done.stdout.splitlines()[-1]


def test_the_command_that_the_doctor_prints_installs_a_missing_detectron2(tmp_path: Path) -> None:
    """The real wheel, in an environment that sees all packages of this one but Detectron2."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "detectron2" not in path.name:
            (packages / path.name).symlink_to(path)
    (next((tmp_path / "venv").glob("lib/python3*/site-packages")) / "packages.pth").write_text(str(packages))

    done = run(python, *DOCTOR, DETECTRON2_DATASETS=str(tmp_path))
    assert done.returncode == 1, done.stdout
    assert value(done.stdout, "detectron2") == "missing"
    (command,) = (line.strip() for line in done.stdout.partition("missing:\n")[2].splitlines())
    assert "relvit_d2 doctor --install-detectron2" in command
    other = run(python, "-m", "relvit_d2", "check-data", "streets_train")
    assert other.returncode == 1
    assert other.stderr == "error: the package detectron2 is not installed: run relvit-d2 doctor --install-detectron2\n"

    mend = run("bash", "-c", command)
    if "could not be reached" in mend.stderr:
        pytest.skip("no package index within reach: the real wheel was not installed")
    assert mend.returncode == 0, mend.stderr
    assert "Detectron2 0.7.2 is installed" in mend.stdout  # and has been imported, modeling included
    installed = list(tmp_path.glob("venv/lib/python3*/site-packages/*"))
    assert {path.name for path in installed if path.is_dir()} == {"detectron2", "sal_detectron2-0.7.2.dist-info"}
