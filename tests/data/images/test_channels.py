"""Grayscale, 16-bit and multi-channel images, from the file to the loss."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image

from relvit_d2.analysis.pixel_statistics import pixel_format, pixel_statistics
from relvit_d2.data.detection.catalog import get_images
from relvit_d2.data.detection.mapper import DetectionMapper, ImageReader
from relvit_d2.data.images.decode import PixelFormat, channels_and_max_value, image_size, read_rgb
from relvit_d2.detection.model import build_detector
from relvit_d2.pretext.views import ViewConfig, Views
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.scripts import run

rng = np.random.default_rng(0)
GRAY = rng.integers(0, 256, (20, 30), np.uint8)
DEEP = rng.integers(0, 4096, (20, 30), np.uint16)
FIVE = rng.integers(0, 256, (20, 30, 5), np.uint8)


def test_gray_and_colour(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    Image.fromarray(FIVE[..., :3]).save(tmp_path / "colour.png")
    Image.fromarray(FIVE[..., :4]).save(tmp_path / "alpha.png")
    assert (PixelFormat(1).read(tmp_path / "gray.png") == GRAY[..., None]).all()
    assert (PixelFormat(3).read(tmp_path / "gray.png") == GRAY[..., None]).all()
    luma = np.array(Image.fromarray(FIVE[..., :3]).convert("L"))
    assert (PixelFormat(1).read(tmp_path / "colour.png")[..., 0] == luma).all()
    assert (PixelFormat(4).read(tmp_path / "alpha.png") == FIVE[..., :4]).all()
    assert (read_rgb(tmp_path / "alpha.png") == FIVE[..., :3]).all()
    with pytest.raises(UserError, match=r"colour\.png' has 3 channels, but INPUT.CHANNELS is 4"):
        PixelFormat(4).read(tmp_path / "colour.png")


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_eight_bits(tmp_path: Path, name: str, channels: int) -> None:
    path = tmp_path / name
    np.save(path, DEEP) if name.endswith("npy") else Image.fromarray(DEEP).save(path)
    for white in (4095, 0, 1000):
        expected = np.minimum(DEEP.astype(np.float64) * 255 / (white or 65535), 255).round()
        assert (PixelFormat(channels, white).read(path) == expected[..., None]).all()
    assert image_size(path) == (30, 20)
    assert pixel_format([path]) == PixelFormat(1, int(DEEP.max()))


def test_values_of_unknown_range(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FIVE.astype(np.float32) / 255)
    with pytest.raises(
        UserError, match=r"a\.npy' contains float32 numbers, whose range is unknown: set INPUT.MAX_VALUE"
    ):
        PixelFormat(5).read(tmp_path / "a.npy")
    assert (PixelFormat(5, 1).read(tmp_path / "a.npy") == FIVE).all()
    np.save(tmp_path / "b.npy", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        PixelFormat(1, 1).read(tmp_path / "b.npy")


def test_bands_of_arrays_and_pages(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FIVE)
    pages = [Image.fromarray(FIVE[..., band]) for band in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for path in (tmp_path / "a.npy", tmp_path / "a.tif"):
        assert (PixelFormat(5).read(path) == FIVE).all()
        small = PixelFormat(5).read(path, longest=15)
        for band in range(5):
            wanted = Image.fromarray(FIVE[..., band]).resize((15, 10), Image.Resampling.BILINEAR)
            assert (small[..., band] == np.array(wanted)).all()
        assert pixel_format([path]).channels == 5


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", "shape", "pickle", "text"])
def test_invalid_arrays_are_errors(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.npy"
    if content == "shape":  # a header that declares more data than the file has
        np.save(path, np.zeros((4, 4, 3), np.uint8))
        path.write_bytes(path.read_bytes().replace(b"(4, 4, 3)", b"(99999, 99999, 3)"))
    elif content == "pickle":
        np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    elif content == "text":
        np.save(path, np.array([["a"]]))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npy"):
        PixelFormat(3).read(path)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF 2.3 tag 0x0112 to stored pixels."""
    turned = pixels.swapaxes(0, 1) if orientation > 4 else pixels
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return turned[::-1] if orientation in (3, 4, 7, 8) else turned


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def add_chunk(file: Path, kind: bytes, body: bytes) -> None:
    """Insert a chunk after the pixels of a PNG file."""
    data = file.read_bytes()
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    file.write_bytes(data[:-12] + chunk + data[-12:])


