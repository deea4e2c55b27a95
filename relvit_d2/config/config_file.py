"""A config from its file and ``KEY VALUE`` pairs, errors as one sentence."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.config_paths import ROOT, find_config
from relvit_d2.utils.errors import UserError, nearest

COMMANDS = {"pretrain": "pretrain", "detection": "train", "classification": "classify"}
"""The command of relvit-d2 that trains, by task."""


@dataclass(frozen=True)
class Task:
    """The config of a task.

    Attributes:
        name: its value of the key ``TASK``.
        start: returns the config that keys are added to.
        add_keys: adds all keys of the task, with their defaults, in place.
        finish: checks the values of a config, and derives those that follow from others, in place; raises UserError.
        without_effect: keys of Detectron2 that are not read, and what to set instead.
    """

    name: str
    start: Callable[[], CfgNode]
    add_keys: Callable[[CfgNode], None]
    finish: Callable[[CfgNode], None]
    without_effect: Mapping[str, str]

    def defaults(self) -> CfgNode:
        """Return a new config with the defaults."""
        cfg = self.start()
        self.add_keys(cfg)
        return cfg


def load_config(config_file: str, overrides: list[str], tasks: Mapping[str, Task], task: str | None = None) -> CfgNode:
    """Return the config of :func:`read_config` after checks of its values.

    Raises:
        UserError: see :func:`read_config`, and for a key without effect or a value that is out of range or contradicts
            another.
    """
    cfg = read_config(config_file, overrides, tasks, task)
    chosen = tasks[cfg.TASK]
    defaults = chosen.start()
    for key, instead in chosen.without_effect.items():
        if key.split(".")[0] in defaults and get_key(cfg, key) != get_key(defaults, key):
            raise UserError(_without_effect(key, instead))
    chosen.finish(cfg)
    return cfg


def read_config(config_file: str, overrides: list[str], tasks: Mapping[str, Task], task: str | None = None) -> CfgNode:
    """Return the defaults of a task, overridden by a yaml file and then by ``KEY VALUE`` pairs.

    Args:
        config_file: path of the yaml file, see :func:`relvit_d2.utils.config_paths.find_config`. Its key ``TASK`` names
            the task.
        overrides: keys and values in turn.
        tasks: the known tasks by name.
        task: the task that the config must be of; a file may leave out ``TASK`` then. None for any.

    Raises:
        UserError: for a missing or unreadable file, a config of another task, a key that is unknown (the nearest one is
            named), renamed, twice in a file or of another task, or a value of the wrong type.
    """
    path = find_config(config_file)
    files = list(_files(path, ()))
    chosen = tasks[_task_name(path, [content for _, content, _ in files], task)]
    cfg = chosen.defaults()

    defaults = flat(cfg.clone())

    def refusal(key: str) -> str:
        return _why_unknown(key, cfg, chosen, tasks)

    for file, content, written in files:
        _merge(cfg, content, written, f"config file '{file}'", defaults, refusal)
    if flag := next((word for word in overrides[::2] if word.startswith("--")), None):
        raise UserError(f"'{flag}' stands among the KEY VALUE pairs; flags go before them")
    if len(overrides) % 2:
        raise UserError(
            f"overrides come as KEY VALUE pairs, but '{overrides[-1]}' has no partner; flags go before them"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        where, content, written = f"override '{key} {value}'", _decode(value), value
        if isinstance(value, str) and value.startswith("{"):  # a mapping, as of DATASETS.CUSTOM
            content, written = _parsed(value, where)
        for part in reversed(key.split(".")):
            content, written = {part: content}, {part: written}
        _merge(cfg, content, written, where, defaults, refusal)
    if chosen.name != cfg.TASK:
        raise UserError(f"override 'TASK {cfg.TASK}': the config is of the task {chosen.name}; give another config")
    return cfg


def _task_name(path: Path, contents: list[dict[str, Any]], task: str | None) -> str:
    """Return the task of a config file.

    Args:
        path: of the file.
        contents: of its bases and itself, the file's own last.
        task: the task that it must be of, or None.
    """
    name = next((content["TASK"] for content in reversed(contents) if "TASK" in content), task)
    if name is None:
        raise UserError(f"config file '{path}' has no key TASK: add 'TASK: {', '.join(COMMANDS)}', one of these")
    if str(name) not in COMMANDS:
        raise UserError(f"config file '{path}': TASK '{name}' is unknown; give one of {', '.join(COMMANDS)}")
    if task not in (None, name):
        raise UserError(
            f"config file '{path}' is of the task {name}, not {task}: start relvit-d2 {COMMANDS[name]} with it, or "
            "give another"
        )
    return str(name)


def _why_unknown(key: str, cfg: CfgNode, chosen: Task, tasks: Mapping[str, Task]) -> str:
    """Return why a config of the task ``chosen`` does not have a key."""
    if cfg.key_is_renamed(key):
        return f"key {key} is named {cfg.__dict__[CfgNode.RENAMED_KEYS][key]} now: rename it"
    if key in chosen.without_effect:
        return _without_effect(key, chosen.without_effect[key])
    groups = {key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)}  # and itself
    owners = [name for name, task in tasks.items() if groups & flat(task.defaults()).keys()]
    if owners:
        which = " or ".join(f"{name} (relvit-d2 {COMMANDS[name]})" for name in owners)
        return f"key {key} belongs to the task {which}, not to {chosen.name}: leave it out"
    near = nearest(key, list(flat(cfg))) or "; the page Config keys of the documentation lists all"
    return f"unknown config key '{key}'{near}"


def _without_effect(key: str, instead: str) -> str:
    return f"key {key} has no effect here; leave it out and set {instead}"


def use_here(cfg: CfgNode) -> None:
    """Let the config of a run use its model on this machine: without a GPU where there is none, uncompiled."""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.COMPILE = False


class _StrictLoader(yaml.SafeLoader):
    """yaml's loader with keys as the text that is written, and without its habit of taking the last of two equal keys.

    ``name`` is the origin of the yaml, for errors.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise UserError(
                    f"{self.name} has the key '{key.value}' twice in one place, the second time in line "
                    f"{key.start_mark.line + 1}: remove one"
                )
            seen.add(str(key.value))
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # <<
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _parsed(text: str, where: str) -> tuple[Any, Any]:
    """Return yaml as Python values, and with all scalars as text; keys are text in both.

    Raises:
        UserError: if the text is not valid yaml; ``where`` names its origin.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = where
        return loader.get_single_data(), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise UserError(f"{where} is not valid yaml: {' '.join(str(error).split())}") from error


def _files(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any], Any]]:
    """Yield the bases of a yaml file and then itself: path, content without ``_BASE_``, and content with all scalars
    as the text that is in the file."""
    if path.resolve() in above:
        raise UserError(f"config file '{path}' builds on itself through _BASE_: take one _BASE_ out")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        by = f"; '{above[-1]}' builds on it" if above else ""
        what = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read as text"
        raise UserError(f"config file '{path}' {what}{by}") from error
    content, written = _parsed(text, f"config file '{path}'")
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' holds no keys; write KEY: VALUE lines")
    bases = content.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        yield from _files(_base_path(path, base), (*above, path.resolve()))
    yield path, content, written


def _base_path(path: Path, base: Any) -> Path:
    """Return the path of a base of the config file ``path``.

    Raises:
        UserError: it is not a path, a URL, or relative and outside of the folders of configs.
    """
    if not isinstance(base, str) or not base or "://" in base:
        raise UserError(f"config file '{path}': _BASE_ {base!r} is not the path of a yaml file on this machine")
    if (given := Path(base).expanduser()).is_absolute():
        return given
    own = path.parent.resolve()
    folders = {own, (ROOT / "configs").resolve()}
    if own.is_relative_to(Path.cwd()):
        folders.add(Path.cwd())
    target = path.parent / given
    if not any(target.resolve().is_relative_to(folder) for folder in folders):
        raise UserError(
            f"config file '{path}': _BASE_ {base!r} leads out of its folder and of the current folder: give an "
            "absolute path"
        )
    return target


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by their full keys; a group without keys is a value."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        inner = isinstance(value, dict) and flat(value, f"{prefix}{name}.")
        found |= inner or {f"{prefix}{name}": value}
    return found


def _decode(value: Any) -> Any:
    """Return the Python value that a text stands for, such as 1e-4, which is a text in YAML 1.1; else the text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _merge(
    node: CfgNode,
    content: dict[str, Any],
    written: Any,
    where: str,
    defaults: dict[str, Any],
    refusal: Callable[[str], str],
    prefix: str = "",
) -> None:
    """Set keys of a config in place.

    Args:
        node: the config, or one of its groups.
        content: values by name.
        written: the same with scalars as text.
        where: the origin of the content, for errors.
        defaults: the defaults by the full names of all keys; they decide the types.
        refusal: unknown key -> why it is refused.
        prefix: the full name of ``node`` with a dot.

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    for name, value in content.items():
        key, text = f"{prefix}{name}", written.get(name) if isinstance(written, dict) else None
        text = value if text is None else text
        if name not in node and not node.is_new_allowed():
            inner = flat(value, f"{key}.") if isinstance(value, dict) else {}
            raise UserError(f"{where}: {refusal(next(iter(inner), key))}")
        default = node.get(name)
        if name not in node and isinstance(value, dict):
            default = node[name] = CfgNode(new_allowed=True)
        if isinstance(default, CfgNode):
            if isinstance(value, dict):
                _merge(default, value, text, where, defaults, refusal, f"{key}.")
            elif value is not None:  # what a group without keys is in yaml
                raise UserError(
                    f"{where}: {key} is a group of keys and takes no value; set {key}.{next(iter(default), 'NAME')}"
                )
        elif name not in node or node.is_new_allowed():
            node[name] = text
        else:
            default, example = defaults[key], ""
            if isinstance(default, list | tuple):
                example = f", such as {default}" if default else " of text"
            try:
                node[name] = _as_type_of(default, value, text)
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{where}: key {key} takes a value of type {type(default).__name__}{example}, not {value!r} of "
                    f"type {type(value).__name__}"
                ) from error


def _as_type_of(default: Any, value: Any, written: Any) -> Any:
    """Return a value in the type of a default, where nothing is lost: 0 as 0.0, 3.0 as 3, a number as text as written.

    Args:
        default: of the type that is needed.
        value: as Python or yaml reads it.
        written: the same as text.

    Raises:
        TypeError, ValueError, OverflowError: if it has another type.
    """
    kind = type(default)
    if kind is str:
        if isinstance(value, str) or value is None:
            return value or ""
        if not isinstance(written, str | int | float):
            raise TypeError
        return str(written)
    value = _decode(value)
    if kind is bool and isinstance(value, str):
        value = yaml.SafeLoader.bool_values.get(value.lower(), value)  # true, no, ...
    if isinstance(value, int | float) and (kind is bool or not isinstance(value, bool)):
        number = kind(value)
        if number != value:
            raise ValueError
        return number
    if kind in (list, tuple) and isinstance(value, list | tuple):
        return kind(_items(default, value, written))
    if type(value) is not kind:
        raise TypeError
    return value


def _items(default: Any, values: Any, written: Any) -> Iterator[Any]:
    """Yield the items of a list in the type of the items of ``default``; numbers may have fractions.

    A tuple that is empty by default, such as ``DATASETS.TRAIN``, is one of text; a list, such as
    ``TEST.EXPECTED_RESULTS``, takes what it is given.
    """
    if default == []:
        yield from values
        return
    default = default[0] if default else ""
    texts = written if isinstance(written, list) else values
    for value, text in zip(values, texts, strict=True):
        if isinstance(value, list | tuple) and isinstance(default, list | tuple):
            yield type(value)(_items(default, value, text))
        elif isinstance(default, str):
            yield _as_type_of(default, value, text)
        else:
            number = _decode(value)
            while isinstance(default, list | tuple):  # Detectron2 takes one list of anchors for all levels too
                default = default[0]
            if not isinstance(number, int | float):
                raise TypeError
            # INPUT.CROP.SIZE is a share or a number of pixels: an integer stays one.
            yield int(number) if type(default) is int and number == int(number) else number
