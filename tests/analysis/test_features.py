"""Features of images from an encoder file, against the encoder itself, also without Detectron2."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relvit_d2 import load_encoder
from relvit_d2.conversion.encoder_file import save_encoder
from relvit_d2.encoders import Encoder, build_encoder
from relvit_d2.utils.errors import UserError
from tests.support.scripts import ROOT

STATISTICS = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 50.0, 40.0]}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder("vit_nano", patch_size=8, img_size=32, pos_embed=True).eval()


@pytest.fixture
def file(encoder: Encoder, tmp_path: Path) -> Path:
    save_encoder(encoder, tmp_path / "encoder.safetensors", {**STATISTICS, "image_size": 32})
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)


def test_features_are_those_of_the_encoder(encoder: Encoder, file: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    mean, std = (np.array(STATISTICS[key], np.float32) for key in ("pixel_mean", "pixel_std"))
    images = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        pooled, _ = encoder.pooled_features(images)
        expected = encoder(images)[encoder.last][0]
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for source in (file, tmp_path, str(tmp_path)):  # the folder of a run too
        load = load_encoder(source)
        for image in (tmp_path / "image.png", str(tmp_path / "image.png"), pixels, Image.fromarray(pixels)):
            found = load(image, size=48)
            assert found.tokens.shape == (encoder.dim, 3, 6)
            torch.testing.assert_close(found.tokens, expected)
            torch.testing.assert_close(found.pooled, pooled[0])


@pytest.mark.parametrize(("size", "grid"), [(0, (2, 4)), (16, (1, 2)), (8, (1, 1)), (1, (1, 1)), (100, (6, 12))])
def test_images_are_resized_to_whole_patches(size: int, grid: tuple[int, int], file: Path, pixels: np.ndarray) -> None:
    assert load_encoder(file)(pixels, size).tokens.shape[1:] == grid


def test_an_image_and_its_enlarged_copy_have_almost_the_same_features(file: Path) -> None:
    """Resizing has no offset: a shift by a fraction of a pixel would change the features more."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small, large = (np.asarray(smooth.resize((side, side), Image.Resampling.BICUBIC)) for side in (64, 256))
    first, second = (load_encoder(file)(image).tokens for image in (small, large))
    assert (first - second).abs().mean() < 0.02 * first.abs().mean()


def test_it_works_without_detectron2(file: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    code = """
import sys
sys.modules["detectron2"] = None
import numpy as np, relvit_d2
features = relvit_d2.load_encoder(sys.argv[1])(np.zeros((16, 16, 3), np.uint8))
assert features.tokens.isfinite().all() and features.pooled.isfinite().all()
try:
    relvit_d2.pretrain
except relvit_d2.utils.errors.UserError as error:
    assert "relvit-d2 doctor --install-detectron2" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, check=True)


def test_bad_files_and_images(encoder: Encoder, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*no.jpg' does not exist"):
        load_encoder(file)("no.jpg")
    with pytest.raises(UserError, match=r"float64 and shape .* is not an image: give uint8"):
        load_encoder(file)(np.zeros((8, 8, 3)))
    save_encoder(encoder, tmp_path / "bare.safetensors", {"image_size": 32})
    with pytest.raises(UserError, match=r"'.*bare.safetensors' has no valid pixel_mean"):
        load_encoder(tmp_path / "bare.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged.safetensors'"):
        load_encoder(tmp_path / "damaged.safetensors")
