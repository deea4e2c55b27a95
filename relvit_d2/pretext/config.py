"""Config keys of the pretext tasks and their views."""

from typing import Any

from relvit_d2.utils.config_keys import add_groups


def add_pretext_config(cfg: Any) -> None:
    """Add what :meth:`relvit_d2.pretext.task.PretextTask.from_keys` reads to a CfgNode, in place."""
    add_groups(cfg, "PRETEXT.WEIGHTS")
    cfg.PRETEXT.WEIGHTS.RELATION = 1.0  # direction of each other patch, one of nine; a task of weight 0 is not built
    cfg.PRETEXT.WEIGHTS.POSITION = 1.0  # cell of the grid that a patch comes from
    cfg.PRETEXT.WEIGHTS.DISTANCE = 0.0  # distance of each other patch
    cfg.PRETEXT.WEIGHTS.ANGLE = 0.0  # the authors' angle, which does not determine the direction
    cfg.PRETEXT.WEIGHTS.BEARING = 0.0  # the direction as an angle
    cfg.PRETEXT.LABEL_SMOOTHING = 0.0  # 0..1, of every cross entropy
    cfg.PRETEXT.PAIR_DROPOUT = 0.0  # 0..1, share of the pairs of patches that a training loss leaves out
    cfg.PRETEXT.POOL = 1  # 2: the heads read every second token of the average over 3 x 3, as the authors' do of T2T


def add_joint_config(cfg: Any) -> None:
    """Add the keys of joint training to a CfgNode, in place: those of the tasks, and whether it is on."""
    add_pretext_config(cfg)
    add_groups(cfg, "MODEL.RELVIT")
    cfg.MODEL.RELVIT.JOINT = False  # add the pretext losses of PRETEXT.WEIGHTS to the training loss


def add_views_config(cfg: Any) -> None:
    """Add what the random views of pre-training are built from to a CfgNode, in place."""
    add_groups(cfg, "PRETEXT.MEGA")
    cfg.PRETEXT.IMAGE_SIZE = 224  # side of the square views in pixels
    # resized: a random part of the image, resized; pad: the image resized, padded, and a random window of that
    cfg.PRETEXT.CROP = "resized"
    cfg.PRETEXT.CROP_SCALE = [0.08, 1.0]  # resized: share of the image's area in a crop
    cfg.PRETEXT.PAD = 4  # pad: pixels added on each side
    cfg.PRETEXT.PAD_MODE = "constant"  # pad: constant, black pixels; reflect, the image mirrored at its edges
    cfg.PRETEXT.FLIP = 0.5  # probability of a horizontal flip
    cfg.PRETEXT.PATCH_CROP = 1.15  # a patch is cropped by this factor and resized back; 1.0 turns it off
    cfg.PRETEXT.JITTER = [0.4, 0.4, 0.4, 0.1]  # brightness, contrast, saturation, hue, drawn for every patch
    cfg.PRETEXT.JITTER_PROB = 0.8  # share of patches whose colours are changed
    cfg.PRETEXT.GRAY_PROB = 0.2  # share of patches turned gray
    cfg.PRETEXT.NOISE_PROB = 0.0  # share of patches with normal noise
    cfg.PRETEXT.NOISE_STD = 0.1  # of the noise, in pixel values of 0..1
    # shuffle the patches: always, never, or auto: if the encoder has position information
    cfg.PRETEXT.PERMUTE = "auto"
    cfg.PRETEXT.MEGA.M = 0  # mega-patches: pieces along each axis, cut at random lines, resized to one size; 0: none
    cfg.PRETEXT.MEGA.UNIT = 0  # cuts lie on multiples of this many pixels; 0: of the patch
    cfg.PRETEXT.MEGA.KEEP_SIZE = False  # the view keeps IMAGE_SIZE; else every piece becomes one patch
    cfg.PRETEXT.MEGA.SHARED_CUTS = False  # cut columns where the rows are, as the authors' code does
