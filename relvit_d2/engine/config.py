"""Config keys of the trainer."""

import math
from fractions import Fraction
from math import inf

import torch
from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges, get_key
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import default_device

VERSION = 2  # of Detectron2's config format

# Detectron2's keys that this trainer does not read, and the replacement.
WITHOUT_EFFECT = {
    "SOLVER.MOMENTUM": "nothing, the optimiser is AdamW",
    "SOLVER.NESTEROV": "nothing, the optimiser is AdamW",
    "SOLVER.BIAS_LR_FACTOR": "SOLVER.BASE_LR",
    "SOLVER.WARMUP_FACTOR": "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_METHOD": "SOLVER.WARMUP_ITERS",
    "SOLVER.REFERENCE_WORLD_SIZE": "SOLVER.IMS_PER_BATCH, the batch of all processes together",
    "TEST.PRECISE_BN.ENABLED": "nothing, models have no batch norm",
    "VIS_PERIOD": "nothing, report.html in OUTPUT_DIR shows the images",
}

# Each key in epochs, and Detectron2's key in iterations that it is given instead of.
EPOCH_KEYS = {
    "SOLVER.EPOCHS": "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_EPOCHS": "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_EPOCHS": "TEST.EVAL_PERIOD",
}

_MAX_EPOCHS = 1e6
_RANGES = {
    **dict.fromkeys(EPOCH_KEYS, (0, _MAX_EPOCHS)),
    "SOLVER.MAX_ITER": (0, inf),
    "SOLVER.WARMUP_ITERS": (0, inf),
    "SEED": (0, inf),
    "SOLVER.IMS_PER_BATCH": (1, inf),
    "SOLVER.GRAD_ACCUM_STEPS": (1, inf),
    "SOLVER.REFERENCE_BATCH": (0, inf),
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": (0, inf),
    "TEST.PATIENCE": (0, inf),
    "SOLVER.BASE_LR": (0, inf),
}


def add_engine_config(cfg: CfgNode, task: str) -> None:
    """Add the keys of the trainer to a config of the task ``task``, in place."""
    add_groups(cfg, "MODEL", "SOLVER.CLIP_GRADIENTS", "SOLVER.AMP", "SOLVER.EMA", "TEST")
    cfg.TASK = task  # pretrain, detection or classification
    cfg.VERSION = VERSION  # version of Detectron2's config format
    cfg.SEED = 0  # seed of all random numbers
    cfg.OUTPUT_DIR = "./output"  # folder of all files that a run writes
    cfg.LOGGERS = ()  # experiment trackers that receive the metrics: "wandb", "mlflow"
    cfg.CUDNN_BENCHMARK = False  # let cuDNN benchmark its algorithms
    cfg.MODEL.DEVICE = default_device()  # torch device: cuda, mps (untested) or cpu
    cfg.MODEL.WEIGHTS = ""  # encoder.safetensors, model_*.pth or timm:NAME; empty: train from scratch
    cfg.MODEL.ALLOW_PICKLE = False  # read pickled weights, such as *.pkl, which can run arbitrary code
    cfg.SOLVER.MAX_ITER = 40000  # number of iterations; 0: SOLVER.EPOCHS
    cfg.SOLVER.EPOCHS = 0.0  # instead of MAX_ITER: passes over the training images; fractions are possible
    cfg.SOLVER.IMS_PER_BATCH = 16  # batch size of all processes together
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1  # gradient accumulation: each batch is computed in as many parts
    cfg.SOLVER.BASE_LR = 5e-4  # AdamW's learning rate, at the batch size REFERENCE_BATCH
    # Batch size of BASE_LR: the learning rate is scaled by IMS_PER_BATCH / REFERENCE_BATCH; 0: not scaled
    cfg.SOLVER.REFERENCE_BATCH = 0
    cfg.SOLVER.BASE_LR_END = 0.0  # learning rate at the end of a cosine schedule
    # WarmupCosineLR, WarmupMultiStepLR or QuarterCosineLR (the authors')
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS = 1000  # iterations of the linear warm-up; below 1: fraction of all iterations
    # WarmupMultiStepLR: iterations at which the learning rate is multiplied by GAMMA; below 1: fractions of all
    cfg.SOLVER.STEPS = (30000,)
    cfg.SOLVER.GAMMA = 0.1  # WarmupMultiStepLR: factor at each of STEPS
    cfg.SOLVER.LAYER_DECAY = 1.0  # layer-wise learning rate decay, 0..1; 1: off
    cfg.SOLVER.WEIGHT_DECAY = 0.1  # AdamW's weight decay
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0  # weight decay of norm parameters
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0  # weight decay of biases
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True  # clip the gradients
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # clip the global norm; other types are not supported
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # maximum norm
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0  # order of the norm
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations between checkpoints; 0: none before the end
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0  # instead of CHECKPOINT_PERIOD: epochs between checkpoints
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0  # number of the newest checkpoints to keep; 0: all
    # Precision of the forward pass: auto, float32, bfloat16 or float16 (with gradient scaling); auto: bfloat16 if the
    # device supports it natively, float16 on other GPUs with tensor cores
    cfg.SOLVER.PRECISION = "auto"
    cfg.SOLVER.AMP.ENABLED = False  # Detectron2's key; True sets PRECISION bfloat16, unless it is float16
    # exponential moving average of the weights, evaluated and exported beside them; names of results and files: _ema
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.999  # decay per iteration, 0 to less than 1; update k has at most 1 - k ** -0.75
    cfg.TEST.EVAL_PERIOD = 0  # iterations between evaluations; 0: only at the end
    cfg.TEST.EVAL_EPOCHS = 0.0  # instead of EVAL_PERIOD: epochs between evaluations
    cfg.TEST.BEST_METRIC = ""  # metric that selects model_best.pth, such as "bbox/AP"; a loss is minimised
    cfg.TEST.PATIENCE = 0  # early stopping after so many evaluations without a better BEST_METRIC; 0: off
    cfg.register_renamed_key("SOLVER.ACCUMULATE", "SOLVER.GRAD_ACCUM_STEPS")


