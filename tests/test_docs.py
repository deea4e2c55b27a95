"""The documentation: keys, commands and snippets are valid; the site is built without a warning and loads nothing."""

import ast
import builtins
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tomllib
from detectron2.config import get_cfg

from benchmarks.harness import arguments as benchmark_arguments
from docs.hooks import PAGES, ROOT, commands_page, config_modules, config_page, keys_of, page_of
from relvit_d2.cli import COMMANDS, parser_of
from relvit_d2.config.config_file import flat
from relvit_d2.detection.config import DETECTION
from relvit_d2.tasks import TASKS, read_config
from tests.support.commands import all_keys, check_command
from tests.support.fuzzing import noise

WRITTEN = sorted([*map(ROOT.joinpath, PAGES), *(ROOT / "docs").glob("*.md")])
"""Pages that are written by hand."""
SCRIPTS = {"pretrain_ssl.py": "pretrain", "train_net.py": "train", "train_cls.py": "classify"}
NOT_CHECKED = {
    "export": "sets a variable",
    "source": "the shell's",
    "pip": "tests/test_wheel.py installs the package",
    "docker": "no test builds an image",
    "first=$(scontrol": "Slurm's, as the next ones",
    "srun": "the command within is checked",
    "status=$?": "",
    "if": "",
    "exit": "",
}
"""First words of command lines that are not checked, and the reason."""
NOT_INSTALLED = {"wandb"}  # imported by a snippet

# Overrides, by command, that let the pages' commands run in seconds: on a user's data, on VOC.
SHORT = {
    "pretrain": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 4 SOLVER.WARMUP_ITERS 0 PRETEXT.IMAGE_SIZE 32",
    "train": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 0 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0",
}
_SHORT_VOC = "SOLVER.MAX_ITER 1 SOLVER.WARMUP_ITERS 0 DATASETS.TRAIN ('voc_2007_train[:4]',) DATASETS.TEST ()"
SHORT_VOC = {
    "pretrain": f"{_SHORT_VOC} SOLVER.IMS_PER_BATCH 4",
    "train": f"{_SHORT_VOC} INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 64 MODEL.PYRAMID.OUT_CHANNELS 16",
}


