"""Weights of models: what training starts from, what evaluation reads, the encoder that training leaves."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.config.config_file import Task, load_config, use_here
from relvit_d2.conversion.converted import TOLERANCE
from relvit_d2.conversion.encoder_file import ENOUGH, MatchReport, feature_difference, load_encoder, save_encoder
from relvit_d2.conversion.timm_hub import is_published
from relvit_d2.encoders import Encoder
from relvit_d2.engine.checkpoint import Checkpointer, download
from relvit_d2.utils.errors import UserError

logger = logging.getLogger(__name__)


def holds_encoder(weights: str) -> bool:
    """Whether ``MODEL.WEIGHTS`` names an ``encoder.safetensors`` or timm's weights, ``timm:NAME``."""
    return weights.endswith(".safetensors") or is_published(weights)


def load_weights(cfg: CfgNode, model: nn.Module, encoder: Encoder, input_format: str) -> dict[str, Any]:
    """Load ``MODEL.WEIGHTS``: what :func:`holds_encoder`, a checkpoint of the whole model, or nothing.

    Args:
        cfg: the config.
        model: takes a checkpoint.
        encoder: the part of it that takes an encoder's weights.
        input_format: see :func:`load_proved`.

    Returns:
        The metadata of an encoder's file, or the entry ``kept`` of a checkpoint.

    Raises:
        UserError: if the file is missing, is of something else, or features differ (:func:`load_proved`).
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        logger.info("MODEL.WEIGHTS is empty: training from scratch")
        return {}
    if holds_encoder(weights):
        return load_proved(cfg, encoder, weights, input_format)
    checkpointer = Checkpointer(model, enough=ENOUGH, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    return checkpointer.load(weights, checkpointables=[]).get("kept", {})


def run_config(weights: str | Path, config_file: str | Path, overrides: Sequence[Any], task: Task) -> CfgNode:
    """Return the config of a trained model for use on this machine: see :func:`relvit_d2.config.config_file.use_here`.

    Args:
        weights: the run's folder or one of its checkpoints, as for :func:`load_trained`.
        config_file: empty for the ``config.yaml`` beside the checkpoint.
        overrides: keys and values in turn.
        task: what it was trained for.

    Raises:
        UserError: if the config is missing or invalid.
    """
    path = Path(weights)
    folder = path if path.is_dir() else path.parent
    words = [str(word) for word in overrides]
    cfg = load_config(str(config_file or folder / "config.yaml"), words, {task.name: task}, task.name)
    use_here(cfg)
    return cfg


def load_trained(cfg: CfgNode, model: nn.Module, weights: str | Path) -> dict[str, Any]:
    """Load a trained model, heads included, to evaluate or to use it.

    Args:
        cfg: its config.
        model: what the weights go into.
        weights: a checkpoint, ``model_*.pth``, or the folder of a run, for its last checkpoint.

    Returns:
        What the checkpoint holds beside the weights.

    Raises:
        UserError: if there is no checkpoint, or it does not fit the model.
    """
    source = str(weights)
    if not source or holds_encoder(source):
        what = f"'{source}' holds an encoder without heads" if source else "MODEL.WEIGHTS is empty"
        raise UserError(f"{what}: give the model_final.pth of a trained model, or the folder of its run")
    checkpointer = Checkpointer(model, source, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
    if Path(source).is_dir():
        if not checkpointer.has_checkpoint():
            raise UserError(f"'{source}' holds no checkpoint: give the OUTPUT_DIR of a training or a model_*.pth")
        source = checkpointer.get_checkpoint_file()
    return checkpointer.load(source, checkpointables=[])


def export_encoder(
    cfg: CfgNode, encoder: Encoder, image_size: int, iterations: int, results: dict[str, Any], **more: Any
) -> Path:
    """Write ``encoder.safetensors`` into ``OUTPUT_DIR`` and return its path.

    Args:
        cfg: the run's config.
        encoder: what is written.
        image_size: side in pixels of the images that it was trained on.
        iterations: how many it was trained for.
        results: what the last evaluation returned.
        more: further metadata, JSON values.
    """
    path = Path(cfg.OUTPUT_DIR) / "encoder.safetensors"
    info = {
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "input_format": "RGB",
        "patch": encoder.strides[encoder.last],
        "image_size": image_size,
        "iteration": iterations,
        "data": list(cfg.DATASETS.TRAIN),
        "results": results,
    }
    save_encoder(encoder, path, info | more)
    return path


def load_proved(cfg: CfgNode, encoder: Encoder, weights: str, input_format: str) -> dict[str, Any]:
    """Load ``weights`` into ``encoder``, log what matched, run both encoders on one image, return the metadata.

    Args:
        cfg: the script's config; its pixel statistics must be those of the weights.
        encoder: what the weights go into.
        weights: see :func:`holds_encoder`.
        input_format: order of the channels that the encoder is fed, such as ``RGB``.

    Raises:
        UserError: if the weights are missing, do not fit or are for other pixels, or the features differ.
    """
    weights = download(weights) if "://" in weights else weights
    report = load_encoder(encoder, weights)
    _check_pixels(cfg, report, input_format)
    logger.info(str(report))
    difference = feature_difference(encoder, weights)
    if not difference <= TOLERANCE:
        raise UserError(
            f"after loading '{weights}' the features differ by {difference:.1e} from those of the encoder it "
            "describes; check that MODEL.ENCODER says what pre-training used"
        )
    if left_out := encoder.lacks(report.metadata["encoder"]):
        logger.warning(f"left out here: {', '.join(left_out)} of '{weights}' (MODEL.ENCODER.POS_EMBED False)")
    note = f" (without the fresh {', '.join(report.fresh)})" if report.fresh else ""
    logger.info(f"features of the pre-trained encoder and of this one agree to {difference:.1e}{note}")
    return report.metadata


def _check_pixels(cfg: CfgNode, report: MatchReport, input_format: str) -> None:
    """Refuse to feed an encoder pixels of another scale or channel order than it was pre-trained on."""
    for key, ours, name in (
        ("INPUT.FORMAT", input_format, "input_format"),
        ("MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), "pixel_mean"),
        ("MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), "pixel_std"),
    ):
        theirs = report.metadata.get(name, ours)
        if theirs != ours:
            raise UserError(f"'{report.path}' was pre-trained with {key} {theirs}, not {ours}; set {key} to that")
