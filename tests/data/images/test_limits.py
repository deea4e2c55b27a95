"""Images made to exhaust memory or time: each is refused or read in at most 1 GiB, by every function."""

import io
import os
import pickle
import resource
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relvit_d2.data.images.archive import ImageFile, list_members
from relvit_d2.data.images.decode import PixelFormat, channels_and_max_value, image_size
from relvit_d2.data.images.folder import EXTENSIONS
from relvit_d2.data.images.limits import MAX_PIXELS
from relvit_d2.utils.errors import UserError
from tests.support.damaged_files import huge_png, png_chunk
from tests.support.scripts import run

MiB = 2**20
READERS: tuple[Callable[[ImageFile], object], ...] = (
    *(image_size, channels_and_max_value),
    *(PixelFormat(channels, 255).read for channels in (3, 1, 5)),
)


def blank(form: str, side: int = 64, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, form, **options)
    return buffer.getvalue()


def directory(entries: int, count: int) -> bytes:
    """A TIFF of many entries that all refer to the same ``count`` bytes, each of which a reader may copy."""
    rows = b"".join(struct.pack("<HHII", 1000 + i, 1, count, 8) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + rows + bytes(count)


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with additional APP1 segments, which may not hold a resolution, as of JFIF."""
    data = blank("JPEG")
    body = data[2 + 2 + struct.unpack(">H", data[4:6])[0] :]  # without JFIF's segment
    parts = [b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments]
    return b"\xff\xd8" + b"".join(parts) + body


def exif_of_many_segments() -> bytes:
    data = directory(20_000, 10**6)
    return jpeg_with(*(b"Exif\0\0" + data[at : at + 60_000] for at in range(0, len(data), 60_000)))


def scans() -> bytes:
    data = blank("JPEG", 8000, progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 20_000 + data[-2:]


def png_with(kind: bytes, content: bytes, count: int = 1) -> bytes:
    data = blank("PNG")
    return data[:33] + png_chunk(kind, content) * count + data[33:]


def gif(frames: int) -> bytes:
    data = blank("GIF", 300, "L")
    start = data.index(b"\x2c")  # the image descriptor
    return data[:start] + data[start:-1] * frames + b";"


def gif_comment() -> bytes:
    data = blank("GIF")
    start = data.index(b"\x2c")
    return data[:start] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 100_000 + b"\0" + data[start:]


def pages(count: int) -> bytes:
    first = Image.new("L", (1, 1))
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=[first] * (count - 1))
    return buffer.getvalue()


def cyclic_pages() -> bytes:
    """A TIFF whose directory is followed by itself."""
    data = bytearray(pages(1))
    start = struct.unpack("<I", data[4:8])[0]
    at = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    data[at : at + 4] = data[4:8]
    return bytes(data)


def tile() -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of 60,000 x 60,000."""
    data = bytearray(blank("TIFF", 16))
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack_from("<H", data, start)[0]
    rows = [struct.unpack_from("<HHII", data, start + 2 + 12 * i) for i in range(count)]
    rename = {273: 324, 278: 323, 279: 325}
    rows = [
        (rename.get(tag, tag), 4 if tag == 278 else kind, n, 60_000 if tag == 278 else v) for tag, kind, n, v in rows
    ]
    rows = sorted([*rows, (322, 4, 1, 60_000)])
    out = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(4)
    return bytes(data[:4]) + struct.pack("<I", len(data)) + bytes(data[8:]) + out


def npy(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def raw_profile() -> bytes:
    data = directory(20_000, 10**6)
    return b"Raw profile type exif\0\nexif\n%8d\n" % len(data) + data.hex().encode()


# Extension, content, and words of the error of reading 3 channels; "" if the image is valid.
ATTACKS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "PNG of 50,000 x 50,000": ("png", lambda: huge_png(50_000), "has too many pixels"),
    "PNG of 9,000 x 9,000": ("png", lambda: huge_png(9000), "has 81,000,000 pixels, above the limit"),
    "WebP of 16,000 x 16,000": ("webp", lambda: blank("WEBP", 16_000, lossless=True, quality=0, method=0), "pixels"),
    "GIF of 10,000 frames": ("gif", lambda: gif(10_000), ""),
    "GIF with a long comment": ("gif", gif_comment, "parts"),
    "TIFF of 1,000 pages": ("tif", lambda: pages(1000), ""),
    "TIFF of endless pages": ("tif", cyclic_pages, ""),
    "TIFF of one huge tile": ("tif", tile, "has 3,600,000,000 pixels, above the limit"),
    "TIFF with repeated metadata": ("tif", lambda: directory(60_000, 10**6), "parts"),
    "JPEG with EXIF in many segments": ("jpg", exif_of_many_segments, "bytes of EXIF data, above the limit of 65,536"),
    "JPEG with the largest EXIF": ("jpg", lambda: jpeg_with(b"Exif\0\0" + directory(5400, 60_000)[:65_500]), ""),
    "JPEG after millions of other bytes": ("jpg", lambda: b"\xff\xd8\xff" + bytes(2**24), "parts"),
    "JPEG of thousands of scans": ("jpg", scans, "scans, above the limit"),
    "JPEG with a large ICC profile": ("jpg", lambda: blank("JPEG", icc_profile=bytes(16_000_000)), ""),
    "PNG with a large ICC profile": (
        "png",
        lambda: png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))),
        "damaged",
    ),
    "PNG with large EXIF": ("png", lambda: png_with(b"eXIf", directory(60_000, 10**6)), "bytes of EXIF data"),
    "PNG with large EXIF as text": ("png", lambda: png_with(b"tEXt", raw_profile()), "bytes of EXIF data"),
    "PNG of millions of chunks": ("png", lambda: png_with(b"abCd", b"", 10**6), "parts"),
    "WebP with large EXIF": ("webp", lambda: blank("WEBP", exif=directory(60_000, 10**6)), "bytes of EXIF data"),
    "PPM as text": ("ppm", lambda: b"P3 7000 7000 255 " + b"1 " * 2**24, "pixels, above the limit of 4,194,304"),
    "PPM of other values": ("ppm", lambda: b"P6 2000 2000 100 " + bytes(12_000_000), "parts"),
    "EPS, which runs Ghostscript": ("png", lambda: blank("EPS"), "not an image that can be read"),
    "array of 60,000 x 60,000": ("npy", lambda: npy((60_000, 60_000)), "damaged"),
    "array with a long axis": ("npy", lambda: npy((2**27, 1)) + bytes(2**27), "pixels, above the limit"),
}


