"""Every plain Vision Transformer of timm, by its timm name."""

from collections.abc import Callable

import timm
from timm.models import deit, model_entrypoint, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from relvit_d2.encoders.base import FAMILIES, Encoder
from relvit_d2.encoders.vit import vit_builder
from relvit_d2.utils.errors import UserError, nearest


def entry(model: str) -> Callable[..., VisionTransformer]:
    """Return timm's function that builds ``model``, a name without a weights tag.

    Models that timm's modules ``vision_transformer`` and ``deit`` build as a ``VisionTransformer`` have a plain patch
    embedding; those of other modules do not.

    Raises:
        UserError: timm has no such model, or it is not a plain Vision Transformer.
    """
    if not timm.is_model(model):
        close = nearest(model, timm.list_models())
        raise UserError(f"timm {timm.__version__} has no model '{model}'{close or '; timm.list_models() lists them'}")
    function = model_entrypoint(model)
    module, made = function.__module__, function.__annotations__.get("return")
    if module not in (vision_transformer.__name__, deit.__name__) or made is not VisionTransformer:
        kind = getattr(made, "__name__", made)
        raise UserError(
            f"timm's '{model}' is a {kind} of {module}, not a VisionTransformer with a plain patch embedding; choose a "
            "vit_*, deit_* or deit3_* of timm, or an encoder of this package"
        )
    return function


def without_head(vit: VisionTransformer) -> VisionTransformer:
    """Remove pooling, the norm of the pooled features and the classifier, in place."""
    vit.reset_classifier(0, "")
    vit.fc_norm = nn.Identity()
    return vit


@FAMILIES.register("timm")
def timm_vit(model: str) -> Callable[..., Encoder]:
    """Return the builder of timm's ``model`` with random weights; nothing is downloaded.

    The arguments of the builder override the patch and image size in the name. Features are the patch tokens of timm's
    ``forward_features``, which are not normed in models that norm the pooled features only (``*_gap_*``).
    """
    function = entry(model)
    return vit_builder(lambda **arguments: without_head(function(**arguments)))
