"""Digests of nested values, by which damage to a file is detected."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def content_digest(content: Any) -> str:
    """Return the SHA-256 digest, in hexadecimal, of tensors and plain values in dicts, lists and tuples.

    It depends on the types, shapes and bytes of tensors, not on their devices or on the order of the keys of a dict.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {flat.dtype} {tuple(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=repr):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _add(digest, item)
    else:
        text = repr(value).encode(errors="surrogatepass")
        digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
