"""make setup and the Detectron2 installer: a new environment, errors, and a second run.

Wheels of a few lines replace the downloads, so that only the slow test needs a network; ``test_doctor.py``
installs the real wheel.
"""

import ast
import base64
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# A build backend that needs no network, instead of setuptools.
BACKEND = """
import zipfile
from pathlib import Path

def get_requires_for_build_editable(config_settings=None):
    return []

def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "relvit_d2-0.1.0-py3-none-any.whl", "relvit_d2-0.1.0.dist-info"
    files = {
        "relvit_d2.pth": str(Path.cwd()),
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: relvit_d2\\nVersion: 0.1.0\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\nrelvit-d2 = relvit_d2.cli:main\\n",
    }
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\\n" for path in (*files, f"{info}/RECORD")))
    return name
"""
INSTALL = ("-m", "relvit_d2", "doctor", "--install-detectron2")
NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_FIND_LINKS": ""}
DETECTRON2_FILES = {
    "detectron2/__init__.py": "__version__ = '0.7.2'\n",
    "detectron2/modeling/__init__.py": "",
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled for another Python and torch",
    "tools/train_net.py": "raise RuntimeError('stray')\n",
}


def make_wheel(folder: Path, name: str, *requires: str, files: dict[str, str] | None = None) -> Path:
    """Write the wheel ``name`` (distribution-version-tags), with these requirements and files."""
    distribution, release, python, *_ = name.split("-")
    info = f"{distribution}-{release}.dist-info"
    contents = {
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {release}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {python}-none-any\n",
    }
    wheel = folder / f"{name}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"]))
    return wheel


def environment(**changes: str) -> dict[str, str]:
    """The variables of this process without pip's settings, and ``changes``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "MAKE", "VIRTUAL_ENV"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1", **changes}


def run(*command: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)


def one_sentence(stderr: str) -> str:
    """The only line on stderr that is not from make; fails if there are more, or a traceback."""
    lines = [line for line in stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small wheel of each package, and a requirements file with the hash of Detectron2's."""
    folder = tmp_path_factory.mktemp("wheels")
    name = "sal_detectron2-0.7.2-cp310-none-any"
    wheel = make_wheel(folder, name, "Pillow>=7.1", "numpy<2", "black", files=DETECTRON2_FILES)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "pinned.txt").write_text(f"sal-detectron2==0.7.2 --hash=sha256:{digest}\n")
    for other in ("pillow-12.2.0", "numpy-2.4.6", "fvcore-0.1.5", "iopath-0.1.9"):
        make_wheel(folder, f"{other}-py3-none-any")
    for build in ("cpu", "cu130"):  # pip prefers the second one
        make_wheel(folder, f"torch-2.11.0+{build}-py3-none-any")
        make_wheel(folder, f"torchvision-0.26.0+{build}-py3-none-any", "torch==2.11.0")
    return folder


@pytest.fixture(scope="module")
def base_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that sees pip and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (folder / "pip").symlink_to(Path(sysconfig.get_path("purelib"), "pip"))
    (site_packages(folder / "venv") / "pip.pth").write_text(str(folder))
    return folder / "venv"


@pytest.fixture
def python(base_venv: Path) -> Iterator[Path]:
    """The Python of an environment without Detectron2."""
    yield base_venv / "bin" / "python"
    for left in site_packages(base_venv).glob("*detectron2*"):
        shutil.rmtree(left)


def site_packages(venv: Path) -> Path:
    return next(venv.glob("lib/python3*/site-packages"))


def found(python: Path) -> list[str]:
    """The files and folders of Detectron2 in the environment, hidden ones included."""
    site = site_packages(python.parent.parent)
    return sorted(path.name for path in site.iterdir() if "detectron2" in path.name or path.name == "tools")


