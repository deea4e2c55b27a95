"""Lists of training data, by which a resumed run detects that they have changed."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from relvit_d2.data.images.archive import Member
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.utils.paths import dataset_root

_THREADS = 16  # which mostly wait for the disk
_CHUNK = 1000  # images


def data_lines(samples: Sequence[Any], labels: Tensor | None = None, hash_contents: bool = False) -> list[str]:
    """Return a line of JSON for each training image: ``[name, size, state, annotations]``.

    The name is the path, relative to the data root if it lies below it. The state is the modification time in ns (of
    the archive for one of its members) or a digest of the contents, the annotations a digest of them.

    Args:
        samples: an image stack, image files, or Detectron2's records.
        labels: ``(n,)`` classes of the images.
        hash_contents: read the files; images in memory are always compared by their contents.
    """
    root = f"{dataset_root()}/"

    def lines(start: int) -> list[str]:
        found = []
        for index in range(start, min(start + _CHUNK, len(samples))):
            name, size, state, annotations = _entry(samples, index, hash_contents)
            label = annotations if labels is None else int(labels[index])
            found.append(json.dumps([name.removeprefix(root), size, state, label]))
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lines, range(0, len(samples), _CHUNK))))


def _entry(samples: Sequence[Any], index: int, hash_contents: bool) -> tuple[str, int, int | str, str]:
    sample = samples[index]
    if isinstance(sample, Tensor):
        name = samples.name if isinstance(samples, ImageStack) else "image"
        content = sample.cpu().contiguous().numpy().tobytes()
        return f"{name} {index}", len(content), _digest(content), ""
    annotations = ""
    if isinstance(sample, dict):
        rest = {key: value for key, value in sample.items() if key != "file_name"}
        annotations = _digest(json.dumps(rest, sort_keys=True, default=str).encode())
        sample = sample["file_name"]
    try:
        if hash_contents:
            content = sample.open().read() if isinstance(sample, Member) else Path(sample).read_bytes()
            return str(sample), len(content), _digest(content), annotations
        state = (sample.archive if isinstance(sample, Member) else Path(sample)).stat()
    except OSError:
        return str(sample), 0, "absent", annotations
    size = sample.size if isinstance(sample, Member) else state.st_size
    return str(sample), size, state.st_mtime_ns, annotations


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
