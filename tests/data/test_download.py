"""Downloads from a server that misbehaves in every way, archives that want out, and the script that prepares."""

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from relvit_d2.data import download
from relvit_d2.data.detection.catalog import DATASETS
from relvit_d2.data.download import Archive, fetch, unpack
from relvit_d2.data.download_urls import SOURCES
from relvit_d2.utils.errors import UserError
from tests.support.scripts import fails, run

CONTENT = bytes(range(256)) * 4096 * 3
SHA = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves ``CONTENT``; ``cut`` ends the next answers after so many bytes, ``ranges`` says whether it can go on."""

    cut: list[int] = []
    ranges = True
    asked: list[str] = []
    status = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        if self.server.status:
            self.send_error(self.server.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut.pop(0)] if self.server.cut else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.cut, running.asked = [], []
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def archive(server: Server, size: int = len(CONTENT), checksum: str = SHA) -> Archive:
    return Archive(f"http://127.0.0.1:{server.server_address[1]}/set.tar", size, checksum)


@pytest.mark.parametrize("checksum", [SHA, f"md5:{hashlib.md5(CONTENT).hexdigest()}", ""])
def test_a_file_arrives_whole(server: Server, tmp_path: Path, checksum: str) -> None:
    seen: list[int] = []
    path = fetch(archive(server, checksum=checksum), tmp_path / "new", seen.append)
    assert path.read_bytes() == CONTENT and sum(seen) == len(CONTENT)
    assert list(path.parent.iterdir()) == [path]
    fetch(archive(server, checksum=checksum), path.parent)
    assert len(server.asked) == 1, "what is there is not asked for again"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cut = [1000, 5000]
    seen: list[int] = []
    assert fetch(archive(server), tmp_path, seen.append).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=1000-", "bytes=6000-"]
    assert sum(seen) == len(CONTENT)


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = [7000, *[0] * download.ATTEMPTS]
    with pytest.raises(UserError, match="run it again to go on"):
        fetch(archive(server), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar.part"]
    server.cut, server.asked = [], []
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=7000-"]


def test_a_server_that_cannot_go_on_starts_anew(server: Server, tmp_path: Path) -> None:
    server.cut, server.ranges = [1000], False
    seen: list[int] = []
    assert fetch(archive(server), tmp_path, seen.append).read_bytes() == CONTENT
    assert sum(seen) == len(CONTENT)


def test_another_content_is_removed_and_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"with the sha256 .* not 00"):
        fetch(archive(server, checksum="sha256:00"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Nor does a wrong beginning of an earlier call stay.
    (tmp_path / "set.tar.part").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="sha256"):
        fetch(archive(server), tmp_path)
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_is_refused_before_it_is_downloaded(server: Server, tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"has {len(CONTENT)} bytes, not the {size}"):
        fetch(archive(server, size=size), tmp_path)
    assert (tmp_path / "set.tar.part").stat().st_size == 0


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, download.ATTEMPTS)])
def test_a_refusal_is_one_sentence(server: Server, tmp_path: Path, status: int, tries: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=str(status)):
        fetch(archive(server), tmp_path)
    assert len(server.asked) == tries


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="cannot be read"):
        fetch(Archive("http://127.0.0.1:9/set.tar", 5), tmp_path)


def test_a_second_process_does_not_write_into_the_same_file(server: Server, tmp_path: Path) -> None:
    lock = tmp_path / ".set.tar.part.lock"
    code = f"import filelock; held = filelock.FileLock({str(lock)!r}).acquire(); print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=r"another process is downloading '.*set\.tar\.part'"):
        fetch(archive(server), tmp_path)
    other.kill()  # as in a crash: the lock file stays, the lock does not
    other.communicate()
    assert lock.exists() and fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar"]


def test_a_full_disk_is_one_sentence_and_what_came_stays(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, chunk: bytes) -> None:
        file.write(chunk[:500])
        file.flush()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", full)
        with pytest.raises(UserError, match="No space left"):
            fetch(archive(server), tmp_path)
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=500-"


def write_tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


WRITERS = [write_tar, write_zip]


@pytest.mark.parametrize("write", WRITERS)
def test_an_archive_is_merged_into_its_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "a/kept").write_bytes(b"kept")
    (folder / "a/old").write_bytes(b"old")
    unpack(write(tmp_path / "x", ("./a/old", b"new"), ("a/b/c", b"more")), folder)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a/kept": b"kept", "a/old": b"new", "a/b/c": b"more"}
    assert {path.name for path in tmp_path.iterdir()} == {"set", "x"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "..", "a\\..\\out", "C:/out", "a\nb"])
def test_a_member_that_leads_out_is_refused(write: Callable[..., Path], name: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "x", ("good", b"good"), (name, b"bad"))
    with pytest.raises(UserError, match="leads elsewhere"):
        unpack(path, tmp_path / "inner/set")
    assert {path.name for path in tmp_path.rglob("*")} == {"inner", "x"}


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_of_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x", ("a", b"good"), ("", link("b", "/etc", kind)), ("b/passwd", b"bad"))
    with pytest.raises(UserError, match="link or a device 'b'"):
        unpack(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_links_of_a_zip_are_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("b")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x", "w") as file:
        file.writestr(entry, "/etc")
    with pytest.raises(UserError, match="link or a device 'b'"):
        unpack(tmp_path / "x", tmp_path / "set")


@pytest.mark.parametrize("write", WRITERS)
def test_a_damaged_archive_changes_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "x", ("a/b", os.urandom(2000)), ("a/c", os.urandom(2000)))
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        damaged = bytearray(whole[:length] if length % 2 else whole)
        if length < len(damaged):
            damaged[length] ^= 0xFF
        path.write_bytes(damaged)
        try:
            unpack(path, tmp_path / "set")
        except UserError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / "set").exists()
        else:  # a byte that nothing depends on
            assert (tmp_path / "set/a/b").stat().st_size == 2000
            for name in ("b", "c"):
                (tmp_path / f"set/a/{name}").unlink(missing_ok=True)
            (tmp_path / "set/a").rmdir()
            (tmp_path / "set").rmdir()


def test_every_source_belongs_to_sets_of_the_catalog_and_its_archives_to_parts() -> None:
    for name, source in SOURCES.items():
        assert name == "kitti" or any(entry.startswith(f"{name}_") for entry in DATASETS)
        held = [part for _, holds in source.archives for part in source.parts if part.pattern.startswith(holds)]
        assert set(held) == set(source.parts)
        for file, _ in source.archives:
            kind, _, digits = file.checksum.partition(":")
            assert len(digits) == {"sha256": 64, "md5": 32, "": 0}[kind]
            assert file.name == "extra.tar.gz" or kind


def test_the_script_reads_what_is_there_and_draws_what_is_missing(root: Path, tmp_path: Path) -> None:
    done = run(root, "relvit-d2", "prepare-data", "svhn")
    assert "svhn_train: 12 images" in done.stdout and "12 images to train on of the official 33,402" in done.stdout
    sentence = fails(root, "relvit-d2", "prepare-data", "coco_2017", "--root", tmp_path / "none")
    assert "coco/annotations/instances_train2017.json" in sentence and "--download" in sentence
    assert not (tmp_path / "none").exists()
