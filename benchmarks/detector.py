"""Training speed and memory of Mask R-CNN with each encoder, compared with Detectron2's backbones.

``vit_small_P`` (attention in windows of 14 patches) and ``vit_small_global_P`` (the default: global attention) are
compared with Detectron2's ViT-S as in ViTDet (windows of 14, global blocks 2, 5, 8 and 11) on its SimpleFeaturePyramid;
``swin_tiny_P`` with Detectron2's Swin-T on its FPN. Detectron2 has no T2T-ViT, so ``t2t_vit_14_P`` is compared with its
ViT-S too. P is fp32, and bf16 if the hardware supports it natively. The images have 512 x 512 pixels; on a GPU, the
rows ``..._1024`` follow with a quarter of the batch.

``batch_of_one_size`` and ``batch_of_mixed_sizes`` compare our detector with the default ViT-S, which runs the backbone
once per image size, with the same detector that runs it once on the padded batch, in float32. ``crowded_images``
compares a detector of ViT-Nano/8 at 320 x 320 with the same one that matches anchors by Detectron2's function.

The ratio is the speed-up of a forward and backward pass. ``memory_ratio`` is our peak memory over theirs, without
model, gradients and images. Both sides have the same heads, batch size and precision, and the images have enough
objects that every pass trains on the same number of regions. Detectron2's ViT has no relative positions, which would
slow it down.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.harness import Row, arguments, in_turn, peak_bytes, print_rows
from relvit_d2.config.config_file import override_words
from relvit_d2.detection.model import build_detector
from relvit_d2.engine.precision import choose_precision
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

SIDE = 512  # pixels
WINDOW, GLOBAL_BLOCKS = 14, (2, 5, 8, 11)  # detectron2/model_zoo/configs/common/models/mask_rcnn_vitdet.py
OBJECTS = 64  # per image, enough for the positive regions, 0.25 of 64
BATCHES = {"cpu": 2, "cuda": 8}
VIT: dict[str, object] = {"NAME": "vit_small", "PATCH_SIZE": 16, "IMG_SIZE": SIDE, "DROP_PATH": 0.0}
# name: (keys of MODEL.ENCODER, builder of Detectron2's backbone)
PAIRS = {
    "vit_small": (VIT | {"WINDOW": WINDOW, "GLOBAL_BLOCKS": len(GLOBAL_BLOCKS)}, "build_vitdet"),
    "vit_small_global": (VIT, "build_vitdet"),
    "swin_tiny": (VIT | {"NAME": "swin_tiny", "PATCH_SIZE": 4}, "build_swin_fpn"),
    "t2t_vit_14": (VIT | {"NAME": "t2t_vit_14"}, "build_vitdet"),
}
CROWDED = {
    "MODEL.ENCODER.IMG_SIZE": 320,
    "MODEL.PYRAMID.STRIDES": [4, 8, 16],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 12], [16, 24], [32, 48]],
}


def padded_batch(model: Any) -> None:
    """Run the backbone of a detector once on the padded batch."""
    model.features = lambda images: model.backbone(images.tensor)
    model.proposal_generator.forward = partial(RPN.forward, model.proposal_generator)


def dense_matching(model: Any) -> None:
    """Match anchors by Detectron2's function."""
    model.proposal_generator.label_and_sample_anchors = partial(RPN.label_and_sample_anchors, model.proposal_generator)


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "detector")
    precisions = {"fp32": "float32"}
    if choose_precision("auto", torch.device(args.device)).dtype == torch.bfloat16:
        precisions["bf16"] = "bfloat16"
    sides = (SIDE,) if args.device == "cpu" else (SIDE, 2 * SIDE)
    settings = itertools.product(sides, precisions.items(), PAIRS)
    backbones = (measure(name, *precision, side, args) for side, precision, name in settings)
    images, cfg = 1 if args.device == "cpu" else 4, config(VIT, None, args)
    crowded = override_words(CROWDED | {"MODEL.DEVICE": args.device, "MODEL.ROI_HEADS.NUM_CLASSES": 20})
    changes = (
        changed("batch_of_one_size", cfg, [(384, 512)] * 2 * images, padded_batch, args),
        changed("batch_of_mixed_sizes", cfg, [(384, 512), (512, 384)] * images, padded_batch, args),
        changed("crowded_images", load_config("configs/custom.yaml", crowded), [(320, 320)] * 8, dense_matching, args),
    )
    print_rows(itertools.chain(backbones, changes), args)


