"""The cache of decoded images: the same pixels, within its limit, whatever happens to its files."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relvit_d2.data.images.archive import Member, list_members
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.pixel_cache import HEADER, PixelCache
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.runs import equal, rows
from tests.support.scripts import command, run, started, wait_for

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
LIMIT = 2**20


@pytest.fixture
def images(tmp_path: Path) -> list[Path | Member]:
    """Images of several formats, one of them rotated and one in an archive."""
    picture = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    names = "plain.jpg", "rotated.jpg", "gray.png", "palette.png", "alpha.png", "deep.png"
    files = [tmp_path / name for name in names]
    picture.save(files[0])
    picture.save(files[1], exif=exif)
    for file, mode in zip(files[2:5], ("L", "P", "RGBA"), strict=True):
        picture.convert(mode).save(file)
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(files[5])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(files[0], "inside.jpg")
    return [*files, *list_members(tmp_path / "images.zip", (".jpg",))]


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("longest", [0, 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_decoder(
    images: list[Path | Member], tmp_path: Path, channels: int, longest: int
) -> None:
    pixels = PixelFormat(channels)
    cache = PixelCache(pixels, longest, tmp_path / "cache", LIMIT)
    (tmp_path / "cache").mkdir()
    for image in images * 2:
        expected, read = pixels.read(image, longest), cache.read(image)
        assert read.dtype == np.uint8 and np.array_equal(read, expected)
        read += 1  # as a transform may
    assert len(files_of(tmp_path / "cache")) == len(images)


def test_the_second_read_is_from_the_cache_unless_the_image_or_the_format_changed(
    images: list[Path | Member], tmp_path: Path
) -> None:
    folder, image = tmp_path / "cache", images[0]
    folder.mkdir()
    assert isinstance(image, Path)
    cache = PixelCache(None, 0, folder, LIMIT)
    expected = cache.read(image)
    (file,) = files_of(folder)
    content = bytearray(file.read_bytes())
    content[HEADER] ^= 255
    file.write_bytes(content)
    assert cache.read(image)[0, 0, 0] == expected[0, 0, 0] ^ 255
    assert np.array_equal(PixelCache(None, 20, folder, LIMIT).read(image), PixelFormat().read(image, 20))
    Image.fromarray(PIXELS[::-1]).save(image)
    assert np.array_equal(cache.read(image), PixelFormat().read(image))


@pytest.mark.parametrize("size", [0, 10, HEADER, HEADER + 5])
def test_an_incomplete_file_is_replaced(images: list[Path | Member], tmp_path: Path, size: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = PixelCache(None, 0, folder, LIMIT)
    expected = cache.read(images[0])
    (file,) = files_of(folder)
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert np.array_equal(cache.read(images[0]), expected) and file.read_bytes() == content


def test_the_cache_stays_within_its_limit_and_drops_the_oldest_images(
    images: list[Path | Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    size = PIXELS.nbytes + HEADER
    cfg = load_config("configs/base/ssl.yaml", ["DATALOADER.CACHE", "disk", "DATALOADER.NUM_WORKERS", "0"])

    def used(limit: int) -> int:
        cfg.DATALOADER.CACHE_LIMIT_GB = limit / 1e9
        cache = PixelCache.of(cfg, 0)
        for image in images:
            assert np.array_equal(cache.read(image), PixelFormat().read(image))
        return sum(path.stat().st_size for path in files_of(tmp_path / "relvit_d2/pixels"))

    assert used(3 * size + 1) == 3 * size
    assert used(10 * size) == 7 * size
    newest = sorted(files_of(tmp_path / "relvit_d2/pixels"), key=lambda path: path.stat().st_mtime_ns)[-3:]
    assert used(4 * size) == 4 * size  # 3 images are within nine tenths of the limit, and there is space for another
    assert all(path.exists() for path in newest)


def test_errors_in_writing_end_the_caching_only(images: list[Path | Member], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.write_text("a file, so that nothing can be written below it")
    cache = PixelCache(None, 0, folder, LIMIT)
    for image in images:
        assert np.array_equal(cache.read(image), PixelFormat().read(image))


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(UserError, match=r"DATALOADER.CACHE 'dsk' must be off, ram, disk; did you mean 'disk'\?"):
        load_config("configs/base/ssl.yaml", ["DATALOADER.CACHE", "dsk"])


@pytest.mark.parametrize("script", ["pretrain_ssl.py", pytest.param("train_net.py", marks=pytest.mark.slow)])
def test_a_run_is_the_same_with_each_cache(root: Path, tmp_path: Path, script: str) -> None:
    without, *others = [tmp_path / name for name in ("off", "ram", "disk", "disk_again")]
    for output in (without, *others):
        mode = output.name.removesuffix("_again")
        run(root, *command(script, output, "DATALOADER.CACHE", mode, "DATALOADER.NUM_WORKERS", 2))
    for output in others:
        one, other = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (without, output))
        assert all(equal(one[key], other[key]) for key in ("model", "optimizer")) and rows(output) == rows(without)
    assert files_of(root / "cache/relvit_d2/pixels")


def test_images_in_memory_are_removed_at_the_end_of_the_run_or_by_the_next(root: Path, tmp_path: Path) -> None:
    keys = "DATALOADER.CACHE", "ram", "DATALOADER.NUM_WORKERS", 0
    with started(root, *command("pretrain_ssl.py", tmp_path / "killed", *keys, "SOLVER.MAX_ITER", 1000)) as process:
        killed = Path(f"/dev/shm/relvit_d2_{os.getuid()}_{process.pid}")
        wait_for(lambda: bool(killed.is_dir() and files_of(killed)), process)
        process.kill()
    assert killed.is_dir()
    with started(root, *command("pretrain_ssl.py", tmp_path / "complete", *keys)) as process:
        assert process.communicate() and process.returncode == 0
    assert not killed.exists() and not killed.with_name(f"relvit_d2_{os.getuid()}_{process.pid}").exists()
