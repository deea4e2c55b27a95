"""Export of an encoder to a timm model."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from relvit_d2.conversion.converted import checked_difference, random_image
from relvit_d2.conversion.reference_models import TIMM_NAMES
from relvit_d2.encoders.base import Encoder
from relvit_d2.encoders.swin import Swin
from relvit_d2.encoders.vit import ViT
from relvit_d2.utils.errors import UserError


def to_timm(encoder: Encoder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the name and the arguments of ``timm.create_model``, and the tensors that the model loads strictly.

    The model's ``forward_features`` returns the features of the encoder, in a ViT after the prefix tokens.

    Raises:
        UserError: if timm has no such model.
    """
    family, _, member = encoder.name.partition(":")
    name, arguments = (member, {}) if member else TIMM_NAMES.get(family, ("", {}))
    if not name:
        raise UserError(f"timm {timm.__version__} has no model of encoder '{encoder.name}'; it cannot load its weights")
    config = encoder.arguments
    arguments = {"num_classes": 0, "in_chans": config["in_chans"], **arguments}
    if isinstance(encoder, ViT):
        arguments |= {"img_size": config["img_size"], "patch_size": config["patch_size"], "global_pool": ""}
        arguments |= {} if config["pos_embed"] else {"pos_embed": "none"}
        arguments |= {"final_norm": False} if isinstance(encoder.vit.norm, nn.Identity) else {}
        tensors = encoder.vit.state_dict()
    else:
        assert isinstance(encoder, Swin)
        tensors = encoder.swin.state_dict()
    return name, arguments, {key: value.detach().clone() for key, value in tensors.items()}


@torch.no_grad()
def verify_timm(encoder: Encoder, name: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    """Load ``tensors`` strictly into timm's model, compare the features of an image, return the relative difference.

    Raises:
        UserError: if they differ.
    """
    model: Any = timm.create_model(name, **arguments).eval()
    model.load_state_dict(tensors)
    image = random_image(arguments.get("img_size", 224), arguments["in_chans"])
    features = model.forward_features(image)
    theirs = features[:, model.num_prefix_tokens :] if isinstance(encoder, ViT) else features.flatten(1, 2)
    return checked_export(theirs, encoder.eval().tokens(image), f"timm's {name}")


def checked_export(features: Tensor, expected: Tensor, model: str) -> float:
    """Return the relative difference of an exported model's features from the encoder's; raise if it is too large."""
    return checked_difference(features, expected, f"{model} differ from the encoder's", "nothing is written")
