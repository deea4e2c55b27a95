"""Weights: initialisation of training, loading for evaluation, export of the encoder."""

import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.config.config_file import Task, adapt_to_machine, load_config
from relvit_d2.conversion.converted import TOLERANCE
from relvit_d2.conversion.detectron2_detector import adapt_checkpoint, adapt_encoder
from relvit_d2.conversion.encoder_file import (
    ENOUGH,
    MatchReport,
    feature_difference,
    load_encoder_weights,
    save_encoder,
)
from relvit_d2.conversion.timm_hub import is_published
from relvit_d2.encoders import Encoder
from relvit_d2.engine.checkpoint import Checkpointer, download
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError

logger = logging.getLogger(__name__)


def holds_encoder(weights: str) -> bool:
    """Whether ``MODEL.WEIGHTS`` is an ``encoder.safetensors``, a folder with one, or ``timm:NAME``."""
    return weights.endswith(".safetensors") or is_published(weights) or _has_encoder(weights)


def _has_encoder(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "encoder.safetensors"))  # noqa: PTH113,PTH118  (False for a long name)


def load_weights(
    cfg: CfgNode, model: nn.Module, encoder: Encoder, input_format: str, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Load ``MODEL.WEIGHTS``: encoder weights, a checkpoint of the whole model, or nothing if empty.

    Args:
        input_format: order of the encoder's input channels, such as ``RGB``.
        class_names: names of the classes of a detector.

    Returns:
        Metadata of the encoder's file or of the checkpoint; empty if there is none.

    Raises:
        UserError: the weights are missing, do not fit, or are of another kind.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        if encoder.frozen_statistics:
            raise UserError(
                f"MODEL.WEIGHTS is empty, but encoder '{encoder.name}' has frozen batch norm, which needs the "
                f"statistics of trained weights: set MODEL.WEIGHTS {encoder.name}, or choose an encoder without batch "
                "norm"
            )
        logger.info("MODEL.WEIGHTS is empty: training from scratch")
        return {}
    if holds_encoder(weights):
        return load_verified(cfg, encoder, weights, input_format)
    return _load_checkpoint(cfg, model, weights, ENOUGH, class_names).get("metadata", {})


def load_encoder(cfg: CfgNode, encoder: Encoder, weights: str) -> dict[str, Any]:
    """Load the encoder, for RGB images, from encoder weights or from a detector of Detectron2.

    Returns:
        Metadata of the encoder's file; empty for a detector.

    Raises:
        UserError: the weights are missing, do not fit, or are of another kind.
    """
    if holds_encoder(weights):
        return load_verified(cfg, encoder, weights, "RGB")

    if os.path.isdir(weights):  # noqa: PTH112  (False for a long name)
        raise UserError(
            f"MODEL.WEIGHTS '{weights}' has no encoder.safetensors: complete its pre-training with --resume, or give "
            "another file"
        )

    def convert(checkpoint: dict[str, Any]) -> None:
        if _task_of(str(checkpoint.get("config"))):
            raise UserError(f"'{weights}' is a checkpoint of a run: set MODEL.WEIGHTS to {_encoder_beside(weights)}")
        logger.info(adapt_encoder(weights, checkpoint, encoder.state_dict(), partial(get_key, cfg)))

    checkpointer = Checkpointer(encoder, min_match=ENOUGH, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    checkpointer.validate = convert
    checkpointer.load(weights, checkpointables=[])
    return {}


def best_or_last(output: str | Path) -> str:
    """Return ``model_best.pth`` of a run if there is one, else its folder, which stands for the last checkpoint."""
    best = Path(output) / "model_best.pth"
    return str(best if best.is_file() else output)


def run_config(weights: str | Path, config_file: str | Path, overrides: Sequence[Any], task: Task) -> CfgNode:
    """Return the config of a trained model, adapted to this machine.

    Args:
        weights: folder of the run or one of its checkpoints.
        config_file: the config; empty: ``config.yaml`` in the folder of the checkpoint.
        overrides: alternating keys and values.
        task: task of the model.

    Raises:
        UserError: the weights or the config are missing, or the config is invalid.
    """
    path = Path(weights)
    if not config_file and not path.exists():
        raise UserError(f"weights '{path}' do not exist: give the output folder of a run or one of its checkpoints")
    folder = path if path.is_dir() else path.parent
    if not config_file:
        _check_run(folder, task.name)
    cfg = load_config(str(config_file or folder / "config.yaml"), [*map(str, overrides)], {task.name: task}, task.name)
    adapt_to_machine(cfg)
    return cfg


def _check_run(folder: Path, task: str) -> None:
    """Raise a :class:`UserError` if a folder is not that of a run, or is that of a pre-training for another task."""
    config = folder / "config.yaml"
    if not config.is_file():
        inner = folder / "detector"  # of relvit-d2 train --data
        instead = f"'{inner}'" if (inner / "config.yaml").is_file() else "the OUTPUT_DIR of a run"
        raise UserError(f"'{folder}' is not the folder of a run, since it has no config.yaml: give {instead}")
    text = config.read_text(encoding="utf-8", errors="replace")
    if task != "pretrain" and _task_of(text) == "pretrain":
        raise UserError(
            f"'{folder}' is a pre-training, which has an encoder but no {task} heads: train them with MODEL.WEIGHTS "
            f"'{folder / 'encoder.safetensors'}', then give the folder of that run"
        )


def _task_of(config: str) -> str | None:
    """Return the task of the text of a complete config."""
    found = re.search(r"^TASK: (\w+)$", config, re.M)
    return found and found[1]


def load_trained(cfg: CfgNode, model: nn.Module, weights: str | Path) -> dict[str, Any]:
    """Load a trained model with its heads.

    Args:
        model: the model, changed in place.
        weights: a checkpoint ``model_*.pth``, or the folder of a run, for its last checkpoint.

    Returns:
        The other entries of the checkpoint.

    Raises:
        UserError: there is no checkpoint, or it does not fit the model.
    """
    source = str(weights)
    if not source or (holds_encoder(source) and not Path(source).is_dir()):
        what = f"'{source}' holds an encoder without heads" if source else "MODEL.WEIGHTS is empty"
        raise UserError(f"{what}: give the model_final.pth of a trained model, or the folder of its run")
    return _load_checkpoint(cfg, model, source, min_match=1)


def _load_checkpoint(
    cfg: CfgNode, model: nn.Module, source: str, min_match: float, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Load a checkpoint, or the last one in a folder, into a model; return the other entries."""
    checkpointer = Checkpointer(model, source, min_match=min_match, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    if os.path.isdir(source):  # noqa: PTH112  (False for a name that is too long)
        if not checkpointer.has_checkpoint():
            raise UserError(f"'{source}' holds no checkpoint: give the OUTPUT_DIR of a training run or a model_*.pth")
        source = checkpointer.get_checkpoint_file()
    checkpointer.validate = partial(_prepare, cfg, model, source, class_names)
    return checkpointer.load(source, checkpointables=[])


def _prepare(
    cfg: CfgNode, model: nn.Module, source: str, class_names: Sequence[str] | None, checkpoint: dict[str, Any]
) -> None:
    """Check the task of a checkpoint, and convert a detector of Detectron2, in place."""
    _check_task(cfg.TASK, source, checkpoint)
    if cfg.TASK == "detection":
        report = adapt_checkpoint(source, checkpoint, model.state_dict(), partial(get_key, cfg), class_names)
        if report:
            logger.info(report)


def _check_task(task: str, source: str, checkpoint: dict[str, Any]) -> None:
    """Raise a :class:`UserError` if a checkpoint was written by another task of this package."""
    saved = _task_of(str(checkpoint.get("config")))
    if saved not in (None, task):
        raise UserError(
            f"'{source}' is a checkpoint of the task {saved}, which has an encoder but not the heads of the task "
            f"{task}: set MODEL.WEIGHTS to {_encoder_beside(source)}"
        )


def _encoder_beside(checkpoint: str) -> str:
    beside = Path(checkpoint).with_name("encoder.safetensors")
    return f"'{beside}'" if beside.is_file() else "its encoder.safetensors"


def export_encoder(
    cfg: CfgNode,
    encoder: Encoder,
    image_size: int,
    iterations: int,
    results: dict[str, Any],
    suffix: str = "",
    **more: Any,
) -> Path:
    """Write ``encoderSUFFIX.safetensors`` to ``OUTPUT_DIR`` and return its path.

    Args:
        image_size: side in pixels of the training images.
        iterations: number of training iterations.
        results: results of the last evaluation.
        suffix: of the name of the file.
        more: further metadata, JSON values.
    """
    path = Path(cfg.OUTPUT_DIR) / f"encoder{suffix}.safetensors"
    info = {
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "input_format": "RGB",
        "max_value": cfg.INPUT.get("MAX_VALUE", 0),
        "patch": encoder.strides[encoder.last],
        "image_size": image_size,
        "iteration": iterations,
        "data": list(cfg.DATASETS.TRAIN),
        "results": results,
    }
    save_encoder(encoder, path, info | more)
    return path


def load_verified(cfg: CfgNode, encoder: Encoder, weights: str, input_format: str) -> dict[str, Any]:
    """Load encoder weights, log the matched parameters, and verify the features on an image.

    Args:
        cfg: the config; its pixel statistics must be those of the weights.
        encoder: the encoder, changed in place.
        weights: an ``encoder.safetensors``, its URL, or ``timm:NAME``.
        input_format: order of the encoder's input channels, such as ``RGB``.

    Returns:
        The metadata of the weights' file.

    Raises:
        UserError: the weights are missing, do not fit or were trained with other pixel statistics, or the features
            differ.
    """
    weights = download(weights) if "://" in weights else weights
    report = load_encoder_weights(encoder, weights)
    _check_pixels(cfg, report, input_format)
    logger.info(str(report))
    difference = feature_difference(encoder, weights)
    if not difference <= TOLERANCE:
        raise UserError(
            f"after loading '{weights}' the features differ by {difference:.1e} from those of the encoder in its "
            "metadata; set MODEL.ENCODER as in pre-training"
        )
    if left_out := encoder.lacks(report.metadata["encoder"]):
        names = sorted(left_out)
        logger.warning(
            f"not loaded from '{weights}': {', '.join(names[:6])}{', ...' if names[6:] else ''} "
            "(MODEL.ENCODER.POS_EMBED or REL_POS is False)"
        )
    shown = ", ".join(report.fresh[:6]) + (", ..." if report.fresh[6:] else "")
    note = f" (without {shown}, not pre-trained)" if report.fresh else ""
    logger.info(f"features of the pre-trained and the loaded encoder agree to {difference:.1e}{note}")
    return report.metadata


def _check_pixels(cfg: CfgNode, report: MatchReport, input_format: str) -> None:
    """Raise a :class:`UserError` unless channel order and pixel statistics are those of pre-training."""
    for key, current, name in (
        ("INPUT.FORMAT", input_format, "input_format"),
        ("MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), "pixel_mean"),
        ("MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), "pixel_std"),
    ):
        saved = report.metadata.get(name, current)
        if saved != current:
            raise UserError(f"'{report.path}' was pre-trained with {key} {saved}, not {current}; set {key} to that")
