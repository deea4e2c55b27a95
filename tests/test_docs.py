"""The documentation: every key is on its page, and the site is built without a warning and loads nothing."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from docs.hooks import PAGES, ROOT, config_modules, config_page, keys_of, page_of
from relvit_d2.config.config_file import flat
from relvit_d2.detection.config import DETECTION
from relvit_d2.tasks import TASKS


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
            if key.name not in ("TASK", "VERSION", "MODEL.DEVICE"):  # no literals
                assert ast.literal_eval(key.default) == found[name][key.name]
    for without in DETECTION.without_effect:
        assert page.count(f"| `{without}` |") == 1


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
