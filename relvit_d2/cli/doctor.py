"""Print the state of this environment, what is missing, and the command that installs it.

Prints the Python, the package versions, the origin and the limitations of Detectron2, the device, its default
precision, and the data sets found under ``$DETECTRON2_DATASETS``. Packages may be missing. Exit status 0 when
training can start, else 1; missing data sets do not count, since ``relvit-d2 demo`` needs none.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from relvit_d2 import __version__
from relvit_d2.utils.detectron2_installer import REQUIREMENTS, ensure
from relvit_d2.utils.errors import UserError, one_line
from relvit_d2.utils.printing import print_text

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

# Limitations of Detectron2 that its code shows: file, text, whether the text is there when the limitation is,
# effect, and the number of the report in Detectron2's tracker.
LIMITATIONS = (
    ("model_zoo/model_zoo.py", "pkg_resources", True, "detectron2.model_zoo needs setuptools older than 82", 5494),
    ("engine/train_loop.py", "torch.cuda.amp", True, "AMPTrainer prints deprecation warnings of torch", 5508),
    ("structures/image_list.py", "torch._check", False, "torch.export fails on ImageList for images of any size", 5347),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--install-detectron2",
        action="store_true",
        help="install Detectron2's Python code into this environment, without a compiler; a working one is kept",
    )
    parser.add_argument("--data", help="report on this folder of a custom data set too")
    parser.add_argument(
        "--requirements", type=Path, default=REQUIREMENTS, help="with --install-detectron2: file that pins the wheel"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and the commands that install what is missing.

    Returns:
        The exit status: 0 when training can start, else 1.

    Raises:
        UserError: if Detectron2 cannot be installed.
    """
    if args.install_detectron2:
        print_text(ensure(args.requirements))
        return 0
    warnings.simplefilter("ignore")
    row("Python", f"{platform.python_version()}   {sys.executable}")
    missing = check_packages()
    if not missing:
        check_device()
        check_data()
        if args.data:
            check_folder(args.data)
        else:
            row("  your images", "relvit-d2 train --data FOLDER")
        print_text("\nTraining can start.")
        return 0
    print_text("\nTraining cannot start. To install what is missing:")
    for command in missing:
        print_text(f"  {command}")
    return 1


def row(name: str, value: str) -> None:
    """Print one line of the table."""
    print_text(f"{name:<27}{value}")


def commands() -> tuple[str, str]:
    """Return the commands that install the packages and Detectron2 into this environment.

    In a checkout, both are ``make setup``, outside of any virtual environment and in the checkout's ``.venv``.
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
    """Return None when the module ``name`` can be imported, else the error, on one line."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary raises OSError, RuntimeError, AttributeError, ...
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            return "missing"
        return f"does not import: {type(error).__name__}: {one_line(error)}"
    return None


def version(package: str) -> str:
    """Return ``__version__`` of an imported package, else the version in its metadata."""
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
    row("detectron2", fault or f"{version('detectron2')}   {detectron2_origin()}")
    if fault:
        missing.append(install_detectron2)
    else:
        for limitation in detectron2_limitations():
            row("", limitation)
    return list(dict.fromkeys(missing))


def detectron2_folder() -> Path:
    """Return the folder of the installed Detectron2."""
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def detectron2_origin() -> str:
    """Return where Detectron2 was installed from: a wheel, a folder, or a repository and its commit."""
    names = metadata.packages_distributions().get("detectron2") or ["detectron2"]  # editable: no list of files
    try:
        distribution = metadata.distribution(names[0])
    except metadata.PackageNotFoundError:
        return f"in {detectron2_folder()}, not installed by pip"
    name = f"{distribution.name} {distribution.version}"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return f"{name}, commit {origin['vcs_info']['commit_id']} of {origin['url']}"
    if origin:
        editable = origin.get("dir_info", {}).get("editable", False)
        return f"{name}, {'editable install' if editable else 'installed'} from {origin['url']}"
    return f"wheel {name} from a package index"


def detectron2_limitations() -> Iterator[str]:
    """Yield what the installed Detectron2 lacks, as its code shows."""
    if not any(detectron2_folder().glob("_C*")):
        yield "no compiled _C: no deformable convolution, no rotated boxes; relvit_d2 needs neither"
    for file, text, present, effect, number in LIMITATIONS:
        path = detectron2_folder() / file
        if path.is_file() and (text in path.read_text(encoding="utf-8")) == present:
            yield f"{effect} (facebookresearch/detectron2#{number})"


def check_device() -> None:
    """Print the device that training uses, and the precision that ``auto`` selects on it."""
    import torch

    from relvit_d2.engine.precision import choose_precision
    from relvit_d2.utils.hardware import default_device, processor

    row("processor", processor())
    device = torch.device(default_device())
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties]
    other = "Apple's GPU (mps), untested" if device.type == "mps" else "the processor, no GPU"
    row("device", "; ".join(gpus) or other)
    chosen = choose_precision("auto", device)
    row("precision auto", f"{chosen.name}: {chosen.reason}")


def check_data() -> None:
    """Print the number of images of each data set of the catalog that is present, and how to get others."""
    from relvit_d2.data.detection import catalog

    state = "is set" if os.environ.get("DETECTRON2_DATASETS") else "is not set"
    row("data root", f"{catalog.dataset_root()}   ($DETECTRON2_DATASETS {state})")
    absent = 0
    for name in catalog.DATASETS:
        if name.startswith("streets_") and not (catalog.streets_root() / "streets").is_dir():
            continue  # drawn on first use
        try:
            row(f"  {name}", f"{len(catalog.get_images(name))} images")
        except UserError:
            absent += 1
    if absent:
        row("  other data sets", f"{absent} known but not there: relvit-d2 prepare-data NAME; the demo needs none")


def check_folder(data: str) -> None:
    """Print the sets of a custom data set and the number of their images.

    Raises:
        UserError: the folder is missing, or contains no labels that can be read.
    """
    from relvit_d2.data.detection.catalog import get_images
    from relvit_d2.data.detection.custom import named_sets, open_folder, register_custom

    form, folder = open_folder(Path(data).expanduser())
    row("custom data", f"{data}, format {form}")
    for name, keys in (sets := named_sets(data, form, folder)).items():
        register_custom({"TRAIN": (name,), "TEST": (), "CUSTOM": sets}, labels=False)
        row(f"  {keys['SPLIT']}", f"{len(get_images(name))} images")