def resolve_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """Return the config with iterations in place of epochs and of fractions of the run.

    An epoch is ``images / SOLVER.IMS_PER_BATCH`` iterations, whatever the number of processes and of accumulation
    steps. The run is rounded up, so that every image is seen in every epoch; periods are rounded, to at least 1.

    Args:
        cfg: the config; unchanged.
        images: number of training images.
    """
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    epoch = Fraction(images, solver.IMS_PER_BATCH)
    if solver.EPOCHS:
        solver.MAX_ITER = math.ceil(_exact(solver.EPOCHS) * epoch)
    if solver.CHECKPOINT_EPOCHS:
        solver.CHECKPOINT_PERIOD = max(round(_exact(solver.CHECKPOINT_EPOCHS) * epoch), 1)
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = max(round(_exact(cfg.TEST.EVAL_EPOCHS) * epoch), 1)
    solver.EPOCHS = solver.CHECKPOINT_EPOCHS = cfg.TEST.EVAL_EPOCHS = 0.0
    solver.WARMUP_ITERS, *steps = (
        round(_exact(value) * solver.MAX_ITER) if 0 < value < 1 else value
        for value in (solver.WARMUP_ITERS, *solver.STEPS)
    )
    solver.STEPS = tuple(steps)
    cfg.freeze()
    return cfg


def _exact(number: float) -> Fraction:
    """Return the decimal number that a float is written as, so that 0.1 of 30 is 3 and not more."""
    return Fraction(str(number))


def finish_engine_config(cfg: CfgNode) -> None:
    """Check the values and set ``PRECISION`` from ``AMP.ENABLED``, in place."""
    if cfg.VERSION != VERSION:
        raise UserError(
            f"VERSION {cfg.VERSION} of Detectron2's configs is not supported: rewrite the file for version {VERSION}"
        )
    check_ranges(cfg, _RANGES)
    for key, other in EPOCH_KEYS.items():
        if get_key(cfg, key) and get_key(cfg, other):
            raise UserError(f"{key} {get_key(cfg, key):g} and {other} {get_key(cfg, other)} are both set: set one to 0")
    if not cfg.SOLVER.EPOCHS and not cfg.SOLVER.MAX_ITER:
        raise UserError("SOLVER.MAX_ITER and SOLVER.EPOCHS are both 0: set one of them")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is not a device of torch; set cpu, cuda or mps") from error
    if not 0 <= cfg.SOLVER.EMA.DECAY < 1:
        raise UserError(
            f"SOLVER.EMA.DECAY {cfg.SOLVER.EMA.DECAY} is out of range: give 0 to less than 1, such as 0.999"
        )
    if cfg.SOLVER.AMP.ENABLED:
        if cfg.SOLVER.PRECISION == "float32":
            raise UserError(
                "SOLVER.AMP.ENABLED True, which means bfloat16, contradicts SOLVER.PRECISION float32: set "
                "SOLVER.PRECISION auto or SOLVER.AMP.ENABLED False"
            )
        if cfg.SOLVER.PRECISION == "auto":
            cfg.SOLVER.PRECISION = "bfloat16"
