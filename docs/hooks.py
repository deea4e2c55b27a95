"""What MkDocs asks for while it builds the site: the pages that are made from files outside ``docs/``."""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the tests read the keys without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "relvit_d2" / "config" / "__init__.py"
# Files of the repository's root that are pages too.
PAGES = {"README.md": "index.md", **{f"{n}.md": f"{n.lower()}.md" for n in ("MODEL_ZOO", "CONTRIBUTING", "CHANGELOG")}}


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        name: with its dots.
        default: as Python writes it.
        comment: what ``config.py`` says of it, empty if nothing.
        section: the words over its part of ``config.py``, empty if it does not start one.
    """

    name: str
    default: str
    comment: str
    section: str = ""


def own_keys(source: str) -> list[Key]:
    """Return the keys that ``config.py`` assigns to ``_C``, in its order.

    Args:
        source: text of ``config.py``. A comment on the line of an assignment belongs to it, else the lines over it.
    """
    comments = _comments(source)
    keys, section = [], ""
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("_C.")):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("_C.")
        above = _above(comments, node.lineno)
        if ast.unparse(node.value) == "CfgNode()":
            section = above or section
            continue
        default = "{}" if ast.unparse(node.value).startswith("CfgNode") else ast.unparse(node.value)
        keys.append(Key(name, default, _beside(comments, node) or above, section))
        section = ""
    return keys


def changed_keys(source: str) -> list[Key]:
    """Return Detectron2's keys whose defaults ``config.py`` changes; see :func:`own_keys`."""
    comments = _comments(source)
    table = _table(source, "_CHANGED")
    return [
        Key(ast.literal_eval(key), ast.unparse(value), _beside(comments, value))
        for key, value in zip(table.keys, table.values, strict=True)
        if key is not None
    ]


def _table(source: str, name: str) -> ast.Dict:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            return node.value
    raise ValueError(f"config.py has no table {name}")


def _comments(source: str) -> dict[int, tuple[bool, str]]:
    """Return of each line with a comment whether it stands alone, and its words."""
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
    source = CONFIG.read_text(encoding="utf-8")
    some: dict[str, tuple[str, ...]] = ast.literal_eval(_table(source, "READ_BY_SOME"))
    without: dict[str, str] = ast.literal_eval(_table(source, "WITHOUT_EFFECT"))

    def readers(name: str) -> str:
        found = [script.removesuffix(".py") for script, starts in some.items() if name.startswith(starts)]
        return ", ".join(found) or "all"

    parts = [
        "# Config keys",
        "",
        "Every key that is not Detectron2's, and Detectron2's whose defaults differ.",
        "Others are [Detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references).",
        "A key is set in a yaml file or as a `KEY VALUE` pair at the end of a command; an unknown one is refused.",
        "",
    ]
    head = ["| key | default | meaning | read by |", "|---|---|---|---|"]
    for key in own_keys(source):
        if key.section:
            parts += ["", f"## {key.section.rstrip('.').split(',')[0]}", "", *head]
        parts.append(_row(f"`{key.name}`", f"`{key.default}`", key.comment, readers(key.name)))
    parts += ["", "## Detectron2's keys with other defaults", "", *head]
    parts += [_row(f"`{k.name}`", f"`{k.default}`", k.comment, readers(k.name)) for k in changed_keys(source)]
    parts += ["", "## Detectron2's keys without effect here", "", "| key | instead |", "|---|---|"]
    parts += [_row(f"`{name}`", _code(instead)) for name, instead in without.items()]
    return "\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(words: str) -> str:
    return re.sub(r"\b[A-Z_]+(\.[A-Z_]+)+|\b\w+/\w+\.json", r"`\g<0>`", words)


def page_of(name: str) -> str:
    """Return a file of the repository's root with its links as they are in the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.partition("\n## More\n")[0] + "\n"  # the site has a menu
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made = {page: page_of(name) for name, page in PAGES.items()} | {"config.md": config_page()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Call a page by its name where a link's words are its path."""
    return re.sub(r"\[(?:docs/)?([\w/]+)\.md\]\(", lambda match: f"[{match[1].replace('_', ' ')}](", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles out of docstrings, such as ``:class:``, which Markdown does not know."""
    return re.sub(r":(?:class|meth|func|data|mod):(?=<code>)", "", html)
