"""Write a detector's backbone, encoder and pyramid, as a program that runs without this package.

Input `images` are normalised pixels (B, C, H, W), float32, in the order and with the mean and spread that the command
prints; outputs are the levels p2, p3, ... in float32. H and W are multiples of the pyramid's coarsest stride, as in the
detector's own batches. The program of a ViT takes any B, H and W, that of a windowed one beyond its window; that of T2T
any H and W with B = 1 (it takes minutes to make); that of a Swin one image of --size. Before the file appears, the
program is run (onnxruntime on the ONNX file, torch.export's own loader on the other) on three sizes, a Swin's on three
images, and must agree with the model to 1e-4 of each level's largest value.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relvit_d2.detection.backbone import build_encoder_pyramid_backbone  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.engine.weights import load_weights  # noqa: E402
from relvit_d2.tasks import load_config  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402
from relvit_d2.utils.files import appearing  # noqa: E402

TOLERANCE = 1e-4  # of a level's largest value; float32 sums in another order were seen to differ by 2e-6
KINDS = ("torch-export", "onnx")
Levels = dict[str, Tensor]


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/export_model.py --config-file configs/demo/streets.yaml --weights '' "
        "--to onnx --output backbone.onnx",
    )
    parser.add_argument("--config-file", required=True, help="a detection config")
    parser.add_argument(
        "--weights", help="model_*.pth of train_net.py, an encoder.safetensors, or '' for none; default: MODEL.WEIGHTS"
    )
    parser.add_argument("--to", required=True, choices=KINDS, help="the program's format")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels of a Swin's image; default: INPUT.MAX_SIZE_TEST"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    return guard(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """Export the backbone, check it and write it.

    Raises:
        UserError: if a package is missing, the place cannot be written to, the size does not fit, or the program does
            not agree with the model.
    """
    if args.to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if find_spec(package) is None:
                raise UserError(f"--to onnx needs the package {package}; pip install -r requirements.txt brings it")
    if not args.output.parent.is_dir():
        raise UserError(f"--output '{args.output}': the folder '{args.output.parent}' does not exist; make it first")
    cfg = load_config(args.config_file, args.opts, "detection")
    cfg.MODEL.DEVICE = "cpu"
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    detector = nn.Module()  # what a detector's checkpoint calls its backbone
    backbone = detector.backbone = build_encoder_pyramid_backbone(cfg, None)
    load_weights(cfg, detector, backbone.encoder, cfg.INPUT.FORMAT)
    backbone.eval().requires_grad_(False)
    images = examples(backbone, cfg.INPUT.MAX_SIZE_TEST, args.size)
    program = torch.export.export(backbone, (images[0],), dynamic_shapes=shapes(backbone))
    with appearing(args.output) as part:
        run = write(program, list(backbone.output_shape()), args.to, part)
        worst = max(difference(run, backbone, image) for image in images)
        if not worst <= TOLERANCE:
            raise UserError(
                f"the exported program differs from the model by {worst:.1e} (allowed {TOLERANCE:.0e}): nothing was "
                "written; try the other --to"
            )
    pixels = f"{cfg.INPUT.FORMAT}, less {cfg.MODEL.PIXEL_MEAN}, over {cfg.MODEL.PIXEL_STD}"
    what = "sizes" if backbone.encoder.traced else "images"
    tried = ", ".join(" x ".join(map(str, image.shape)) for image in images)
    print(f"written: {args.output} ({args.output.stat().st_size / 2**20:.1f} MiB); images: {pixels}")
    print(f"agrees with the model to {worst:.1e} of the largest value on three {what}: {tried}")


def examples(backbone: Any, longest: int, size: list[int] | None) -> list[Tensor]:
    """Return three batches of noise to compare on; the first is the one to trace."""
    unit, encoder = backbone.size_divisibility, backbone.encoder
    if encoder.traced:
        if size:
            raise UserError(f"--size is for a Swin; the program of a {encoder.name} takes any size: leave it out")
        least = least_side(backbone)
        sizes = [(2, least + 4 * unit, least + 2 * unit), (1, least, least + 3 * unit), (3, least + unit, least)]
        if "batch" not in encoder.traced:
            sizes = [(1, *sides) for _, *sides in sizes]
    else:
        sizes = [(1, *(size or 2 * [-(-longest // unit) * unit]))] * 3
        if any(side < unit or side % unit for side in sizes[0][1:]):
            raise UserError(f"--size {sizes[0][1]} {sizes[0][2]}: give multiples of {unit} pixels")
    generator, channels = torch.Generator().manual_seed(0), encoder.arguments["in_chans"]
    return [torch.randn(batch, channels, *sides, generator=generator) for batch, *sides in sizes]


def least_side(backbone: Any) -> int:
    """Return the least side, pixels, that a program for any size takes."""
    unit, encoder = backbone.size_divisibility, backbone.encoder
    window = encoder.arguments.get("window", 0) * encoder.strides[encoder.last]
    return max(window // unit + 1, 2) * unit


def shapes(backbone: Any) -> Any:
    """Return what of the images may vary, as ``torch.export`` wants it told."""
    unit, traced = backbone.size_divisibility, backbone.encoder.traced
    varying: dict[int, Any] = {0: Dim("batch")} if "batch" in traced else {}
    if "height" in traced:
        rows, cols = (Dim(name, min=least_side(backbone) // unit) for name in ("rows", "cols"))
        varying |= {2: unit * rows, 3: unit * cols}
    return (varying,)


def write(program: ExportedProgram, levels: list[str], to: str, path: Path) -> Callable[[Tensor], Levels]:
    """Write ``program`` to ``path`` and return it as read from there."""
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
    """Return the largest difference of a level, relative to its largest value."""
    found, expected = run(images), backbone(images)
    if any(found[name].shape != level.shape for name, level in expected.items()):
        return float("inf")
    return max(((found[n] - level).abs().max() / level.abs().max()).item() for n, level in expected.items())


if __name__ == "__main__":
    sys.exit(main())
