"""Config keys of detection, in addition to those of Detectron2."""

from math import inf

from detectron2.config import get_cfg
from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import Task
from relvit_d2.data.config import (
    add_data_config,
    add_evaluation_batch_config,
    check_data_config,
    check_evaluation_batch_config,
)
from relvit_d2.data.detection.config import add_custom_data_config, add_mapper_config, check_mapper_config
from relvit_d2.data.images.config import add_pixel_format_config, check_pixel_format_config
from relvit_d2.detection.config_check import check_config
from relvit_d2.detection.detections import TrainingSizes
from relvit_d2.detection.tiles import MIN_TILE, Tiling
from relvit_d2.encoders import map_strides
from relvit_d2.encoders.config import add_encoder_config, check_encoder_config
from relvit_d2.engine.config import EPOCH_KEYS, WITHOUT_EFFECT, add_engine_config, finish_engine_config
from relvit_d2.pretext.config import add_joint_config
from relvit_d2.utils.config_keys import add_groups, check_ranges
from relvit_d2.utils.errors import UserError

BACKBONE = "build_encoder_pyramid_backbone"  # registered in relvit_d2.detection.backbone


def add_relvit_config(cfg: CfgNode) -> None:
    """Add this project's keys to a config of ``detectron2.config.get_cfg()``, in place.

    Some of Detectron2's keys get other defaults; the page "Config keys" of the documentation lists all keys.
    """
    add_engine_config(cfg, "detection")
    add_encoder_config(cfg)
    add_joint_config(cfg)
    add_data_config(cfg)
    add_evaluation_batch_config(cfg)
    add_pixel_format_config(cfg)
    add_custom_data_config(cfg)
    add_mapper_config(cfg)
    add_groups(cfg, "MODEL.PYRAMID", "SEMI")
    cfg.MODEL.BACKBONE.NAME = BACKBONE  # MODEL.ENCODER with MODEL.PYRAMID
    cfg.MODEL.BACKBONE.FREEZE_AT = 0  # 0: train all; 1: freeze the patch embedding; 2: the first block too, ...
    # simple: simple feature pyramid on the encoder's last map; fpn: FPN on its maps of several strides; multitap: FPN
    # on the maps of several of its blocks; auto: fpn if it has maps of several strides, else simple
    cfg.MODEL.PYRAMID.NAME = "auto"
    # Pixels per cell of each level, powers of two; [0]: the strides of an encoder with several maps, else a quarter of
    # the encoder's stride (at least 4) to twice its stride
    cfg.MODEL.PYRAMID.STRIDES = [0]
    cfg.MODEL.PYRAMID.TOP_BLOCK = True  # a further level: every second row and column of the last one (p6)
    cfg.MODEL.PYRAMID.OUT_CHANNELS = 256  # channels of every level
    cfg.MODEL.PYRAMID.NORM = "LN"  # LN, GN, FrozenBN, or "" for none
    # Sides of images are padded to multiples of this many pixels, a multiple of the coarsest stride, 0: of that stride.
    # With INPUT.MAX_SIZE_TEST or more pixels, images are padded to squares, as in ViTDet
    cfg.MODEL.PYRAMID.SIZE_DIVISIBILITY = 0
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0  # 0: the number of classes of the data set
    cfg.MODEL.RELVIT.GRID = [7, 7]  # joint training: rows and columns of the position grid for any image size
    # Evaluate again in tiles, results with the suffix _tiles: SIZE or WIDTHxHEIGHT in pixels of the image; auto: the
    # size of the training images; empty: no
    cfg.TEST.TILES = ""
    cfg.TEST.TILE_OVERLAP = 0.2  # minimum overlap of neighbouring tiles, a fraction of their shorter side
    cfg.DATASETS.TRAIN_DIFFICULT = True  # train on VOC's difficult objects, as Detectron2 does
    cfg.DATASETS.IGNORE_DIFFICULT = True  # ignore difficult objects in evaluation, as VOC does
    # Semi-supervised training: folder, pattern, archive or list of images without labels, which the moving average of
    # the weights labels (SOLVER.EMA, which it switches on); empty: off
    cfg.SEMI.UNLABELLED = ""
    cfg.SEMI.BURN_IN = 0.3  # iterations on labelled images only at first; below 1: fraction of all iterations
    cfg.SEMI.THRESHOLD = 0.7  # score above which a detection is a pseudo-label, 0..1
    cfg.SEMI.WEIGHT = 1.0  # weight of the losses on unlabelled images


