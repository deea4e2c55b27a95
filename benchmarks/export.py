"""Inference speed of exported detectors, compared with the model in torch.

``ENCODER_onnx`` is the ONNX file in float32 against the model in torch, ``ENCODER_int8`` the int8 file against the one
in float32. All are Mask R-CNN with random weights on one image of noise, of 512 x 384 pixels (with ``--quick`` 256 x
192), pasting of masks included, on a CPU with as many threads as torch has. The ratio is the speed-up.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch

from benchmarks.harness import Row, arguments, in_turn, print_rows
from relvit_d2.detection.export import to_onnx
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.onnx_detector import OnnxDetector
from relvit_d2.detection.predictor import Detector
from relvit_d2.detection.quantization import quantize_file
from relvit_d2.encoders import build_encoder
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

ENCODERS = ("vit_small", "swin_tiny", "t2t_vit_14")
CLASSES = 20


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "export")
    args.device = "cpu"
    names = ENCODERS[:1] if args.quick else ENCODERS
    print_rows((row for name in names for row in measure(name, args)), args)


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Measure an encoder."""
    longest = 256 if args.quick else 512
    detector = untrained(name, longest)
    images = [*np.random.default_rng(0).integers(0, 255, (3, longest * 3 // 4, longest, 3), dtype=np.uint8)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{kind}.onnx") for kind in ("onnx", "int8")]
        onnx.save(to_onnx(detector), paths[0])
        quantize_file(paths[0], paths[1], images[1:])
        files = [OnnxDetector(path, 0.0, torch.get_num_threads()) for path in paths]
        pairs = [("onnx", files[0], detector), ("int8", files[1], files[0])]
        for kind, ours, theirs in pairs:
            pair = in_turn(
                lambda ours=ours: ours.detect(images[:1]),  # type: ignore[misc]
                lambda theirs=theirs: theirs.detect(images[:1]),  # type: ignore[misc]
                "cpu",
                budget=10 if args.quick else 30,
            )
            yield {
                "name": f"{name}_{kind}",
                "ratio": pair.ratio,
                "ours_images_per_s": 1 / pair.ours,
                "theirs_images_per_s": 1 / pair.theirs,
                "detections": len(ours.detect(images[:1])[0].scores),
            }


def untrained(name: str, longest: int) -> Detector:
    """Return a detector with random weights that detects something in noise."""
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ENCODER.NAME": name,
        "MODEL.ENCODER.PATCH_SIZE": build_encoder(name, img_size=32).arguments["patch_size"],
        "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
        "INPUT.MIN_SIZE_TEST": longest,
        "INPUT.MAX_SIZE_TEST": longest,
        "SOLVER.PRECISION": "float32",
    }
    cfg = load_config("configs/base/detection.yaml", [str(word) for pair in keys.items() for word in pair])
    seed_everything(0, "model")
    model = build_detector(cfg)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)  # scores that differ
    return Detector(cfg, model, [str(index) for index in range(CLASSES)], 0.0)


if __name__ == "__main__":
    main()
