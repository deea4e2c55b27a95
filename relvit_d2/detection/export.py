"""Export of a detector to one ONNX file, whose detections are compared with the model's before it appears."""

import json
import warnings
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.export import Dim

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.detection.streets import draw_image
from relvit_d2.data.images.folder import list_images
from relvit_d2.detection.comparison import compare
from relvit_d2.detection.export_program import DetectorProgram
from relvit_d2.detection.onnx_detector import FORMAT, OnnxDetector
from relvit_d2.detection.predictor import Detector, load_detector
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing

OPSET = 18  # the first with an antialiased Resize
COMPARED = 8  # images
MAX_LEVELS, MAX_CHANGED = 2, 0.05  # differences of resizing: grey levels, fraction of the values
THRESHOLD = 0.05  # score from which detections are compared


def export(weights: str, config_file: str, opts: list[str], output: Path, folder: Path | None) -> str:
    """Export a detector and compare its detections with the model's on images of different sizes.

    Args:
        weights, config_file, opts: see :func:`relvit_d2.detection.predictor.load_detector`.
        output: the file to write.
        folder: images to compare the detections in; None: images of the data sets of the config, or drawn ones.

    Returns:
        The file and the largest differences, as text.

    Raises:
        UserError: the detector cannot be exported, its detections differ, or there are none.
    """
    overrides = [*opts, "MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32"]
    detector = load_detector(weights, config_file, overrides, THRESHOLD)
    images, source = compared_images(detector, folder)
    with appearing(output) as part:
        onnx.save(to_onnx(detector), part)
        resize = file_resizing(detector)
        resizing = compare_resizing(detector, resize, images)
        detector.network_input = resize
        limit = detector.cfg.TEST.DETECTIONS_PER_IMAGE
        differences = compare(detector, OnnxDetector(part, THRESHOLD), images, THRESHOLD, limit)
    sizes = ", ".join(f"{image.shape[1]} x {image.shape[0]}" for image in images)
    return (
        f"written: {output} ({output.stat().st_size / 2**20:.1f} MiB)\n"
        f"equal to the model in {len(images)} {source} ({sizes}): {differences}; {resizing}"
    )


def file_resizing(detector: Detector) -> Callable[[np.ndarray], Tensor]:
    """Return the resizing of the file as a function, to replace ``detector.network_input``."""
    model = onnx.parser.parse_model(preprocessing(detector.cfg, detector.model.backbone.size_divisibility))
    model.graph.output.append(onnx.helper.make_tensor_value_info("in_ordered", onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["in_ordered"], {"image": image})[0][0])


def compare_resizing(detector: Detector, resize: Callable[[np.ndarray], Tensor], images: list[np.ndarray]) -> str:
    """Compare the resized images of the file and of the detector; return the difference as text.

    They are not equal: another rounding changes single values by a grey level, and the detections by more than the
    allowed differences. The networks are therefore compared on equal pixels.

    Raises:
        UserError: the sizes or the grey levels differ.
    """
    changed, count = 0, 0
    for image in images:
        ours, theirs = resize(image), detector.network_input(image)
        if ours.shape != theirs.shape or (ours.int() - theirs.int()).abs().max() > MAX_LEVELS:
            raise UserError(
                f"the resizing of the exported file differs from the model's in an image of {image.shape[1]} x "
                f"{image.shape[0]} pixels: nothing was written; please report this"
            )
        changed += int((ours != theirs).sum())
        count += ours.numel()
    if changed > MAX_CHANGED * count:
        raise UserError(f"the resizing of the exported file changes {changed / count:.1%} of the values: please report")
    return f"resizing changes {changed / count:.2%} of the values, by at most {MAX_LEVELS} grey levels"


