"""Every key that this project adds to Detectron2's, with its default."""

import torch
from detectron2.config import CfgNode

_C = CfgNode()

# The encoder, the same keys for pre-training and for the detector.
_C.MODEL = CfgNode()
_C.MODEL.ENCODER = CfgNode()
_C.MODEL.ENCODER.NAME = "vit_small"  # a name in relvit_d2.encoders.ENCODERS, or timm:NAME
_C.MODEL.ENCODER.PATCH_SIZE = 16  # side of a patch in pixels; 4 in a Swin
_C.MODEL.ENCODER.IMG_SIZE = 224  # side of the image whose grid the position embedding is stored for
_C.MODEL.ENCODER.POS_EMBED = True  # off in the method's pre-training: positions are what it predicts
_C.MODEL.ENCODER.DROP_PATH = 0.0  # stochastic depth of the last block, 0..1
_C.MODEL.ENCODER.DROPOUT = 0.0  # 0..1
_C.MODEL.ENCODER.WINDOW = 0  # ViT: patches a side of the windows that attention is kept in; 0: global everywhere
_C.MODEL.ENCODER.GLOBAL_BLOCKS = 4  # with WINDOW: blocks whose attention stays global, evenly spaced up to the last
_C.MODEL.PYRAMID = CfgNode()
# simple: from the encoder's last map; fpn: over its maps of several strides; multitap: an FPN over several of its
# blocks; auto: fpn if it has maps of several strides, else simple
_C.MODEL.PYRAMID.NAME = "auto"
_C.MODEL.PYRAMID.STRIDES = [4, 8, 16, 32]  # pixels per cell of each level, powers of two
_C.MODEL.PYRAMID.TOP_BLOCK = True  # one more level, the last one at every second cell (p6)
_C.MODEL.PYRAMID.OUT_CHANNELS = 256  # of every level
_C.MODEL.PYRAMID.NORM = "LN"  # LN, GN, FrozenBN, or "" for none

_C.MODEL.CHECKPOINT = False  # recompute the encoder's blocks in the backward pass to save memory
_C.MODEL.COMPILE = False  # make the encoder's passes with torch.compile, which needs a C++ compiler on a CPU
_C.MODEL.ALLOW_PICKLE = False  # read weights that are pickles, such as *.pkl: reading one can run any code in it

_C.MODEL.CLASSIFIER = CfgNode()
# cls: the classifier reads the class token; if the encoder has none, it reads the mean of the patch tokens, like the
# authors' code. mean: it always reads the mean of the patch tokens. Pre-training does not train the class token.
_C.MODEL.CLASSIFIER.POOL = "cls"

# Pretext losses beside the detector's.
_C.MODEL.RELVIT = CfgNode()
_C.MODEL.RELVIT.JOINT = False  # train on both at once; PRETEXT.WEIGHTS says which and how much
_C.MODEL.RELVIT.GRID = [7, 7]  # rows and columns that positions are told in, laid over images of any size

