"""Tokens-to-Token Vision Transformer, T2T-ViT-14 with token performers.

"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (Yuan et al., 2021), sections 3.1 and 3.3.
Constants and parameter names are those of RelViT's published code, ``models/backbones/t2t.py``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from relvit_d2.encoders.base import ENCODERS
from relvit_d2.encoders.plain import PlainEncoder
from relvit_d2.utils.errors import UserError

PATCH = 16  # pixels; the product of the soft splits' strides 4, 2 and 2
DIM, DEPTH, HEADS, MLP_RATIO = 384, 14, 6, 3.0
PERFORMER_DROPOUT = 0.1  # rate after the projection and after the MLP
TOKEN_DIM = 64  # channels of the performers' tokens


class Performer(nn.Module):
    """Single-head attention with memory linear in the number of tokens, and an MLP (``t2t.py:153-204``).

    An attention weight is the product of positive random features of query and key ("Rethinking Attention with
    Performers", Choromanski et al., 2021, lemma 1), so the sums over all keys are computed once for all queries. Random
    directions of length ``sqrt(dim)`` would estimate the softmax kernel ``exp(q . k)``; the published ones, of length
    ``sqrt(dim / 2)``, estimate ``exp(-|q - k|^2 / 4)``.

    Args:
        in_dim: channels of the input tokens.
        dim: channels of the output tokens.

    Attributes:
        w: ``(dim // 2, dim)`` random directions: orthogonal, each of length ``sqrt(dim // 2)``, not trained.
    """

    epsilon = 1e-8  # added to the denominator

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dp = nn.Dropout(PERFORMER_DROPOUT)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(PERFORMER_DROPOUT))
        self.w: Tensor
        features = dim // 2
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, in_dim)`` to ``(B, N, dim)``."""
        keys, queries, values = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        # Input and output differ in channels, so the residual connection starts at the values.
        x = values + self.dp(self.proj(self.attend(keys, queries, values).to(values.dtype)))
        return x + self.mlp(self.norm2(x))

    def attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        """Average the values with the kernel's weights, all ``(B, N, dim)``, in float32 or wider."""
        precision = torch.promote_types(values.dtype, torch.float32)
        with torch.autocast(values.device.type, enabled=False):
            keys, queries = self.features(keys.to(precision)), self.features(queries.to(precision))
            sums = keys.transpose(1, 2) @ values.to(precision)
            weights = queries @ keys.sum(1).unsqueeze(-1)
            return queries @ sums / (weights + self.epsilon)

    def features(self, x: Tensor) -> Tensor:
        """Map ``(B, N, dim)`` to positive random features ``(B, N, m)``, ``exp(w . x - |x|^2 / 2) / sqrt(m)``.

        The exponent is at most ``|w|^2 / 2 = m / 2``, which is 16 for 64 channels, for any ``x``. Float32 does not
        overflow, and underflow is far below ``epsilon``, so no maximum needs to be subtracted.
        """
        w = self.w.to(x.dtype)
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


class TokensToToken(nn.Module):
    """Three soft splits: overlapping windows of side 7, 3 and 3 as tokens (``t2t.py:255-257``).

    Args:
        in_chans: channels of the images.
        dim: channels of the output tokens.
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
    """Unfold maps ``(B, C, h, w)`` into overlapping windows ``(B, N, C * kernel * kernel)`` in row-major order."""
    return F.unfold(maps, kernel, padding=padding, stride=stride).transpose(1, 2)


def as_map(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Reshape tokens ``(B, rows * cols, C)`` to ``(B, C, rows, cols)``."""
    return tokens.transpose(1, 2).unflatten(2, (rows, cols))


def sinusoid(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Return the sinusoidal position encoding ``(length, dim)``, float64 in -1..1.

    Channels ``2 i`` and ``2 i + 1`` are the sine and cosine of ``position / 10000^(2 i / dim)`` ("Attention Is All You
    Need", Vaswani et al., 2017, section 3.5). Float32 would have an error of 1e-4 at angles of thousands.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] / 10000 ** (steps / dim)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


@ENCODERS.register("t2t_vit_14")
class T2T(PlainEncoder):
    """T2T-ViT-14 (21.1 million parameters): one map of stride 16 and 384 channels, after the final norm.

    Positions are encoded by a sinusoid of the index in the sequence: 0 for the class token, ``1 + row * cols + col``
    for a patch. The table is computed for each image size and not stored; for 14 x 14 patches it is the published one.
    The soft splits pad with zeros, so tokens near the border have position information without the sinusoid too.

    Args:
        patch_size: 16.
        img_size: no effect.
        pos_embed: whether to add the sinusoid.
        drop_path: stochastic depth rate of the last block, 0..1; it decreases linearly towards the first.
        dropout: dropout rate after the embedding, after the attention projection and in the MLP of the blocks, 0..1;
            that of the performers is 0.1, as published.
        in_chans: channels of the images.

    Raises:
        UserError: ``patch_size`` is not 16.
    """

    position_embedding = "sinusoid"  # not a parameter
    prefix = 1  # the class token

    def __init__(
        self,
        patch_size: int = PATCH,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__(PATCH, DIM)
        if patch_size != PATCH:
            raise UserError(
                f"MODEL.ENCODER.PATCH_SIZE {patch_size} is not supported by t2t_vit_14, whose soft splits give patches "
                f"of {PATCH} pixels; set it to {PATCH}"
            )
        self.positions = pos_embed
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

    @property
    def sequence_blocks(self) -> nn.Sequential:
        return self.blocks

    @property
    def final_norm(self) -> nn.Module:
        return self.norm

    def embed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        tokens = self.tokens_to_token(F.pad(images, (0, -width % PATCH, 0, -height % PATCH)))
        tokens = torch.cat((self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.positions:
            tokens = tokens + sinusoid(tokens.shape[1], DIM, tokens.device).to(tokens.dtype)
        return self.pos_drop(tokens)

    def compile_passes(self) -> None:
        """Compile the performers and the blocks; the soft splits stay eager.

        They only copy, and torch 2.11 needs minutes to simplify their indices once the size of an image may vary.
        """
        self.tokens_to_token.attention1.compile()
        self.tokens_to_token.attention2.compile()
        super().compile_passes()

    @contextmanager
    def without(self, names: set[str]) -> Iterator[None]:
        """Omit the sinusoid inside the block if it is in ``names``."""
        before, self.positions = self.positions, self.positions and "sinusoid" not in names
        try:
            yield
        finally:
            self.positions = before
