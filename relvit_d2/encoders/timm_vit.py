"""Models of timm as encoders, by their timm names: Vision Transformers, also with rotary positions, and pyramids."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models import deit, eva, model_entrypoint, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from relvit_d2.encoders.base import FAMILIES, Encoder
from relvit_d2.encoders.eva import EvaViT
from relvit_d2.encoders.timm_pyramid import PYRAMIDS, pyramid_builder
from relvit_d2.encoders.vit import ViT, vit_builder
from relvit_d2.utils.errors import UserError, nearest

# timm's modules whose models of the class have a plain patch embedding; those of other modules do not.
_CLASSES = {
    vision_transformer.__name__: VisionTransformer,
    deit.__name__: VisionTransformer,
    eva.__name__: Eva,
}


def entry(model: str) -> Callable[..., Any]:
    """Return timm's function that builds ``model``, a name without a weights tag.

    Raises:
        UserError: timm has no such model, or it is of another class.
    """
    if not timm.is_model(model):
        close = nearest(model, timm.list_models())
        raise UserError(f"timm {timm.__version__} has no model '{model}'{close or '; timm.list_models() lists them'}")
    function = model_entrypoint(model)
    module, made = function.__module__, function.__annotations__.get("return")
    if module not in PYRAMIDS and (module not in _CLASSES or made is not _CLASSES[module]):
        kind = getattr(made, "__name__", made)
        raise UserError(
            f"timm's '{model}' is a {kind} of {module}, which is not supported: choose a vit_*, deit_*, deit3_*, eva*, "
            "resnet* or convnext* of timm, one of the others in docs/weights.md, or an encoder of this package"
        )
    return function


def is_eva(model: str) -> bool:
    """Whether timm's ``model`` is of the class ``Eva``; with few exceptions, these have rotary positions."""
    return _module(model) == eva.__name__


def is_pyramid(model: str) -> bool:
    """Whether timm's ``model`` is one of those with maps of several strides."""
    return _module(model) in PYRAMIDS


def _module(model: str) -> str:
    return model_entrypoint(model).__module__ if timm.is_model(model) else ""


def without_head(model: str, **arguments: Any) -> Any:
    """Build timm's ``model`` without pooling, norm of the pooled features and classifier.

    Args:
        model: see :func:`entry`.
        arguments: keyword arguments of a ``VisionTransformer``, which an ``Eva`` has too; its ``pos_embed`` is
            translated.
    """
    function = entry(model)
    if is_eva(model):
        # Positions that are scaled at random in training would depend on how a batch is divided among processes.
        arguments["rope_rescale_coords"] = None
        if arguments.pop("pos_embed", "") == "none":
            arguments["use_abs_pos_emb"] = False
    vit: Any = function(**arguments)
    vit.reset_classifier(0, "")
    vit.fc_norm = nn.Identity()
    return vit


@FAMILIES.register("timm")
def timm_model(model: str) -> Callable[..., Encoder]:
    """Return the builder of timm's ``model`` with random weights; nothing is downloaded.

    The arguments of the builder override the patch and image size in the name of a ViT. Its features are the patch
    tokens of timm's ``forward_features``, which are not normed in models that norm the pooled features only
    (``*_gap_*``, ``eva02_*``).
    """
    function = entry(model)
    if is_pyramid(model):
        return pyramid_builder(model, function)
    return vit_builder(partial(without_head, model), EvaViT if is_eva(model) else ViT)
