"""Pre-training, training and evaluation from Python, as the command line does them, but in the calling process.

A config key and its value are a keyword argument, such as ``**{"SOLVER.MAX_ITER": 500}``. The log lines of a run are in
``log.txt`` of its folder.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relvit_d2.cli import module_of, parser_of
from relvit_d2.cli.train import run_recipe
from relvit_d2.cli.training import run_process
from relvit_d2.config.config_file import COMMANDS, override_words
from relvit_d2.engine.in_process import in_process
from relvit_d2.experiments.custom_measurements import PRETRAINING_CONFIG
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError, resource_error


@contextmanager
def _user_errors() -> Iterator[None]:
    """Raise a UserError for a lack of memory, disk space or file descriptors."""
    try:
        yield
    except Exception as error:
        if resource := resource_error(error):
            raise resource from error
        raise


@_user_errors()
def pretrain(
    data: str | Path,
    output: str | Path,
    *,
    config: str | Path = PRETRAINING_CONFIG,
    overwrite: bool = False,
    **keys: Any,
) -> Path:
    """Pre-train an encoder on images without labels, like ``relvit-d2 pretrain``.

    Args:
        data: folder, glob pattern, archive or text file of images, or a labelled folder, for its training images.
        output: folder of the run.
        config: config file.
        overwrite: replace the run in ``output``, if there is one.
        keys: config keys, which override the file.

    Returns:
        The path of ``encoder.safetensors``, for ``weights`` of :func:`train` and for ``load_encoder``.

    Raises:
        UserError: the data, the config or a key is invalid.
        KeyboardInterrupt: Ctrl-C; ``relvit-d2 pretrain --config-file OUTPUT/config.yaml --resume`` continues.
    """
    _run("pretrain", str(config), data, _with_output(keys, output), *["--overwrite"] * overwrite)
    return Path(output) / "encoder.safetensors"


@_user_errors()
def train(
    data: str | Path,
    output: str | Path,
    *,
    weights: str | Path = "",
    config: str | Path = "",
    hours: float | None = None,
    pretrain: bool | None = None,
    overwrite: bool = False,
    **keys: Any,
) -> Path:
    """Train a detector on a folder of labelled images, like ``relvit-d2 train``.

    Without ``config``, a recipe is chosen for the data, the machine and the time, and pre-training, training and
    evaluation run one after the other.

    Args:
        data: folder of labelled images.
        output: folder of the run, or of all runs of the recipe.
        weights: ``encoder.safetensors``, a checkpoint, the folder of a run or ``timm:NAME`` to start from. Without, the
            recipe may pre-train.
        config: config file instead of the recipe.
        hours: for the recipe: time of everything; default 1 on a GPU, 0.5 on a CPU.
        pretrain: for the recipe without weights: whether to pre-train; None: if the time allows.
        overwrite: replace the runs in ``output``, if there are any.
        keys: config keys, which override the file or the recipe.

    Returns:
        The folder of the detector, for :func:`evaluate` and ``load_detector``, which load its last checkpoint;
        ``model_best.pth`` in it is the checkpoint with the best AP, if the run was evaluated while it trained.

    Raises:
        UserError: the data, the config or a key is invalid, or the time is too short.
        KeyboardInterrupt: Ctrl-C; ``relvit-d2 train --config-file OUTPUT/config.yaml --resume`` continues.
    """
    keys = _with_output(keys, output)
    if config:
        if hours is not None or pretrain is not None:
            raise UserError("hours and pretrain belong to the recipe: leave them out, or leave out config")
        keys = ({"MODEL.WEIGHTS": weights} if weights else {}) | keys
        _run("train", str(config), data, keys, *["--overwrite"] * overwrite)
        return Path(output)
    if weights and pretrain is not None:
        raise UserError("weights replace the pre-training: leave out pretrain, or leave out weights")
    args = parser_of("train").parse_args([f"--data={data}", f"--weights={weights}", *_words(keys)])
    args.hours, args.pretrain, args.overwrite = hours, pretrain, overwrite
    run_recipe(args, _run_command)
    return Path(output) / "detector"


@_user_errors()
def evaluate(run: str | Path, data: str | Path | None = None, **keys: Any) -> dict[str, dict[str, Any]]:
    """Evaluate a trained model, like ``relvit-d2 train --eval-only``.

    Args:
        run: folder of a run, or one of its checkpoints.
        data: folder of labelled images, whose part ``val``, else ``test``, is evaluated; None: ``DATASETS.TEST`` of
            the run.
        keys: config keys, which override those of the run.

    Returns:
        The results of each data set, as in ``inference/results.json`` of the run, such as
        ``{"cells_val": {"bbox": {"AP": ...}}}``, in percent.

    Raises:
        UserError: the run, the data or a key is invalid.
    """
    path = Path(run)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.yaml"
    if not path.exists() or not config.is_file():
        raise UserError(f"'{path}' is not the folder of a run or one of its checkpoints: there is no '{config}'")
    command = COMMANDS[load_config(str(config), []).TASK]
    if data and command == "classify":
        raise UserError(f"'{path}' is a classifier: set DATASETS.TEST instead of data")
    keys = {"MODEL.WEIGHTS": path, "OUTPUT_DIR": folder} | keys
    _run(command, str(config), data, keys, "--eval-only")
    results = Path(keys["OUTPUT_DIR"]) / "inference/results.json"
    return json.loads(results.read_text(encoding="utf-8"))


def _with_output(keys: Mapping[str, Any], output: str | Path) -> dict[str, Any]:
    if "OUTPUT_DIR" in keys:
        raise UserError("OUTPUT_DIR is the argument output: leave the key out")
    return {**keys, "OUTPUT_DIR": output}


def _words(keys: Mapping[str, Any]) -> list[str]:
    """Return the keys as words of a command line."""
    if odd := next((key for key in keys if not key[:1].isupper()), None):
        raise UserError(f"'{odd}' is neither an argument nor a config key, such as SOLVER.MAX_ITER")
    return override_words(keys)


def _run(command: str, config: str, data: str | Path | None, keys: Mapping[str, Any], *flags: str) -> None:
    words = [command, f"--config-file={config}", *flags, *([f"--data={data}"] if data else []), *_words(keys)]
    _run_command(command, words, Path(keys["OUTPUT_DIR"]), 0)


def _run_command(title: str, command: list[str], output: Path, total: int) -> None:
    """Run a command as :func:`relvit_d2.experiments.commands.run_command` does, but in this process."""
    name, *words = command
    args = parser_of(name).parse_args(words)
    with in_process(title, command):
        run_process(args) if hasattr(args, "task") else module_of(name).run(args)
