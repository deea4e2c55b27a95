"""Print the state of this environment, what it lacks, and the command that installs that.

Prints the Python, the package versions, the device and the precision chosen for it, and the data sets found
under ``$DETECTRON2_DATASETS``. Runs in a half-built environment too. Exit status 0 when training can start,
else 1; missing data sets are named but do not count, since ``relvit-d2 demo`` needs none.
"""

import argparse
import importlib
import importlib.util
import os
import platform
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path

from relvit_d2 import __version__
from relvit_d2.utils.detectron2_installer import REQUIREMENTS, ensure

EXAMPLE = "relvit-d2 doctor"

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "fvcore",
    "pycocotools",
    "faster_coco_eval",
    "safetensors",
    "h5py",
    "defusedxml",
    "matplotlib",
    "tensorboard",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--install-detectron2",
        action="store_true",
        help="install Detectron2's Python code into this environment, without a compiler; one that imports is kept",
    )
    parser.add_argument(
        "--requirements", type=Path, default=REQUIREMENTS, help="with --install-detectron2: file that pins the wheel"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and the commands; return the exit status.

    Raises:
        UserError: if Detectron2 cannot be installed.
    """
    if args.install_detectron2:
        print(ensure(args.requirements))
        return 0
    warnings.simplefilter("ignore")
    row("Python", f"{platform.python_version()}   {sys.executable}")
    missing = check_packages()
    if not missing:
        check_device()
        check_data()
        print("\nTraining can start.")
        return 0
    print("\nTraining cannot start. To install what is missing:")
    for command in missing:
        print(f"  {command}")
    return 1


def row(name: str, value: str) -> None:
    """Print one line of the table."""
    print(f"{name:<20}{value}", flush=True)


def commands() -> tuple[str, str]:
    """Return the commands that install the packages and Detectron2 into the environment in use.

    In a checkout, outside of any virtual environment and in the project's own, ``make setup`` does both.
    """
    checkout = (ROOT / "Makefile").is_file() and (ROOT / "pyproject.toml").is_file()
    foreign = sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix
    python = shlex.quote(sys.executable)
    here = f"cd {shlex.quote(str(ROOT))} && " if checkout else ""
    if checkout and (not foreign or Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()):
        command = f"{here}make setup && .venv/bin/relvit-d2 doctor"
        return command, command
    package = "-e ." if checkout else "--upgrade relvit_d2"
    return f"{here}{python} -m pip install {package}", f"{here}{python} -m relvit_d2 doctor --install-detectron2"


def try_import(name: str) -> str | None:
    """Return None when the module ``name`` imports, else why not, on one line."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary raises OSError, RuntimeError, AttributeError, ...
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            return "missing"
        return f"does not import: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def version(package: str) -> str:
    """Return the version that an imported package gives itself, else the one in its metadata."""
    return str(getattr(sys.modules[package], "__version__", None) or metadata.version(package))


def check_packages() -> list[str]:
    """Print the versions; return the commands that install what is missing or broken, without repeats."""
    install_packages, install_detectron2 = commands()
    missing = []
    row("relvit_d2", f"{__version__}   {ROOT}")
    for package in PACKAGES:
        fault = try_import(package)
        row(package, fault or version(package))
        if fault:
            missing.append(install_packages)
    fault = try_import("detectron2.modeling")
    if fault:
        missing.append(install_detectron2)
        row("detectron2", fault)
    else:
        compiled = importlib.util.find_spec("detectron2._C") is not None
        state = "with its compiled _C" if compiled else "without its compiled _C, which nothing here needs"
        row("detectron2", f"{version('detectron2')}   {state}")
    return list(dict.fromkeys(missing))


def check_device() -> None:
    """Print the device that training takes, and the precision that ``auto`` takes on it."""
    import torch

    from relvit_d2.engine.precision import choose_precision
    from relvit_d2.utils.hardware import processor

    row("processor", processor())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties]
    row("device", "; ".join(gpus) or "the processor, no GPU")
    chosen = choose_precision("auto", device)
    row("precision auto", f"{chosen.name}: {chosen.reason}")


def check_data() -> None:
    """Print how many images each data set of the catalog has, or why it is not usable; each reason once, below."""
    from relvit_d2.data.detection import catalog
    from relvit_d2.utils.errors import UserError

    state = "is set" if os.environ.get("DETECTRON2_DATASETS") else "is not set"
    row("data root", f"{catalog.dataset_root()}   ($DETECTRON2_DATASETS {state})")
    reasons: dict[str, int] = {}
    for name in catalog.DATASETS:
        if name.startswith("streets_") and not (catalog.streets_root() / "streets").is_dir():
            row(f"  {name}", f"drawn on first use, in {catalog.streets_root()}")
            continue
        try:
            row(f"  {name}", f"{len(catalog.get_images(name))} images")
        except UserError as error:
            number = reasons.setdefault(str(error), len(reasons) + 1)
            row(f"  {name}", f"not usable ({number})")
    for reason, number in reasons.items():
        print(f"  ({number}) {reason}.")
