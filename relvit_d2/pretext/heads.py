"""The head of the pair tasks."""

from torch import Tensor, nn

from relvit_d2.utils.errors import UserError


class PairHead(nn.Module):
    """Projects tokens to the queries and keys of the score maps of a pair task.

    Each map has width floor(dim / maps), no bias and the default initialisation of ``nn.Linear`` (authors' code,
    models/relvit.py:66-81,138-147). The authors' value projections do not affect a loss and are omitted.

    Args:
        dim: width of a token.
        maps: scores per pair: nine for relations, one for a distance or an angle.

    Raises:
        UserError: ``dim`` is less than ``maps``.
    """

    def __init__(self, dim: int, maps: int) -> None:
        super().__init__()
        self.maps, self.width = maps, dim // maps
        if not self.width:
            raise UserError(
                f"tokens of width {dim} are too narrow for the relation head's {maps} score maps: "
                f"choose an encoder of width {maps} or more"
            )
        self.query_key = nn.Linear(dim, 2 * maps * self.width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``(B, N, dim)`` tokens to queries and keys, ``(B, maps, N, width)`` each."""
        batch, count, _ = tokens.shape
        maps = self.query_key(tokens).view(batch, count, 2, self.maps, self.width)
        queries, keys = maps.permute(2, 0, 3, 1, 4)
        return queries, keys
