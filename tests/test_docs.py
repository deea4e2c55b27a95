"""The documentation: every key is on its page, and the site is built without a warning and loads nothing."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from docs.hooks import CONFIG, PAGES, ROOT, changed_keys, config_page, own_keys, page_of
from relvit_d2.config import _C, _CHANGED


def leaves(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_key_is_told_with_its_default_and_a_comment() -> None:
    keys = own_keys(CONFIG.read_text())
    assert sorted(key.name for key in keys) == sorted(leaves(_C))
    changed = changed_keys(CONFIG.read_text())
    assert [key.name for key in changed] == list(_CHANGED)
    page = config_page()
    for key in (*keys, *changed):
        assert key.comment, f"{key.name} has no comment in config.py"
        assert page.count(f"| `{key.name}` | `{key.default}` |") == 1
    for key in keys:
        node = _C
        for part in key.name.split("."):
            node = node[part]
        assert repr(node) == key.default or isinstance(node, CfgNode)


def test_a_comment_is_the_one_beside_its_key_or_over_it() -> None:
    source = "# A part.\n_C.A = CfgNode()\n_C.A.X = 1  # beside\n# over\n# it\n_C.A.Y = '#'\n_C.A.Z = 2\n"
    assert [key[:3] for key in own_keys(source)] == [
        ("A.X", "1", "beside"),
        ("A.Y", "'#'", "over it"),
        ("A.Z", "2", ""),
    ]
    assert own_keys(source)[0].section == "A part."


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
