"""Config keys of the trainer."""

from math import inf

import torch
from fvcore.common.config import CfgNode

from relvit_d2.utils.config_keys import add_groups, check_ranges
from relvit_d2.utils.errors import UserError

VERSION = 2  # of Detectron2's config format

# Detectron2's keys that this trainer does not read, and what to set instead.
WITHOUT_EFFECT = {
    "SOLVER.MOMENTUM": "nothing, the optimiser is AdamW",
    "SOLVER.NESTEROV": "nothing, the optimiser is AdamW",
    "SOLVER.BIAS_LR_FACTOR": "SOLVER.BASE_LR",
    "SOLVER.WARMUP_FACTOR": "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_METHOD": "SOLVER.WARMUP_ITERS",
    "SOLVER.REFERENCE_WORLD_SIZE": "SOLVER.IMS_PER_BATCH, which counts all processes together",
    "TEST.PRECISE_BN.ENABLED": "nothing, there are no batch norms",
    "DATALOADER.SAMPLER_TRAIN": "nothing, the order is a function of SEED",
    "DATALOADER.REPEAT_THRESHOLD": "nothing, the order is a function of SEED",
    "VIS_PERIOD": "nothing, report.html in OUTPUT_DIR shows the images",
}

_RANGES = {
    "SEED": (0, inf),
    "SOLVER.IMS_PER_BATCH": (1, inf),
    "SOLVER.GRAD_ACCUM_STEPS": (1, inf),
    "SOLVER.REFERENCE_BATCH": (0, inf),
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": (0, inf),
    "TEST.PATIENCE": (0, inf),
    "SOLVER.BASE_LR": (0, inf),
}


def add_engine_config(cfg: CfgNode, task: str) -> None:
    """Add what the trainer reads to a config of the task ``task``, in place."""
    add_groups(cfg, "MODEL", "SOLVER.CLIP_GRADIENTS", "SOLVER.AMP", "TEST")
    cfg.TASK = task  # what the config is for: pretrain, detection or classification
    cfg.VERSION = VERSION  # of Detectron2's config format
    cfg.SEED = 0  # of every random draw; a run is a function of its config and data
    cfg.OUTPUT_DIR = "./output"  # folder of all that a run writes
    cfg.CUDNN_BENCHMARK = False  # let cuDNN choose its algorithms by their speed
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # torch's name of it
    cfg.MODEL.WEIGHTS = ""  # encoder.safetensors, model_*.pth or timm:NAME; empty: from scratch
    cfg.MODEL.ALLOW_PICKLE = False  # read weights that are pickles, such as *.pkl, which can run any code in them
    cfg.SOLVER.MAX_ITER = 40000  # iterations of the run
    cfg.SOLVER.IMS_PER_BATCH = 16  # images of an iteration, of all processes together
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1  # parts that every batch is computed in, one after the other, to save memory
    cfg.SOLVER.BASE_LR = 5e-4  # of AdamW, at REFERENCE_BATCH
    # The batch that BASE_LR is meant for: rates are scaled by IMS_PER_BATCH over it; 0: never
    cfg.SOLVER.REFERENCE_BATCH = 0
    cfg.SOLVER.BASE_LR_END = 0.0  # learning rate at the end of a cosine
    # WarmupCosineLR, WarmupMultiStepLR, or QuarterCosineLR, that of the method's authors
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS = 1000  # iterations of the linear warm-up
    cfg.SOLVER.STEPS = (30000,)  # WarmupMultiStepLR: iterations after which the rate is multiplied by GAMMA
    cfg.SOLVER.GAMMA = 0.1  # see STEPS
    cfg.SOLVER.LAYER_DECAY = 1.0  # rate of a block over that of the next one, 0..1; for fine-tuning
    cfg.SOLVER.WEIGHT_DECAY = 0.1  # AdamW's
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0  # of the norms' parameters
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0  # of the biases
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True  # clip the gradients
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # by their global norm; no other is offered
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # the largest norm
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0  # order of the norm
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations between checkpoints; 0: none before the end
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0  # numbered checkpoints that are kept, the newest; 0: all
    # auto, float32 or bfloat16, of the forward pass; auto: bfloat16 where the device multiplies it natively
    cfg.SOLVER.PRECISION = "auto"
    cfg.SOLVER.AMP.ENABLED = False  # Detectron2's key for mixed precision; True: PRECISION bfloat16
    cfg.TEST.EVAL_PERIOD = 0  # iterations between evaluations; 0: only at the end
    cfg.TEST.BEST_METRIC = ""  # such as "bbox/AP": its best value, or least if it is a loss, decides model_best.pth
    cfg.TEST.PATIENCE = 0  # evaluations in a row without a better BEST_METRIC that end the run; 0: no early end
    cfg.register_renamed_key("SOLVER.ACCUMULATE", "SOLVER.GRAD_ACCUM_STEPS")


def finish_engine_config(cfg: CfgNode) -> None:
    """Check values that would fail late or unclearly, and let ``AMP.ENABLED`` set ``PRECISION``, in place.

    Raises:
        UserError: a value is out of range, or two contradict each other.
    """
    if cfg.VERSION != VERSION:
        raise UserError(
            f"VERSION {cfg.VERSION} of Detectron2's configs is not supported: rewrite the file for version {VERSION}"
        )
    check_ranges(cfg, _RANGES)
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is not a device of torch; set cpu or cuda") from error
    if cfg.SOLVER.AMP.ENABLED:
        if cfg.SOLVER.PRECISION == "float32":
            raise UserError(
                "SOLVER.AMP.ENABLED True, which is bfloat16 here, contradicts SOLVER.PRECISION float32: set "
                "SOLVER.PRECISION auto or SOLVER.AMP.ENABLED False"
            )
        cfg.SOLVER.PRECISION = "bfloat16"
