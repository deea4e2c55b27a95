"""A config from its file and ``KEY VALUE`` pairs, faults as one sentence."""

import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from detectron2.config import get_cfg
from fvcore.common.config import CfgNode

from relvit_d2.config import WITHOUT_EFFECT, add_relvit_config
from relvit_d2.errors import UserError, nearest


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Return Detectron2's defaults and ours, overridden by a yaml file and then by ``KEY VALUE`` pairs.

    Raises:
        UserError: for a missing or unreadable file, an unknown key (the nearest one is named) or a value of
            the wrong type.
    """
    cfg = get_cfg()
    add_relvit_config(cfg)
    path = Path(config_file)
    if not path.is_file():
        raise UserError(
            f"config file '{config_file}' does not exist; the ones that come with the project are in configs/"
        )
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except yaml.YAMLError as error:
        raise UserError(f"config file '{config_file}' is not valid yaml: {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise UserError(f"config file '{config_file}' builds on '{error.filename}', which does not exist") from error
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise _config_error(error, f"config file '{config_file}'", cfg) from error
    if len(overrides) % 2:
        raise UserError(
            f"overrides come as KEY VALUE pairs, but '{overrides[-1]}' has no partner; flags go before them"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, AttributeError, TypeError) as error:
            raise _config_error(error, f"override '{key} {value}'", cfg, key) from error
    defaults = get_cfg()
    for key, instead in WITHOUT_EFFECT.items():
        if _value(cfg, key) != _value(defaults, key):
            raise UserError(f"key {key} has no effect here; leave it out and set {instead}")
    return cfg


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
            f"{where}: unknown config key '{name}'{nearest(name, _keys(cfg)) or '; see relvit_d2/config.py'}"
        )
    return UserError(f"{where}: {' '.join(text.split())}")


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    """All dotted keys of a config."""
    keys = []
    for name, value in node.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]
    return keys
