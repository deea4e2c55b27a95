"""AdamW with the groups that decay and those that do not."""

import logging

import torch
from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.errors import UserError

# Tables of positions and tokens: decay would pull them to zero without a loss asking for it
# (timm's VisionTransformer.no_weight_decay names the same).
_UNDECAYED = ("pos_embed", "cls_token")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """Build AdamW with ``SOLVER.WEIGHT_DECAY`` on weight matrices only.

    Norms take ``SOLVER.WEIGHT_DECAY_NORM``, biases ``SOLVER.WEIGHT_DECAY_BIAS``, position embeddings and
    class tokens none. Parameters that need no gradient are left out.
    """
    solver = cfg.SOLVER
    bias_decay = solver.WEIGHT_DECAY if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name in _UNDECAYED:
                decay = 0.0
            elif _is_norm(module):
                decay = solver.WEIGHT_DECAY_NORM
            elif name == "bias":
                decay = bias_decay
            else:
                decay = solver.WEIGHT_DECAY
            groups.setdefault(decay, []).append(parameter)
    logging.getLogger(__name__).info(
        "AdamW: " + ", ".join(f"{sum(p.numel() for p in g):,} values decay {d}" for d, g in groups.items())
    )
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()], lr=solver.BASE_LR
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether a module's weight scales features one by one, as every norm's does (Detectron2's own LayerNorm too)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1 and not isinstance(module, nn.PReLU)


def build_clipper(cfg: CfgNode, model: nn.Module) -> "GradientClipper":
    """Build the clipping that ``SOLVER.CLIP_GRADIENTS`` asks for.

    Raises:
        UserError: for a ``CLIP_TYPE`` other than ``full_model``, the global norm of all gradients.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE != "full_model":
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE '{clip.CLIP_TYPE}' clips each tensor on its own and is not offered; "
            "set it to full_model (the global norm) or set SOLVER.CLIP_GRADIENTS.ENABLED False"
        )
    return GradientClipper(model, clip.CLIP_VALUE if clip.ENABLED else float("inf"), clip.NORM_TYPE)


class GradientClipper:
    """Scales all gradients so that their global norm is at most a limit.

    Args:
        model: whose parameters.
        limit: the largest norm allowed; infinity only measures it.
        norm_type: the order of the norm.
    """

    def __init__(self, model: nn.Module, limit: float, norm_type: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._limit, self._norm_type = limit, norm_type

    def __call__(self) -> torch.Tensor:
        """Clip in place and return the norm before it."""
        return nn.utils.clip_grad_norm_(self._parameters, self._limit, self._norm_type)
