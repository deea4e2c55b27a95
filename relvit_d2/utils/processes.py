"""The process group of torch.distributed."""

import sys
from typing import Any


def process_group() -> Any:
    """Return the module ``torch.distributed`` if a process group is initialised, else None; does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None
