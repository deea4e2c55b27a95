"""Image sources of pre-training: folders, patterns, lists, archives, and unreadable ones."""

import io
import os
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relvit_d2.data.classification.image_folder import read_tree
from relvit_d2.data.detection.catalog import get_images
from relvit_d2.data.detection.mapper import ImageReader
from relvit_d2.data.images.archive import ImageFile, Member, list_members
from relvit_d2.data.images.decode import image_size, read_rgb
from relvit_d2.data.images.folder import EXTENSIONS, image_sizes, list_images, readable
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.data.loader import Batches, EndlessOrder, ordered_batches
from relvit_d2.utils.errors import UserError

NAMES = ("a/1.png", "a/b/2.JPG", "3.png")


def encoded(shade: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6 + shade, 4), (shade, 0, 0)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, also in sub-folders, and other files."""
    root = tmp_path / "photos"
    for shade, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(shade))
    (root / "notes.txt").write_text("no image")
    (root / "a/._1.png").write_text("no image")
    return root


@pytest.fixture(params=["zip stored", "zip deflated", "tar"])
def archive(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The folder as an archive, with unsafe members."""
    kind = str(request.param)
    path = folder.parent / ("photos.tar" if kind == "tar" else "photos.zip")
    files = [p for p in folder.rglob("*") if p.is_file()]
    bad = ("../out.png", "/etc/out.png", "a/../../out.png", "__MACOSX/1.png")
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for file in files:
                tar.add(file, str(file.relative_to(folder)))
            for name in bad:
                info = tarfile.TarInfo(name)
                info.size = len(encoded(1))
                tar.addfile(info, io.BytesIO(encoded(1)))
            for name, type_ in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = type_, "/etc/passwd"
                tar.addfile(info)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED) as packed:
            for member in files:
                packed.write(member, str(member.relative_to(folder)))
            for name in bad:
                packed.writestr(name, encoded(1))
    return path


def test_folder_pattern_and_list_give_the_same_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sorted(folder / name for name in NAMES)
    assert get_images(str(folder)) == get_images(f"{folder}/") == list_images(folder) == expected
    assert get_images(f"{folder}/**/*") == expected
    assert get_images(f"{folder}/a/*.png") == [folder / "a/1.png"]
    assert get_images(f"{folder}/**/*[:2]") == get_images(f"{folder}[:2]") == expected[:2]
    listed = folder / "list.txt"
    listed.write_text(f"\ufeff3.png\n\n{folder / 'a/1.png'}\n", encoding="utf-8")
    assert get_images(str(listed)) == [folder / "3.png", folder / "a/1.png"]
    assert get_images(f"{listed}[:50%]") == [folder / "3.png"]
    monkeypatch.chdir(folder.parent)
    assert get_images("photos") == [path.relative_to(folder.parent) for path in expected]


def test_a_link_to_a_folder_is_not_followed(folder: Path) -> None:
    before = list_images(folder)
    (folder / "a/loop").symlink_to(folder)
    (folder / "4.png").symlink_to(folder / "nowhere.png")
    assert list_images(folder) == before


def test_archives_are_read_without_unpacking(archive: Path, folder: Path) -> None:
    before = sorted(path for path in folder.parent.rglob("*"))
    members = get_images(str(archive))
    assert [member.name for member in members if isinstance(member, Member)] == sorted(NAMES)
    for member in members:
        assert isinstance(member, Member)
        assert str(member) == f"{archive}:{member.name}"
        assert (read_rgb(member) == read_rgb(folder / member.name)).all()
        assert image_size(member) == image_size(folder / member.name)
    assert get_images(f"{archive}[:1]") == members[:1]
    # Worker processes read the same.
    batches = ordered_batches(members, ImageReader(PixelCache()), list, 2, 2)
    images = [image for batch in batches for image in batch]
    assert [image.shape[2] for image in images] == [image_size(member)[0] for member in members]
    assert sorted(path for path in folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["photos [2020]", "a*b", "what?", "[a", "plain"])
def test_existing_paths_are_not_patterns(folder: Path, name: str) -> None:
    root = folder.rename(folder.parent / name)
    assert get_images(str(root)) == list_images(root)
    assert get_images(f"{root}/**/*.png") == [root / "3.png", root / "a/1.png"]
    assert get_images(f"{root}/a/*") == [root / "a/1.png"]
    assert get_images(f"{root}[:1]") == [root / "3.png"]
    (root / "list.txt").write_text("3.png\n")
    assert get_images(f"{root}/list.txt") == [root / "3.png"]


