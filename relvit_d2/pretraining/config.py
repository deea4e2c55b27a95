"""Config keys of pre-training."""

from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import Task
from relvit_d2.data.classification.config import add_class_set_config
from relvit_d2.data.config import add_data_config, check_data_config
from relvit_d2.data.detection.config import add_custom_data_config
from relvit_d2.data.images.config import add_load_size_config, add_pixel_format_config, check_pixel_format_config
from relvit_d2.encoders.config import add_encoder_config, check_encoder_config
from relvit_d2.engine.config import EPOCH_KEYS, WITHOUT_EFFECT, add_engine_config, finish_engine_config
from relvit_d2.pretext.config import add_pretext_config, add_views_config


def add_pretraining_config(cfg: CfgNode) -> None:
    """Add all keys of pre-training to an empty config, in place."""
    add_engine_config(cfg, "pretrain")
    add_encoder_config(cfg)
    add_pretext_config(cfg)
    add_views_config(cfg)
    add_data_config(cfg)
    add_pixel_format_config(cfg)
    add_load_size_config(cfg)
    add_custom_data_config(cfg)
    add_class_set_config(cfg)
    cfg.DATASETS.EXCLUDE = ()  # names as in TRAIN; their duplicates and near-duplicates are left out of TRAIN
    cfg.PRETEXT.KNN = ""  # folder with one folder of images per class, on which k-NN accuracy is evaluated; empty: off


def finish_config(cfg: CfgNode) -> None:
    """Check the values and set derived ones, in place."""
    finish_engine_config(cfg)
    check_encoder_config(cfg)
    check_data_config(cfg)
    check_pixel_format_config(cfg)


# With MODEL.WEIGHTS: a fifth of the learning rate, this project's choice, and a layer-wise decay of 0.75, as in the
# fine-tuning of K. He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021 (table 9).
FACTORS_WITH_WEIGHTS = {"SOLVER.BASE_LR": 0.2, "SOLVER.LAYER_DECAY": 0.75}

PRETRAINING = Task(
    "pretrain",
    CfgNode,
    add_pretraining_config,
    finish_config,
    WITHOUT_EFFECT,
    EPOCH_KEYS,
    FACTORS_WITH_WEIGHTS,
)
