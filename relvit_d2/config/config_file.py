"""Loading of configs from yaml files and ``KEY VALUE`` overrides."""

import ast
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.config_paths import ROOT, find_config
from relvit_d2.utils.errors import UserError, nearest, one_line
from relvit_d2.utils.hardware import default_device

COMMANDS = {"pretrain": "pretrain", "detection": "train", "classification": "classify"}
"""The training command of relvit-d2 by task."""

FRACTIONS = ("SOLVER.WARMUP_ITERS",)  # integers that may be fractions below 1 too

_CONFIGS = (ROOT / "configs").resolve()
_NOT_IN_PATHS = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")  # other surrogates are bytes that are not UTF-8


@dataclass(frozen=True)
class Task:
    """The config of a task.

    Attributes:
        name: value of the key ``TASK``.
        start: returns the config to which keys are added.
        add_keys: adds all keys of the task with their defaults, in place.
        finish: checks the values and sets derived ones, in place; raises :class:`UserError`.
        without_effect: unused keys of Detectron2, and the replacement of each.
        alternatives: keys that are 0 by default, and the key that each replaces; a file or a command line gives one of
            the two, which sets the other to 0.
        factors_with_weights: factors of the defaults of keys where ``MODEL.WEIGHTS`` is set. Defaults are the values in
            the code and in the project's ``configs/``; a value in another file or on the command line is unchanged.
    """

    name: str
    start: Callable[[], CfgNode]
    add_keys: Callable[[CfgNode], None]
    finish: Callable[[CfgNode], None]
    without_effect: Mapping[str, str]
    alternatives: Mapping[str, str]
    factors_with_weights: Mapping[str, float] = field(default_factory=dict)

    def defaults(self) -> CfgNode:
        """Return a new config with the defaults."""
        cfg = self.start()
        self.add_keys(cfg)
        return cfg


def load_config(config_file: str, overrides: list[str], tasks: Mapping[str, Task], task: str | None = None) -> CfgNode:
    """Return the config of :func:`read_config` with checked values.

    Raises:
        UserError: as :func:`read_config`; a key has no effect; a value is out of range or contradicts another.
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
        config_file: a yaml file (:func:`relvit_d2.utils.config_paths.find_config`); its key ``TASK`` selects the task.
        overrides: alternating keys and values.
        tasks: the tasks by name.
        task: required task, which the file may then omit; None: any.

    Raises:
        UserError: the file cannot be read, the config is of another task, a key is unknown, renamed, duplicated or of
            another task, or a value has the wrong type.
    """
    path = find_config(config_file)
    files = list(_files(path, ()))
    chosen = tasks[_task_name(path, [content for _, content, _ in files], task)]
    cfg = chosen.defaults()

    defaults = flat(cfg.clone())
    explain = partial(_explain_unknown, cfg=cfg, chosen=chosen, tasks=tasks)
    user_keys = set[str]()  # keys that are not given by a config of the project
    for file, content, text in files:
        _merge(cfg, content, text, f"config file '{file}'", defaults, explain)
        _choose_alternatives(cfg, flat(content), f"config file '{file}'", chosen.alternatives)
        if not file.resolve().is_relative_to(_CONFIGS):
            user_keys |= flat(content).keys()
    if len(overrides) % 2:
        raise UserError(f"'{overrides[-1]}' has no value: give KEY VALUE pairs")
    given = dict[str, Any]()
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        where, content, text = f"override '{key} {value}'", _decode(value), value
        is_text = isinstance(defaults.get(key), str)  # such as a path
        if isinstance(value, str) and value.startswith("{") and not is_text:  # a mapping, as of DATASETS.CUSTOM
            content, text = _parse(value, where)
        for part in reversed(key.split(".")):
            content, text = {part: content}, {part: text}
        _merge(cfg, content, text, where, defaults, explain)
        given |= flat(content)
    _choose_alternatives(cfg, given, "the command line", chosen.alternatives)
    for key, factor in chosen.factors_with_weights.items() if cfg.MODEL.WEIGHTS else ():
        if key not in user_keys | given.keys():
            _multiply(cfg, key, factor)
    if chosen.name != cfg.TASK:
        raise UserError(f"override 'TASK {cfg.TASK}': the config is of the task {chosen.name}; give another config")
    return cfg


def _choose_alternatives(cfg: CfgNode, given: dict[str, Any], where: str, alternatives: Mapping[str, str]) -> None:
    """Set the key of each pair of alternatives to 0 that a source, named ``where``, does not give but replaces."""
    for key, other in alternatives.items():
        if key in given and other in given:
            if get_key(cfg, key) and get_key(cfg, other):
                raise UserError(f"{where} gives both {key} and {other}: remove one")
        elif other in given or (key in given and get_key(cfg, key)):
            _multiply(cfg, key if other in given else other, 0)  # keeps the type


