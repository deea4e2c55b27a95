"""What an encoder is, and the table of the encoders that exist."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm import is_model
from torch import Tensor, nn

from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.registry import Registry


class Encoder(nn.Module):
    """Images to token maps.

    A subclass sets, before its first forward pass:

    Attributes:
        name: the registered name that built it.
        arguments: the keyword arguments it was built with, plain numbers and booleans.
        strides: pixels per token of each map, by the map's name, finest first (``{"s16": 16}``).
        channels: channels of each map, under the same names.
        traced: which of batch, height and width ``torch.export`` leaves open when it makes a program of it.

    The last map is the one the pretext heads and the simple feature pyramid read. Every builder takes the keys of
    ``MODEL.ENCODER`` in small letters and ``in_chans``.
    """

    name: str
    arguments: dict[str, Any]
    strides: dict[str, int]
    channels: dict[str, int]
    traced: tuple[str, ...] = ("batch", "height", "width")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images ``(B, in_chans, H, W)`` to maps ``(B, C, ceil(H / stride), ceil(W / stride))``."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        """Return the last map as a sequence ``(B, h * w, C)``, row by row."""
        maps = self(images)
        return maps[self.last].flatten(2).transpose(1, 2)

    def pooled_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a classifier reads of each image, ``(B, C)``, and :meth:`tokens`.

        Here their mean; an encoder with a class token returns that.
        """
        tokens = self.tokens(images)
        return tokens.mean(1), tokens

    @property
    def has_position_information(self) -> bool:
        """Whether a token can know its place beyond what the patches show.

        Where it cannot, permuting the patches permutes the tokens and changes nothing else.
        """
        return True

    @property
    def last(self) -> str:
        """Name of the last (coarsest) map."""
        return next(reversed(self.strides))

    @property
    def dim(self) -> int:
        """Channels of the last map."""
        return self.channels[self.last]

    def depth_of(self, name: str) -> int:
        """Return how deep a parameter lies: 0 for what embeds patches, i for the i-th block, then the rest."""
        if block := re.search(r"\bblocks\.(\d+)\.", name):
            return int(block[1]) + 1
        return self.depth + 1 if re.match(r"(\w+\.)?norm\.", name) else 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(int(b[1]) for n, _ in self.named_parameters() if (b := re.search(r"\bblocks\.(\d+)\.", n)))

    def compile_passes(self) -> None:
        """Make the passes of :meth:`forward` and :meth:`tokens` with ``torch.compile`` from here on, in place."""
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    def select_blocks(self, count: int) -> None:
        """Give the outputs of ``count`` blocks, evenly spaced up to the last one, as maps from here on.

        Their names stand in :attr:`strides` before the last map.

        Raises:
            UserError: if the encoder is no row of equal blocks.
        """
        raise UserError(
            f"encoder '{self.name}' has no equal blocks to tap but maps of its own: set MODEL.PYRAMID.NAME fpn"
        )

    def checkpoint_blocks(self) -> None:
        """Recompute the blocks in the backward pass from here on, instead of keeping what is inside them.

        Raises:
            UserError: if the encoder has no blocks to recompute.
        """
        raise UserError(f"encoder '{self.name}' has no blocks to recompute; set MODEL.ACTIVATION_CHECKPOINT False")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the last map for an image of ``height`` x ``width`` pixels."""
        stride = self.strides[self.last]
        return -(-height // stride), -(-width // stride)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`build_encoder` needs to build the same encoder again."""
        return {"name": self.name, **self.arguments}

    def fresh(self, source: dict[str, Any]) -> set[str]:
        """Name the parameters, or parts, that weights saved from the configuration ``source`` lack by design."""
        return set()

    def lacks(self, source: dict[str, Any]) -> set[str]:
        """Name the parameters, or parts, of an encoder configured as ``source`` that this one leaves out by design."""
        return set()

    def accepts(self, key: str, value: Any) -> bool:
        """Whether weights of an encoder built with another ``value`` of the argument ``key`` can be adapted to this.

        Features stay equal then for images that are enlarged patch by patch (``patch_size``) or gray (``in_chans``).
        """
        return bool(value == self.arguments[key])

    def adapt(self, name: str, value: Tensor, source: dict[str, Any]) -> Tensor | None:
        """Resize the tensor ``name`` of an encoder configured as ``source``, or None where that makes no sense."""
        return None

    @contextmanager
    def without(self, fresh: set[str]) -> Iterator[None]:
        """Keep what is in ``fresh`` at zero inside the block, to compare with an encoder that lacks them."""
        muted = [p.data for n, p in self.named_parameters() if n in fresh]
        kept = [value.clone() for value in muted]
        for value in muted:
            value.zero_()
        try:
            yield
        finally:
            for value, before in zip(muted, kept, strict=True):
                value.copy_(before)


