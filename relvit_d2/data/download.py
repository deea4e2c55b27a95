"""Files from the net that arrive whole and unchanged, and archives that cannot write outside their folder."""

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock, Timeout

from relvit_d2.data.images.archive import ARCHIVE_DAMAGE, each_member
from relvit_d2.utils.errors import UserError

ATTEMPTS = 5
"""How often a connection that breaks is made anew, in a row without a byte gained."""

TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""

_CHUNK = 1 << 20
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Archive:
    """One file on the net.

    Attributes:
        url: where it lies.
        size: bytes.
        checksum: ``sha256:...`` or ``md5:...``; ``""`` where none is known, so that only the size is compared.
    """

    url: str
    size: int
    checksum: str = ""

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.url).name


def fetch(archive: Archive, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file, go on with what an earlier call left, and compare it with its checksum.

    The file appears under its name only once it is whole and right; until then it grows as ``NAME.part``.

    Args:
        archive: what to fetch.
        folder: to put it in; made if missing.
        progress: called with the number of bytes gained, at the start with those that are there.

    Returns:
        The file's path.

    Raises:
        UserError: the server is not reached or has another file, the checksum differs (what came is removed then), or
            the disk is full.
    """
    path = folder / archive.name
    part = folder / f"{archive.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size == archive.size:
            return path
        with _locked(part), part.open("ab") as file:
            _download(archive, file, progress or (lambda _: None))
            file.flush()
            os.fsync(file.fileno())
            _compare(archive, part)
            part.replace(path)
    except OSError as error:
        raise UserError(
            f"'{part}' could not be written ({error.strerror or error}): free space or choose another --root, "
            "then run it again to go on"
        ) from error
    return path


def _download(archive: Archive, file: IO[bytes], progress: Progress) -> None:
    attempt = 0
    reason = "it sent less than it promised"
    progress(file.tell())
    while (start := file.tell()) < archive.size:
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if start and answer.status != 206:  # the server cannot go on in the middle
                    file.truncate(0)
                    progress(-start)
                    start = 0
                total = start + int(answer.headers.get("Content-Length") or archive.size - start)
                if total != archive.size:
                    raise UserError(
                        f"{archive.url} has {total} bytes, not the {archive.size} of the official file: get it by hand"
                    )
                need = archive.size - start
                if need > shutil.disk_usage(Path(file.name).parent).free:
                    raise UserError(f"'{archive.name}' needs {need / 1e9:.1f} GB more than are free: make room first")
                while chunk := answer.read(_CHUNK):
                    _write(file, chunk)
                    progress(len(chunk))
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(f"{archive.url} is refused ({error.code} {error.reason}): get it by hand") from error
            reason = str(error)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", "") or error)
        attempt = 0 if file.tell() > start else attempt + 1
        if attempt == ATTEMPTS:
            raise UserError(f"{archive.url} cannot be read ({reason}): run it again to go on, or get it by hand")
        if file.tell() < archive.size:
            time.sleep(min(2.0**attempt, 16) if attempt else 0)


def _write(file: IO[bytes], chunk: bytes) -> None:
    """Write all or raise; a disk's fault must not be taken for the net's."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
    file.flush()


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Hold a lock file beside ``part``, which is removed afterwards."""
    path = part.with_name(f".{part.name}.lock")
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"another process is downloading '{part}': wait for it or end it") from error


def _compare(archive: Archive, part: Path) -> None:
    kind, _, wanted = archive.checksum.partition(":")
    if not kind:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest() if hasattr(hashlib, "file_digest") else _digest(file, kind)
    if found != wanted:
        part.unlink()
        raise UserError(
            f"{archive.url} came with the {kind} {found}, not {wanted}: it was removed, run it again or get it by hand"
        )


def _digest(file: IO[bytes], kind: str) -> str:
    digest = hashlib.new(kind)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def unpack(path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Unpack a zip or tar archive, compressed or not, into a folder.

    All members are unpacked beside ``folder`` first and then moved in, replacing files that are there: a damaged
    archive changes nothing. Links, devices, and names that lead out of the folder are refused.

    Args:
        path: the archive.
        folder: to put its members in; made if missing.
        progress: called with the number of bytes after each member.

    Raises:
        UserError: the archive is damaged or has such a member, or the disk is full.
    """
    workplace = folder.with_name(f".{folder.name}.{os.getpid()}.unpacking")
    try:
        workplace.mkdir(parents=True)
        try:
            for name, size, source in _members(path):
                target = workplace / name
                if source is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                if size > shutil.disk_usage(workplace).free:
                    raise UserError(f"'{path}' does not fit on the disk: make room first")
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file)
                if progress:
                    progress(size)
            _move(workplace, folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except ARCHIVE_DAMAGE as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 say so of damage
            raise _damaged(path, error) from error
        raise UserError(
            f"'{path}' cannot be unpacked to '{folder}' ({error.strerror}): make room there, or get it again"
        ) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"the archive '{path}' is damaged ({reason}): remove it and get it again")


def _members(path: Path) -> Iterator[tuple[PurePosixPath, int, IO[bytes] | None]]:
    """Give name, size in bytes and content of every member, None for a folder's; nothing but files and folders."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                mode = entry.external_attr >> 16
                if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"the archive '{path}' holds a link or a device '{entry.filename}': do not use it")
                name = _inside(entry.filename, path)
                yield name, entry.file_size, None if entry.is_dir() else archive.open(entry)
        return
    with tarfile.open(path) as archive:
        for member in each_member(archive):
            if not (member.isfile() or member.isdir()):
                raise UserError(f"the archive '{path}' holds a link or a device '{member.name}': do not use it")
            yield _inside(member.name, path), member.size, archive.extractfile(member)


def _inside(name: str, path: Path) -> PurePosixPath:
    clean = PurePosixPath(name)
    if clean.is_absolute() or ".." in clean.parts or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(f"the archive '{path}' holds a member named {name!r}, which leads elsewhere: do not use it")
    return clean


def _move(source: Path, folder: Path) -> None:
    """Move everything in ``source`` to the same place in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if entry.is_dir() and target.is_dir():
            _move(entry, target)
        else:
            with suppress(FileNotFoundError):
                target.unlink()
            entry.rename(target)