# The pretext tasks.
_C.PRETEXT = CfgNode()
_C.PRETEXT.WEIGHTS = CfgNode()  # a task of weight 0 is not built
_C.PRETEXT.WEIGHTS.RELATION = 1.0  # in which of nine directions each other patch lies
_C.PRETEXT.WEIGHTS.POSITION = 1.0  # which cell of the grid a patch comes from
_C.PRETEXT.WEIGHTS.DISTANCE = 0.0  # how far each other patch is
_C.PRETEXT.WEIGHTS.ANGLE = 0.0  # the authors' angle, which tells no direction
_C.PRETEXT.WEIGHTS.BEARING = 0.0  # the direction
_C.PRETEXT.LABEL_SMOOTHING = 0.0  # 0..1, of every cross entropy
_C.PRETEXT.PAIR_DROPOUT = 0.0  # 0..1, share of the pairs of patches that a training loss leaves out
_C.PRETEXT.IMAGE_SIZE = 224  # side of the square views in pixels
_C.PRETEXT.POOL = 1  # 2: the heads read every second token of the average over 3 x 3, as the authors' do of T2T
# resized: a random part of the image, resized; pad: the image resized, padded, and a random window of that
_C.PRETEXT.CROP = "resized"
_C.PRETEXT.CROP_SCALE = [0.08, 1.0]  # resized: share of the image's area in a crop
_C.PRETEXT.PAD = 4  # pad: pixels added on each side
_C.PRETEXT.PAD_MODE = "constant"  # pad: constant, black pixels; reflect, the image mirrored at its edges
_C.PRETEXT.FLIP = 0.5  # probability of a horizontal flip
_C.PRETEXT.PATCH_CROP = 1.15  # a patch is cropped by this factor and resized back; 1.0 turns it off
_C.PRETEXT.JITTER = [0.4, 0.4, 0.4, 0.1]  # brightness, contrast, saturation, hue, drawn for every patch
_C.PRETEXT.JITTER_PROB = 0.8  # share of patches whose colours are changed
_C.PRETEXT.GRAY_PROB = 0.2  # share of patches turned gray
_C.PRETEXT.NOISE_PROB = 0.0  # share of patches with normal noise
_C.PRETEXT.NOISE_STD = 0.1  # of the noise, in pixel values of 0..1
_C.PRETEXT.PERMUTE = "auto"  # shuffle the patches: auto, always or never; auto: if the encoder carries positions
_C.PRETEXT.MEGA = CfgNode()  # mega-patches: the view is cut at random lines, each piece resized to one size
_C.PRETEXT.MEGA.M = 0  # pieces along each axis; 0: none
_C.PRETEXT.MEGA.UNIT = 0  # cuts lie on multiples of this many pixels; 0: of the patch
_C.PRETEXT.MEGA.KEEP_SIZE = False  # the view keeps IMAGE_SIZE; else every piece becomes one patch
_C.PRETEXT.MEGA.SHARED_CUTS = False  # cut columns where the rows are, as the authors' code does
_C.PRETEXT.KNN = ""  # a folder with a folder of images for each class: k-NN accuracy of the features is told too

# Data.
_C.DATASETS = CfgNode()
# Data sets of your own: NAME: {ROOT: folder}, and where wanted FORMAT (coco, voc or yolo; else told by looking), SPLIT
# (train, val, test, all), CLASSES (in the order of their ids), for COCO JSON and IMAGES in ROOT; see docs/own_data.md
_C.DATASETS.CUSTOM = CfgNode(new_allowed=True)
_C.DATASETS.SKIP_MISSING = False  # leave out images that are listed but absent, instead of refusing to start
_C.DATASETS.TRAIN_DIFFICULT = True  # train on VOC's difficult objects, as Detectron2 does
_C.DATASETS.IGNORE_DIFFICULT = True  # neither hits nor misses in evaluation, as VOC does
_C.DATASETS.DOWNLOAD = False  # fetch a classification set that is missing, where torchvision can
# classification: share of the training images, or a set, that decides the best model; "": none
_C.DATASETS.VALIDATION = "10%"
_C.DATASETS.SYNSETS = ""  # a text file with the folders of ImageNet that are ImageNet-100, one a line; "": those of CMC
_C.INPUT = CfgNode()
_C.INPUT.CHANNELS = 3  # of every image: 3 for RGB, 1 for gray; PIXEL_MEAN and PIXEL_STD have as many values
_C.INPUT.WHITE = 0  # the value of more than eight bits that becomes 255; 0: 65535, the brightest of 16 bits
_C.INPUT.VIEW = CfgNode()  # of classification
_C.INPUT.VIEW.SIZE = 32  # side in pixels of what the encoder sees
# training: pad, a window of images of SIZE pixels with a black rim; resized, any crop resized
_C.INPUT.VIEW.CROP = "pad"
_C.INPUT.VIEW.PAD = 4  # pixels of the rim
_C.INPUT.VIEW.SCALE = [0.08, 1.0]  # share of the image's area in a resized crop
_C.INPUT.VIEW.FLIP = 0.5  # probability of a horizontal flip
_C.INPUT.VIEW.CENTRE = 0.0  # evaluation: side of the centred square seen, of the shorter side; 0: all, squeezed to SIZE
_C.INPUT.VIEW.RANDAUGMENT = 0  # operations of torchvision's RandAugment on a training image; 0: off
_C.INPUT.VIEW.MAGNITUDE = 9  # of RandAugment, 0..30
_C.INPUT.VIEW.MIXUP = 0.0  # alpha of timm's mixup; 0: off
_C.INPUT.VIEW.CUTMIX = 0.0  # alpha of timm's cutmix; 0: off
_C.INPUT.LSJ = CfgNode()  # large-scale jitter, in place of MIN_SIZE_TRAIN
_C.INPUT.LSJ.SIZE = 0  # pixels of the square crops; 0: off
_C.INPUT.LSJ.SCALE = [0.1, 2.0]  # images are resized to fit the crop times a factor of this range
_C.INPUT.LOAD_SIZE = 512  # pre-training: larger images are reduced to this longer side (pixels) when read; 0: never