def chunk_of(kind: str, orientation: int) -> tuple[bytes, bytes]:
    """Return a PNG chunk with an orientation: EXIF, EXIF as text (ImageMagick), or XMP."""
    exif = exif_of(orientation).tobytes()
    profile = f"\nexif\n{len(exif):8d}\n{exif.hex()}\n".encode()
    return {
        "eXIf": (b"eXIf", exif.removeprefix(b"Exif\0\0")),
        "tEXt": (b"tEXt", b"Raw profile type exif\0" + profile),
        "zTXt": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "iTXt": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>' % orientation),
    }[kind]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pixels", [FIVE[..., :3], GRAY, DEEP], ids=["colour", "gray", "deep"])
def test_pixels_and_sizes_are_upright_wherever_the_orientation_is_stored(
    tmp_path: Path, orientation: int, pixels: np.ndarray
) -> None:
    for name in ("a.jpg", "a.webp", "a.tif", "a.png"):
        if not (pixels is DEEP and name in ("a.jpg", "a.webp")):
            Image.fromarray(pixels).save(
                tmp_path / name, exif=exif_of(orientation), quality=100, subsampling=0, lossless=True
            )
    for kind in ("eXIf", "tEXt", "zTXt", "iTXt"):
        Image.fromarray(pixels).save(tmp_path / f"{kind}.png")
        add_chunk(tmp_path / f"{kind}.png", *chunk_of(kind, orientation))
    with zipfile.ZipFile(tmp_path / f"{orientation}.zip", "w") as packed:  # archives stay open by their path
        for file in sorted(tmp_path.glob("*.png")):
            packed.write(file, file.name)
    for path in [
        *sorted(tmp_path.glob("a.*")),
        *sorted(tmp_path.glob("*.png")),
        *get_images(f"{tmp_path}/{orientation}.zip"),
    ]:
        expected = upright(pixels, orientation)
        for channels in (1, 3):
            read = PixelFormat(channels).read(path)
            assert image_size(path) == read.shape[1::-1] == expected.shape[1::-1], path
            if isinstance(path, Path):
                with Image.open(io.BytesIO(path.read_bytes())) as picture:
                    for _ in range(2):  # before its pixels are decoded and after
                        assert (PixelFormat(channels).convert(picture) == read).all(), path
                        picture.load()
            plain = PixelFormat(channels).convert(Image.fromarray(expected))
            assert np.abs(read.astype(int) - plain).mean() < (20 if str(path).endswith(".jpg") else 0.001), path
            assert max(image_size(path)) == 30 and PixelFormat(channels).read(path, 15).shape[1::-1] == (
                (15, 10) if expected.shape[1] == 30 else (10, 15)
            )
        if isinstance(path, Path) and pixels is not DEEP and path.suffix != ".tif":  # Detectron2 transposes TIFF twice
            assert (read_image(str(path), "RGB") == read_rgb(path)).all(), path


