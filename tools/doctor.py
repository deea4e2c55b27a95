"""Say what this environment has, what it lacks, and the command that mends it.

Prints the Python, the package versions, the device and the precision chosen for it, and the data sets found
under ``$DETECTRON2_DATASETS``. Runs in a half-built environment too. Exit status 0 when training can start,
else 1; missing data sets are named but do not count, since ``make demo`` needs none.
"""

from __future__ import annotations  # an old Python gets a sentence, not a syntax error

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

from setup_env import check_python

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

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


def row(name: str, value: str) -> None:
    """Print one line of the table."""
    print(f"{name:<20}{value}", flush=True)


def environment_commands() -> tuple[str, str]:
    """Return the commands that install the packages and Detectron2 into the environment in use.

    Outside of any virtual environment, and in the project's own, ``make setup`` does both.
    """
    prefix = Path(sys.prefix).resolve()
    foreign = sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix
    if foreign and prefix != (ROOT / ".venv").resolve():
        python = f"cd {shlex.quote(str(ROOT))} && {shlex.quote(sys.executable)}"
        return f"{python} -m pip install -e .", f"{python} tools/install_detectron2.py"
    command = f"cd {shlex.quote(str(ROOT))} && make setup && .venv/bin/python tools/doctor.py"
    return command, command


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
    """Print the versions; return the mending commands of what is missing or broken, without repeats."""
    install_packages, install_detectron2 = environment_commands()
    mends = []
    row("relvit_d2", f"{importlib.import_module('relvit_d2').__version__}   {ROOT}")
    for package in PACKAGES:
        fault = try_import(package)
        row(package, fault or version(package))
        if fault:
            mends.append(install_packages)
    fault = try_import("detectron2.modeling")
    if fault:
        mends.append(install_detectron2)
        row("detectron2", fault)
    else:
        compiled = importlib.util.find_spec("detectron2._C") is not None
        state = "with its compiled _C" if compiled else "without its compiled _C, which nothing here needs"
        row("detectron2", f"{version('detectron2')}   {state}")
    return list(dict.fromkeys(mends))


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
    """Print how many images each data set of the catalog has, or why not; each reason once, below."""
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


def main() -> int:
    """Print the table and the mends; return the exit status."""
    argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/doctor.py",
    ).parse_args()
    warnings.simplefilter("ignore")
    row("Python", f"{platform.python_version()}   {sys.executable}")
    fault = check_python(sys.version_info)
    mends = [fault] if fault else check_packages()
    if not mends:
        check_device()
        check_data()
        print("\nTraining can start.")
        return 0
    print("\nTraining cannot start. To mend it:")
    for mend in mends:
        print(f"  {mend}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