def fences(page: Path, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language, each with the text above it."""
    text = page.read_text()
    return [
        (text[: m.start()], m[1]) for m in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def spans(page: Path) -> list[str]:
    """The inline code of a page, on one line each."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def command_lines(script: str) -> Iterator[list[str]]:
    """Words of each command line of a shell script, and of those that a line hands to ``bash -c``."""
    text = ""
    for line in script.replace("\\\n", " ").splitlines():
        text += f"{line}\n"
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # an open quotation
            continue
        text = ""
        if "-c" in words:
            yield from command_lines(words[words.index("-c") + 1].removeprefix("exec "))
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words
    assert not text


def our_words(words: list[str]) -> list[str] | None:
    """The command of relvit-d2 and its arguments in a command line, None if it is another program's."""
    for place, word in enumerate(words):
        if command := SCRIPTS.get(word):  # python's or torchrun's
            return [command, *words[place + 1 :]]
    return words[1:] if Path(words[0]).name == "relvit-d2" else None


def check_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line as its program does."""
    if (ours := our_words(words)) is not None:
        check_command(ours)
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[:2] == ["python", "-m"]:
        benchmark = import_module(words[2])
        if hasattr(benchmark, "build_parser"):
            benchmark.build_parser().parse_intermixed_args(words[3:])
        else:
            monkeypatch.setattr(sys, "argv", words[2:])
            benchmark_arguments("", words[2])
    else:
        assert words[0] in NOT_CHECKED


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_command_lines_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [words for _, script in fences(page, "sh") for words in command_lines(script)]
    for words in (shlex.split(span) for span in spans(page) if re.match("(relvit-d2|make|python) ", span)):
        if words[0] == "relvit-d2" and len(words) == 2:  # a command's name in a sentence
            assert words[1] in (*COMMANDS, "--help")
        else:
            lines.append(words)
    for words in lines:
        try:
            check_line(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error
    for _, script in fences(page, "sh"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_config_keys_in_sentences_and_yaml_are_valid(page: Path, tmp_path: Path) -> None:
    keys = all_keys() | set(flat(get_cfg()))
    groups = {key[:end] for key in keys for end in range(len(key)) if key[end] == "."}
    for span in spans(page):
        for key in re.findall(r"(?<![\w.$/])[A-Z][A-Z_]+(?:\.[A-Z][A-Z_]*)+(?![\w/])", span):
            assert key in keys | groups, key
    for _, text in fences(page, "yaml"):
        (tmp_path / "config.yaml").write_text(text)
        read_config(str(tmp_path / "config.yaml"), [], "detection")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_the_tests_that_prove_guarantees_exist(page: Path) -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = {span for span in spans(page) if re.match("test_|tests/", span)}
    assert {span for span in named if span not in defined and not (ROOT / span).exists()} == set()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_names_in_python_snippets_exist(page: Path) -> None:
    """In the snippet, those above it on the page, or the module of this package that is named last above it."""
    known = set(dir(builtins))
    for above, code in fences(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            match node:
                case ast.Name(ctx=ast.Store(), id=name) | ast.arg(arg=name):
                    known.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    known.add(name)
                case ast.Import() | ast.ImportFrom():
                    known |= {alias.asname or alias.name for alias in node.names}
                    check_import(node, above)
        files = [path for path in re.findall(r"`(relvit_d2/[\w/]+)\.py`", above) if (ROOT / f"{path}.py").exists()]
        there = set(vars(import_module(files[-1].replace("/", ".")))) if files else set()
        loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert not loaded - known - there, f"{page.name}: {loaded - known - there}"


def check_import(node: ast.Import | ast.ImportFrom, above: str) -> None:
    """The imported modules and names exist, or are files that the page introduces."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            assert alias.name in NOT_INSTALLED or importlib.util.find_spec(alias.name), alias.name
        elif f"`{node.module.replace('.', '/')}/{alias.name}.py`" not in above:  # type: ignore[union-attr]
            module = import_module(node.module)  # type: ignore[arg-type]
            assert hasattr(module, alias.name) or import_module(f"{node.module}.{alias.name}")


def test_the_figure_of_the_layers_is_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [set(re.findall(r"relvit_d2\.(\w+)", layer)) for layer in contract["layers"]]
    figure = (ROOT / "docs/images/layers.svg").read_text()
    boxes = re.findall(r'<rect x="[\d.]+" y="(\d+)"[^>]*/>\n<text[^>]*>(\w+)', figure)
    heights = sorted({int(y) for y, _ in boxes})
    assert [{name for y, name in boxes if int(y) == height} for height in heights] == layers


@pytest.mark.slow
def test_the_guide_for_custom_data_runs(tmp_path: Path) -> None:
    """Every command and snippet of two pages that concerns the user's data, in their order, in one folder."""
    data = tmp_path / "DATA"
    (data / "labels").mkdir(parents=True)
    for number in range(10):
        noise(data / f"images/{number}.jpg", number, (64, 64))
        (data / f"labels/{number}.txt").write_text("0 0.3 0.3 0.5 0.4\n1 0.7 0.7 0.3 0.4\n")
    shutil.make_archive(str(tmp_path / "photos"), "zip", data / "images")
    shutil.copy(data / "images/0.jpg", tmp_path / "photo.jpg")
    shutil.copytree(data / "images", tmp_path / "NEW")
    for number in range(10, 14):
        noise(tmp_path / f"photos/{number}.jpg", number, (64, 64))
    noise(tmp_path / "large.tif", 14, (64, 64))
    guide = ROOT / "docs/custom_data.md"
    lines = [
        line for line in all_lines(guide, ROOT / "README.md") if re.search("DATA( |/|$)|custom|photos", " ".join(line))
    ]
    assert len(lines) > 6
    for line in lines:
        run_line(tmp_path, ["0.04" if word == "0.5" else word for word in line], SHORT)
    for _, code in fences(guide, "python"):
        run_python(tmp_path, "-c", code)
    assert len(list((tmp_path / "predictions").rglob("*.png"))) == 10 + 1  # large.tif
    assert len(list((tmp_path / "predictions_new/labels_yolo").glob("*.txt"))) == 11
    assert (tmp_path / "output/custom/finetune/report.html").is_file()
    assert (tmp_path / "output/DATA/detector/report.html").is_file()


@pytest.mark.slow
def test_the_commands_for_voc_run(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two pages for one process, in their order, on a few images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    lines = all_lines(ROOT / "README.md", ROOT / "docs/scaling.md")
    lines = [
        line
        for line in lines
        # LOGGERS needs packages that are not installed here.
        if line[0] == "relvit-d2" and re.search("/voc_vit_s.yaml(?!.*(--num-gpus|LOGGERS))", " ".join(line))
    ]
    assert len(lines) > 4
    for line in lines:
        run_line(tmp_path, line, SHORT_VOC)
    assert (tmp_path / "output/voc_vit_s/model_final.pth").is_file()
    shutil.copy(next((samples / "VOC2007/JPEGImages").glob("*.jpg")), tmp_path / "image.jpg")
    ((_, code),) = fences(ROOT / "docs/weights.md", "python")
    run_python(tmp_path, "-c", code)


def all_lines(*pages: Path) -> list[list[str]]:
    """The command lines in the fenced blocks of pages, each once."""
    lines = [line for page in pages for _, script in fences(page, "sh") for line in command_lines(script)]
    return list(map(list, dict.fromkeys(map(tuple, lines))))


def run_line(folder: Path, line: list[str], short: dict[str, str]) -> None:
    """Run a command; examples of a page may be alternatives with the same output folder."""
    again = ["--overwrite"] if line[1] in ("pretrain", "train") and "--resume" not in line else []
    run_python(folder, "-m", "relvit_d2", *line[1:], *short.get(line[1], "").split(), *again)


def run_python(folder: Path, *words: str) -> None:
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | variables, check=True)


EXECUTED = {"api.md", "custom_data.md", "weights.md", "CONTRIBUTING.md"}
"""Pages with Python examples, each of which a test executes."""


def test_every_page_with_python_examples_is_executed() -> None:
    assert {page.name for page in WRITTEN if fences(page, "python")} == EXECUTED


@pytest.mark.slow
def test_the_examples_of_the_api_run(samples: Path, tmp_path: Path) -> None:
    """In their order, and then the notebook, in one folder."""
    shutil.copytree(samples / "bccd/BCCD", tmp_path / "DATA")
    shutil.copy(next((tmp_path / "DATA/JPEGImages").glob("*.jpg")), tmp_path / "photo.jpg")
    cells = json.loads((ROOT / "docs/custom_data.ipynb").read_text())["cells"]
    notebook = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = "\n".join(code for _, code in fences(ROOT / "docs/api.md", "python"))
    for name, text in (("api", code), ("notebook", notebook)):
        short = re.sub(r"hours=[\d.]+", 'hours=0.06, **{"SOLVER.MAX_ITER": 8}', text)
        short = re.sub(r'"SOLVER.MAX_ITER": \d+, "SOLVER.WARMUP_ITERS": \d+', '"SOLVER.MAX_ITER": 2', short)
        assert short != text
        short = short.replace('"SOLVER.MAX_ITER": 2', '"SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0')
        (tmp_path / name).mkdir()
        for shared in ("DATA", "photo.jpg"):
            (tmp_path / name / shared).symlink_to(tmp_path / shared)
        run_python(tmp_path / name, "-c", f"import os; os.environ['BCCD'] = 'DATA'\n{short}")


@pytest.mark.slow
def test_the_snippets_for_contributors_work() -> None:
    """Each is executed in its module, which the text above names last; a module that is missing is created."""
    page = ROOT / "CONTRIBUTING.md"
    snippets = []
    for above, code in fences(page, "python"):
        path = re.findall(r"`(relvit_d2/[\w/]+)\.py`", above)[-1]
        snippets.append((path.removesuffix("/__init__").replace("/", "."), code))
    check = f"""
import importlib, math, sys, types, torch
for name, code in {snippets!r}:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        module = sys.modules[name] = types.ModuleType(name)
    exec(code, vars(module))
    package, _, leaf = name.rpartition(".")
    setattr(sys.modules[package], leaf, module)
from relvit_d2.data.classification.datasets import CLASS_SETS
from relvit_d2.data.detection.catalog import DATASETS
from relvit_d2.encoders.base import ENCODERS
from relvit_d2.pretext import task
assert "blobs_train" in DATASETS and "shapes_train" in CLASS_SETS
maps = ENCODERS["resnet18"]()(torch.zeros(2, 3, 64, 96))
assert {{name: tuple(m.shape) for name, m in maps.items()}} == {{
    "s8": (2, 128, 8, 12), "s16": (2, 256, 4, 6), "s32": (2, 512, 2, 3)
}}
row = task.PRETEXT_TASKS["row"](8, (3, 4))
torch.nn.init.zeros_(row.head.weight), torch.nn.init.zeros_(row.head.bias)
loss, accuracy = row(torch.randn(2, 12, 8), task.PatchLayout.full(2, (3, 4)))
assert abs(loss.item() - math.log(3)) < 1e-5 and abs(accuracy.item() - row.chance((3, 4))) < 1e-5
"""
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_every_key_is_documented_once_with_its_default_and_a_comment() -> None:
    page, stock = config_page(), flat(get_cfg())
    documented = [key for path in config_modules() for key in keys_of(path.read_text())]
    names = {key.name for key in documented}
    assert len(names) == len(documented)
    found = {name: flat(task.defaults()) for name, task in TASKS.items()}
    for name, defaults in found.items():
        assert set(defaults) - names <= (set(stock) if name == "detection" else set())
    for key in documented:
        assert key.comment, f"{key.name} has no comment"
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key.name}` | `{key.default}` |")]
        tasks = [name for name in TASKS if key.name in found[name]]
        assert tasks and row.endswith(f"| {', '.join(tasks)} |")
        for name in tasks:
            if key.name not in ("TASK", "VERSION", "MODEL.DEVICE", "MODEL.BACKBONE.NAME"):  # no literals
                assert ast.literal_eval(key.default) == found[name][key.name]
    for without in DETECTION.without_effect:
        assert page.count(f"| `{without}` |") == 1


def test_every_option_of_every_command_is_documented() -> None:
    sections = dict(zip(COMMANDS, re.split(r"^## .*$", commands_page(), flags=re.M)[1:], strict=True))
    for name, text in sections.items():
        for action in parser_of(name)._actions:
            assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in action.option_strings)
            assert not action.option_strings or action.help, f"{name} {action.option_strings} has no help"


def test_a_comment_is_the_one_beside_its_key_or_above_it() -> None:
    keys = ["cfg.X = 1  # beside", "# above", "# it", "cfg.A.Y = '#'", "cfg.A.Z = 2"]
    source = "\n    ".join(["def add_x(cfg):", *keys]) + "\ndef check(cfg):\n    cfg.B = 1\n"
    assert keys_of(source) == [("X", "1", "beside"), ("A.Y", "'#'", "above it"), ("A.Z", "2", "")]


@pytest.mark.parametrize("name", PAGES)
def test_links_between_files_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / link).exists(), f"{name} links to {link}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page_of(name)):
        assert (ROOT / "docs" / link).exists() or link in PAGES.values()


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no MkDocs: make docs installs it")
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    # Not --quiet: then strict sees no warnings either.
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, check=True)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\">\s]+)", text)
        loads += re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*href=\"?([^\">\s]+)", text)
        assert not [address for address in loads if re.match(r"(https?:)?//", address)], page
        assert 'class="mermaid"' not in text  # Material fetches what draws it
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet
