"""A config from its file and ``KEY VALUE`` pairs, faults as one sentence."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from detectron2.config import get_cfg
from fvcore.common.config import CfgNode

from relvit_d2.config import READ_BY_SOME, WITHOUT_EFFECT, add_relvit_config
from relvit_d2.engine.config_check import check_config
from relvit_d2.errors import UserError, nearest


def load_config(config_file: str, overrides: list[str], script: str | None = None) -> CfgNode:
    """Return the config of :func:`read_config` after checks of its values.

    Raises:
        UserError: see :func:`read_config`, and for a key without effect or a value that cannot be used.
    """
    cfg, defaults = read_config(config_file, overrides, script), get_cfg()
    if cfg.VERSION != defaults.VERSION:
        raise UserError(
            f"VERSION {cfg.VERSION} of Detectron2's configs is not supported: rewrite the file for version 2"
        )
    for key, instead in WITHOUT_EFFECT.items():
        if _value(cfg, key) != _value(defaults, key):
            raise UserError(f"key {key} has no effect here; leave it out and set {instead}")
    add_relvit_config(defaults)
    check_config(cfg, defaults)
    return cfg


def read_config(config_file: str, overrides: list[str], script: str | None = None) -> CfgNode:
    """Return Detectron2's defaults and ours, overridden by a yaml file and then by ``KEY VALUE`` pairs.

    Args:
        config_file: path of the yaml file.
        overrides: keys and values in turn.
        script: name of the script that reads the config; keys that only another one reads are refused then.

    Raises:
        UserError: for a missing or unreadable file, a key that is unknown (the nearest one is named), comes twice in a
            file or belongs to another script, or a value of the wrong type.
    """
    cfg = get_cfg()
    add_relvit_config(cfg)
    path = Path(config_file)
    if not path.is_file():
        raise UserError(
            f"config file '{config_file}' does not exist; the ones that come with the project are in configs/"
        )
    defaults = flat(cfg.clone())
    for file, content, written in _files(path, ()):
        for key in flat(content):
            _check_reader(key, str(file), script)
        _merge(cfg, content, written, f"config file '{file}'", defaults)
    if flag := next((word for word in overrides[::2] if word.startswith("--")), None):
        raise UserError(f"'{flag}' stands among the KEY VALUE pairs; flags go before them")
    if len(overrides) % 2:
        raise UserError(
            f"overrides come as KEY VALUE pairs, but '{overrides[-1]}' has no partner; flags go before them"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _check_reader(key, "an override", script)
        where, content, written = f"override '{key} {value}'", _decode(value), value
        if isinstance(value, str) and value.startswith("{"):  # a mapping, as of DATASETS.CUSTOM
            content, written = _parsed(value, where)
        for part in reversed(key.split(".")):
            content, written = {part: content}, {part: written}
        _merge(cfg, content, written, where, defaults)
    return cfg


def use_here(cfg: CfgNode) -> None:
    """Let the config of a run use its model on this machine: without a GPU where there is none, uncompiled."""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.COMPILE = False


def dump_config(cfg: CfgNode, script: str | None) -> str:
    """Return a config as yaml that :func:`load_config` takes: without the keys that only other scripts read."""

    def pruned(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        kept = {}
        for name, value in node.items():
            inner = pruned(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            if inner != {} and not (inner is value and _other_readers(prefix + name, script)):
                kept[name] = inner
        return kept

    return yaml.safe_dump(pruned(yaml.safe_load(cfg.dump()), ""))


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
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _files(path.parent / Path(base).expanduser(), (*above, path.resolve()))
    yield path, content, written


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config under their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _other_readers(key: str, script: str | None) -> list[str]:
    """Return the scripts that read ``key``, if only some do and ``script`` is none of them."""
    readers = [reader for reader, keys in READ_BY_SOME.items() if key.startswith(keys)]
    return readers if script and script not in readers else []


def _check_reader(key: str, where: str, script: str | None) -> None:
    if readers := _other_readers(key, script):
        raise UserError(
            f"key {key} ({where}) is read by {' and '.join(readers)} only: give a config or a run of {script}, start "
            f"{'that script' if len(readers) == 1 else 'one of them'}, or leave the key out"
        )


def _value(cfg: CfgNode, key: str) -> object:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _decode(value: Any) -> Any:
    """Return the Python value that a text stands for, such as 1e-4, which is a text in YAML 1.1; else the text."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _merge(
    node: CfgNode, content: dict[str, Any], written: Any, where: str, defaults: dict[str, Any], prefix: str = ""
) -> None:
    """Set keys of a config in place.

    Args:
        node: the config, or one of its groups.
        content: values by name.
        written: the same with scalars as text.
        where: the origin of the content, for errors.
        defaults: the defaults by the full names of all keys; they decide the types.
        prefix: the full name of ``node`` with a dot.

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    for name, value in content.items():
        key, text = f"{prefix}{name}", written.get(name) if isinstance(written, dict) else None
        text = value if text is None else text
        if name not in node and not node.is_new_allowed():
            raise UserError(
                f"{where}: unknown config key '{key}'{nearest(key, list(defaults)) or '; see relvit_d2/config.py'}"
            )
        default = node.get(name)
        if name not in node and isinstance(value, dict):
            default = node[name] = CfgNode(new_allowed=True)
        if isinstance(default, CfgNode):
            if isinstance(value, dict):
                _merge(default, value, text, where, defaults, f"{key}.")
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

    A list that is empty by default, such as ``DATASETS.TRAIN``, is one of text.
    """
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