def measure(name: str, short: str, precision: str, side: int, args: argparse.Namespace) -> Row:
    """Measure an encoder in a precision on square images."""
    batch = 1 if args.quick and args.device == "cpu" else BATCHES[args.device] * SIDE**2 // side**2
    keys, backbone = PAIRS[name]
    sizes = [(side, side)] * batch
    ours = training_pass(config(keys, None, args), precision, sizes)
    theirs = training_pass(config(VIT, backbone, args), precision, sizes)
    pair = in_turn(ours, theirs, args.device, budget=10 if args.quick else 60)
    mine, others = (peak_bytes(run, args.device) for run in (ours, theirs))
    return {
        "name": f"{name}_{short}" + (f"_{side}" if side != SIDE else ""),
        "ratio": pair.ratio,
        "memory_ratio": mine / others,
        "batch": batch,
        "ours_images_per_s": batch / pair.ours,
        "theirs_images_per_s": batch / pair.theirs,
        "ours_MiB": mine / 2**20,
        "theirs_MiB": others / 2**20,
    }


def changed(
    name: str, cfg: CfgNode, sizes: list[tuple[int, int]], change: Callable[[Any], None], args: argparse.Namespace
) -> Row:
    """Compare a detector with the same one after ``change`` was applied to it, in float32."""
    ours, theirs = training_pass(cfg, "float32", sizes), training_pass(cfg, "float32", sizes, change)
    pair = in_turn(ours, theirs, args.device, budget=20 if args.quick else 60)
    return {
        "name": name,
        "ratio": pair.ratio,
        "batch": len(sizes),
        "ours_images_per_s": len(sizes) / pair.ours,
        "theirs_images_per_s": len(sizes) / pair.theirs,
    }


def config(encoder: dict[str, object], backbone: str | None, args: argparse.Namespace) -> CfgNode:
    """Return the config of a detector with one of our encoders, or with one of Detectron2's backbones.

    On a CPU both sides have smaller ROI heads, which would otherwise take nearly all of the time.
    """
    values: dict[str, Any] = {f"MODEL.ENCODER.{key}": value for key, value in encoder.items()}
    values |= {"MODEL.DEVICE": args.device, "MODEL.ROI_HEADS.NUM_CLASSES": 20}
    if backbone:
        levels = [f"p{level}" for level in range(2, 7)]
        values |= {"MODEL.BACKBONE.NAME": backbone, "MODEL.RPN.IN_FEATURES": levels}
        values |= {"MODEL.ROI_HEADS.IN_FEATURES": levels[:-1]}
    if args.device == "cpu":
        values |= {
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 512,
        }
    return load_config("configs/base/detection.yaml", [str(part) for pair in values.items() for part in pair])


def training_pass(
    cfg: CfgNode, precision: str, sizes: list[tuple[int, int]], change: Callable[[Any], None] | None = None
) -> Callable[[], None]:
    """Return a function that runs forward and backward on images of ``sizes``, after ``change``."""
    seed_everything(0, "model")
    model = build_detector(cfg).train()
    if change:
        change(model)
    autocast = choose_precision(precision, torch.device(cfg.MODEL.DEVICE)).autocast
    inputs = [image_with_objects(seed, *size) for seed, size in enumerate(sizes)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        with EventStorage(), autocast():
            losses = model(inputs)
        torch.stack(list(losses.values())).sum().backward()

    return run


def image_with_objects(seed: int, height: int, width: int) -> dict[str, Any]:
    """Return an image of noise with ``OBJECTS`` boxes and masks, in the form of a mapper's output."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, min(height, width) - 128, (OBJECTS, 2), generator=generator)
    extent = torch.randint(32, 128, (OBJECTS, 2), generator=generator)
    boxes = torch.cat((corner, corner + extent), dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = True
    objects = Instances((height, width), gt_boxes=Boxes(boxes.float()), gt_masks=BitMasks(masks))
    objects.gt_classes = torch.randint(0, 20, (OBJECTS,), generator=generator)
    return {"image": torch.randint(0, 256, (3, height, width), generator=generator), "instances": objects}


@BACKBONE_REGISTRY.register()
def build_vitdet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ViT-S and pyramid (the model zoo's ``mask_rcnn_vitdet.py`` at the width of ViT-S)."""
    windowed = [block for block in range(12) if block not in GLOBAL_BLOCKS]
    net = ViT(
        img_size=SIDE,
        embed_dim=384,
        depth=12,
        num_heads=6,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=WINDOW,
        window_block_indexes=windowed,
    )
    channels = cfg.MODEL.PYRAMID.OUT_CHANNELS
    return SimpleFeaturePyramid(net, "last_feat", channels, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN")


@BACKBONE_REGISTRY.register()
def build_swin_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's Swin-T and FPN, with the norm of our pyramid."""
    net = SwinTransformer(drop_path_rate=0.0)
    return FPN(net, list(net.output_shape()), cfg.MODEL.PYRAMID.OUT_CHANNELS, "LN", LastLevelMaxPool())


if __name__ == "__main__":
    main()
