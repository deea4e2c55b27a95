"""Pooled features of many images, in a parquet file."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from relvit_d2.analysis.features import ImageEncoder
from relvit_d2.data.images.file_cache import file_state
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing
from relvit_d2.utils.hardware import cores
from relvit_d2.utils.progress import Progress

PART = 512  # images after which the features are written, so that little is lost if the command is interrupted


class Embedded(NamedTuple):
    """Features of images.

    Attributes:
        paths: of the images.
        features: ``(N, dim)`` float32.
    """

    paths: list[str]
    features: np.ndarray


def embed(
    encoder: ImageEncoder, weights: Path, images: Sequence[Path], output: Path, size: int, batch: int
) -> list[str]:
    """Write paths and pooled features of images to a parquet file; continue if an earlier call was interrupted.

    Args:
        encoder: the encoder, read from the file or folder ``weights``.
        images: image files.
        output: the file; it appears complete, and finished parts are kept beside it until then.
        size: longer side in pixels to which images are resized; 0: the encoder's.
        batch: images that are encoded together.

    Returns:
        A sentence for each image that could not be read; these are left out.

    Raises:
        UserError: no image could be read.
    """
    folder = output.with_name(f".{output.name}.parts")
    folder.mkdir(exist_ok=True)
    tables: list[pa.Table] = []
    with Progress(desc="images", total=len(images), unit="image") as bar, ThreadPoolExecutor(cores()) as threads:
        for start in range(0, len(images), PART):
            part = images[start : start + PART]
            state = f"{file_state(weights)} {size or encoder.size} {list(map(file_state, part))}"
            key = hashlib.blake2b(state.encode(errors="surrogateescape"), digest_size=16).hexdigest()
            path = folder / f"{key}.parquet"
            if not path.exists():
                rows, errors = [], []
                for first in range(0, len(part), batch):
                    some = part[first : first + batch]
                    read = list(threads.map(lambda image: _prepared(encoder, image, size), some))
                    errors += [found for found in read if isinstance(found, str)]
                    good = {str(i): pixels for i, pixels in zip(some, read, strict=True) if not isinstance(pixels, str)}
                    features = encoder.batch([*good.values()])
                    rows += [(name, one.pooled.numpy()) for name, one in zip(good, features, strict=True)]
                    bar.update(len(some))
                _write(_table(rows, errors), path)
            else:
                bar.update(len(part))
            tables.append(parquet.read_table(path))
    errors = [error for table in tables for error in json.loads(table.schema.metadata[b"errors"])]
    filled = [table.replace_schema_metadata(None) for table in tables if len(table)]
    if not filled:
        raise UserError(f"none of the {len(images)} images could be read: {errors[0]}")
    _write(
        pa.concat_tables(filled).replace_schema_metadata({"weights": str(weights), "size": str(size or encoder.size)}),
        output,
    )
    shutil.rmtree(folder)
    return errors


def read_features(file: Path) -> Embedded:
    """Read a file that :func:`embed` wrote.

    Raises:
        UserError: it is missing, damaged or of another program.
    """
    try:
        table = parquet.read_table(file, columns=["path", "features"])
        paths, rows = table["path"].to_pylist(), table["features"].combine_chunks()
        features = rows.flatten().to_numpy().reshape(len(paths), -1)
    except (OSError, pa.ArrowException, AttributeError, ValueError, KeyError) as error:
        raise UserError(f"'{file}' is not a file of relvit-d2 embed ({error}): write it with that command") from error
    if features.dtype != np.float32 or not features.size or not np.isfinite(features).all():
        raise UserError(f"'{file}' holds no finite float32 features: write it again with relvit-d2 embed")
    return Embedded(paths, features)


def _prepared(encoder: ImageEncoder, image: Path, size: int) -> Any:
    """Return the pixels of an image, or the error as text."""
    try:
        return encoder.prepared(image, size)
    except UserError as error:
        return str(error)


def _table(rows: list[tuple[str, np.ndarray]], errors: list[str]) -> pa.Table:
    dim = len(rows[0][1]) if rows else 0
    values = np.concatenate([features for _, features in rows]) if rows else np.empty(0, np.float32)
    columns = {
        "path": pa.array([name for name, _ in rows], pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(values), dim) if rows else pa.array([]),
    }
    return pa.table(columns).replace_schema_metadata({"errors": json.dumps(errors)})


def _write(table: pa.Table, path: Path) -> None:
    with appearing(path) as part:
        parquet.write_table(table, part)