def _multiply(cfg: CfgNode, key: str, factor: float) -> None:
    *groups, name = key.split(".")
    get_key(cfg, ".".join(groups))[name] *= factor


def override_words(pairs: Mapping[str, object]) -> list[str]:
    """Return keys and values as words of a command line, which :func:`read_config` reads as these values.

    Text is unchanged, since it may be an override that the user gave.
    """

    def word(value: object) -> str:
        if isinstance(value, dict):
            return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()
        return str(value)

    return [part for key, value in pairs.items() for part in (key, word(value))]


def _task_name(path: Path, contents: list[dict[str, Any]], task: str | None) -> str:
    """Return the task of a config file with the ``contents`` of its bases and, last, of the file."""
    name = next((content["TASK"] for content in reversed(contents) if "TASK" in content), task)
    if name is None:
        raise UserError(f"config file '{path}' has no key TASK: add TASK with one of {', '.join(COMMANDS)}")
    if str(name) not in COMMANDS:
        raise UserError(f"config file '{path}': TASK '{name}' is unknown; give one of {', '.join(COMMANDS)}")
    if task not in (None, name):
        raise UserError(
            f"config file '{path}' is of the task {name}, not {task}: start relvit-d2 {COMMANDS[name]} with it, or "
            "give another"
        )
    return str(name)


def _explain_unknown(key: str, cfg: CfgNode, chosen: Task, tasks: Mapping[str, Task]) -> str:
    """Return the error message for a key that a config of the task ``chosen`` does not have."""
    if cfg.key_is_renamed(key):
        return f"key {key} was renamed to {cfg.__dict__[CfgNode.RENAMED_KEYS][key]}: rename it"
    if key in chosen.without_effect:
        return _without_effect(key, chosen.without_effect[key])
    groups = {key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)}  # including key
    owners = [name for name, task in tasks.items() if groups & flat(task.defaults()).keys()]
    if owners:
        which = " or ".join(f"{name} (relvit-d2 {COMMANDS[name]})" for name in owners)
        return f"key {key} belongs to the task {which}, not to {chosen.name}: leave it out"
    near = nearest(key, list(flat(cfg))) or "; see the page Config keys of the documentation"
    return f"unknown config key '{key}'{near}"


def _without_effect(key: str, instead: str) -> str:
    return f"key {key} has no effect here; leave it out and set {instead}"


def adapt_to_machine(cfg: CfgNode) -> None:
    """Adapt the config of a trained model, in place: a device of this machine, without torch.compile."""
    if cfg.MODEL.DEVICE != "cpu" and torch.device(cfg.MODEL.DEVICE).type != (device := default_device()):
        cfg.MODEL.DEVICE = device
    cfg.MODEL.COMPILE = False