def measured(image: ImageFile, *readers: Callable[[ImageFile], object]) -> tuple[list[str], int]:
    """Run readers, all by default, in a process of limited time; return their errors and memory in bytes."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        signal.alarm(120)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        errors = []
        for read in readers or READERS:
            try:
                read(image)
                errors.append("")
            except UserError as error:
                errors.append(str(error))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writes, pickle.dumps((errors, used * 1024)))
        os._exit(0)
    os.close(writes)
    with open(reads, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0 and answer, f"ended by signal {status}"
    return pickle.loads(answer)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ATTACKS)
def test_no_image_takes_more_than_its_share(name: str, tmp_path: Path) -> None:
    extension, make, words = ATTACKS[name]
    path = tmp_path / f"a.{extension}"
    path.write_bytes(make())
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.write(path, path.name)
    images: list[ImageFile] = [path, *list_members(tmp_path / "a.zip", sorted(EXTENSIONS))]
    for image in images:
        errors, memory = measured(image)
        assert memory < 1024 * MiB
        assert words in errors[3] and bool(words) == bool(errors[3])
        assert all(str(image) in error for error in errors if error)


@pytest.mark.parametrize(
    ("extension", "mode", "options"),
    [
        ("png", "RGBA", {"compress_level": 1}),
        ("png", "I;16", {"compress_level": 1}),
        ("tif", "F", {}),
        ("jpg", "CMYK", {"progressive": True}),
        ("gif", "P", {}),
        ("bmp", "RGB", {}),
        ("webp", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
    ],
)
def test_memory_at_the_limit_of_pixels(extension: str, mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    """At a quarter of the limit the images take at most a quarter of the memory, also turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{extension}"
    turned: dict[str, Any] = {} if extension in ("gif", "bmp") else {"exif": exif}
    share = MAX_PIXELS // (8 if extension == "webp" else 4)
    Image.new(mode, (share // 4096, 4096)).save(path, **options, **turned)
    errors, memory = measured(path, PixelFormat(3, 255).read)
    assert errors == [""] and memory < 256 * MiB


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_unpack_to_more_than_they_declare(method: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as packed, packed.open("a.png", "w") as member:
        for _ in range(200):
            member.write(bytes(MiB))
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02") + 24
    path.write_bytes(data[:at] + struct.pack("<I", 1000) + data[at + 4 :])
    (image,) = list_members(path, [".png"])
    errors, memory = measured(image)
    assert all("a.png" in error for error in errors) and memory < 64 * MiB


def test_the_rest_of_the_images_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(blank("JPEG"))
    for number, name in enumerate(("PNG of 50,000 x 50,000", "JPEG with EXIF in many segments", "PPM as text")):
        extension, make, _ = ATTACKS[name]
        (folder / f"bad{number}.{extension}").write_bytes(make())
    sets = ("DATASETS.TRAIN", f"('{folder}/',)", "DATASETS.TEST", "()")
    ssl = ("--config-file", "configs/demo/ssl_streets.yaml")
    tiny = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 0, "PRETEXT.IMAGE_SIZE", 32)
    done = run(tmp_path, "pretrain_ssl.py", *ssl, *tiny, *sets, "OUTPUT_DIR", tmp_path / "out")
    assert "3 of 7 images cannot be read and are left out" in done.stdout and "4 training images" in done.stdout
    checked = run(tmp_path, "relvit-d2", "check-data", *ssl, "--output", tmp_path / "check", *sets)
    for number in range(3):
        assert f"bad{number}." in checked.stdout
