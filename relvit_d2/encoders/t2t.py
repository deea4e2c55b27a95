"""Tokens-to-Token Vision Transformer, T2T-ViT-14 with token performers.

"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (Yuan et al., 2021), sections 3.1 and 3.3.
Constants are those of the authors' code of RelViT, ``models/backbones/t2t.py``; so are the names of the parameters.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relvit_d2.encoders.base import ENCODERS, Encoder, evenly
from relvit_d2.utils.errors import UserError

PATCH = 16  # strides 4, 2 and 2 of the soft splits
DIM, DEPTH, HEADS, MLP_RATIO = 384, 14, 6, 3.0
TOKEN_DIM = 64  # of the performers' tokens


class Performer(nn.Module):
    """Attention in memory linear in the tokens, one head, and an MLP (``t2t.py:153-204``).

    The weight of a key is the product of positive random features of both ("Rethinking Attention with Performers",
    Choromanski et al., 2021, lemma 1), so that the sums over all keys are made once for all queries. Random directions
    of length ``sqrt(dim)`` would estimate the kernel of softmax, ``exp(q . k)``; the published ones, of length
    ``sqrt(dim / 2)``, estimate ``exp(-|q - k|^2 / 4)``.

    Args:
        in_dim: channels of the tokens that come in.
        dim: channels of the tokens that go out.
        dropout: after the projection and after the MLP, 0..1.

    Attributes:
        w: ``(dim // 2, dim)``, the random directions: orthogonal, each of length ``sqrt(dim // 2)``, never trained.
    """

    epsilon = 1e-8  # added to the denominator

    def __init__(self, in_dim: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dp = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))
        self.w: Tensor
        features = dim // 2
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, in_dim)`` to ``(B, N, dim)``."""
        keys, queries, values = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        # Tokens have other channels than before, so what is skipped to is the value.
        x = values + self.dp(self.proj(self.attend(keys, queries, values).to(values.dtype)))
        return x + self.mlp(self.norm2(x))

    def attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        """Mean of the values, weighted for each query by the kernel: all ``(B, N, dim)``, in float32 at least."""
        precision = torch.promote_types(values.dtype, torch.float32)
        with torch.autocast(values.device.type, enabled=False):
            keys, queries = self.features(keys.to(precision)), self.features(queries.to(precision))
            sums = keys.transpose(1, 2) @ values.to(precision)
            weights = queries @ keys.sum(1).unsqueeze(-1)
            return queries @ sums / (weights + self.epsilon)

    def features(self, x: Tensor) -> Tensor:
        """Map ``(B, N, dim)`` to positive random features ``(B, N, m)``, ``exp(w . x - |x|^2 / 2) / sqrt(m)``.

        The exponent is at most ``|w|^2 / 2 = m / 2``, 16 for tokens of 64 channels, however large ``x`` is. So nothing
        overflows float32, and what underflows is far below ``epsilon``: no maximum needs to be subtracted.
        """
        w = self.w.to(x.dtype)
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


class TokensToToken(nn.Module):
    """Three soft splits, overlapping windows as tokens, of 7, 3 and 3 pixels a side (``t2t.py:255-257``).

    Args:
        in_chans: channels of the images.
        dim: channels of the tokens that go out.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.attention1 = Performer(in_chans * 7 * 7, TOKEN_DIM)
        self.attention2 = Performer(TOKEN_DIM * 3 * 3, TOKEN_DIM)
        self.project = nn.Linear(TOKEN_DIM * 3 * 3, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)``, multiples of 16 pixels, to tokens ``(B, H / 16 * W / 16, dim)``."""
        height, width = images.shape[-2:]
        tokens = self.attention1(soft_split(images, kernel=7, stride=4, padding=2))
        tokens = self.attention2(soft_split(as_map(tokens, height // 4, width // 4), kernel=3, stride=2, padding=1))
        return self.project(soft_split(as_map(tokens, height // 8, width // 8), kernel=3, stride=2, padding=1))


def soft_split(maps: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Cut maps ``(B, C, h, w)`` into windows that overlap: ``(B, N, C * kernel * kernel)``, row by row."""
    return F.unfold(maps, kernel, padding=padding, stride=stride).transpose(1, 2)


def as_map(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Lay tokens ``(B, rows * cols, C)`` out as ``(B, C, rows, cols)``."""
    return tokens.transpose(1, 2).unflatten(2, (rows, cols))


def sinusoid(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions ``(length, dim)``, float64, -1..1.

    Channels ``2 i`` and ``2 i + 1`` are the sine and cosine of ``position / 10000^(2 i / dim)`` ("Attention Is All You
    Need", Vaswani et al., 2017, section 3.5). Float32 would round an angle of thousands by 1e-4.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] / 10000 ** (steps / dim)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class T2T(Encoder):
    """One map of stride 16 and 384 channels, after the final norm.

    Positions are a sinusoid of the place in the sequence: 0 is the class token, ``1 + row * cols + col`` a patch. The
    table is made for each size and not stored; for 14 x 14 patches it is the published one. Windows of the soft splits
    see zeros beyond the border, so tokens near it have position information without the sinusoid too.

    Args:
        pos_embed: whether the sinusoid is added.
        drop_path: stochastic depth of the last block, 0..1; earlier blocks linearly less.
        dropout: dropout after the embedding, the attention's projection and in the MLP of the blocks, 0..1;
            that of the performers is 0.1 as published.
        in_chans: channels of the images.
    """

    traced = ("height", "width")  # torch 2.11 tells a batch of one from larger ones

    def __init__(self, pos_embed: bool, drop_path: float, dropout: float, in_chans: int) -> None:
        super().__init__()
        self.strides, self.channels = {"s16": PATCH}, {"s16": DIM}
        self.positions, self.checkpointing = pos_embed, False
        self.taps: list[int] = []
        self.tokens_to_token = TokensToToken(in_chans, DIM)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_drop = nn.Dropout(dropout)
        rates = torch.linspace(0, drop_path, DEPTH, device="cpu").tolist()
        arguments: dict[str, Any] = {
            "mlp_ratio": MLP_RATIO,
            "qkv_bias": False,
            "proj_drop": dropout,
            "norm_layer": nn.LayerNorm,
        }
        self.blocks = nn.Sequential(*(Block(DIM, HEADS, drop_path=rate, **arguments) for rate in rates))
        self.norm = nn.LayerNorm(DIM)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :class:`Encoder`; sides that are no multiples of 16 are padded with zeros, right and bottom."""
        height, width = images.shape[-2:]
        maps = self.forward_blocks(self.embed(images))
        return {name: as_map(m[:, 1:], *self.grid(height, width)) for name, m in zip(self.strides, maps, strict=True)}

    def pooled_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Encoder`: the class token."""
        sequence = self.forward_blocks(self.embed(images))[-1]
        return sequence[:, 0], sequence[:, 1:]

    def embed(self, images: Tensor) -> Tensor:
        """Make the patches ``(B, N, 384)`` of images ``(B, C, H, W)``."""
        height, width = images.shape[-2:]
        return self.tokens_to_token(F.pad(images, (0, -width % PATCH, 0, -height % PATCH)))

    def forward_blocks(self, tokens: Tensor) -> list[Tensor]:
        """Run the embedded patches ``(B, N, 384)`` through the blocks, with class token and positions.

        Returns:
            The normed outputs of the tapped blocks and of the last one, ``(B, 1 + N, 384)`` each, class token first.
        """
        tokens = torch.cat((self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.positions:
            tokens = tokens + sinusoid(tokens.shape[1], DIM, tokens.device).to(tokens.dtype)
        tokens, outputs = self.pos_drop(tokens), []
        for index, block in enumerate(self.blocks):
            tokens = checkpoint(block, tokens, use_reentrant=False) if self.checkpointing else block(tokens)
            if index in self.taps:
                outputs.append(self.norm(tokens))
        return [*outputs, self.norm(tokens)]

    def select_blocks(self, count: int) -> None:
        """See :class:`Encoder`; every map goes through the final norm."""
        *self.taps, _ = evenly(count, DEPTH, self.name)
        names = [*(f"b{index + 1}" for index in self.taps), self.last]
        self.strides, self.channels = dict.fromkeys(names, PATCH), dict.fromkeys(names, DIM)

    def checkpoint_blocks(self) -> None:
        """See :class:`Encoder`."""
        self.checkpointing = True

    def compile_passes(self) -> None:
        """See :class:`Encoder`; the soft splits stay as they are.

        They only copy, and torch 2.11 takes minutes to simplify their indices once the size of an image may vary.
        """
        self.tokens_to_token.attention1.compile()
        self.tokens_to_token.attention2.compile()
        self.forward_blocks = torch.compile(self.forward_blocks)  # type: ignore[method-assign]

    def fresh(self, source: dict[str, Any]) -> set[str]:
        """The sinusoid, which is no parameter, is new when the source was trained without it."""
        return {"sinusoid"} if self.positions and not source["pos_embed"] else set()

    def lacks(self, source: dict[str, Any]) -> set[str]:
        """See :class:`Encoder`; all that can be left out is the sinusoid."""
        return {"sinusoid"} if source["pos_embed"] and not self.positions else set()

    @contextmanager
    def without(self, fresh: set[str]) -> Iterator[None]:
        """See :class:`Encoder`; all that can be fresh is the sinusoid."""
        kept, self.positions = self.positions, self.positions and "sinusoid" not in fresh
        try:
            yield
        finally:
            self.positions = kept


@ENCODERS.register("t2t_vit_14")
def t2t_vit_14(
    patch_size: int = PATCH,
    img_size: int = 224,
    pos_embed: bool = True,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    in_chans: int = 3,
) -> Encoder:
    """Build a T2T-ViT-14, of 21.1 million parameters; ``img_size`` changes nothing.

    Raises:
        UserError: if ``patch_size`` is not 16.
    """
    if patch_size != PATCH:
        raise UserError(
            f"MODEL.ENCODER.PATCH_SIZE {patch_size} is not that of t2t_vit_14, whose soft splits make patches of "
            f"{PATCH} pixels; set it to {PATCH}"
        )
    return T2T(pos_embed, drop_path, dropout, in_chans)
