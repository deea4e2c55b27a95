"""Config keys of classification."""

from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import Task
from relvit_d2.data.classification.config import add_class_set_config
from relvit_d2.data.config import (
    add_data_config,
    add_evaluation_batch_config,
    check_data_config,
    check_evaluation_batch_config,
)
from relvit_d2.data.images.config import add_load_size_config, check_pixel_statistics
from relvit_d2.encoders.config import add_encoder_config, check_encoder_config
from relvit_d2.engine.config import EPOCH_KEYS, WITHOUT_EFFECT, add_engine_config, finish_engine_config
from relvit_d2.pretext.config import add_joint_config
from relvit_d2.utils.config_keys import add_groups


def add_classification_config(cfg: CfgNode) -> None:
    """Add all keys of classification to an empty config, in place."""
    add_engine_config(cfg, "classification")
    add_encoder_config(cfg)
    add_joint_config(cfg)
    add_data_config(cfg)
    add_evaluation_batch_config(cfg)
    add_load_size_config(cfg)
    add_class_set_config(cfg)
    add_groups(cfg, "MODEL.CLASSIFIER", "INPUT.VIEW")
    # Input of the classifier. cls: the class token, or the mean of the patch tokens if the encoder has none, as in the
    # authors' code; mean: always the mean of the patch tokens. Pre-training does not train the class token.
    cfg.MODEL.CLASSIFIER.POOL = "cls"
    # percentage of the training images, or a data set, on which the best model is selected; "": none
    cfg.DATASETS.VALIDATION = "10%"
    cfg.INPUT.VIEW.SIZE = 32  # side in pixels of the encoder's input
    # training: pad, a crop of images of SIZE pixels with black padding; resized, a random resized crop
    cfg.INPUT.VIEW.CROP = "pad"
    cfg.INPUT.VIEW.PAD = 4  # width of the padding, pixels
    cfg.INPUT.VIEW.SCALE = [0.08, 1.0]  # range of the fraction of the image area in a resized crop
    cfg.INPUT.VIEW.FLIP = 0.5  # probability of a horizontal flip
    # evaluation: side of the centre crop as a fraction of the shorter side; 0: the whole image
    cfg.INPUT.VIEW.CENTRE = 0.0
    cfg.INPUT.VIEW.RANDAUGMENT = 0  # number of RandAugment operations (torchvision) per training image; 0: off
    cfg.INPUT.VIEW.MAGNITUDE = 9  # magnitude of RandAugment, 0..30
    cfg.INPUT.VIEW.MIXUP = 0.0  # alpha of timm's mixup; 0: off
    cfg.INPUT.VIEW.CUTMIX = 0.0  # alpha of timm's cutmix; 0: off
    cfg.TEST.BEST_ON_TEST = False  # select the best model on DATASETS.TEST; its result is named best_on_test


def finish_config(cfg: CfgNode) -> None:
    """Check the values, and derive those that follow from others, in place."""
    finish_engine_config(cfg)
    check_encoder_config(cfg)
    check_data_config(cfg)
    check_evaluation_batch_config(cfg)
    check_pixel_statistics(cfg, channels=3)


CLASSIFICATION = Task("classification", CfgNode, add_classification_config, finish_config, WITHOUT_EFFECT, EPOCH_KEYS)