# Solver.
_C.SOLVER = CfgNode()
# The batch that BASE_LR is meant for: rates are scaled by IMS_PER_BATCH over it; 0: never
_C.SOLVER.REFERENCE_BATCH = 0
_C.SOLVER.ACCUMULATE = 1  # parts that every batch is computed in, one after the other, to save memory
_C.SOLVER.LAYER_DECAY = 1.0  # a block learns at this times the rate of the next one, 0..1; for fine-tuning
_C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0  # numbered checkpoints that stay, the newest; 0: all
_C.SOLVER.EMA = 0.0  # classification: decay of the mean of the weights that is evaluated and kept, 0..1; 0: none
_C.SOLVER.PRECISION = "auto"  # auto, float32 or bfloat16; auto: bfloat16 where the device multiplies it natively

# Test.
_C.TEST = CfgNode()
_C.TEST.BATCH_SIZE = 1  # images a batch in evaluation, per process
_C.TEST.BEST_METRIC = ""  # such as "bbox/AP": its best value, or least if it is a loss, decides model_best.pth
_C.TEST.PATIENCE = 0  # evaluations in a row without a better BEST_METRIC that end the run; 0: none do

_C.TEST.BEST_ON_TEST = False  # choose the best classifier on DATASETS.TEST itself, and call its figure so

# Detectron2's own keys whose defaults differ here.
_CHANGED = {
    "SEED": 0,  # of every draw; a run is a function of its config and data
    "INPUT.FORMAT": "RGB",  # order of the channels; Detectron2 has BGR
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],  # ImageNet's, RGB
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],  # ImageNet's, RGB
    "MODEL.BACKBONE.NAME": "build_encoder_pyramid_backbone",  # MODEL.ENCODER under MODEL.PYRAMID
    "MODEL.BACKBONE.FREEZE_AT": 0,  # 1: the patch embedding is not trained; 2: nor the first block, and so on
    "MODEL.WEIGHTS": "",  # encoder.safetensors, model_*.pth or timm:NAME; empty: from scratch
    "MODEL.ROI_HEADS.NUM_CLASSES": 0,  # 0: as many as the data set has
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",  # after a linear warm-up of WARMUP_ITERS
    "SOLVER.WEIGHT_DECAY": 0.1,  # AdamW's
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,  # of the norms' parameters
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,  # of the biases
    "SOLVER.BASE_LR": 5e-4,  # of AdamW, at REFERENCE_BATCH
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,  # by CLIP_VALUE
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",  # the global norm
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,  # the largest norm
}