def install(python: Path, requirements: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    env = environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    return run(python, *INSTALL, "--requirements", requirements, cwd=ROOT, env=env)


INSTALLED = ["detectron2", "sal_detectron2-0.7.2.dist-info"]


def test_the_package_is_kept_without_its_compiled_part(python: Path, wheels: Path) -> None:
    done = install(python, wheels / "pinned.txt", wheels)
    assert done.returncode == 0, done.stderr
    assert found(python) == INSTALLED
    site = site_packages(python.parent.parent)
    assert not list(site.glob("detectron2/_C*"))
    on_disk = {str(p.relative_to(site)) for name in INSTALLED for p in (site / name).rglob("*") if p.is_file()}
    assert read_record(site).keys() == on_disk


def read_record(site: Path) -> dict[str, bytes]:
    """The files that RECORD lists; fails where a hash or a size in it is wrong."""
    with (site / INSTALLED[1] / "RECORD").open(newline="") as file:
        rows = {name: (digest, size) for name, digest, size in csv.reader(file)}
    contents = {name: (site / name).read_bytes() for name in rows}
    for name, (digest, size) in rows.items():
        if digest:
            value = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={value}", str(len(contents[name]))), name
    return contents


def metadata(site: Path) -> tuple[set[str], list[str]]:
    """The requirements and the tags in the metadata."""
    files = read_record(site)
    requires = re.findall("^Requires-Dist: (.+)$", files[f"{INSTALLED[1]}/METADATA"].decode(), re.MULTILINE)
    return set(requires), re.findall("^Tag: (.+)$", files[f"{INSTALLED[1]}/WHEEL"].decode(), re.MULTILINE)


def test_the_metadata_name_what_the_code_needs(python: Path, wheels: Path) -> None:
    """In a new installation, and in one of the wheel as it is."""
    correct = ({"Pillow>=7.1", "numpy", "fvcore", "iopath", "torch", "torchvision"}, ["py3-none-any"])
    site = site_packages(python.parent.parent)
    assert install(python, wheels / "pinned.txt", wheels).returncode == 0
    assert metadata(site) == correct

    for name in INSTALLED:
        shutil.rmtree(site / name)
    env = environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    pip = ("-m", "pip", "install", "--no-deps", "--target", site, "--python-version", "3.10", "sal-detectron2")
    assert run(python, *pip, cwd=wheels, env=env).returncode == 0
    assert metadata(site) == ({"Pillow>=7.1", "numpy<2", "black"}, ["cp310-none-any"])
    for _ in range(2):
        assert install(python, wheels / "pinned.txt", wheels).returncode == 0
        assert metadata(site) == correct
    assert list((site / "detectron2").glob("_C*")), "the code is not changed"
    shutil.rmtree(site / "tools")


def test_pip_uninstalls_all_of_it(python: Path, wheels: Path) -> None:
    assert install(python, wheels / "pinned.txt", wheels).returncode == 0
    done = run(python, "-m", "pip", "uninstall", "-y", "sal-detectron2", cwd=wheels, env=environment())
    assert done.returncode == 0, done.stderr
    assert found(python) == []


def test_a_wrong_hash_is_one_sentence_and_leaves_nothing(python: Path, wheels: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(f"sal-detectron2==0.7.2 --hash=sha256:{'0' * 64}\n")
    done = install(python, wrong, wheels)
    assert done.returncode == 1
    assert "hash" in one_sentence(done.stderr)
    assert found(python) == []
    assert install(python, wheels / "pinned.txt", wheels).returncode == 0


def test_no_network_is_one_sentence(python: Path, wheels: Path) -> None:
    done = run(python, *INSTALL, cwd=ROOT, env=environment(**NO_NETWORK))
    assert done.returncode == 1
    assert "could not be reached" in one_sentence(done.stderr)
    assert found(python) == []


def test_what_a_killed_run_left_is_replaced(python: Path, wheels: Path) -> None:
    site = site_packages(python.parent.parent)
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").write_text("import a_part_that_is_not_there\n")
    (site / "sal_detectron2-0.7.1.dist-info").mkdir()
    (site / ".detectron2-staging-x" / "wheel").mkdir(parents=True)
    assert install(python, wheels / "pinned.txt", wheels).returncode == 0
    assert found(python) == INSTALLED


def test_a_detectron2_that_imports_is_left_as_it_is(python: Path, wheels: Path) -> None:
    own = site_packages(python.parent.parent) / "detectron2"
    (own / "modeling").mkdir(parents=True)
    (own / "__init__.py").write_text("__version__ = '0.6+own'\n")
    done = install(python, wheels / "pinned.txt", wheels)
    assert done.returncode == 0
    assert "0.6+own" in done.stdout
    assert found(python) == ["detectron2"]


def test_an_official_detectron2_that_is_broken_is_not_replaced(python: Path, wheels: Path) -> None:
    site = site_packages(python.parent.parent)
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    (site / "detectron2-0.6.dist-info").mkdir()
    (site / "detectron2-0.6.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n"
    )
    done = install(python, wheels / "pinned.txt", wheels)
    assert done.returncode == 1
    sentence = one_sentence(done.stderr)
    assert "undefined symbol" in sentence
    assert "pip uninstall detectron2" in sentence
    assert found(python) == ["detectron2", "detectron2-0.6.dist-info"]


def test_make_setup_fails_in_one_sentence_and_repairs(wheels: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "relvit_d2", tmp_path / "relvit_d2", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "tools/setup_env.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "backend.py").write_text(BACKEND)
    promised = f'requires-python = "{required_python()}"\n'
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "pyproject.toml").write_text(f'{system}[project]\nname = "relvit_d2"\nversion = "0.1.0"\n{promised}')
    requirements = tmp_path / "requirements.txt"
    pinned = tmp_path / "relvit_d2/utils/requirements-detectron2.txt"
    ready = tmp_path / ".venv" / ".ready"
    make = ("make", f"PYTHON={sys.executable}", "setup")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # a broken environment, to be created anew
    (tmp_path / ".venv" / "bin" / "python").symlink_to("gone")

    requirements.write_text("safetensors==0.7.0\n")
    done = run(*make, cwd=tmp_path, env=environment(**NO_NETWORK))
    assert done.returncode != 0
    assert "could not be reached" in one_sentence(done.stderr)
    assert str(tmp_path / ".venv" / "setup.log") in done.stderr
    assert not ready.exists()

    requirements.write_text("pillow\nfvcore\niopath\ntorch==2.11.0\ntorchvision==0.26.0\n")
    offline = environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    done = run(*make, cwd=tmp_path, env=offline)  # the pin is the real wheel's, the file is not
    assert done.returncode != 0
    assert "hash" in one_sentence(done.stderr)
    assert not ready.exists()

    shutil.copy(wheels / "pinned.txt", pinned)
    done = run(*make, "TORCH=rocm9", cwd=tmp_path, env=offline)
    assert done.returncode != 0
    sentence = one_sentence(done.stderr)
    assert sentence.startswith("torch==2.11.0+rocm9 and torchvision==0.26.0+rocm9 not installed: no package index")

    done = run(*make, "TORCH=cpu", cwd=tmp_path, env=offline)
    assert done.returncode != 0
    assert "sal-detectron2 0.7.2 requires numpy, which is not installed" in one_sentence(done.stderr)
    assert not ready.exists()

    with requirements.open("a") as file:
        file.write("numpy\n")
    done = run(*make, cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr
    assert ready.exists()
    assert found(tmp_path / ".venv" / "bin" / "python") == INSTALLED
    done = run(tmp_path / ".venv/bin/relvit-d2", "--version", cwd=wheels, env=offline)
    assert done.stdout == "relvit-d2 0.1.0\n"
    shutil.copytree(tmp_path / "relvit_d2", tmp_path / "second/relvit_d2")
    for folder, checkout in ((wheels, tmp_path), (tmp_path / "second", tmp_path / "second")):  # a second checkout
        code = "import relvit_d2; print(relvit_d2.__file__)"
        done = run(tmp_path / ".venv/bin/python", "-c", code, cwd=folder, env=offline)
        assert done.stdout == f"{checkout}/relvit_d2/__init__.py\n"

    frozen = run(tmp_path / ".venv/bin/python", "-m", "pip", "freeze", cwd=wheels, env=offline).stdout
    assert re.findall("^torch.*", frozen, re.MULTILINE) == ["torch==2.11.0+cpu", "torchvision==0.26.0+cpu"]

    up_to_date = run("make", "--question", ".venv/.ready", cwd=tmp_path, env=offline)
    assert up_to_date.returncode == 0
    os.utime(requirements, (ready.stat().st_mtime + 10,) * 2)
    assert run("make", "--question", ".venv/.ready", cwd=tmp_path, env=offline).returncode == 1


def required_python() -> str:
    (specifier,) = re.findall(r'^requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(specifier)


# Every version of Python that pyproject.toml promises, and its neighbours.
PYTHONS = [f"3.{minor}" for minor in range(40) if SpecifierSet(required_python()).contains(f"3.{minor}.0")]
OTHERS = [f"3.{minor}" for minor in range(40) if f"3.{minor}" not in PYTHONS]


def test_every_place_promises_the_same_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from setup_env import check_python

    span = f"Python {PYTHONS[0]} to {PYTHONS[-1]}"
    assert span in (ROOT / "README.md").read_text()
    assert f'python_version = "{PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()  # of mypy
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()  # of ruff
    assert all(check_python((*map(int, version.split(".")), 7)) is None for version in PYTHONS)
    for version in ("2.7", *OTHERS):
        sentence = check_python((*map(int, version.split(".")), 18))
        assert f"{span} is needed, this is {version}.18;" in sentence
        assert "make PYTHON=python3.11 setup" in sentence


@pytest.fixture(scope="module")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where pip finds no version of a pinned package, as without a network."""
    (pin,) = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("tabulate==")]
    probe = ("download", "--no-deps", "--no-cache-dir", "--quiet", "--retries", "1", "--dest")
    folder = tmp_path_factory.mktemp("probe")
    if run(sys.executable, "-m", "pip", *probe, folder, pin, cwd=folder, env=environment()).returncode:
        pytest.skip("the package index is not reachable")


@pytest.mark.slow
@pytest.mark.usefixtures("package_index")
@pytest.mark.parametrize("version", PYTHONS)
def test_the_pins_resolve_for_every_promised_version(version: str, tmp_path: Path) -> None:
    """pip finds a wheel of every pin for that Python, and no pin contradicts what another one requires."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    target = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    # pip evaluates markers for the Python that it runs in, so they are evaluated here.
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(target)]
    assert len({pin.name for pin in pins}) == len({Requirement(line).name for line in lines}) == len(pins)
    wanted, report = tmp_path / "requirements.txt", tmp_path / "report.json"
    wanted.write_text("".join(f"{pin.name}{pin.specifier}\n" for pin in pins))
    done = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"),
        *("--python-version", version, "--implementation", "cp", "--target", tmp_path / "site"),
        *("--only-binary=:all:", "--no-binary=fvcore", "--report", report, "-r", wanted),  # fvcore has no wheel
        cwd=tmp_path,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    found = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]
        for item in json.loads(report.read_text())["install"]
    }
    assert found.keys() == {canonicalize_name(pin.name) for pin in pins}
    for name, described in found.items():
        for needed in map(Requirement, described.get("requires_dist", ())):
            other = found.get(canonicalize_name(needed.name))
            if other and (needed.marker is None or needed.marker.evaluate(target)):
                assert needed.specifier.contains(other["version"], prereleases=True), f"{name}: {needed}"


def test_an_old_python_can_read_the_set_up_script() -> None:
    ast.parse((ROOT / "tools" / "setup_env.py").read_text(), feature_version=(3, 6))
