"""The process group of a run with several processes."""

import sys
from typing import Any


def process_group() -> Any:
    """Return the module ``torch.distributed`` if this process belongs to a group, else None.

    Does not import torch: without it there is no group, and usage errors are reported before it is loaded.
    """
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None
