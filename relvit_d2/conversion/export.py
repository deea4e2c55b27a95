"""Export of an encoder.safetensors to a file for timm or Detectron2."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from relvit_d2.conversion.encoder_file import build_described, read_encoder
from relvit_d2.conversion.to_detectron2 import to_detectron2
from relvit_d2.conversion.to_timm import to_timm, verify_timm
from relvit_d2.encoders import Encoder
from relvit_d2.utils.files import appearing, check_target


def _read(path: Path) -> Encoder:
    tensors, metadata = read_encoder(path)
    return build_described(path, tensors, metadata["encoder"]).eval()


def export_timm(source: Path, output: Path) -> str:
    """Write a file for timm; return the relative difference of the features and the code that loads it, as text."""
    check_target(output, ".safetensors")
    encoder = _read(source)
    name, arguments, tensors = to_timm(encoder)
    difference = verify_timm(encoder, name, arguments, tensors)
    with appearing(output) as part:
        save_file(tensors, str(part), {"architecture": name})
    call = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    return (
        f"features of timm's model agree with the encoder's: relative difference {difference:.1e}\n"
        f"load with: model = timm.create_model({call})\n"
        f'           model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )


def export_detectron2(source: Path, output: Path) -> str:
    """Write a checkpoint for Detectron2's ViT or SwinTransformer, standalone or as the backbone of a detector.

    Returns:
        The equal and the unequal features, and the code that loads the file, as text.
    """
    check_target(output, ".pth")
    exported = to_detectron2(_read(source))
    tensors = {name: value.detach().clone() for name, value in exported.backbone.state_dict().items()}
    # With matching_heuristics Detectron2 finds the backbone of a detector by the suffixes of names.
    with appearing(output) as part:
        torch.save({"model": tensors, "matching_heuristics": True}, part)
    return (
        f"equal (relative difference {exported.difference:.1e}): {exported.equal}\n"
        f"not equal: {exported.unequal}\n"
        f"load with: DetectionCheckpointer(model).load('{output}'), where model is a detector with this backbone, or\n"
        f"           {exported.call}"
    )
