"""An encoder as a model of timm."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from relvit_d2.conversion.converted import TOLERANCE
from relvit_d2.conversion.reference_models import TIMM_NAMES
from relvit_d2.encoders.base import Encoder
from relvit_d2.encoders.swin import Swin
from relvit_d2.encoders.vit import ViT
from relvit_d2.utils.errors import UserError


def to_timm(encoder: Encoder) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return what makes the encoder a model of timm.

    Returns:
        The name and the arguments of ``timm.create_model``, and the tensors that the model loads strictly. Its
        ``forward_features`` gives the encoder's features, after prefix tokens in a ViT.

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
def prove_timm(encoder: Encoder, name: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> float:
    """Load ``tensors`` strictly into timm's model and compare features of one image, of its side or 224 pixels.

    Returns:
        The largest difference, relative to the largest feature.

    Raises:
        UserError: if they differ.
    """
    model: Any = timm.create_model(name, **arguments).eval()
    model.load_state_dict(tensors)
    side = arguments.get("img_size", 224)
    image = torch.randn(1, arguments["in_chans"], side, side, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(image)
    theirs = features[:, model.num_prefix_tokens :] if isinstance(encoder, ViT) else features.flatten(1, 2)
    return compared(encoder.eval().tokens(image), theirs, f"timm's {name}")


def compared(ours: Tensor, theirs: Tensor, what: str) -> float:
    """Return the largest difference of features, relative to the largest feature.

    Raises:
        UserError: if it is more than :data:`TOLERANCE`.
    """
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"features of {what} differ by {difference:.1e} from the encoder's, where {TOLERANCE:.0e} is allowed: "
            "nothing is written, since it does not compute what the encoder does"
        )
    return difference
