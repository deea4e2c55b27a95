"""AdamW with parameter groups, and gradient clipping."""

import logging
from collections import Counter

import torch
from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.encoders import Encoder
from relvit_d2.utils.errors import UserError

logger = logging.getLogger(__name__)

# As no_weight_decay of timm's VisionTransformer and SwinTransformer; frequencies of learnt rotary positions.
_WITHOUT_DECAY = ("pos_embed", "cls_token", "relative_position_bias_table", "freqs")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """Build AdamW with ``SOLVER.WEIGHT_DECAY`` for weight matrices.

    Norms have ``SOLVER.WEIGHT_DECAY_NORM``, biases ``SOLVER.WEIGHT_DECAY_BIAS``; position embeddings, relative position
    biases and class tokens have none. Frozen parameters are omitted. The learning rate of a group is multiplied by its
    ``scale``: ``SOLVER.LAYER_DECAY`` to the power of the number of encoder layers above, and 1 outside the encoder (K.
    Clark et al., "ELECTRA", 2020).
    """
    solver = cfg.SOLVER
    if not 0 < solver.LAYER_DECAY <= 1:
        raise UserError(f"SOLVER.LAYER_DECAY {solver.LAYER_DECAY} is out of range; give more than 0, at most 1")
    layers_above = _layers_above(model) if solver.LAYER_DECAY < 1 else {}
    bias_decay = solver.WEIGHT_DECAY if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name in _WITHOUT_DECAY:
                decay = 0.0
            elif _is_norm(module):
                decay = solver.WEIGHT_DECAY_NORM
            elif name.endswith("bias"):
                decay = bias_decay
            else:
                decay = solver.WEIGHT_DECAY
            scale = solver.LAYER_DECAY ** layers_above.get(id(parameter), 0)
            groups.setdefault((decay, scale), []).append(parameter)
    decays: Counter[float] = Counter()
    for (decay, _), group in groups.items():
        decays[decay] += sum(p.numel() for p in group)
    logger.info("AdamW: " + ", ".join(f"{count:,} values with weight decay {decay}" for decay, count in decays.items()))
    if solver.LAYER_DECAY < 1:
        least = min(scale for _, scale in groups)
        logger.info(f"learning rate factors from {least:.3g} (patch embedding) to 1 (SOLVER.LAYER_DECAY)")
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()],
        lr=solver.BASE_LR,
    )


def _layers_above(model: nn.Module) -> dict[int, int]:
    """Return the number of layers above each encoder parameter, by its ``id``; the heads count as one layer."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    return {id(p): e.depth + 1 - e.depth_of(name) for e in encoders for name, p in e.named_parameters()}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module's weight scales single features, as in every norm, including Detectron2's LayerNorm."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1 and not isinstance(module, nn.PReLU)


def build_clipper(cfg: CfgNode, model: nn.Module) -> "GradientClipper":
    """Build the gradient clipping of ``SOLVER.CLIP_GRADIENTS``.

    Raises:
        UserError: ``CLIP_TYPE`` is not ``full_model``, the global norm of all gradients.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE != "full_model":
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE '{clip.CLIP_TYPE}' clips each tensor separately and is not supported; "
            "set it to full_model (the global norm) or set SOLVER.CLIP_GRADIENTS.ENABLED False"
        )
    return GradientClipper(model, clip.CLIP_VALUE if clip.ENABLED else float("inf"), clip.NORM_TYPE)


class GradientClipper:
    """Clips the global norm, of order ``norm_type``, of all gradients to ``limit``; infinity: no clipping."""

    def __init__(self, model: nn.Module, limit: float, norm_type: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._limit, self._norm_type = limit, norm_type

    def __call__(self) -> torch.Tensor:
        """Clip in place; return the norm before clipping."""
        return nn.utils.clip_grad_norm_(self._parameters, self._limit, self._norm_type)