@pytest.mark.parametrize("kinds", [("NFC", "NFD"), ("NFD", "NFC")])
def test_lists_in_either_unicode_normal_form(folder: Path, kinds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk, written = (unicodedata.normalize(kind, "fénêtre") for kind in kinds)
    shutil.copytree(folder / "a", folder / on_disk)
    (folder / on_disk / "1.png").rename(folder / on_disk / f"{on_disk}.png")
    expected = Path(on_disk) / f"{on_disk}.png"
    listed = folder / "list.txt"
    listed.write_text(f"{written}/{written}.png\n3.png\n{folder}/{written}/{written}.png\n", encoding="utf-8")
    assert get_images(str(listed)) == [folder / expected, folder / "3.png", folder / expected]
    monkeypatch.chdir(folder / "a")
    assert get_images("../list.txt") == [Path("..") / expected, Path("../3.png"), folder / expected]


def test_links_to_folders_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "more").symlink_to(folder / "a")
    assert len(get_images(str(folder))) == 3 and f"links to folders are not followed: {folder / 'more'}" in caplog.text
    for read in (list_images, lambda path: read_tree(path.parent)):  # every function that lists a folder
        (folder.parent / "other").mkdir(exist_ok=True)
        (folder.parent / "other/1.png").write_bytes(encoded(1))
        caplog.clear()
        read(folder)
        assert f"links to folders are not followed: {folder / 'more'}" in caplog.text
    (folder.parent / "links").mkdir()
    (folder.parent / "links/photos").symlink_to(folder)
    with pytest.raises(UserError, match=r"contains no image .*links to folders are not followed: .*links/photos"):
        list_images(folder.parent / "links")


def test_headers_of_large_members(tmp_path: Path) -> None:
    """The header is read from a member's first bytes, or from all if they do not suffice."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "TIFF")  # its directory is at the end
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.tiff", buffer.getvalue())
    (member,) = list_members(tmp_path / "a.zip", [".tiff"])
    assert member.size > 2**18
    assert readable([member]) == [member]
    assert image_size(member) == (500, 400)


@pytest.mark.parametrize(
    "name", ["a.tar.gz", "a.tgz", "a.zip", "a.tar", "empty.zip", "b.zip", "list.txt", "odd.txt", "*.gif"]
)
def test_invalid_sources_are_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"packed")
    (tmp_path / "a.tgz").write_bytes(b"packed")
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as file:
        file.writestr("notes.txt", "no image")
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "odd.txt").write_text("/etc/passwd\n")
    with pytest.raises(UserError) as caught:
        get_images(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_of_an_archive(archive: Path) -> None:
    data = archive.read_bytes()
    for length in range(0, len(data), 97):
        archive.write_bytes(data[:length])
        try:
            for member in list_members(archive, sorted(EXTENSIONS)):
                read_rgb(member)
        except UserError as error:
            assert str(archive) in str(error)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_byte_of_a_zip_damaged(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "original.zip", "w", method) as file:
        file.writestr("1.png", encoded(1))
    original = (tmp_path / "original.zip").read_bytes()
    refused = 0
    for position in range(len(original)):
        damaged = tmp_path / f"{position}.zip"  # open archives are cached by name
        damaged.write_bytes(original[:position] + bytes([original[position] ^ 0xFF]) + original[position + 1 :])
        try:
            for member in list_members(damaged, [".png"]):
                read_rgb(member)
        except UserError as error:
            assert str(damaged) in str(error)
            refused += 1
    assert len(original) / 4 < refused < len(original)


def test_names_that_are_not_utf8_are_errors(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(encoded(1))
    with pytest.raises(UserError, match=r"\\xff\.png' cannot be printed: rename it"):
        list_images(folder)


def test_unreadable_images_are_counted_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = list_images(folder)
    (folder / "a/1.png").write_bytes(b"")
    assert readable(images) == [folder / "3.png", folder / "a/b/2.JPG"]
    assert "1 of 3 images cannot be read and are left out" in caplog.text
    assert "a/1.png" in caplog.text
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        readable([folder / "a/1.png"])


def test_headers_of_unchanged_images_are_read_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = list_images(folder)
    read: list[ImageFile] = []

    def counted(image: ImageFile) -> tuple[int, int]:
        read.append(image)
        return image_size(image)

    monkeypatch.setattr("relvit_d2.data.images.folder.image_size", counted)
    monkeypatch.chdir(folder)
    assert readable(images) == images and sorted(map(str, read)) == list(map(str, images))
    relative = [image.relative_to(folder) for image in images if isinstance(image, Path)]
    assert image_sizes(relative) == list(map(image_size, images)) and len(read) == 3
    content = relative[0].read_bytes()
    relative[0].write_bytes(b"")  # an unreadable image is read each time
    for reads in (4, 5):
        assert readable(images) == images[1:] and len(read) == reads
    relative[0].write_bytes(content)
    for _ in range(2):
        assert readable(images[:1]) == images[:1] and len(read) == 6
    assert readable(images) == images and len(read) == 6  # results for other images were kept


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_by_the_next(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(number))
    for number in (2, 3):
        Image.effect_noise((99, 99), 50).save(files[number])
        files[number].write_bytes(files[number].read_bytes()[:500])

    def widths(start: int, count: int) -> list[list[int]]:
        order = EndlessOrder(len(files), 2, 5, start)
        batches = Batches(files, ImageReader(PixelCache()), list, order, 5, workers, replaces=True)
        return [[image.shape[2] - 6 for image in batch] for batch, _ in zip(batches, range(count), strict=False)]

    straight = widths(0, 9)
    order = EndlessOrder(len(files), 2, 5, 0)
    expected = [[4 if index in (2, 3) else index for _, index in order.keys(iteration)] for iteration in range(9)]
    assert straight == expected
    assert widths(4, 5) == straight[4:]
    if not workers:
        assert "2.png' is damaged or truncated" in caplog.text
        assert "(2 replaced so far in this process)" in caplog.text
    for file in files:
        file.write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="not an image"):
        widths(0, 1)