class _StrictLoader(yaml.SafeLoader):
    """yaml loader that reads keys as text and rejects duplicate keys; ``name`` is the source, for errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise UserError(
                    f"{self.name} has the key '{key.value}' twice, the second time in line {key.start_mark.line + 1}: "
                    "remove one"
                )
            seen.add(str(key.value))
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # <<
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> tuple[Any, Any]:
    """Return yaml as Python values and with all scalars as text; ``where`` is the source, for errors."""
    try:
        loader = _StrictLoader(text)
        loader.name = where
        return loader.get_single_data(), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise UserError(f"{where} is not valid yaml: {one_line(error)}") from error


def _files(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any], Any]]:
    """Yield the bases of a yaml file and then the file: path, content without ``_BASE_``, content as text."""
    if path.resolve() in above:
        raise UserError(f"config file '{path}' is its own base (_BASE_): remove one _BASE_")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        by = f", the _BASE_ of '{above[-1]}'," if above else ""
        what = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read as text"
        raise UserError(f"config file '{path}'{by} {what}") from error
    content, text_content = _parse(text, f"config file '{path}'")
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' has no keys; write KEY: VALUE lines")
    bases = content.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        yield from _files(_base_path(path, base), (*above, path.resolve()))
    yield path, content, text_content


def _base_path(path: Path, base: Any) -> Path:
    """Return the path of a base of the config file ``path``; a relative one must be in a folder of configs."""
    if not isinstance(base, str) or not base or "://" in base or _NOT_IN_PATHS.search(base):
        raise UserError(f"config file '{path}': _BASE_ {base!r} is not the path of a yaml file on this machine")
    # Unlike Path.expanduser, it leaves the name of an unknown user unchanged.
    if (given := Path(os.path.expanduser(base))).is_absolute():  # noqa: PTH111
        return given
    folder = path.parent.resolve()
    folders = {folder, _CONFIGS}
    if folder.is_relative_to(Path.cwd()):
        folders.add(Path.cwd())
    target = path.parent / given
    if not any(target.resolve().is_relative_to(allowed) for allowed in folders):
        raise UserError(
            f"config file '{path}': _BASE_ {base!r} leads out of its folder and of the current folder: give an "
            "absolute path"
        )
    return target


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by full key; an empty group is a value."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        inner = isinstance(value, dict) and flat(value, f"{prefix}{name}.")
        found |= inner or {f"{prefix}{name}": value}
    return found


def _decode(value: Any) -> Any:
    """Return the Python value of a literal, such as 1e-4, which is text in YAML 1.1; other text is unchanged."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _merge(
    node: CfgNode,
    content: dict[str, Any],
    texts: Any,
    where: str,
    defaults: dict[str, Any],
    explain: Callable[[str], str],
    prefix: str = "",
) -> None:
    """Set keys of ``node``, whose full name is ``prefix``, in place; ``texts`` is ``content`` with scalars as text.

    The ``defaults`` by full key determine the types; ``explain`` returns the error message for an unknown key.
    """
    for name, value in content.items():
        key, text = f"{prefix}{name}", texts.get(name) if isinstance(texts, dict) else None
        text = value if text is None else text
        if name not in node and not node.is_new_allowed():
            inner = flat(value, f"{key}.") if isinstance(value, dict) else {}
            raise UserError(f"{where}: {explain(next(iter(inner), key))}")
        default = node.get(name)
        if name not in node and isinstance(value, dict):
            default = node[name] = CfgNode(new_allowed=True)
        if isinstance(default, CfgNode):
            if isinstance(value, dict):
                _merge(default, value, text, where, defaults, explain, f"{key}.")
            elif value is not None:  # an empty group in yaml
                raise UserError(
                    f"{where}: {key} is a group of keys, not a key; set {key}.{next(iter(default), 'NAME')}"
                )
        elif name not in node or node.is_new_allowed():
            node[name] = text
        else:
            default, example = defaults[key], ""
            if isinstance(default, list | tuple):
                example = f", such as {default}" if default else " of text"
            try:
                fraction = _decode(value) if key in FRACTIONS else 0
                is_fraction = isinstance(fraction, float) and 0 < fraction < 1
                node[name] = fraction if is_fraction else _as_type_of(default, value, text)
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{where}: key {key} takes a value of type {type(default).__name__}{example}, not {value!r} of "
                    f"type {type(value).__name__}"
                ) from error


def _as_type_of(default: Any, value: Any, text: Any) -> Any:
    """Convert a value without loss to the type of a default: 0 to 0.0, 3.0 to 3, a number to its ``text``."""
    kind = type(default)
    if kind is str:
        if isinstance(value, str) or value is None:
            return value or ""
        if not isinstance(text, str | int | float):
            raise TypeError
        return str(text)
    value = _decode(value)
    if kind is bool and isinstance(value, str):
        value = yaml.SafeLoader.bool_values.get(value.lower(), value)  # true, no, ...
    if isinstance(value, int | float) and (kind is bool or not isinstance(value, bool)):
        number = kind(value)
        if number != value:
            raise ValueError
        return number
    if kind in (list, tuple) and isinstance(value, list | tuple):
        return kind(_items(default, value, text))
    if type(value) is not kind:
        raise TypeError
    return value


def _items(default: Any, values: Any, texts: Any) -> Iterator[Any]:
    """Convert the items of a list to the type of the items of ``default``; numbers may be fractions.

    A tuple that is empty by default, such as ``DATASETS.TRAIN``, contains text; an empty list, such as
    ``TEST.EXPECTED_RESULTS``, any values.
    """
    if default == []:
        yield from values
        return
    default = default[0] if default else ""
    texts = texts if isinstance(texts, list) else values
    for value, text in zip(values, texts, strict=True):
        if isinstance(value, list | tuple) and isinstance(default, list | tuple):
            yield type(value)(_items(default, value, text))
        elif isinstance(default, str):
            yield _as_type_of(default, value, text)
        else:
            number = _decode(value)
            while isinstance(default, list | tuple):  # Detectron2 also accepts one list of anchors for all levels
                default = default[0]
            if not isinstance(number, int | float):
                raise TypeError
            # INPUT.CROP.SIZE is a fraction or a number of pixels: integers stay integers.
            yield int(number) if type(default) is int and number == int(number) else number
