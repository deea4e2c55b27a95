"""The encoder base class and the registry of encoders."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm import is_model
from torch import Tensor, nn

from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.registry import Registry

logger = logging.getLogger(__name__)


class Encoder(nn.Module):
    """Base class of all encoders: images to feature maps.

    A subclass sets ``strides`` and ``channels`` before its first forward pass; :func:`build_encoder` sets ``name`` and
    ``arguments``. The pretext heads and the simple feature pyramid read the last map.

    Attributes:
        name: registered name.
        arguments: keyword arguments of the builder, plain numbers and booleans.
        strides: pixels per token of each map, by the map's name, finest first (``{"s16": 16}``).
        channels: channels of each map, by the map's name.
        position_embedding: state dict name of what ``pos_embed`` adds, or ``sinusoid``; empty if nothing.
        patch_embedding: state dict name of the convolution weight over the channels of the images; empty if none.
        stage_depths: blocks of each stage; empty if the blocks are not divided into stages.
        frozen_statistics: whether there is batch norm with the statistics of the loaded weights.
    """

    name: str
    arguments: dict[str, Any]
    strides: dict[str, int]
    channels: dict[str, int]
    position_embedding = ""
    patch_embedding = ""
    stage_depths: tuple[int, ...] = ()
    frozen_statistics = False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images ``(B, in_chans, H, W)`` to maps ``(B, C, ceil(H / stride), ceil(W / stride))``."""
        raise NotImplementedError

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the last map as a sequence ``(B, h * w, C)`` in row-major order.

        Args:
            images: as for :meth:`forward`.
            kept: ``(B, K)`` int64, different row-major indices in each row: only these patches pass the blocks, and
                their tokens ``(B, K, C)`` are returned in this order. For encoders with :attr:`supports_subsets`.
        """
        assert kept is None, f"{self.name} needs all tokens"
        return self(images)[self.last].flatten(2).transpose(1, 2)

    def pooled_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return one feature vector per image, ``(B, C)``, and :meth:`tokens`.

        The vector is the class token where the encoder has one, else the mean of the tokens.
        """
        tokens = self.tokens(images)
        return tokens.mean(1), tokens

    @property
    def supports_subsets(self) -> bool:
        """Whether :meth:`tokens` can compute a subset of the tokens alone."""
        return False

    @property
    def has_position_information(self) -> bool:
        """Whether a token depends on its position and not on the patch contents alone.

        If not, permuting the patches only permutes the tokens.
        """
        return True

    def check_pretext(self) -> None:
        """Raise a :class:`UserError` if the pretext tasks do not support the encoder."""

    def warn_position_leak(self) -> None:
        """Warn that accuracies of pretext tasks without permuted patches are uninformative, if they are."""
        if self.has_position_information:
            logger.warning(
                "joint training does not permute patches, and the encoder has position information, so the pretext "
                "tasks can be solved without the patch contents: their accuracies are not informative"
            )

    @property
    def last(self) -> str:
        """Name of the last (coarsest) map."""
        return next(reversed(self.strides))

    @property
    def dim(self) -> int:
        """Channels of the last map."""
        return self.channels[self.last]

    def depth_of(self, name: str) -> int:
        """Return the layer index of a parameter: 0 for the embedding, i for the i-th block, depth + 1 after them.

        A downsampling layer between stages belongs to the block after it.
        """
        stage = re.search(r"\b(?:layers|stages)\.(\d+)\.(?:blocks\.(\d+))?", name) if self.stage_depths else None
        if stage:
            return sum(self.stage_depths[: int(stage[1])]) + int(stage[2] or 0) + 1
        if block := re.search(r"\bblocks\.(\d+)\.", name):
            return int(block[1]) + 1
        return self.depth + 1 if re.match(r"(\w+\.)?norm\.", name) else 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        if self.stage_depths:
            return sum(self.stage_depths)
        return 1 + max(int(b[1]) for n, _ in self.named_parameters() if (b := re.search(r"\bblocks\.(\d+)\.", n)))

    def compile_passes(self) -> None:
        """Run the passes of :meth:`forward` and :meth:`tokens` through ``torch.compile``, in place."""
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    def select_blocks(self, count: int) -> None:
        """Return the outputs of ``count`` blocks, evenly spaced up to the last one, as maps.

        Their names precede the last map in :attr:`strides`.

        Raises:
            UserError: the encoder does not consist of equal blocks, or has fewer.
        """
        raise UserError(
            f"encoder '{self.name}' has no equal blocks to select from, but maps of several strides: set "
            "MODEL.PYRAMID.NAME fpn"
        )

    def checkpoint_blocks(self) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations.

        Raises:
            UserError: the encoder has no blocks to recompute.
        """
        raise UserError(f"encoder '{self.name}' has no blocks to recompute; set MODEL.ACTIVATION_CHECKPOINT False")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the last map for an image of ``height`` x ``width`` pixels."""
        stride = self.strides[self.last]
        return -(-height // stride), -(-width // stride)

    def to_config(self) -> dict[str, Any]:
        """Return the arguments with which :func:`build_encoder` builds the same encoder."""
        return {"name": self.name, **self.arguments}

    def fresh(self, source: dict[str, Any]) -> set[str]:
        """Return the names in the state dict that an encoder with the configuration ``source`` lacks by design."""
        return self._positions_only_in(self.arguments, source)

    def lacks(self, source: dict[str, Any]) -> set[str]:
        """Return the names that an encoder with the configuration ``source`` has and this one lacks by design."""
        return self._positions_only_in(source, self.arguments)

    def _positions_only_in(self, one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        name = self.position_embedding
        return {name} if name and one["pos_embed"] and not other["pos_embed"] else set()

    def accepts(self, key: str, value: Any) -> bool:
        """Whether :meth:`adapt` converts weights of an encoder whose argument ``key`` is ``value``.

        Features are equal then for images enlarged patch by patch (``patch_size``) or gray (``in_chans``).
        """
        gray = bool(self.patch_embedding) and (key, value, self.arguments[key]) == ("in_chans", 3, 1)
        return gray or bool(value == self.arguments[key])

    def adapt(self, name: str, value: Tensor, source: dict[str, Any]) -> Tensor | None:
        """Convert the tensor ``name`` of an encoder with the configuration ``source``; None if it cannot be converted.

        The patch embedding is summed over the colours, so that a gray image has the features of its RGB copy.
        """
        gray = self.arguments["in_chans"] == 1 and name == self.patch_embedding
        return value.sum(1, keepdim=True) if gray else None

    @contextmanager
    def without(self, names: set[str]) -> Iterator[None]:
        """Set the parameters ``names`` to zero inside the block, to compare with an encoder that lacks them."""
        parameters = [p.data for n, p in self.named_parameters() if n in names]
        values = [value.clone() for value in parameters]
        for value in parameters:
            value.zero_()
        try:
            yield
        finally:
            for value, before in zip(parameters, values, strict=True):
                value.copy_(before)


ENCODERS: Registry[Callable[..., Encoder]] = Registry("encoder")
# "FAMILY:MEMBER" is built by what the family's function returns for the member's name.
FAMILIES: Registry[Callable[[str], Callable[..., Encoder]]] = Registry("family of encoders")


def build_encoder(name: str, **arguments: Any) -> Encoder:
    """Build a registered encoder.

    Args:
        name: a name in :data:`ENCODERS`, or ``FAMILY:MEMBER`` with a family in :data:`FAMILIES`.
        arguments: the keyword arguments of its builder.

    Raises:
        UserError: for an unknown name or argument, or a value that the encoder does not support.
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


_STRIDES: dict[str, list[int]] = {}  # by encoder: to build one takes most of the time of loading a config


def map_strides(keys: Mapping[str, Any]) -> list[int]:
    """Return the strides, ascending, of the maps of the encoder that the config node ``MODEL`` describes."""
    described = repr((dict(keys["ENCODER"]), len(keys.get("PIXEL_MEAN", ()))))
    if described not in _STRIDES:
        with torch.device("meta"):  # parameters without memory
            encoder = encoder_from_keys(dict(keys) | {"COMPILE": False})
        _STRIDES[described] = sorted(encoder.strides.values())
    return [*_STRIDES[described]]


def encoder_from_keys(keys: Mapping[str, Any]) -> Encoder:
    """Build the encoder of the config node ``MODEL``; ``ENCODER`` holds the arguments, in capitals.

    Images have as many channels as ``PIXEL_MEAN`` has values; three without that key.

    Raises:
        UserError: see :func:`build_encoder`; or ``WINDOW`` or ``REL_POS`` is set for an encoder without them.
    """
    arguments = {key.lower(): value for key, value in keys["ENCODER"].items()}
    if "PIXEL_MEAN" in keys:  # as Detectron2 counts channels (modeling/backbone/build.py)
        arguments["in_chans"] = len(keys["PIXEL_MEAN"])
    if "window" not in inspect.signature(_builder(arguments["name"])).parameters:
        if arguments.pop("window", 0):
            raise UserError(
                f"MODEL.ENCODER.WINDOW: encoder '{arguments['name']}' does not support window attention; set it to 0"
            )
        if arguments.pop("rel_pos", False):
            raise UserError(
                f"MODEL.ENCODER.REL_POS: encoder '{arguments['name']}' has no option for relative positions; set it to "
                "False"
            )
        arguments.pop("global_blocks", None)
    encoder = build_encoder(**arguments)
    if keys["ACTIVATION_CHECKPOINT"]:
        encoder.checkpoint_blocks()
    if keys["COMPILE"]:
        encoder.compile_passes()
    return encoder
