"""timm's pre-trained weights by name, from timm's cache or download."""

from typing import Any

import timm
from torch import Tensor

from relvit_d2.conversion.checkpoint_file import FoundEncoder
from relvit_d2.conversion.convert import swin, timm_pyramid, timm_vit
from relvit_d2.conversion.converted import pixel_metadata, verify
from relvit_d2.encoders.base import Encoder
from relvit_d2.encoders.timm_vit import is_pyramid
from relvit_d2.utils.errors import UserError, nearest, one_line

PREFIX = "timm:"


def is_published(source: str) -> bool:
    """Whether ``source`` is ``timm:NAME`` and not a path."""
    return source.startswith(PREFIX)


def read_published(source: str, encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read timm's weights in the form of the tensors and the metadata of an encoder file.

    Args:
        source: ``timm:NAME`` or ``timm:NAME.TAG``, a model of timm that is an encoder, or a Swin-T.
        encoder: the encoder to load them into. Unless it is a ``timm:NAME``, they are converted to one of this package.

    Raises:
        UserError: if timm has no such weights, they are not cached and cannot be downloaded, or they fit no encoder.
    """
    name = source.removeprefix(PREFIX)
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models())
        raise UserError(f"'{source}': timm {timm.__version__} has no model '{architecture}'{close}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if not tags or ("." in name and name not in tags):
        raise UserError(f"'{source}': timm has no such weights; it has {', '.join(tags) or 'none'}")
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # timm's ways of downloading raise different exceptions
        reason = one_line(error, 160)
        raise UserError(
            f"'{source}' is not in timm's cache and could not be downloaded ({reason}); connect to the "
            "network once, or convert a file with relvit-d2 convert"
        ) from error
    pretrained = timm.get_pretrained_cfg(name)
    assert pretrained is not None  # its name is in list_pretrained
    found = FoundEncoder(source, dict(model.state_dict()))
    if architecture.startswith("swin_"):
        converted = swin(found)
    elif is_pyramid(architecture):
        converted = timm_pyramid(found, architecture)
    else:
        converted = timm_vit(found, architecture=architecture, keep=encoder.name.startswith(PREFIX))
    verify(converted, source)
    tensors = {key: value.detach() for key, value in converted.encoder.state_dict().items()}
    return tensors, {"encoder": converted.encoder.to_config(), **pixel_metadata(pretrained.to_dict())}
