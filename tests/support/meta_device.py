"""The meta device as a GPU whose values cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _WithoutWaiting(TorchDispatchMode):
    """Raises where an operation would wait for a GPU; torch itself raises where a value of a meta tensor is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, device = func.overloadpacket.__name__, kwargs.get("device")
        is_copy = name in ("_to_copy", "copy_")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and (is_copy or x.ndim)]
        devices = {x.device.type for x in tensors} | ({torch.device(device).type} if device is not None else set())
        if len(devices) > 1:
            waits = not (is_copy and (kwargs.get("non_blocking") or args[2:3] == (True,)))
            assert not waits, f"{name} of values on {' and '.join(sorted(devices))} waits for the device"
        return func(*args, **kwargs)


class _WithoutLists(TorchFunctionMode):
    """Raises where a list of numbers is copied to the device, which torch does without a dispatched operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copies = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        assert not (copies and made.is_meta), f"{func.__name__} waits for the device"
        return made


@contextmanager
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the block fail where a computation on the meta device would wait for a GPU.

    The meta device has no autocast, so that the block has none.
    """
    autocast = torch.autocast

    def chosen(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    with monkeypatch.context() as patch, _WithoutWaiting(), _WithoutLists():
        patch.setattr(torch, "autocast", chosen)
        yield
