"""Config keys of the pretext tasks and their views."""

from typing import Any

from relvit_d2.utils.config_keys import add_groups


def add_pretext_config(cfg: Any) -> None:
    """Add the keys of :meth:`relvit_d2.pretext.task.PretextTask.from_keys` to a CfgNode, in place."""
    add_groups(cfg, "PRETEXT.WEIGHTS")
    cfg.PRETEXT.WEIGHTS.RELATION = 1.0  # one of nine relative directions of a pair; a task of weight 0 is not built
    cfg.PRETEXT.WEIGHTS.POSITION = 1.0  # grid cell of a patch
    cfg.PRETEXT.WEIGHTS.DISTANCE = 0.0  # distance of a pair
    cfg.PRETEXT.WEIGHTS.ANGLE = 0.0  # the authors' angle, which does not determine the direction
    cfg.PRETEXT.WEIGHTS.BEARING = 0.0  # the direction as an angle
    cfg.PRETEXT.LABEL_SMOOTHING = 0.0  # of every cross entropy, 0..1
    cfg.PRETEXT.PAIR_DROPOUT = 0.0  # fraction of the pairs that a training loss omits, 0..1
    cfg.PRETEXT.POOL = 1  # 2: average-pool the tokens of the heads, 3 x 3 with stride 2, as the authors do for T2T


def add_joint_config(cfg: Any) -> None:
    """Add the keys of joint training to a CfgNode, in place."""
    add_pretext_config(cfg)
    add_groups(cfg, "MODEL.RELVIT")
    cfg.MODEL.RELVIT.JOINT = False  # add the pretext losses of PRETEXT.WEIGHTS to the training loss


def add_views_config(cfg: Any) -> None:
    """Add the keys of the views of pre-training to a CfgNode, in place."""
    add_groups(cfg, "PRETEXT.MEGA")
    cfg.PRETEXT.IMAGE_SIZE = 224  # side of the square views in pixels
    # resized: random resized crop; pad: resize, pad, random crop
    cfg.PRETEXT.CROP = "resized"
    cfg.PRETEXT.CROP_SCALE = [0.08, 1.0]  # resized: range of the crop's fraction of the image area
    cfg.PRETEXT.PAD = 4  # pad: pixels added on each side
    cfg.PRETEXT.PAD_MODE = "constant"  # pad: constant (black pixels) or reflect (mirrored at the edges)
    cfg.PRETEXT.FLIP = 0.5  # probability of a horizontal flip
    cfg.PRETEXT.PATCH_CROP = 1.15  # each patch is cropped by this factor and resized back; 1.0: off
    cfg.PRETEXT.JITTER = [0.4, 0.4, 0.4, 0.1]  # ranges of brightness, contrast, saturation and hue, for each patch
    cfg.PRETEXT.JITTER_PROB = 0.8  # probability that a patch's colours are jittered
    cfg.PRETEXT.GRAY_PROB = 0.2  # probability that a patch is converted to gray
    cfg.PRETEXT.NOISE_PROB = 0.0  # probability that normal noise is added to a patch
    cfg.PRETEXT.NOISE_STD = 0.1  # standard deviation of the noise, pixel values in 0..1
    cfg.PRETEXT.KEEP = 1.0  # fraction of the tokens of a training view that enter the encoder's blocks, above 0 to 1
    # permute the patches: always, never or auto (if the encoder has position information)
    cfg.PRETEXT.PERMUTE = "auto"
    cfg.PRETEXT.MEGA.M = 0  # mega-patches: number of pieces along each axis, cut at random lines; 0: none
    cfg.PRETEXT.MEGA.UNIT = 0  # cuts lie on multiples of this many pixels; 0: of MODEL.ENCODER.PATCH_SIZE
    cfg.PRETEXT.MEGA.KEEP_SIZE = False  # True: the view keeps IMAGE_SIZE; False: every piece becomes one patch
    cfg.PRETEXT.MEGA.SHARED_CUTS = False  # use the row cuts for the columns too, as the authors' code does
