"""Images inside zip and tar files, read where they are: nothing is unpacked."""

import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from relvit_d2.utils.errors import UserError

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

# What tarfile and zipfile raise, beside OSError, depends on where the damage is.
ARCHIVE_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, LookupError, OverflowError),
)

LARGEST = 2**29
"""Bytes of the largest member that is read: a few bytes of a zip can ask for gigabytes of memory."""


@dataclass(frozen=True)
class Member:
    """An image inside an archive.

    Attributes:
        archive: the file.
        name: of the member; nothing is ever written under it.
        offset: of its bytes in a tar; -1 in a zip, which finds members by name.
        size: bytes, unpacked.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def open(self, limit: int = -1) -> io.BytesIO:
        """Return the unpacked bytes, of more than ``limit`` the first ones if that is not negative.

        Raises:
            OSError: they cannot be read.
        """
        if self.size > LARGEST:
            raise OSError(f"{self.size} bytes in an archive")
        if self.offset < 0:
            try:
                with _zip(self.archive, os.getpid()).open(self.name) as file:
                    return io.BytesIO(file.read(limit))
            except ARCHIVE_DAMAGE as error:
                raise OSError(str(error)) from error  # damaged, encrypted, or packed in a way that Python cannot read
        with self.archive.open("rb") as tar:
            tar.seek(self.offset)
            return io.BytesIO(tar.read(self.size if limit < 0 else min(limit, self.size)))


ImageFile = Path | Member


def is_archive(path: Path) -> bool:
    """Whether ``path`` is named like an archive, a compressed tar included."""
    return path.name.lower().endswith(ARCHIVES + COMPRESSED)


def list_members(archive: Path, extensions: Sequence[str], folders: bool = False) -> list[Member]:
    """Return the images in a zip or an uncompressed tar, sorted by name.

    Hidden files are left out, links too, and members with an absolute name or one that holds ``..``, which no honest
    archive has.

    Args:
        archive: the file.
        extensions: endings of images in small letters, with their dots.
        folders: return the folders that a zip lists too; their names end with a slash.

    Raises:
        UserError: the file is missing, damaged or compressed as a whole.
    """
    if archive.name.lower().endswith(COMPRESSED):
        raise UserError(
            f"'{archive}' is compressed as a whole, so that no image can be read without all before it: decompress it "
            "to a .tar, or unpack it"
        )
    try:
        members = _tar_members(archive) if archive.name.lower().endswith(".tar") else _zip_members(archive)
    except FileNotFoundError as error:
        raise UserError(f"the archive '{archive}' does not exist: correct the path") from error
    except (OSError, *ARCHIVE_DAMAGE) as error:
        raise UserError(f"the archive '{archive}' is damaged or no archive ({error}): fetch it again") from error
    found: dict[str, Member] = {}
    for member in members:  # of two members with one name an archive means the last
        path = PurePosixPath(member.name)
        honest = not path.is_absolute() and ".." not in path.parts and "\\" not in member.name
        visible = not any(part.startswith((".", "__MACOSX")) for part in path.parts)
        folder = member.name.endswith("/")
        wanted = folders if folder else path.suffix.lower() in extensions
        if honest and visible and wanted and member.name.isprintable():
            found[member.name] = member
    return [found[name] for name in sorted(found)]


def each_member(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Go through a tar once.

    Raises:
        ValueError: a member has less than no bytes: tarfile would go back, and find it for ever (CVE-2025-8194).
    """
    for info in tar:
        if info.size < 0:
            raise ValueError(f"a member of {info.size} bytes")
        yield info


def _tar_members(archive: Path) -> list[Member]:
    with tarfile.open(archive, "r:") as file:
        infos = [info for info in each_member(file) if info.isreg() and not info.issparse()]
    return [Member(archive, info.name, info.offset_data, info.size) for info in infos]


def _zip_members(archive: Path) -> list[Member]:
    with zipfile.ZipFile(archive) as file:
        return [Member(archive, info.filename, -1, info.file_size) for info in file.infolist()]


@lru_cache(maxsize=4)
def _zip(archive: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once a process: two that shared a file would move each other's place in it."""
    return zipfile.ZipFile(archive)
