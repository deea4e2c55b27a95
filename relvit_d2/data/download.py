"""Resumable downloads with checksums, and unpacking of archives without writing outside the target folder."""

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

from relvit_d2.data.images.archive import ARCHIVE_DAMAGE, each_member
from relvit_d2.utils.errors import UserError, one_line

ATTEMPTS = 5
"""Maximum number of consecutive connections without any received data."""

TIMEOUT = 60.0
"""Seconds without received data after which a connection is closed."""

_CHUNK = 1 << 20
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        size: bytes.
        checksum: ``sha256:...`` or ``md5:...``; ``""`` if none is known, so that only the size is checked.
    """

    url: str
    size: int
    checksum: str = ""

    @property
    def name(self) -> str:
        """The file name."""
        return PurePosixPath(self.url).name


def fetch(archive: Archive, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file and verify its checksum; resume an interrupted download.

    The file is written as ``NAME.part`` and renamed when it is complete and verified.

    Args:
        folder: target folder; created if missing.
        progress: called with the number of new bytes, first with those of an earlier call.

    Returns:
        The file's path.

    Raises:
        UserError: the server cannot be reached or has another file, the checksum differs (the file is removed), or the
            disk is full.
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
            _verify(archive, part)
            part.replace(path)
    except OSError as error:
        raise UserError(
            f"'{part}' could not be written ({error.strerror or error}): free space or choose another --root, "
            "then run it again to resume"
        ) from error
    return path


def _download(archive: Archive, file: IO[bytes], progress: Progress) -> None:
    attempt = 0
    reason = "it sent less data than announced"
    progress(file.tell())
    while (start := file.tell()) < archive.size:
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                if start and response.status != 206:  # the server cannot resume
                    file.truncate(0)
                    progress(-start)
                    start = 0
                total = start + int(response.headers.get("Content-Length") or archive.size - start)
                if total != archive.size:
                    raise UserError(
                        f"{archive.url} has {total} bytes, not the {archive.size} of the official file: download it "
                        "manually"
                    )
                need = archive.size - start
                if need > shutil.disk_usage(Path(file.name).parent).free:
                    raise UserError(f"'{archive.name}' needs {need / 1e9:.1f} GB more than are free: free space first")
                while chunk := response.read(_CHUNK):
                    _write(file, chunk)
                    progress(len(chunk))
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(
                    f"the server refuses {archive.url} ({error.code} {error.reason}): download it manually"
                ) from error
            reason = str(error)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", "") or error)
        attempt = 0 if file.tell() > start else attempt + 1
        if attempt == ATTEMPTS:
            raise UserError(
                f"{archive.url} cannot be downloaded ({reason}): run it again to resume, or download it manually"
            )
        if file.tell() < archive.size:
            time.sleep(min(2.0**attempt, 16) if attempt else 0)


def _write(file: IO[bytes], chunk: bytes) -> None:
    """Write all bytes or raise, so that errors of the disk are not mistaken for errors of the network."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
    file.flush()


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Hold a lock file beside ``part``, which is removed afterwards."""
    from filelock import FileLock, Timeout  # here: relvit-d2 doctor imports this module where packages are missing

    path = part.with_name(f".{part.name}.lock")
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"another process is downloading '{part}': wait for it or end it") from error


def _verify(archive: Archive, part: Path) -> None:
    kind, _, expected = archive.checksum.partition(":")
    if not kind:
        return
    digest = hashlib.new(kind)
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        part.unlink()
        raise UserError(
            f"the download of {archive.url} has the {kind} {found}, not {expected}, and was removed: run it again, or "
            "download it manually"
        )


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip or tar archive, compressed or not, into a folder.

    All members are unpacked to a temporary folder first and then moved, replacing existing files: a damaged archive
    changes nothing. Links, devices, and names that lead out of the folder are errors.

    Args:
        folder: target folder; created if missing.

    Raises:
        UserError: the archive is damaged or has such a member, or the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.unpacking")
    try:
        temporary.mkdir(parents=True)
        try:
            for name, size, source in _members(path):
                target = temporary / name
                if source is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                if size > shutil.disk_usage(temporary).free:
                    raise UserError(f"'{path}' does not fit on the disk: free space first")
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file)
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except ARCHIVE_DAMAGE as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # raised by gzip and bz2 for damaged data
            raise _damaged(path, error) from error
        raise UserError(
            f"'{path}' cannot be unpacked to '{folder}' ({error.strerror}): free space there, or download it again"
        ) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(f"the archive '{path}' is damaged ({reason}): remove it and download it again")


def _members(path: Path) -> Iterator[tuple[PurePosixPath, int, IO[bytes] | None]]:
    """Yield name, size in bytes and content (None for a folder) of every member."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                mode = entry.external_attr >> 16
                if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(
                        f"the archive '{path}' contains a link or a device '{entry.filename}': do not use it"
                    )
                name = _inside(entry.filename, path)
                yield name, entry.file_size, None if entry.is_dir() else archive.open(entry)
        return
    with tarfile.open(path) as archive:
        for member in each_member(archive):
            if not (member.isfile() or member.isdir()):
                raise UserError(f"the archive '{path}' contains a link or a device '{member.name}': do not use it")
            yield _inside(member.name, path), member.size, archive.extractfile(member)


def _inside(name: str, path: Path) -> PurePosixPath:
    clean = PurePosixPath(name)
    if clean.is_absolute() or ".." in clean.parts or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(
            f"the archive '{path}' contains a member named {name!r}, which leads out of the folder: do not use it"
        )
    return clean


def _move(source: Path, folder: Path) -> None:
    """Move the content of ``source`` into ``folder``, merging folders and replacing files."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if entry.is_dir() and target.is_dir():
            _move(entry, target)
        else:
            with suppress(FileNotFoundError):
                target.unlink()
            entry.rename(target)
