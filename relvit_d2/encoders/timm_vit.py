"""Any plain Vision Transformer of timm by its name there."""

from collections.abc import Callable

import timm
from timm.models import deit, model_entrypoint, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from relvit_d2.encoders.base import FAMILIES, Encoder
from relvit_d2.encoders.vit import ANY_SIZE, ViT, divided
from relvit_d2.utils.errors import UserError, nearest


def entry(model: str) -> Callable[..., VisionTransformer]:
    """Return timm's function that builds ``model``, a name without a tag of weights.

    What the modules ``vision_transformer`` and ``deit`` of timm build as a ``VisionTransformer`` has a plain patch
    embedding, and keys, registers, scales and feed-forward parts of every kind; the other modules build variants.

    Raises:
        UserError: if timm has no such model, or it is no plain Vision Transformer.
    """
    if not timm.is_model(model):
        close = nearest(model, timm.list_models())
        raise UserError(f"timm {timm.__version__} has no model '{model}'{close or '; timm.list_models() names them'}")
    function = model_entrypoint(model)
    module, made = function.__module__, function.__annotations__.get("return")
    if module not in (vision_transformer.__name__, deit.__name__) or made is not VisionTransformer:
        kind = getattr(made, "__name__", made)
        raise UserError(
            f"timm's '{model}' is a {kind} of {module}, no VisionTransformer with a plain patch embedding; choose a "
            "vit_*, deit_* or deit3_* of timm, or an encoder of this package"
        )
    return function


def without_head(vit: VisionTransformer) -> VisionTransformer:
    """Remove, in place, what comes after the tokens: pooling, the norm of what is pooled, the classifier."""
    vit.reset_classifier(0, "")
    vit.fc_norm = nn.Identity()
    return vit


@FAMILIES.register("timm")
def timm_vit(model: str) -> Callable[..., Encoder]:
    """Return the builder of timm's ``model``, with random weights: nothing is downloaded.

    Raises:
        UserError: see :func:`entry`.
    """
    function = entry(model)

    def build(
        patch_size: int = 16,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
        window: int = 0,
        global_blocks: int = 4,
    ) -> Encoder:
        """Build the model; the arguments decide, whatever patch and image its name tells.

        Features are the tokens that timm's ``forward_features`` gives for patches, so in a model that norms only what
        is pooled (``*_gap_*``) they are not normed.
        """
        divided(img_size, patch_size)
        vit = function(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            drop_path_rate=drop_path,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            **({} if pos_embed else {"pos_embed": "none"}),
            **ANY_SIZE,
        )
        return ViT(without_head(vit), window, global_blocks)

    return build
