"""Images in strips: the same pixels as at once, in little memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relvit_d2.data.images import jpeg, limits
from relvit_d2.data.images.decode import PixelFormat, UnreadableImageError
from relvit_d2.data.images.strips import OVERVIEW, StripImage, open_strips
from relvit_d2.utils.errors import UserError

TOPS, HEIGHT = [0, 40, 70, 230, 250], 64  # with overlap, without, and beyond the end


def saved(folder: Path, name: str, mode: str = "RGB", **options: Any) -> Path:
    coarse = np.random.default_rng(0).integers(0, 255, (30, 20, len(mode)), dtype=np.uint8)
    Image.fromarray(coarse.squeeze()).resize((200, 300)).save(folder / name, **options)
    return folder / name


def test_strips_of_an_array() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 20, 3), dtype=np.uint8)
    for top, rows in zip(TOPS, StripImage.of(pixels).strips(TOPS, HEIGHT), strict=True):
        np.testing.assert_array_equal(rows, pixels[top : top + HEIGHT])


@pytest.fixture()
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (limits, jpeg):
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [
        *((f"a.{kind}", mode, channels) for kind in ("jpg", "png", "tif") for mode, channels in (("L", 3), ("L", 1))),
        *((f"a.{kind}", "RGB", 3) for kind in ("jpg", "png", "tif", "webp")),
        *((f"a.{kind}", "RGBA", 3) for kind in ("png", "tif")),
    ],
)
def test_large_files_give_the_same_pixels(
    name: str, mode: str, channels: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, pixels = saved(tmp_path, name, mode), PixelFormat(channels)
    expected = pixels.read(path)
    request.getfixturevalue("small_limit")
    with pytest.raises(UnreadableImageError, match=r"predict --tiles"):
        pixels.read(path)
    image = open_strips(path, pixels)
    assert (image.width, image.height) == (200, 300) and image.overview.shape == expected.shape
    for top, rows in zip(TOPS, image.strips(TOPS, HEIGHT), strict=True):
        np.testing.assert_array_equal(rows, expected[top : top + HEIGHT])


def test_what_cannot_be_read_in_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    rotated, cut = saved(tmp_path, "rotated.jpg", exif=_rotation()), saved(tmp_path, "cut.png")
    cut.write_bytes(cut.read_bytes()[:-2000])
    Image.fromarray(np.full((300, 200), 40_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    request.getfixturevalue("small_limit")
    for path in (rotated, tmp_path / "deep.png"):
        with pytest.raises(UserError, match="only if it is upright, has 8 bits"):
            open_strips(path, PixelFormat())
    with pytest.raises(UnreadableImageError, match="not an image"):
        open_strips(tmp_path / "text.png", PixelFormat())
    with pytest.raises(UnreadableImageError, match="damaged or truncated"):
        list(open_strips(cut, PixelFormat()).strips([0, 100, 200], 100))
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UserError, match="pip install"):
        open_strips(rotated, PixelFormat())


def _rotation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_20_000_by_20_000_pixels_in_little_memory(name: str, tmp_path: Path) -> None:
    import pyvips

    block = pyvips.Image.new_from_array(np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8))
    block.replicate(40, 40).write_to_file(str(tmp_path / name))
    code = f"""
from pathlib import Path
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.strips import open_strips
image = open_strips(Path({str(tmp_path / name)!r}), PixelFormat())
assert (image.width, image.height) == (20_000, 20_000) and image.overview.shape == ({OVERVIEW}, {OVERVIEW}, 3)
assert sum(rows[0, 0].sum() > 0 for rows in image.strips(range(0, 20_000, 500), 500)) == 40
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])  # peak memory, without torch
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 2**20  # KiB
