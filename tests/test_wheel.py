"""The wheel, installed beside the packages of this environment, and its metadata."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "relvit_d2", "configs")
DEVELOPMENT = ("dev", "docs")  # extras
UNPINNED = (*DEVELOPMENT, "loggers")  # which make setup does not install
FEW = ("SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from a copy of the sources: a build leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder)
    done = subprocess.run(build, capture_output=True, text=True)
    if "Connection" in done.stdout + done.stderr or "No matching distribution" in done.stderr:
        pytest.skip("no package index within reach: setuptools, which builds the wheel, cannot be downloaded")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel and the packages of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    install = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", wheel)
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin"


def run(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run ``relvit-d2`` in a folder."""
    names = ("PYTHONPATH", "DETECTRON2_DATASETS")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [installed / "relvit-d2", *map(str, words)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_the_wheel_has_every_file_of_the_package_and_every_config(wheel: Path) -> None:
    expected = {"relvit_d2/py.typed"}
    kinds = (".py", ".txt", ".html", ".css")
    expected |= {str(path.relative_to(ROOT)) for path in ROOT.glob("relvit_d2/**/*") if path.suffix in kinds}
    expected |= {f"relvit_d2/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_a_config_of_the_wheel_is_found_from_any_folder(installed: Path, tmp_path: Path) -> None:
    assert "configs/demo/streets.yaml" in run(installed, tmp_path, "reproduce", "demo", "--print").stdout


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder_and_its_detector_predicts(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "demo", *FEW)
    results = json.loads((tmp_path / "output/demo/results.json").read_text())
    assert results.keys() == {"finetune", "supervised", "pretrain", "machine"}
    for arm in ("finetune", "supervised"):
        assert results[arm].keys() == {"AP", "AP50", "AP75", "seconds"}
    chances = {"relation_chance": 49 / 256, "position_chance": 1 / 64}
    assert {name: results["pretrain"][name] for name in chances} == pytest.approx(chances)
    assert {"relation_accuracy", "position_accuracy", "seconds"} <= results["pretrain"].keys()
    assert "One seed proves nothing" in (tmp_path / "output/demo/results.md").read_text()
    assert Image.open(tmp_path / "output/demo/predictions.png").width > 1000
    image = next(Path(os.environ["XDG_CACHE_HOME"]).glob("**/streets/test/*.png"))
    run(installed, tmp_path, "predict", "--weights", "output/demo/finetune", "--input", image)
    assert (tmp_path / "predictions" / image.name).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"output", "predictions"}


@pytest.mark.slow
def test_trainings_and_a_row_run_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    few = ("DATASETS.TRAIN", "('streets_train[:8]',)", "DATASETS.TEST", "('streets_test[:2]',)", *FEW)
    config = "configs/demo/ssl_streets.yaml"
    done = run(installed, tmp_path, "pretrain", "--config-file", config, *few)
    command = re.findall(r"^next +(relvit-d2 train .*)$", done.stdout, re.M)
    assert command
    run(installed, tmp_path, *command[0].split()[1:], *few, "OUTPUT_DIR", "two", "SOLVER.IMS_PER_BATCH", 2)
    both = ("--num-gpus", 2, *few, "OUTPUT_DIR", "parallel", "SOLVER.IMS_PER_BATCH", 2)
    run(installed, tmp_path, "train", "--config-file", "configs/demo/streets.yaml", *both)
    done = run(installed, tmp_path, "reproduce", "demo", "--scale", 0.01, "SOLVER.IMS_PER_BATCH", 2)
    assert "A rehearsal" in done.stdout and (tmp_path / "output/demo_streets_0.01/results.md").is_file()


def requirements() -> dict[str, set[str]]:
    """The distributions that pyproject.toml names, of the package itself under "" and of each extra."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    groups = dict(re.findall(r"^(\w+) = (\[.*\])$", extras, re.M))
    groups[""] = re.findall(r"^dependencies = (\[.*?^\])", text, re.M | re.S)[0]
    return {
        name: {canonicalize_name(Requirement(line).name) for line in ast.literal_eval(words)}
        for name, words in groups.items()
    }


def test_every_import_is_declared() -> None:
    declared, owners = requirements(), packages_distributions()
    extras = set().union(*(names for extra, names in declared.items() if extra not in DEVELOPMENT))
    for path in ROOT.glob("relvit_d2/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names:
                if module in ("relvit_d2", "detectron2"):  # which is in no index
                    continue
                names = {canonicalize_name(name) for name in owners.get(module, [module])}
                assert names & (declared[""] | extras), f"{path} imports {module}, which pyproject.toml lacks"


def test_extras_and_pins_name_the_same_packages() -> None:
    """What requirements.txt pins is what the package and its extras need, and nothing else."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name) for line in lines}
    declared = requirements()
    assert set().union(*(names for extra, names in declared.items() if extra not in UNPINNED)) <= pinned
    assert pinned <= set().union(*declared.values())
