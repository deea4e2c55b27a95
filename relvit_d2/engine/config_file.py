"""A config from its file and ``KEY VALUE`` pairs, faults as one sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from detectron2.config import get_cfg
from fvcore.common.config import CfgNode

from relvit_d2.config import READ_BY_SOME, WITHOUT_EFFECT, add_relvit_config
from relvit_d2.errors import UserError, nearest


def load_config(config_file: str, overrides: list[str], script: str | None = None) -> CfgNode:
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
    for file, content in _files(path, ()):
        for key in flat(content):
            _check_reader(key, str(file), script)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise _config_error(error, f"config file '{config_file}'", cfg) from error
    if flag := next((word for word in overrides[::2] if word.startswith("--")), None):
        raise UserError(f"'{flag}' stands among the KEY VALUE pairs; flags go before them")
    if len(overrides) % 2:
        raise UserError(
            f"overrides come as KEY VALUE pairs, but '{overrides[-1]}' has no partner; flags go before them"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _check_reader(key, "an override", script)
        try:
            # A mapping, as of DATASETS.CUSTOM, comes as text from a command line.
            mapping = isinstance(value, str) and value.startswith("{")
            cfg.merge_from_list([key, yaml.safe_load(value) if mapping else value])
        except (KeyError, ValueError, AssertionError, AttributeError, TypeError, yaml.YAMLError) as error:
            raise _config_error(error, f"override '{key} {value}'", cfg, key) from error
    defaults = get_cfg()
    for key, instead in WITHOUT_EFFECT.items():
        if _value(cfg, key) != _value(defaults, key):
            raise UserError(f"key {key} has no effect here; leave it out and set {instead}")
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
    """yaml's loader, less its habit of taking the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise UserError(
                    f"config file '{self.name}' has the key '{key.value}' twice in one place, the second time in line "
                    f"{key.start_mark.line + 1}: remove one"
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _files(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give the content of a yaml file and of those that it builds on, without its ``_BASE_``."""
    if path.resolve() in above:
        raise UserError(f"config file '{path}' builds on itself through _BASE_: take one _BASE_ out")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"config file '{path}' is not valid yaml: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        by = f"; '{above[-1]}' builds on it" if above else ""
        what = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read as text"
        raise UserError(f"config file '{path}' {what}{by}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' holds no keys; write KEY: VALUE lines")
    bases = content.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _files(path.parent / Path(base).expanduser(), (*above, path.resolve()))
    yield path, content


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


def _config_error(error: Exception, where: str, cfg: CfgNode, key: str = "") -> UserError:
    """Put one of yacs's complaints into a sentence."""
    text = str(error.args[0]) if error.args else str(error)
    if mismatch := re.search(
        r"Type mismatch \((.+?) vs\. (.+?)\) with values \((.+?) vs\. (.+)\) for config key: (\S+)",
        text,
        re.S,
    ):
        wants, got, _, value, full = mismatch.groups()

        def kind(s: str) -> str:
            return re.sub(r"<class '(.+?)'>", r"\1", s)

        return UserError(f"{where}: key {full} wants a value of type {kind(wants)}, not {value} of type {kind(got)}")
    unknown = re.search(r"Non-existent (?:config )?key: (\S+)", text)
    name = unknown.group(1) if unknown else key
    if name and (unknown or isinstance(error, KeyError | AssertionError)):
        return UserError(
            f"{where}: unknown config key '{name}'{nearest(name, list(flat(cfg))) or '; see relvit_d2/config.py'}"
        )
    return UserError(f"{where}: {' '.join(text.split())}")