def derive_levels(cfg: CfgNode) -> None:
    """Derive the levels that a config does not choose, in place.

    The strides of the pyramid follow from the encoder if ``MODEL.PYRAMID.STRIDES`` is [0]. The RPN reads all levels and
    the region heads all but the top block's, if their ``IN_FEATURES`` are Detectron2's default, [res4].

    Raises:
        UserError: a stride is not a positive integer.
    """
    if cfg.MODEL.BACKBONE.NAME != BACKBONE:
        return
    keys = cfg.MODEL.PYRAMID
    if keys.STRIDES == [0]:
        strides = map_strides(cfg.MODEL)
        last = strides[-1]
        around = [stride for stride in (last // 4, last // 2, last, 2 * last) if stride >= min(4, last)]
        keys.STRIDES = strides if len(strides) > 1 else around
    if not all(isinstance(stride, int) and stride > 0 for stride in keys.STRIDES):
        raise UserError(f"MODEL.PYRAMID.STRIDES {keys.STRIDES} are not powers of two, each twice the one before")
    levels = [f"p{stride.bit_length() - 1}" for stride in keys.STRIDES]
    top = [f"p{keys.STRIDES[-1].bit_length()}"] if keys.TOP_BLOCK and keys.STRIDES else []
    if cfg.MODEL.RPN.IN_FEATURES == ["res4"]:
        cfg.MODEL.RPN.IN_FEATURES = levels + top
    if cfg.MODEL.ROI_HEADS.IN_FEATURES == ["res4"]:
        cfg.MODEL.ROI_HEADS.IN_FEATURES = levels


def finish_config(cfg: CfgNode) -> None:
    """Check the values, and derive those that follow from others, in place."""
    finish_engine_config(cfg)
    check_encoder_config(cfg)
    derive_levels(cfg)
    check_config(cfg, DETECTION.defaults())
    check_data_config(cfg)
    check_evaluation_batch_config(cfg)
    check_pixel_format_config(cfg)
    check_mapper_config(cfg)
    check_ranges(cfg, {"SEMI.BURN_IN": (0, inf), "SEMI.THRESHOLD": (0, 1), "SEMI.WEIGHT": (0, inf)})
    cfg.SOLVER.EMA.ENABLED |= bool(cfg.SEMI.UNLABELLED)
    if cfg.TEST.AUG.ENABLED and cfg.INPUT.CHANNELS not in (1, 3):
        raise UserError(
            f"TEST.AUG.ENABLED needs images of 1 or 3 channels, but INPUT.CHANNELS is {cfg.INPUT.CHANNELS}: set "
            "TEST.AUG.ENABLED False"
        )
    if cfg.TEST.TILES:
        Tiling.of(str(cfg.TEST.TILES), cfg.TEST.TILE_OVERLAP, TrainingSizes(MIN_TILE, MIN_TILE, 0))  # checks the values
    expected = cfg.TEST.EXPECTED_RESULTS
    kinds = (str, str, int | float, int | float)
    for entry in expected:
        if not (isinstance(entry, list | tuple) and len(entry) == 4 and all(map(isinstance, entry, kinds))):
            raise UserError(
                f"TEST.EXPECTED_RESULTS: {entry} is not [task, metric, value, tolerance], such as "
                "['bbox', 'AP', 38.5, 0.2]"
            )
    if expected and len(cfg.DATASETS.TEST) != 1:
        raise UserError("TEST.EXPECTED_RESULTS needs one data set in DATASETS.TEST, whose results it describes")


DETECTION = Task(
    "detection",
    get_cfg,
    add_relvit_config,
    finish_config,
    WITHOUT_EFFECT
    | {
        "MODEL.KEYPOINT_ON": "nothing, keypoints are not supported",
        "MODEL.LOAD_PROPOSALS": "nothing, the detector has an RPN",
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": "nothing, the number of images per class is not known",
    },
    EPOCH_KEYS,
)
