"""Images inside zip and tar files, read without unpacking."""

import bz2
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from relvit_d2.utils.errors import UserError

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

# Exceptions of tarfile and zipfile for damaged archives, beside OSError.
ARCHIVE_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, LookupError, OverflowError),
)

MAX_SIZE = 2**28 + 2**24
"""Maximum size of an image file in bytes, in an archive unpacked: a small zip can unpack to gigabytes of memory."""


@dataclass(frozen=True)
class Member:
    """An image inside an archive.

    Attributes:
        archive: the file.
        name: of the member; never used as a path to write to.
        offset: of its bytes in a tar; -1 in a zip, which finds members by name.
        size: bytes, unpacked.
        content: the bytes, of a member of a compressed tar.
    """

    archive: Path
    name: str
    offset: int
    size: int
    content: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def open(self, limit: int = -1) -> io.BytesIO:
        """Return the unpacked bytes, or the first ``limit`` if that is not negative.

        Raises:
            OSError: they cannot be read.
        """
        if self.size > MAX_SIZE:
            raise OSError(f"its size is {self.size} bytes, above the limit of {MAX_SIZE}")
        if self.content is not None:
            return io.BytesIO(self.content if limit < 0 else self.content[:limit])
        if self.offset < 0:
            try:
                return io.BytesIO(self._unpacked(self.size if limit < 0 else min(limit, self.size)))
            except ARCHIVE_DAMAGE as error:
                raise OSError(str(error)) from error  # damaged, encrypted, or an unsupported compression
        with self.archive.open("rb") as tar:
            tar.seek(self.offset)
            return io.BytesIO(tar.read(self.size if limit < 0 else min(limit, self.size)))

    def _unpacked(self, count: int) -> bytes:
        """Return the first ``count`` bytes of a zip's member, in memory proportional to its size."""
        file = _zip(self.archive, os.getpid())
        info = file.getinfo(self.name)
        if info.compress_type not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            with file.open(info) as packed:
                return packed.read(count)
        # zipfile unpacks other methods without a limit: gigabytes from a member that declares a kilobyte.
        raw = copy(info)
        raw.compress_type, raw.file_size, raw.CRC = zipfile.ZIP_STORED, info.compress_size, None  # type: ignore[assignment]
        with file.open(raw) as packed:
            data = packed.read(MAX_SIZE)
        decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor = bz2.BZ2Decompressor()
        if info.compress_type == zipfile.ZIP_LZMA:
            # The properties after a header of 4 bytes, as in a file of the format LZMA alone, with unknown size.
            data = data[4:9] + b"\xff" * 8 + data[9:]
            decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_SIZE)
        content = decompressor.decompress(data, self.size)
        if len(content) != self.size or zlib.crc32(content) != info.CRC:
            raise ValueError("a checksum or a size is wrong")
        return content[:count]


ImageFile = Path | Member


def is_archive(path: Path) -> bool:
    """Whether ``path`` has the extension of an archive, a compressed tar included."""
    return path.name.lower().endswith(ARCHIVES + COMPRESSED)


def list_members(archive: Path, extensions: Sequence[str], folders: bool = False) -> list[Member]:
    """Return the images in a zip or a tar, sorted by name.

    Hidden files, links, and members with an absolute name or ``..`` in it are left out.
    ``extensions`` are in lower case, with the dot. With ``folders``, folders are returned too, whose names end with a
    slash, and the images of a tar, which may be compressed, are read at once.

    Raises:
        UserError: the file is missing or damaged, or it is compressed as a whole and ``folders`` is not set.
    """
    if archive.name.lower().endswith(COMPRESSED) and not folders:
        raise UserError(
            f"'{archive}' is compressed as a whole, so that single images cannot be read: decompress it to a .tar, or "
            "unpack it"
        )

    def selects(name: str) -> bool:
        path = PurePosixPath(name)
        safe = not path.is_absolute() and ".." not in path.parts and "\\" not in name
        visible = not any(part.startswith((".", "__MACOSX")) for part in path.parts)
        kind = folders if name.endswith("/") else path.suffix.lower() in extensions
        return safe and visible and kind and name.isprintable()

    try:
        if archive.name.lower().endswith(".zip"):
            members = _zip_members(archive, selects)
        else:
            members = _tar_members(archive, selects, folders)
    except FileNotFoundError as error:
        raise UserError(f"the archive '{archive}' does not exist: correct the path") from error
    except (OSError, *ARCHIVE_DAMAGE) as error:
        raise UserError(f"the archive '{archive}' is damaged or not an archive ({error}): download it again") from error
    found = {member.name: member for member in members}  # of several members with one name the last is valid
    return [found[name] for name in sorted(found)]


def each_member(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar.

    Raises:
        ValueError: a member has a negative size, which would make tarfile loop forever (CVE-2025-8194).
    """
    for info in tar:
        if info.size < 0:
            raise ValueError(f"a member of {info.size} bytes")
        yield info


def _tar_members(archive: Path, selects: Callable[[str], bool], unpack: bool) -> list[Member]:
    members = []
    with tarfile.open(archive, "r:*" if unpack else "r:") as tar:
        for info in each_member(tar):
            name = f"{info.name}/" if info.isdir() else info.name
            if not (info.isdir() or (info.isreg() and not info.issparse())) or not selects(name):
                continue
            file = tar.extractfile(info) if unpack and info.size <= MAX_SIZE else None
            members.append(Member(archive, name, info.offset_data, info.size, file.read() if file else None))
    return members


def _zip_members(archive: Path, selects: Callable[[str], bool]) -> list[Member]:
    with zipfile.ZipFile(archive) as file:
        return [Member(archive, i.filename, -1, i.file_size) for i in file.infolist() if selects(i.filename)]


@lru_cache(maxsize=4)
def _zip(archive: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once per process: processes that share a file would change each other's file position."""
    return zipfile.ZipFile(archive)
