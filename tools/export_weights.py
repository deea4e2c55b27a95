"""Turn an encoder.safetensors into weights of a timm model or of one of Detectron2's own backbones.

Loads them there, strictly, compares the features of one random image with the encoder's, and writes nothing unless
they agree to 1e-4. Prints the call that builds the model and, for Detectron2, exactly what stays equal.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert_weights import check_target  # noqa: E402

from relvit_d2.conversion.encoder_file import load_encoder, read_encoder  # noqa: E402
from relvit_d2.conversion.to_detectron2 import to_detectron2  # noqa: E402
from relvit_d2.conversion.to_timm import prove_timm, to_timm  # noqa: E402
from relvit_d2.encoders import Encoder, build_encoder  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.utils.files import appearing  # noqa: E402


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/export_weights.py output/demo/pretrain/encoder.safetensors --to timm "
        "timm.safetensors",
    )
    parser.add_argument("encoder", type=Path, help="an encoder.safetensors")
    parser.add_argument("--to", required=True, choices=("timm", "detectron2"), help="whose weights to write")
    parser.add_argument("output", type=Path, help="the file: .safetensors for timm, .pth for detectron2")
    args = parser.parse_args()
    return guard(lambda: {"timm": export_timm, "detectron2": export_detectron2}[args.to](args.encoder, args.output))


def loaded(path: Path) -> Encoder:
    """Build the encoder that a file describes, with its weights."""
    _, metadata = read_encoder(path)
    encoder = build_encoder(**metadata["encoder"])
    load_encoder(encoder, path)
    return encoder.eval()


def export_timm(source: Path, output: Path) -> None:
    """Write tensors that a timm model made by name loads strictly."""
    check_target(output, ".safetensors")
    encoder = loaded(source)
    name, arguments, tensors = to_timm(encoder)
    difference = prove_timm(encoder, name, arguments, tensors)
    with appearing(output) as part:
        save_file(tensors, str(part), {"architecture": name})
    call = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    print(f"features of the encoder and of timm's model agree to {difference:.1e}")
    print(f"load with: model = timm.create_model({call})")
    print(f'           model.load_state_dict(safetensors.torch.load_file("{output}"))')
    print(f"written: {output}")


def export_detectron2(source: Path, output: Path) -> None:
    """Write a checkpoint for Detectron2's ViT or SwinTransformer, alone or in a detector."""
    check_target(output, ".pth")
    stock = to_detectron2(loaded(source))
    tensors = {name: value.detach().clone() for name, value in stock.backbone.state_dict().items()}
    # With this Detectron2 finds the backbone in a whole detector by the ends of names.
    with appearing(output) as part:
        torch.save({"model": tensors, "matching_heuristics": True}, part)
    print(f"equal to {stock.difference:.1e}: {stock.equal}")
    print(f"not equal: {stock.unequal}")
    print(f"load with: DetectionCheckpointer(model).load('{output}'), a detector on, or alone,")
    print(f"           {stock.call}")
    print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