ENCODERS: Registry[Callable[..., Encoder]] = Registry("encoder")
# Encoders named "FAMILY:MEMBER" come from the family's function of the member's name, which gives their builder.
FAMILIES: Registry[Callable[[str], Callable[..., Encoder]]] = Registry("family of encoders")


def evenly(count: int, depth: int, name: str) -> list[int]:
    """Return ``count`` of ``depth`` blocks, counted from 0, evenly spaced up to the last one.

    Raises:
        UserError: if the encoder ``name`` has not so many.
    """
    if not 1 <= count <= depth:
        raise UserError(f"{count} levels need as many blocks, but encoder '{name}' has {depth}: ask for fewer levels")
    return spaced(count, depth)


def spaced(count: int, depth: int) -> list[int]:
    """Return ``count`` of ``depth`` blocks as :func:`evenly`; 0 to ``depth`` of them."""
    return [depth * (i + 1) // count - 1 for i in range(count)]


def build_encoder(name: str, **arguments: Any) -> Encoder:
    """Build a registered encoder.

    Args:
        name: a name in :data:`ENCODERS`, or ``FAMILY:MEMBER`` with a family in :data:`FAMILIES`.
        arguments: the keyword arguments of its builder.

    Raises:
        UserError: for an unknown name or argument, or a value that the encoder cannot have.
    """
    builder = _builder(name)
    known = list(inspect.signature(builder).parameters)
    for key in arguments:
        if key not in known:
            raise UserError(f"encoder '{name}' has no argument '{key}'{nearest(key, known)}")
    encoder = builder(**arguments)
    bound = inspect.signature(builder).bind(**arguments)
    bound.apply_defaults()
    encoder.name = name
    encoder.arguments = dict(bound.arguments)
    return encoder


def _builder(name: str) -> Callable[..., Encoder]:
    family, _, member = name.partition(":")
    if name not in ENCODERS and is_model(name):
        raise UserError(f"unknown encoder '{name}'; timm's model of that name is 'timm:{name}'")
    return FAMILIES[family](member) if member else ENCODERS[name]


def map_strides(keys: Mapping[str, Any]) -> list[int]:
    """Return the strides, ascending, of the maps of the encoder that the config node ``MODEL`` describes.

    Raises:
        UserError: see :func:`encoder_from_keys`.
    """
    with torch.device("meta"):  # parameters without memory
        encoder = encoder_from_keys(dict(keys) | {"COMPILE": False})
    return sorted(encoder.strides.values())


def encoder_from_keys(keys: Mapping[str, Any]) -> Encoder:
    """Build the encoder that the config node ``MODEL`` describes: in ``ENCODER`` the arguments' names in capitals.

    ``PIXEL_MEAN``, a mean a channel, says how many channels images have; without it they have three.

    Raises:
        UserError: see :func:`build_encoder`; and if windows are asked of an encoder without such an argument.
    """
    arguments = {key.lower(): value for key, value in keys["ENCODER"].items()}
    if "PIXEL_MEAN" in keys:  # Detectron2 counts channels there too (modeling/backbone/build.py)
        arguments["in_chans"] = len(keys["PIXEL_MEAN"])
    if "window" not in inspect.signature(_builder(arguments["name"])).parameters:
        if arguments.pop("window", 0):
            raise UserError(
                f"MODEL.ENCODER.WINDOW: encoder '{arguments['name']}' has no attention to keep in windows of a chosen "
                "side; set it to 0"
            )
        arguments.pop("global_blocks", None)
    encoder = build_encoder(**arguments)
    if keys["ACTIVATION_CHECKPOINT"]:
        encoder.checkpoint_blocks()
    if keys["COMPILE"]:
        encoder.compile_passes()
    return encoder
