"""Convert weights of another project into a file that MODEL.WEIGHTS loads.

Encoders become an encoder.safetensors, which every task loads. The converted and the dropped tensors are listed. A
ViTDet or an R-CNN on Swin of Detectron2 (--from detectron2) becomes a .pth for relvit-d2 train, predict and more, with
its config keys in config.yaml beside it. The features of a random image are compared with those of the original model;
the file is written only if they agree within a relative tolerance of 1e-4. No code in the source file is run, except
with --allow-pickle.
"""

import argparse
from pathlib import Path

from relvit_d2.conversion import KINDS
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target
from relvit_d2.utils.printing import print_text

EXAMPLE = """\
relvit-d2 convert dinov2_vits14_pretrain.pth --to encoder.safetensors
relvit-d2 convert model_final_61ccd1.pkl --from detectron2 --allow-pickle --to vitdet_b/model_final.pth"""
DETECTRON2 = "detectron2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, help="a .safetensors, .pth, .pt, .bin, .ckpt or, of Detectron2, .pkl file")
    parser.add_argument("--to", required=True, type=Path, help="the encoder.safetensors to write, of Detectron2 a .pth")
    kinds = (*KINDS, DETECTRON2)
    parser.add_argument("--from", dest="kind", choices=kinds, help="default: detected from the names of the tensors")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .pkl of Detectron2; unpickling can run arbitrary code"
    )


def run(args: argparse.Namespace) -> None:
    """Convert the file."""
    if args.kind == DETECTRON2:
        from relvit_d2.detection.detectron2_import import import_detector
        from relvit_d2.engine.run_setup import silence_warnings

        silence_warnings()
        print_text(import_detector(args.source, args.to, args.allow_pickle))
        return
    if args.allow_pickle:
        raise UserError("--allow-pickle is for a .pkl of Detectron2: add --from detectron2, or remove it")
    check_target(args.to, ".safetensors")
    from relvit_d2.conversion.checkpoint_file import find_encoder
    from relvit_d2.conversion.convert import convert
    from relvit_d2.conversion.encoder_file import save_encoder

    converted = convert(find_encoder(args.source), args.kind)
    info = {"source": f"{converted.kind}: {args.source.name}", **converted.pixels}
    save_encoder(converted.encoder, args.to, info)
    print_text(f"{converted}\nwritten: {args.to}")
