"""An encoder.safetensors as weights of a timm model or of one of Detectron2's backbones."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from relvit_d2.conversion.encoder_file import build_described, read_encoder
from relvit_d2.conversion.to_detectron2 import to_detectron2
from relvit_d2.conversion.to_timm import prove_timm, to_timm
from relvit_d2.encoders import Encoder
from relvit_d2.utils.files import appearing, check_target


def loaded(path: Path) -> Encoder:
    """Build the encoder that a file describes, with its weights."""
    tensors, metadata = read_encoder(path)
    return build_described(path, tensors, metadata["encoder"]).eval()


def export_timm(source: Path, output: Path) -> str:
    """Write tensors that a timm model made by name loads strictly; return the difference and the call that loads them.

    Raises:
        UserError: if timm has no such model, its features differ, or ``output`` cannot be written.
    """
    check_target(output, ".safetensors")
    encoder = loaded(source)
    name, arguments, tensors = to_timm(encoder)
    difference = prove_timm(encoder, name, arguments, tensors)
    with appearing(output) as part:
        save_file(tensors, str(part), {"architecture": name})
    call = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    return (
        f"features of the encoder and of timm's model agree to {difference:.1e}\n"
        f"load with: model = timm.create_model({call})\n"
        f'           model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )


def export_detectron2(source: Path, output: Path) -> str:
    """Write a checkpoint for Detectron2's ViT or SwinTransformer, alone or in a detector.

    Returns:
        What is equal and what is not, and the call that loads the file.

    Raises:
        UserError: if Detectron2 has no such backbone, its features differ, or ``output`` cannot be written.
    """
    check_target(output, ".pth")
    stock = to_detectron2(loaded(source))
    tensors = {name: value.detach().clone() for name, value in stock.backbone.state_dict().items()}
    # With this Detectron2 finds the backbone in a whole detector by the ends of names.
    with appearing(output) as part:
        torch.save({"model": tensors, "matching_heuristics": True}, part)
    return (
        f"equal to {stock.difference:.1e}: {stock.equal}\n"
        f"not equal: {stock.unequal}\n"
        f"load with: DetectionCheckpointer(model).load('{output}'), a detector on, or alone,\n"
        f"           {stock.call}"
    )