def compared_images(detector: Detector, folder: Path | None) -> tuple[list[np.ndarray], str]:
    """Return images of different sizes to compare detections in, ``(H, W, channels)`` uint8, and what they are."""
    files = list_images(folder) if folder else _images_of_sets(detector.cfg)
    if files:
        images = [detector.read(file) for file in files[:: -(-len(files) // COMPARED)]]
        source = f"images of '{folder or Path(files[0]).parent}'"
    else:
        drawn = [np.asarray(draw_image(0, index)[0].resize((320, 240))) for index in range(COMPARED)]
        images, source = [np.resize(image, (240, 320, detector.pixels.channels)) for image in drawn], "drawn images"
    chosen = list(islice(cycle(images), COMPARED))
    # Crops, so that all sizes and aspect ratios differ.
    return [
        image[: image.shape[0] * (12 - number % 3) // 12, : image.shape[1] * (24 - number) // 24]
        for number, image in enumerate(chosen)
    ], source


def _images_of_sets(cfg: CfgNode) -> list[Any]:
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            register_custom(cfg.DATASETS, labels=False)
            return list(catalog.get_images(name))
        except UserError:  # not on this machine
            continue
    return []


def to_onnx(detector: Detector) -> onnx.ModelProto:
    """Return the detector as an ONNX model with standard operators.

    Its input ``image`` is uint8 ``(height, width, channels)``, RGB. Its outputs are ``boxes`` ``(N, 4)`` XYXY in pixels
    of the image, ``scores`` ``(N,)`` in descending order, ``classes`` ``(N,)`` and, with a mask head, ``masks``
    ``(N, M, M)``, probabilities on a grid that covers the box.

    Raises:
        UserError: a part of the detector is of a class whose inference is not known.
    """
    cfg, model = detector.cfg, detector.model
    check_classes(detector)
    program = DetectorProgram(model.requires_grad_(False)).eval()
    unit, side = model.backbone.size_divisibility, min_side(model.backbone)
    rows, cols = (Dim(name, min=side // unit) for name in ("rows", "cols"))
    height, width = side + 8 * unit, side + 14 * unit  # several windows of attention, else torch.export assumes one
    size = torch.tensor([height, width], dtype=torch.float32)
    # A tensor that is passed twice would be one input.
    example = (torch.zeros(1, detector.pixels.channels, height, width), size, size.clone())
    names = ["boxes", "scores", "classes", *(["masks"] if model.roi_heads.mask_on else [])]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions within torch and torchvision
        exported = torch.onnx.export(
            torch.export.export(program, example, dynamic_shapes=({2: unit * rows, 3: unit * cols}, None, None)),
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixels", "size", "original"],
            output_names=names,
        )
    assert exported is not None
    network = exported.model_proto
    for item in (*network.graph.node, *network.graph.value_info, *network.graph.input, *network.graph.output):
        del item.metadata_props[:]  # stack traces
    before = onnx.parser.parse_model(preprocessing(cfg, unit))
    before.ir_version = network.ir_version
    inputs = [(name, name) for name in ("pixels", "size", "original")]
    merged = onnx.compose.merge_models(before, network, inputs)
    del merged.opset_import[1:]  # of each part
    onnx.helper.set_model_props(merged, {"format": FORMAT} | {n: json.dumps(v) for n, v in metadata(detector).items()})
    return merged


def min_side(backbone: Any) -> int:
    """Return the minimum side in pixels of a padded image: with attention in windows, more than a window."""
    unit, encoder = backbone.size_divisibility, backbone.encoder
    window = encoder.arguments.get("window", 0) * encoder.strides[encoder.last]
    return int(max(window // unit + 1, 2) * unit)


def check_classes(detector: Detector) -> None:
    """Raise a :class:`UserError` for heads whose inference :class:`DetectorProgram` does not reproduce."""
    keys = detector.cfg.MODEL
    if keys.PYRAMID.SIZE_DIVISIBILITY:
        raise UserError(
            "a detector that pads images to squares cannot be exported: add MODEL.PYRAMID.SIZE_DIVISIBILITY 0, with "
            "which detections differ slightly"
        )
    known = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "BACKBONE.NAME": "build_encoder_pyramid_backbone",
        "PROPOSAL_GENERATOR.NAME": "RPN",
        "ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
        "ROI_HEADS.NAME": "StandardROIHeads",
        "ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
        "ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    }
    for key, names in known.items():
        group, _, name = key.rpartition(".")
        value = keys[group][name] if group else keys[name]
        if value not in (names if isinstance(names, tuple) else (names,)):
            raise UserError(f"MODEL.{key} '{value}' cannot be exported, only {names}: train with that")


def metadata(detector: Detector) -> dict[str, Any]:
    """Return what a program that runs the file may need to know, JSON values."""
    cfg, model = detector.cfg, detector.model
    heads = model.roi_heads
    return {
        "class_names": detector.class_names,
        "channels": detector.pixels.channels,
        "max_value": cfg.INPUT.MAX_VALUE,
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "min_side": min_side(model.backbone) - model.backbone.size_divisibility + 1,
        "network_format": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "score_threshold": heads.box_predictor.test_score_thresh,
        "nms_threshold": heads.box_predictor.test_nms_thresh,
        "detections_per_image": heads.box_predictor.test_topk_per_image,
        "mask_size": 2 * cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION if heads.mask_on else 0,
        "encoder": model.backbone.encoder.name,
        "training": detector.training and detector.training._asdict(),
    }


def preprocessing(cfg: CfgNode, unit: int) -> str:
    """Return the text of an ONNX model from an image to the inputs of :class:`DetectorProgram`.

    The size is that of Detectron2's ``ResizeShortestEdge``. A smaller height is resampled before the width, as in
    :class:`relvit_d2.data.detection.mapper.DetectionMapper`; the other order rounds to other grey levels. Single pixels
    differ by one grey level from torch's.
    """
    channels, shortest, longest = cfg.INPUT.CHANNELS, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    mean, std = (", ".join(map(repr, map(float, values))) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    order = "2, 1, 0" if cfg.INPUT.FORMAT == "BGR" and channels == 3 else ", ".join(map(str, range(channels)))
    resize = f"""
        in_exact = Cast <to = 11> (in_sides)
        in_shortest = ReduceMin (in_exact)
        in_longest = ReduceMax (in_exact)
        in_short = Constant <value = double {{{float(shortest)}}}> ()
        in_long = Constant <value = double {{{float(longest)}}}> ()
        in_one = Constant <value = double {{1.0}}> ()
        in_half = Constant <value = double {{0.5}}> ()
        in_enlarged = Div (in_short, in_shortest)
        in_enlarged_longest = Mul (in_longest, in_enlarged)
        in_excess = Div (in_long, in_enlarged_longest)
        in_limit = Min (in_excess, in_one)
        in_enlarged_sides = Mul (in_exact, in_enlarged)
        in_limited_sides = Mul (in_enlarged_sides, in_limit)
        in_above = Add (in_limited_sides, in_half)
        in_floor = Floor (in_above)
        in_positive = Max (in_floor, in_one)
        in_new = Cast <to = 7> (in_positive)
        in_outer = Constant <value_ints = [1, {channels}]> ()
        in_lowered = Min (in_new, in_sides)
        in_height, in_narrowed = Split <num_outputs = 2> (in_lowered)
        in_old_height, in_width = Split <num_outputs = 2> (in_sides)
        in_first = Concat <axis = 0> (in_outer, in_height, in_width)
        in_low = Resize <mode = "linear", antialias = 1, exclude_outside = 1> (in_batch, , , in_first)
        in_second = Concat <axis = 0> (in_outer, in_new)
        in_resized = Resize <mode = "linear", antialias = 1, exclude_outside = 1> (in_low, , , in_second)"""
    keep = """
        in_new = Identity (in_sides)
        in_resized = Identity (in_batch)"""
    return f"""<ir_version: 10, opset_import: ["" : {OPSET}]>
    preprocessing (uint8[height, width, {channels}] image)
    => (float[1, {channels}, rows, cols] pixels, float[2] size, float[2] original) {{
        in_zero = Constant <value_ints = [0]> ()
        in_zeros = Constant <value_ints = [0, 0]> ()
        in_unit = Constant <value_ints = [{unit}]> ()
        in_axes = Constant <value_ints = [2, 3]> ()
        in_order = Constant <value_ints = [{order}]> ()
        in_mean = Constant <value = float[{channels}, 1, 1] {{{mean}}}> ()
        in_std = Constant <value = float[{channels}, 1, 1] {{{std}}}> ()
        in_planes = Transpose <perm = [2, 0, 1]> (image)
        in_batch = Unsqueeze (in_planes, in_zero)
        in_sides = Shape <start = 2> (in_batch)
        original = Cast <to = 1> (in_sides){resize if shortest else keep}
        size = Cast <to = 1> (in_new)
        in_ordered = Gather <axis = 1> (in_resized, in_order)
        in_values = Cast <to = 1> (in_ordered)
        in_centred = Sub (in_values, in_mean)
        in_normal = Div (in_centred, in_std)
        in_over = Mod (in_new, in_unit)
        in_rest = Sub (in_unit, in_over)
        in_missing = Mod (in_rest, in_unit)
        in_pads = Concat <axis = 0> (in_zeros, in_missing)
        pixels = Pad (in_normal, in_pads, , in_axes)
    }}"""
