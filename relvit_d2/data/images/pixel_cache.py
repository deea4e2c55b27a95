"""Cache of decoded images, so that an image is decoded once instead of in every epoch."""

import atexit
import hashlib
import logging
import math
import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torchvision
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.file_cache import file_state
from relvit_d2.data.user_cache import cache_root
from relvit_d2.utils.files import is_other_process
from relvit_d2.utils.hardware import free_memory
from relvit_d2.utils.loader_workers import loader_workers

VERSION = 1  # of the files; those of another version are not used
HEADER = 64  # bytes before the pixels: height, width and channels as int32, zeros; a multiple of a cache line
RESERVE = 2**30  # bytes of the disk or of shared memory that are left free

logger = logging.getLogger(__name__)


class PixelCache:
    """Decoded images as files of uint8 values, one for each image, mapped into the memory of every process.

    The pixels are bitwise identical to those of :meth:`relvit_d2.data.images.decode.PixelFormat.read`. A file is
    identified by path, size and times of the image, and by the decoder's settings and versions; it appears complete.
    Images that do not fit the limit, and all further ones after an error in writing, are decoded each time.

    Args:
        pixels: the format; None for 8-bit RGB.
        longest: see :meth:`~relvit_d2.data.images.decode.PixelFormat.read`.
        folder: folder of the files, which is created; None to decode each time.
        share: maximum number of bytes that each process writes.
    """

    def __init__(
        self, pixels: PixelFormat | None = None, longest: int = 0, folder: Path | None = None, share: int = 0
    ) -> None:
        self._pixels = pixels = pixels or PixelFormat()
        self._longest, self._folder, self._left = longest, folder, share
        self._decoder = repr((VERSION, pixels, longest, PIL.__version__, torchvision.__version__))

    @classmethod
    def of(cls, cfg: CfgNode, longest: int) -> "PixelCache":
        """Return the cache of ``DATALOADER.CACHE`` and ``DATALOADER.CACHE_LIMIT_GB`` for ``INPUT.CHANNELS``."""
        pixels, mode = PixelFormat.of(cfg), cfg.DATALOADER.CACHE
        if mode == "off":
            return cls(pixels, longest)
        limit = int(cfg.DATALOADER.CACHE_LIMIT_GB * 1e9)
        try:
            folder = _shared_memory() if mode == "ram" else cache_root() / "pixels"
            folder.mkdir(parents=True, exist_ok=True)
            used = _shrink(folder, limit)
            free = shutil.disk_usage(folder).free - RESERVE
        except OSError as error:
            logger.warning(f"images are decoded in every epoch: the cache of pixels cannot be written ({error})")
            return cls(pixels, longest)
        if mode == "ram":
            free = min(free, int(free_memory("cpu")) - RESERVE)
        writers = max(1, loader_workers(cfg)) * comm.get_local_size()
        return cls(pixels, longest, folder, max(0, min(limit - used, free)) // writers)

    def read(self, image: ImageFile | str) -> np.ndarray:
        """Return the pixels of an image, uint8 ``(H, W, channels)``; arguments and errors as for ``PixelFormat.read``.

        Changes of the array are not written to the cache.
        """
        if not self._folder:
            return self._pixels.read(image, self._longest)
        file = Path(image) if isinstance(image, str) else image
        state = f"{self._decoder}\0{Path.cwd()}\0{file_state(file)}".encode(errors="surrogateescape")
        name = hashlib.blake2b(state, digest_size=16).hexdigest()
        path = self._folder / name[:2] / name[2:]
        if (known := _load(path)) is not None:
            return known
        decoded = self._pixels.read(image, self._longest)
        if decoded.nbytes + HEADER <= self._left:
            self._left -= decoded.nbytes + HEADER
            try:
                _store(path, decoded)
            except OSError as error:
                self._left = 0
                logger.warning(f"further images are decoded in every epoch: the cache cannot be written ({error})")
        return decoded


def _load(path: Path) -> np.ndarray | None:
    """Return the array in a file of the cache, None if it is missing or incomplete."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        os.utime(path)  # the files that have not been used for the longest time are removed first
    except (OSError, ValueError):  # missing or empty
        return None
    if len(content) <= HEADER:
        return None
    shape = content[:12].view(np.int32).tolist()
    return content[HEADER:].reshape(shape) if len(content) == HEADER + math.prod(shape) else None


def _store(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb", buffering=0) as file:
            file.write(np.array(pixels.shape, np.int32).tobytes().ljust(HEADER, b"\0"))
            file.write(np.ascontiguousarray(pixels).data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _shrink(folder: Path, limit: int) -> int:
    """Remove the files that have not been used for the longest time until a tenth of the limit is free.

    Returns:
        The number of bytes that remain.
    """
    files = []
    for part in os.scandir(folder):
        for entry in os.scandir(part):
            with suppress(OSError):  # another process has removed it
                state = entry.stat()
                files.append((state.st_mtime_ns, state.st_size, entry.path))
    used = sum(size for _, size, _ in files)
    if used <= limit:
        return used
    for _, size, path in sorted(files):
        if used <= 0.9 * limit:
            break
        with suppress(OSError):
            Path(path).unlink()
            used -= size
    return used


def _shared_memory() -> Path:
    """Return a folder in memory for this run, which is removed at its end, and remove those of killed runs."""
    root = Path("/dev/shm")
    if not root.is_dir():
        root = Path(tempfile.gettempdir())
    prefix = f"relvit_d2_{os.getuid() if hasattr(os, 'getuid') else ''}_"
    owner = os.getppid() if comm.get_world_size() > 1 else os.getpid()  # the same for all processes of a run
    for folder in root.glob(f"{prefix}*"):
        number = folder.name.removeprefix(prefix)
        if number.isdecimal() and int(number) != owner and not is_other_process(int(number)):
            shutil.rmtree(folder, ignore_errors=True)
    folder = root / f"{prefix}{owner}"
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, creator: int) -> None:
    if os.getpid() == creator:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
