"""Create or repair ``.venv``: a virtual environment with the pinned packages and Detectron2.

A second run continues after the last step that succeeded. ``.venv/.ready`` is written last; ``make`` compares
its time. pip's output goes to ``.venv/setup.log``. Standard library only, and syntax that Python 3.6 parses,
so that an old Python gets one sentence instead of a syntax error.
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
    """A failure that the user can correct; the message is one sentence."""


def read_pins(file: str, pattern: str) -> list:
    """Return what ``pattern`` finds in a file of this checkout, line by line."""
    return re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def supported_minors() -> range:
    """Return the minor versions of Python 3 that ``requires-python`` in ``pyproject.toml`` allows."""
    ((first, end),) = read_pins("pyproject.toml", r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$')
    return range(int(first), int(end))


def check_python(version: tuple) -> "str | None":
    """Return None for a supported version (major, minor, micro, ...), else a sentence with the correction."""
    minors = supported_minors()
    if version[0] == 3 and version[1] in minors:
        return None
    found = ".".join(str(part) for part in version[:3])
    return f"Python 3.{minors[0]} to 3.{minors[-1]} is needed, this is {found}; run make PYTHON=python3.11 setup"


def run(*command: str) -> tuple:
    """Return exit status and output, standard error included, of a command run in this checkout."""
    done = subprocess.run(
        command,
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,  # noqa: UP021 (text= is newer than 3.6)
    )
    return done.returncode, done.stdout.strip() or f"exit status {done.returncode}"


def venv_works() -> bool:
    """Return whether ``.venv`` has a supported Python with pip."""
    minors = supported_minors()
    code = f"import sys, pip; sys.exit(not (3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]}))"
    try:
        return run(str(PYTHON), "-c", code)[0] == 0
    except OSError:
        return False


def make_venv() -> None:
    """Create ``.venv`` anew, deleting what is in it."""
    status, output = run(sys.executable, "-m", "venv", "--clear", str(VENV))
    if status and "ensurepip" in output:
        raise SetupError(
            f"{sys.executable} cannot create virtual environments; install its venv package "
            "(on Debian and Ubuntu: apt install python3-venv) and run make setup again"
        )
    if status:
        raise SetupError(
            f"{VENV} could not be created ({output.splitlines()[-1]}); delete that folder and run make setup again"
        )


def pip_install(what: str, *arguments: str) -> None:
    """Run pip install; a terminal shows the seconds that have passed, since pip's output goes to the log.

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
        raise SetupError(f"{what} not installed: {reason} (all of pip's output: {LOG})")


def set_up(torch_build: str) -> None:
    """Install everything into ``.venv``.

    Args:
        torch_build: local version label of the builds of torch and torchvision, such as ``cpu``; empty for the
            default builds of the package index.

    Raises:
        SetupError: if a step fails.
    """
    if READY.exists():
        READY.unlink()
    if not venv_works():
        print(f"[1/3] creating .venv with {sys.executable}", flush=True)
        make_venv()
    print("[2/3] installing the packages (a minute or more) ...", flush=True)
    if torch_build:
        builds = [f"{pin}+{torch_build}" for pin in read_pins("requirements.txt", r"^torch(?:vision)?==[\d.]+")]
        pip_install(" and ".join(builds), *builds)
    pip_install("requirements.txt", "-r", str(ROOT / "requirements.txt"))
    # With the pinned setuptools: an isolated build would download another one.
    pip_install("the package relvit_d2", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    print("[3/3] installing Detectron2 ...", flush=True)
    status, output = run(str(PYTHON), "-m", "relvit_d2", "doctor", "--install-detectron2")
    if status:
        raise SetupError(output.splitlines()[-1].replace("error: ", "", 1))
    print(output)
    status, output = run(str(PYTHON), "-m", "pip", "check", "--disable-pip-version-check")
    if status:
        conflicts = "; ".join(line.rstrip(".") for line in output.splitlines())
        raise SetupError(f"packages in {VENV} contradict each other ({conflicts}); run make clean and make setup")
    READY.touch()
    print(f"{VENV} is ready", flush=True)


def main() -> int:
    """Run the script; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python3 tools/setup_env.py",
    )
    parser.add_argument("--torch", default="", metavar="BUILD", help="build of torch and torchvision, such as cpu")
    args = parser.parse_args()
    problem = check_python(sys.version_info)
    if problem is None:
        try:
            set_up(args.torch)
        except SetupError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{VENV} could not be written ({error}); correct that and run make setup again"
        except KeyboardInterrupt:
            problem = "the set-up was interrupted; run make setup again to continue"
    if problem:
        print(f"{problem}.", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