def test_damaged_metadata_do_not_make_an_image_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for kind, body in ((b"eXIf", b"nonsense"), (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nxyz")):
        Image.fromarray(FIVE[..., :3]).save(path)
        add_chunk(path, kind, body)
        assert image_size(path) == (30, 20) and (read_rgb(path) == FIVE[..., :3]).all()


def test_animations_are_read_as_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(GRAY + np.uint8(40 * i)) for i in range(4)]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (PixelFormat(1).read(tmp_path / name)[..., 0] == GRAY).all()
        assert channels_and_max_value(tmp_path / name)[0] in (1, 3)
        with pytest.raises(UserError, match=r"set it to [13]"):
            PixelFormat(4).read(tmp_path / name)


def test_pixel_statistics_equal_those_of_all_pixels(tmp_path: Path) -> None:
    images = [rng.integers(0, 256, (10 + i, 20, 3), np.uint8) for i in range(5)]
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    (tmp_path / "bad.png").write_bytes(b"")
    found = pixel_statistics([*files, tmp_path / "bad.png"], PixelFormat())
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    np.testing.assert_allclose(found.mean, pixels.mean(0))
    np.testing.assert_allclose(found.std, pixels.std(0))
    assert found.images == 5
    with pytest.raises(UserError, match="none of the 1 images"):
        pixel_statistics([tmp_path / "bad.png"], PixelFormat())


def keys(channels: int, size: int = 32) -> list[str]:
    values = [100.0 + channel for channel in range(channels)]
    pairs = {"INPUT.CHANNELS": channels, "MODEL.PIXEL_MEAN": values, "MODEL.PIXEL_STD": values, "MODEL.DEVICE": "cpu"}
    return [str(item) for pair in pairs.items() for item in pair]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_mapper_and_detector_with_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    cfg = load_config("configs/demo/streets.yaml", [*keys(channels), "INPUT.RANDOM_FLIP", "horizontal"])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    np.save(tmp_path / "a.npy", FIVE[..., :channels])
    annotation = {"bbox": [2, 3, 20, 15], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    record = {"file_name": str(tmp_path / "a.npy"), "height": 20, "width": 30, "annotations": [annotation]}
    np.random.seed(0)
    mapped = DetectionMapper(cfg, is_train=True)(record)
    for band in range(channels):
        np.save(tmp_path / "b.npy", FIVE[..., band])
        one = DetectionMapper(
            load_config("configs/demo/streets.yaml", [*keys(1), "INPUT.RANDOM_FLIP", "horizontal"]), True
        )
        np.random.seed(0)
        assert (mapped["image"][band] == one(record | {"file_name": str(tmp_path / "b.npy")})["image"][0]).all()
    with EventStorage():
        losses = build_detector(cfg)([mapped, DetectionMapper(cfg, True)(record | {"annotations": []})])
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("mask", [False, True])
def test_images_without_objects_may_be_cropped(tmp_path: Path, mask: bool) -> None:
    np.save(tmp_path / "a.npy", FIVE[..., :3])
    cfg = load_config("configs/demo/streets.yaml", ["INPUT.CROP.ENABLED", "True", "MODEL.MASK_ON", str(mask)])
    crowd = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1}
    for annotations in ([], [crowd]):
        record = {"file_name": str(tmp_path / "a.npy"), "height": 20, "width": 30, "annotations": annotations}
        assert len(DetectionMapper(cfg, is_train=True)(record)["instances"]) == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_views_change_brightness_and_contrast_of_any_channels(channels: int) -> None:
    images = torch.randint(0, 256, (3, channels, 40, 40), dtype=torch.uint8)
    sizes = torch.tensor([[40, 40]] * 3)
    mean, std = (0.0,) * channels, (1.0,) * channels
    config = ViewConfig(32, 8, mean=mean, std=std, jitter_prob=1.0, gray_prob=1.0, noise_prob=0.5, permute=True)
    views, _ = Views(config).train(images, sizes, torch.arange(3))
    assert views.shape == (3, channels, 32, 32)
    assert 0 <= views.min() < views.max() <= 1
    # Gray pixels have neither saturation nor hue: RGB of three equal channels goes the same way.
    same = ViewConfig(
        32, 8, mean=(0.0,) * 3, std=(1.0,) * 3, jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=1.0, gray_prob=1.0
    )
    one = ViewConfig(32, 8, mean=(0.0,), std=(1.0,), jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=1.0, gray_prob=1.0)
    gray, _ = Views(one).train(images[:, :1], sizes, torch.arange(3))
    rgb, _ = Views(same).train(images[:, :1].expand(-1, 3, -1, -1).contiguous(), sizes, torch.arange(3))
    torch.testing.assert_close(rgb, gray.expand(-1, 3, -1, -1), atol=1e-3, rtol=0)


def test_pretraining_uses_the_configured_channels() -> None:
    cfg = load_config("configs/demo/ssl_streets.yaml", keys(5))
    model = build_pretraining_model(cfg).train()
    images = torch.randint(0, 256, (2, 5, 40, 48), dtype=torch.uint8)
    losses = model({"images": images, "sizes": torch.tensor([[40, 48], [30, 40]]), "keys": torch.arange(2)})
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()
    assert model.encoder.arguments["in_chans"] == 5


def test_estimated_pixel_statistics_are_a_valid_config(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 4096, (40, 40), np.uint16)).save(root / f"{number}.png")
    lines = run(tmp_path, "relvit-d2", "estimate-pixels", root).stdout
    base = Path("configs/demo/ssl_streets.yaml").resolve()
    (tmp_path / "gray.yaml").write_text(f"_BASE_: {base}\n{lines}")
    cfg = load_config(str(tmp_path / "gray.yaml"), [])
    image = ImageReader.of(cfg)(root / "0.png").float()
    assert image.shape == (1, 40, 40)
    assert image.max() > 250  # of 255: twelve bits fill the range
    assert abs(image.mean().item() - cfg.MODEL.PIXEL_MEAN[0]) < 5
    assert abs(image.std().item() - cfg.MODEL.PIXEL_STD[0]) < 5
