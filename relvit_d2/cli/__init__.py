"""The command line ``relvit-d2``, one module a command.

A module has a docstring, which is its help text, ``EXAMPLE`` command lines, ``add_arguments`` and ``run``. At import it
loads the standard library and light modules of this package only; what imports torch is imported in ``run``, so that
``--help`` and usage errors answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from relvit_d2 import __version__
from relvit_d2.engine.error_reporting import guard
from relvit_d2.utils.errors import UserError, nearest

COMMANDS = (
    "demo",
    "doctor",
    "prepare-data",
    "check-data",
    "estimate-pixels",
    "pretrain",
    "train",
    "classify",
    "predict",
    "report",
    "visualize-pretext",
    "analyze",
    "overfit-check",
    "convert",
    "export-weights",
    "export-model",
    "compare",
    "reproduce",
    "compare-runs",
)

_EXTRAS = {"av": "video", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error that was printed, 2 after a usage error.

    Args:
        arguments: the command's name and its arguments; None: those of the process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    return guard(lambda: _run(words))


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="relvit-d2",
        description="Self-supervised pre-training of vision transformers on the relations of image patches, and "
        "detection with Detectron2.",
        usage="relvit-d2 [-h] [--version] COMMAND ...",
        epilog="commands:\n"
        + "\n".join(f"  {name:<19}{_summary(module_of(name))}" for name in COMMANDS)
        + "\n\nrelvit-d2 COMMAND --help describes a command.\n\nexample:\n  relvit-d2 demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"relvit-d2 {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    given = parser.parse_args(words)
    if given.command not in COMMANDS:
        known = f"{nearest(given.command, COMMANDS)} relvit-d2 --help lists all".removeprefix("; ")
        parser.error(f"unknown command '{given.command}'; {known}")
    module = module_of(given.command)
    command_parser = parser_of(given.command)
    args = getattr(module, "parse", argparse.ArgumentParser.parse_args)(command_parser, given.arguments)
    try:
        return module.run(args) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "relvit_d2"):
            raise
        raise UserError(f"the package {package} is not installed: {_installation(package)}") from error


def module_of(command: str) -> ModuleType:
    """Return the module of a command."""
    return import_module(f"relvit_d2.cli.{command.replace('-', '_')}")


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments."""
    module = module_of(command)
    examples = "\n".join(f"  {line}" for line in module.EXAMPLE.splitlines())
    parser = argparse.ArgumentParser(
        prog=f"relvit-d2 {command}",
        description=module.__doc__,
        epilog=f"example:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def _installation(package: str) -> str:
    if package == "detectron2":
        return "run relvit-d2 doctor --install-detectron2"
    if extra := _EXTRAS.get(package):
        return f"run pip install 'relvit_d2[{extra}]'"
    return "relvit-d2 doctor prints the command that installs it"
