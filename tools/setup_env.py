"""Build or repair ``.venv``: a virtual environment with the pinned packages and Detectron2.

Every step looks at what is there, so a second run goes on where the first stopped. ``.venv/.ready`` is
written last; ``make`` reads it. pip's own words go to ``.venv/setup.log``. Standard library only, and
readable by Python 3.6, so that an old Python gets a sentence instead of a syntax error.
"""

import argparse
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
READY = VENV / ".ready"


class SetupError(Exception):
    """A failure that the user can mend; the message is one sentence."""


def supported_minors() -> range:
    """Return the minor versions of Python 3 that ``requires-python`` in ``pyproject.toml`` allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((first, end),) = re.findall(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', text, re.MULTILINE)
    return range(int(first), int(end))


def check_python(version: tuple) -> "str | None":
    """Return None for a supported version (major, minor, micro, ...), else a sentence with the correction."""
    minors = supported_minors()
    if version[0] == 3 and version[1] in minors:
        return None
    found = ".".join(str(part) for part in version[:3])
    return f"Python 3.{minors[0]} to 3.{minors[-1]} is needed, this is {found}; run make PYTHON=python3.11 setup"


def venv_works() -> bool:
    """Return whether ``.venv`` has a supported Python with pip."""
    minors = supported_minors()
    code = f"import sys, pip; sys.exit(not (3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]}))"
    try:
        return subprocess.run([str(PYTHON), "-c", code], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    """Make ``.venv`` anew, deleting what is in it."""
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,  # noqa: UP021 (text= is newer than 3.6)
    )
    if done.returncode == 0:
        return
    if "ensurepip" in done.stdout:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments; install its venv package "
            "(on Debian and Ubuntu: apt install python3-venv) and run make setup again"
        )
    words = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    raise SetupError(f"{VENV} could not be made ({words[-1]}); delete that folder and run make setup again")


def install_requirements() -> None:
    """Install ``requirements.txt`` and this package."""
    pip_install("requirements.txt", "-r", str(ROOT / "requirements.txt"))
    pip_install("the command relvit-d2", "--no-deps", "-e", str(ROOT))


def pip_install(what: str, *arguments: str) -> None:
    """Run pip install; on a terminal the seconds are counted while pip is silent.

    Raises:
        SetupError: if pip fails; the sentence names ``what``.
    """
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    start = time.monotonic()
    with LOG.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command + list(arguments), stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if sys.stdout.isatty():
                    print(f"\r      {time.monotonic() - start:.0f} s", end="", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if sys.stdout.isatty():
        print("\r", end="")
    if process.returncode:
        # The package is not on the path of this script.
        explain_pip = runpy.run_path(str(ROOT / "relvit_d2" / "utils" / "pip_errors.py"))["explain_pip"]
        reason = explain_pip(LOG.read_text(encoding="utf-8", errors="replace"))
        raise SetupError(f"{what} was not installed: {reason} (all of pip's output: {LOG})")


def install_detectron2() -> None:
    """Run ``relvit-d2 doctor --install-detectron2`` with the new Python; its error is passed on."""
    done = subprocess.run(
        [str(PYTHON), "-m", "relvit_d2", "doctor", "--install-detectron2"],
        cwd=str(ROOT),
        stderr=subprocess.PIPE,
        universal_newlines=True,  # noqa: UP021 (text= is newer than 3.6)
    )
    if done.returncode:
        raise SetupError((done.stderr.strip().splitlines() or ["no output"])[-1].replace("error: ", "", 1))


def set_up() -> None:
    """Bring ``.venv`` into the wanted state; raise SetupError where that fails."""
    if READY.exists():
        READY.unlink()
    if not venv_works():
        print(f"[1/3] making .venv with {sys.executable}", flush=True)
        make_venv()
    print("[2/3] installing the packages (new: about 5 GB, a minute or more) ...", flush=True)
    install_requirements()
    print("[3/3] installing Detectron2 ...", flush=True)
    install_detectron2()
    READY.touch()
    print(f"{VENV} is ready", flush=True)


def main() -> int:
    """Run the script; return the exit status."""
    argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python3 tools/setup_env.py",
    ).parse_args()
    problem = check_python(sys.version_info)
    if problem is None:
        try:
            set_up()
        except SetupError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{VENV} could not be written ({error}); mend that and run make setup again"
        except KeyboardInterrupt:
            problem = "the set-up was interrupted; run make setup again, it goes on from here"
    if problem:
        print(f"{problem}.", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