# Detectron2's keys that mean nothing to this trainer, and what to set instead.
WITHOUT_EFFECT = {
    "SOLVER.AMP.ENABLED": "SOLVER.PRECISION",
    "SOLVER.MOMENTUM": "nothing, the optimiser is AdamW",
    "SOLVER.NESTEROV": "nothing, the optimiser is AdamW",
    "SOLVER.BIAS_LR_FACTOR": "SOLVER.BASE_LR",
    "SOLVER.WARMUP_FACTOR": "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_METHOD": "SOLVER.WARMUP_ITERS",
    "SOLVER.REFERENCE_WORLD_SIZE": "SOLVER.IMS_PER_BATCH, which counts all processes together",
    "TEST.AUG.ENABLED": "INPUT.MIN_SIZE_TEST",
    "TEST.PRECISE_BN.ENABLED": "nothing, batch norms do not occur",
    "TEST.EXPECTED_RESULTS": "nothing, inference/results.json holds the figures",
    "MODEL.KEYPOINT_ON": "nothing, keypoints are not supported",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": "nothing, it needs counts of images by class, which are not known",
    "MODEL.LOAD_PROPOSALS": "nothing, the detector proposes",
    "DATALOADER.SAMPLER_TRAIN": "nothing, the order is a function of SEED",
    "DATALOADER.REPEAT_THRESHOLD": "nothing, the order is a function of SEED",
    "VIS_PERIOD": "nothing, report.html in OUTPUT_DIR shows the images",
}


# Keys that not every script reads, by how they begin.
READ_BY_SOME = {
    "pretrain_ssl.py": (
        "PRETEXT.IMAGE_SIZE",
        "PRETEXT.CROP",
        "PRETEXT.PAD",
        "PRETEXT.FLIP",
        "PRETEXT.PATCH_CROP",
        "PRETEXT.JITTER",
        "PRETEXT.GRAY_PROB",
        "PRETEXT.NOISE_",
        "PRETEXT.PERMUTE",
        "PRETEXT.MEGA.",
        "PRETEXT.KNN",
        "INPUT.CHANNELS",
        "INPUT.WHITE",
        "INPUT.LOAD_SIZE",
        "DATASETS.CUSTOM",
        "DATASETS.SKIP_MISSING",
        "DATASETS.DOWNLOAD",
        "DATASETS.SYNSETS",
    ),
    "train_cls.py": (
        "MODEL.CLASSIFIER.",
        "MODEL.RELVIT.JOINT",
        "DATASETS.DOWNLOAD",
        "DATASETS.SYNSETS",
        "DATASETS.VALIDATION",
        "INPUT.LOAD_SIZE",
        "INPUT.VIEW.",
        "SOLVER.EMA",
        "TEST.BATCH_SIZE",
        "TEST.BEST_ON_TEST",
    ),
    "train_net.py": (
        "MODEL.META_ARCHITECTURE",
        "MODEL.RELVIT.",
        "MODEL.MASK_ON",
        "MODEL.BACKBONE.",
        "MODEL.PYRAMID.",
        "MODEL.ANCHOR_GENERATOR.",
        "MODEL.PROPOSAL_GENERATOR.",
        "MODEL.RPN.",
        "MODEL.ROI_",
        "INPUT.MIN_SIZE_",
        "INPUT.MAX_SIZE_",
        "INPUT.RANDOM_FLIP",
        "INPUT.CROP.",
        "INPUT.LSJ.",
        "INPUT.CHANNELS",
        "INPUT.WHITE",
        "INPUT.FORMAT",
        "INPUT.MASK_FORMAT",
        "DATASETS.CUSTOM",
        "DATASETS.SKIP_MISSING",
        "DATASETS.TRAIN_DIFFICULT",
        "DATASETS.IGNORE_DIFFICULT",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        "TEST.BATCH_SIZE",
        "TEST.DETECTIONS_PER_IMAGE",
    ),
}

# Keys that a resumed run may change, by how they begin: they do not decide what is learnt.
FREE_ON_RESUME = (
    "VERSION",
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.ALLOW_PICKLE",
    "MODEL.CHECKPOINT",
    "MODEL.COMPILE",
    "MODEL.WEIGHTS",  # read at the start only
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.DOWNLOAD",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_",
)


def add_relvit_config(cfg: CfgNode) -> None:
    """Add this project's keys to a config of ``detectron2.config.get_cfg()``, in place."""

    def merge(ours: CfgNode, theirs: CfgNode) -> None:
        for key, value in ours.items():
            if isinstance(value, CfgNode) and key in theirs:
                merge(value, theirs[key])
            else:
                theirs[key] = value

    merge(_C.clone(), cfg)
    cfg.merge_from_list([item for pair in _CHANGED.items() for item in pair])
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
