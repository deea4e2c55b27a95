"""Installation of Detectron2's Python code into the running environment, without a compiler.

Detectron2 has no release on the package index. The wheel pinned in ``requirements-detectron2.txt`` carries
its code of August 2024 (ViTDet included) beside a ``_C`` that was compiled for Python 3.10 and
another torch, and a stray top-level package ``tools``. Mask R-CNN on a transformer needs no ``_C``, so the
package without it and the wheel's metadata are all that is kept; ``pip uninstall sal-detectron2`` removes
them. A Detectron2 that imports already is left as it is.

The wheel's metadata asks for ``numpy<2`` and ``black``, and ``pip check`` says so; the code runs with
NumPy 2, and black only formats the files of ``LazyConfig.to_py``.
"""

import csv
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.pip_errors import explain_pip

REQUIREMENTS = Path(__file__).with_name("requirements-detectron2.txt")
STAGING = ".detectron2-staging-"


def probe() -> tuple[bool, str]:
    """Import Detectron2 in a fresh process; return (True, its version) or (False, the import's error)."""
    code = "import detectron2, detectron2.modeling; print(detectron2.__version__)"
    # The working directory is first on the path of ``python -c``: a folder named detectron2 must not count.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace", cwd=sys.prefix
    )
    words = (done.stdout if done.returncode == 0 else done.stderr).strip() or f"exit status {done.returncode}"
    return done.returncode == 0, words.splitlines()[-1]


def download(requirements: Path, target: Path) -> None:
    """Let pip put the pinned wheel's files under ``target``; raise UserError where it cannot."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--no-compile",
    ]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
    command += ["--target", str(target), "--require-hashes", "-r", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"Detectron2 was not installed: {explain_pip(done.stdout)}")


def prune(package: Path, info: Path) -> None:
    """Delete the compiled part of ``package``, and from RECORD in ``info`` every file that is not kept."""
    for compiled in package.glob("_C*"):
        compiled.unlink()
    record = info / "RECORD"
    with record.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    owned = (package.name, info.name)
    kept = [row for row in rows if Path(row[0]).parts[0] in owned and (package.parent / row[0]).exists()]
    with record.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(kept)


def install(requirements: Path, site: Path) -> None:
    """Put the pinned Detectron2 into ``site`` (a site-packages folder), in place of what an earlier try left.

    Everything is made ready in a temporary folder inside ``site``; what appears there is renamed into place.

    Raises:
        UserError: if pip fails (hash, network, disk).
        OSError: if ``site`` cannot be written.
    """
    for left in site.glob(f"{STAGING}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=site, prefix=STAGING) as staging:
        wheel, old = Path(staging, "wheel"), Path(staging, "old")
        download(requirements, wheel)
        package = wheel / "detectron2"
        (info,) = wheel.glob("*.dist-info")
        prune(package, info)
        old.mkdir()
        for path in [site / package.name, *site.glob("sal_detectron2-*.dist-info")]:
            if path.exists():
                path.rename(old / path.name)
        info.rename(site / info.name)
        package.rename(site / package.name)


def ensure(requirements: Path) -> str:
    """Install Detectron2 unless one imports; return what was found or done, as a line for the user.

    Raises:
        UserError: if it cannot be installed, does not import afterwards, or if an official Detectron2 is
            installed that does not import (it is not replaced).
    """
    works, words = probe()
    if works:
        return f"Detectron2 {words} is installed and imports; it is left as it is"
    if any(metadata.distributions(name="detectron2")):
        raise UserError(
            f"the installed Detectron2 {metadata.version('detectron2')} does not import ({words}); "
            f"repair it, or run {shlex.quote(sys.executable)} -m pip uninstall detectron2 and try again"
        )
    site = Path(sysconfig.get_path("purelib"))
    try:
        install(requirements, site)
    except OSError as error:
        raise UserError(f"{site} cannot be written ({error}); use a virtual environment of your own") from error
    works, words = probe()
    if not works:
        raise UserError(
            f"Detectron2 is in {site} but does not import ({words}); "
            "relvit-d2 doctor lists the packages that are missing"
        )
    return f"Detectron2 {words} is installed in {site}"
