"""The command line ``relvit-d2``, with one module per command.

Each module has a docstring (the help text), ``EXAMPLE`` command lines, ``add_arguments(parser)`` and ``run(args)``.
``run`` returns the exit status (None: 0) and raises a UserError for invalid input. Modules that import torch are
imported inside ``run``, so that ``--help`` and usage errors are answered without delay.
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
    "embed",
    "select",
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

_EXTRAS = {"av": "video", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "pyarrow": "formats"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error that was printed, 2 after a usage error.

    Args:
        arguments: name of the command and its arguments; None: those of the process.
    """
    return guard(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="relvit-d2",
        description="Self-supervised pre-training of vision transformers on the spatial relations of image patches, "
        "and detection with Detectron2.",
        usage="relvit-d2 [-h] [--version] COMMAND ...",
        epilog="commands:\n"
        + "\n".join(f"  {name:<19}{_summary(module_of(name))}" for name in COMMANDS)
        + "\n\nrelvit-d2 COMMAND --help prints the arguments of a command.\n\nexample:\n  relvit-d2 demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"relvit-d2 {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    parsed = parser.parse_args(arguments)
    if parsed.command not in COMMANDS:
        hint = f"{nearest(parsed.command, COMMANDS)} relvit-d2 --help lists all".removeprefix("; ")
        parser.error(f"unknown command '{parsed.command}'; {hint}")
    module = module_of(parsed.command)
    command_parser = parser_of(parsed.command)
    args = getattr(module, "parse", parse_arguments)(command_parser, parsed.arguments)
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


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of a command, whose flags may also follow ``KEY VALUE`` pairs."""
    args = parser.parse_args(arguments)
    pairs: list[str] = getattr(args, "opts", [])
    for index in range(0, len(pairs), 2):
        if pairs[index].startswith("--"):
            before = arguments[: len(arguments) - len(pairs)]
            args = parse_arguments(parser, [*before, *pairs[index:]])
            args.opts = pairs[:index] + args.opts
            break
    return args


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def _installation(package: str) -> str:
    if package == "detectron2":
        return "run relvit-d2 doctor --install-detectron2"
    if extra := _EXTRAS.get(package):
        return f"run pip install 'relvit_d2[{extra}]'"
    return "relvit-d2 doctor prints the command that installs it"
