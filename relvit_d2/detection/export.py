"""Export of a detector's backbone (encoder and pyramid) with torch.export or to ONNX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from relvit_d2.detection.backbone import build_encoder_pyramid_backbone
from relvit_d2.engine.weights import load_weights
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing

TOLERANCE = 1e-4  # relative to a level's largest value; differences in float32 were measured to be 2e-6
Levels = dict[str, Tensor]


def export(cfg: CfgNode, to: str, output: Path, size: list[int] | None) -> str:
    """Export the backbone with the weights of ``MODEL.WEIGHTS``, compare it with the original one and write it.

    Args:
        to: ``torch-export`` or ``onnx``.
        output: the file to write.
        size: height and width of the input of a Swin, pixels; None: ``INPUT.MAX_SIZE_TEST``.

    Returns:
        The file and the largest difference, as text.

    Raises:
        UserError: if the size is invalid or the exported program differs from the model.
    """
    detector = nn.Module()  # checkpoints of detectors have the prefix "backbone."
    backbone = detector.backbone = build_encoder_pyramid_backbone(cfg, None)
    load_weights(cfg, detector, backbone.encoder, cfg.INPUT.FORMAT)
    backbone.eval().requires_grad_(False)
    images = example_inputs(backbone, cfg.INPUT.MAX_SIZE_TEST, size)
    program = torch.export.export(backbone, (images[0],), dynamic_shapes=dynamic_shapes(backbone))
    with appearing(output) as part:
        run = write(program, list(backbone.output_shape()), to, part)
        largest = max(difference(run, backbone, image) for image in images)
        if not largest <= TOLERANCE:
            raise UserError(
                f"the exported program differs from the model by {largest:.1e} (allowed: {TOLERANCE:.0e}): nothing was "
                "written; try the other format of --to"
            )
    pixels = f"{cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, standard deviation {cfg.MODEL.PIXEL_STD}"
    shapes = ", ".join(" x ".join(map(str, image.shape)) for image in images)
    return (
        f"written: {output} ({output.stat().st_size / 2**20:.1f} MiB); input: {pixels}\n"
        f"largest relative difference from the model: {largest:.1e}, on inputs of {shapes}"
    )


def example_inputs(backbone: Any, longest: int, size: list[int] | None) -> list[Tensor]:
    """Return three batches of noise for the comparison; the first one is used for tracing."""
    unit, encoder = backbone.size_divisibility, backbone.encoder
    if encoder.traced:
        if size:
            raise UserError(f"--size is for Swin only; the exported {encoder.name} accepts any size: remove it")
        side = min_side(backbone)
        sizes = [(2, side + 4 * unit, side + 2 * unit), (1, side, side + 3 * unit), (3, side + unit, side)]
        if "batch" not in encoder.traced:
            sizes = [(1, *sides) for _, *sides in sizes]
    else:
        sizes = [(1, *(size or 2 * [-(-longest // unit) * unit]))] * 3
        if any(side < unit or side % unit for side in sizes[0][1:]):
            raise UserError(f"--size {sizes[0][1]} {sizes[0][2]}: give multiples of {unit} pixels")
    generator, channels = torch.Generator().manual_seed(0), encoder.arguments["in_chans"]
    return [torch.randn(batch, channels, *sides, generator=generator) for batch, *sides in sizes]


def min_side(backbone: Any) -> int:
    """Return the minimum side in pixels that a program with dynamic shapes accepts."""
    unit, encoder = backbone.size_divisibility, backbone.encoder
    window = encoder.arguments.get("window", 0) * encoder.strides[encoder.last]
    return max(window // unit + 1, 2) * unit


def dynamic_shapes(backbone: Any) -> Any:
    """Return the dynamic dimensions of the input, in the form that ``torch.export`` takes."""
    unit, traced = backbone.size_divisibility, backbone.encoder.traced
    varying: dict[int, Any] = {0: Dim("batch")} if "batch" in traced else {}
    if "height" in traced:
        rows, cols = (Dim(name, min=min_side(backbone) // unit) for name in ("rows", "cols"))
        varying |= {2: unit * rows, 3: unit * cols}
    return (varying,)


def write(program: ExportedProgram, levels: list[str], to: str, path: Path) -> Callable[[Tensor], Levels]:
    """Write ``program`` to ``path``, load it from there and return it."""
    if to == "torch-export":
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as written:
            return torch.export.load(written).module()
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": levels}
    torch.onnx.export(program, f=str(path), dynamo=True, external_data=False, verbose=False, **names)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Levels:
        return dict(zip(levels, map(torch.from_numpy, session.run(levels, {"images": images.numpy()})), strict=True))

    return run


@torch.no_grad()
def difference(run: Callable[[Tensor], Levels], backbone: nn.Module, images: Tensor) -> float:
    """Return the largest difference in any level, relative to the largest value of the level."""
    found, expected = run(images), backbone(images)
    if any(found[name].shape != level.shape for name, level in expected.items()):
        return float("inf")
    return max(((found[n] - level).abs().max() / level.abs().max()).item() for n, level in expected.items())
