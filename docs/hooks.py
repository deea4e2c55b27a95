"""MkDocs hooks: pages that are generated from files outside ``docs/``, commands, config keys and a notebook."""

import argparse
import ast
import io
import json
import logging
import os
import re
import tempfile
import tokenize
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detectron2.config import get_cfg

from relvit_d2.cli import COMMANDS, parser_of
from relvit_d2.config.config_file import flat
from relvit_d2.detection.config import DETECTION
from relvit_d2.tasks import TASKS

if TYPE_CHECKING:  # the tests read the keys without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository's root that are pages too.
PAGES = {"README.md": "index.md", **{f"{n}.md": f"{n.lower()}.md" for n in ("MODEL_ZOO", "CONTRIBUTING", "CHANGELOG")}}

NOTEBOOK = "custom_data.ipynb"
NOTEBOOK_PAGE = "custom_data_notebook.md"

logger = logging.getLogger("mkdocs")


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        name: with its dots.
        default: the Python expression.
        comment: the comment on its line, else the comment lines above it; empty if there is none.
    """

    name: str
    default: str
    comment: str


def config_modules() -> list[Path]:
    """Return the ``config.py`` of all packages, those of lower layers first."""
    order = ("engine", "encoders", "pretext", "data", "detection", "pretraining", "classification")
    paths = sorted((ROOT / "relvit_d2").rglob("config.py"))
    return sorted(paths, key=lambda path: order.index(path.relative_to(ROOT).parts[1]))


def keys_of(source: str) -> list[Key]:
    """Return the keys that the functions ``add_*`` of a ``config.py`` assign to ``cfg``, in their order.

    Args:
        source: text of the module.
    """
    comments = _comments(source)
    keys = []
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for node in (node for function in functions if function.name.startswith("add_") for node in function.body):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("cfg."):
            value = ast.unparse(node.value)
            default = "{}" if value == "type(cfg)(new_allowed=True)" else value
            name = ast.unparse(node.targets[0]).removeprefix("cfg.")
            keys.append(Key(name, default, _beside(comments, node) or _above(comments, node.lineno)))
    return keys


def _comments(source: str) -> dict[int, tuple[bool, str]]:
    """Return by line number whether a comment is alone on its line, and its text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (not token.line[: token.start[1]].strip(), token.string.lstrip("# "))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _above(comments: dict[int, tuple[bool, str]], line: int) -> str:
    words: list[str] = []
    while comments.get(line - 1, (False, ""))[0]:
        line -= 1
        words.insert(0, comments[line][1])
    return " ".join(words)


def _beside(comments: dict[int, tuple[bool, str]], node: ast.stmt | ast.expr) -> str:
    alone, words = comments.get(node.end_lineno or node.lineno, (False, ""))
    return "" if alone else words


def config_page() -> str:
    """Return the page of all keys."""
    stock = flat(get_cfg())
    readers = {name: flat(task.defaults()) for name, task in TASKS.items()}
    parts = [
        "# Config keys",
        "",
        "The keys that this project defines, by the package that reads them. A detector also has all of",
        "[Detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references);",
        "the third column has Detectron2's default of a key that both have.",
        "A key is set in a yaml file or as a `KEY VALUE` pair at the end of a command.",
        "A key that the config's task does not have is refused.",
        "",
    ]
    head = ["", "| key | default | Detectron2's | meaning | tasks |", "|---|---|---|---|---|"]
    for path in config_modules():
        if keys := keys_of(path.read_text(encoding="utf-8")):
            package = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            parts += ["", f"## {package}", *head]
        for key in keys:
            theirs = f"`{stock[key.name]!r}`" if key.name in stock else ""
            tasks = ", ".join(name for name, defaults in readers.items() if key.name in defaults)
            parts.append(_row(f"`{key.name}`", f"`{key.default}`", theirs, key.comment, tasks))
    parts += ["", "## Detectron2's keys without effect here", "", "| key | instead |", "|---|---|"]
    parts += [_row(f"`{name}`", _code(instead)) for name, instead in DETECTION.without_effect.items()]
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """Return the page of all commands."""
    parts = ["# Commands", "", "The help texts of all commands, as `relvit-d2 COMMAND --help` prints them.", ""]
    for name in COMMANDS:
        parser = parser_of(name)
        parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=100)
        parts += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(parts)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(words: str) -> str:
    return re.sub(r"\b[A-Z_]+(\.[A-Z_]+)+|\b\w+/\w+\.json", r"`\g<0>`", words)


def page_of(name: str) -> str:
    """Return the text of a file of the repository's root, with links adapted to the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.partition("\n## Documentation\n")[0] + "\n"  # the site has a menu
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def notebook_page() -> str:
    """Return the notebook as a page, with outputs if the environment variable ``BCCD`` names the folder of its data."""
    text = (ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8")
    data = os.environ.get("BCCD")
    if not data or not Path(data).is_dir():
        logger.info(f"{NOTEBOOK} is not executed: the environment variable BCCD does not name the folder of its data")
        return "\n\n".join(map(_cell, json.loads(text)["cells"])) + "\n"
    import nbformat
    from nbclient import NotebookClient

    os.environ["BCCD"] = str(Path(data).resolve())
    with tempfile.TemporaryDirectory() as folder:
        notebook = NotebookClient(
            nbformat.reads(text, as_version=4), resources={"metadata": {"path": folder}}
        ).execute()
    return "\n\n".join(map(_cell, notebook.cells)) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    """Return a cell with its outputs, but for stderr (progress bars), in Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output["text"]} if output.get("name") == "stdout" else {})
        if "image/png" in data:
            parts.append(f'<img alt="output of the cell" src="data:image/png;base64,{data["image/png"].strip()}">')
        elif "text/plain" in data:
            parts.append(f"```text\n{data['text/plain'].strip()}\n```")
    return "\n\n".join(parts)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages."""
    from mkdocs.structure.files import File

    made = {page: page_of(name) for name, page in PAGES.items()}
    made |= {"commands.md": commands_page(), "config.md": config_page(), NOTEBOOK_PAGE: notebook_page()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace link texts that are paths of pages by the page's name, and links to the notebook by its page."""
    markdown = markdown.replace(f"]({NOTEBOOK})", f"]({NOTEBOOK_PAGE})")
    return re.sub(r"\[(?:docs/)?([\w/]+)\.md\]\(", lambda match: f"[{match[1].replace('_', ' ')}](", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove Sphinx roles such as ``:class:`` from docstrings."""
    return re.sub(r":(?:class|meth|func|data|mod):(?=<code>)", "", html)
