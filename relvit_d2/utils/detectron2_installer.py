"""Installation of Detectron2's Python code into the running environment, without a compiler.

Detectron2 has no release on the package index. The wheel pinned in ``requirements-detectron2.txt`` contains its
code of August 2024 (ViTDet included), a ``_C`` compiled for Python 3.10 and an older torch, and a stray
top-level package ``tools``. Mask R-CNN on a transformer needs no ``_C``, so only the rest of the package and
the wheel's metadata, corrected, are installed; ``pip uninstall sal-detectron2`` removes them.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text
from relvit_d2.utils.pip_errors import explain_pip

REQUIREMENTS = Path(__file__).with_name("requirements-detectron2.txt")
STAGING = ".detectron2-staging-"
# Replacements in the wheel's metadata. The code runs with NumPy 2, imports four more packages, and needs black only
# to format what LazyConfig.to_py writes; without _C it runs on every Python 3 and platform.
CORRECTIONS = {
    "METADATA": {
        r"^Requires-Dist: numpy<2$": "Requires-Dist: numpy",
        r"^Requires-Dist: black$": "\n".join(
            f"Requires-Dist: {n}" for n in ("fvcore", "iopath", "torch", "torchvision")
        ),
    },
    "WHEEL": {r"^Root-Is-Purelib: .*$": "Root-Is-Purelib: true", r"^Tag: .*$": "Tag: py3-none-any"},
}


def probe() -> tuple[bool, str]:
    """Import Detectron2 in a fresh process; return (True, its version) or (False, the import's error)."""
    code = "import detectron2, detectron2.modeling; print(detectron2.__version__)"
    # The working directory is first on the path of ``python -c``: a folder named detectron2 must not count.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace", cwd=sys.prefix
    )
    words = (done.stdout if done.returncode == 0 else done.stderr).strip() or f"exit status {done.returncode}"
    return done.returncode == 0, words.splitlines()[-1]


def correct_metadata(info: Path) -> None:
    """Apply ``CORRECTIONS`` to a dist-info folder, and correct the hashes and sizes in its RECORD."""
    record = (info / "RECORD").read_text(encoding="utf-8")
    texts = {}
    for name, corrections in CORRECTIONS.items():
        text = (info / name).read_text(encoding="utf-8")
        for wrong, right in corrections.items():
            text = re.sub(wrong, right, text, flags=re.MULTILINE)
        texts[name] = text
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        path = f"{info.name}/{name}"
        row = f"{path},sha256={digest},{len(text.encode())}"
        record = re.sub(rf"^{re.escape(path)},.*$", row, record, flags=re.MULTILINE)
    for name, text in (texts | {"RECORD": record}).items():
        if (info / name).read_text(encoding="utf-8") != text:
            write_text(info / name, text)


def prune(package: Path, info: Path) -> None:
    """Delete the compiled part of ``package``, and from RECORD in ``info`` every file that is not kept."""
    for compiled in package.glob("_C*"):
        compiled.unlink()
    lines = (info / "RECORD").read_text(encoding="utf-8").splitlines(keepends=True)
    owned = tuple(f"{folder.name}/" for folder in (package, info))
    kept = [line for line in lines if line.startswith(owned) and (package.parent / line.partition(",")[0]).exists()]
    (info / "RECORD").write_text("".join(kept), encoding="utf-8")


def install(requirements: Path, site: Path) -> None:
    """Install the pinned Detectron2 into ``site``, a site-packages folder, replacing an incomplete installation.

    The files are prepared in a temporary folder inside ``site`` and renamed into place.

    Raises:
        UserError: if pip fails (hash, network, disk).
        OSError: if ``site`` cannot be written.
    """
    for left in site.glob(f"{STAGING}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=site, prefix=STAGING) as staging:
        wheel, old = Path(staging, "wheel"), Path(staging, "old")
        # The wheel is tagged for Python 3.10; pip requires hashes, since the file has them.
        command = [sys.executable, "-m", "pip", "install", "--no-input", "--no-deps", "--python-version", "3.10"]
        command += ["--target", str(wheel), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise UserError(f"Detectron2 was not installed: {explain_pip(done.stdout + done.stderr)}")
        package = wheel / "detectron2"
        (info,) = wheel.glob("*.dist-info")
        prune(package, info)
        correct_metadata(info)
        old.mkdir()
        for path in [site / package.name, *site.glob("sal_detectron2-*.dist-info")]:
            if path.exists():
                path.rename(old / path.name)
        info.rename(site / info.name)
        package.rename(site / package.name)


def ensure(requirements: Path) -> str:
    """Install Detectron2 unless one can be imported; of an installed wheel, correct the metadata.

    Returns:
        What was found or done, as a line for the user.

    Raises:
        UserError: if it cannot be installed or then not be imported, or if an official Detectron2 is installed
            that cannot be imported (it is not replaced).
    """
    site = Path(sysconfig.get_path("purelib"))
    works, words = probe()
    if not works and any(metadata.distributions(name="detectron2")):
        raise UserError(
            f"the installed Detectron2 {metadata.version('detectron2')} does not import ({words}); "
            f"repair it, or run {shlex.quote(sys.executable)} -m pip uninstall detectron2 and try again"
        )
    try:
        if works:
            for info in site.glob("sal_detectron2-*.dist-info"):
                correct_metadata(info)
            return f"Detectron2 {words} is installed and can be imported; its code is not changed"
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
