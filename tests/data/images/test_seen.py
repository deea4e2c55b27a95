"""Training images of an encoder: found among test images, counted by evaluations, excluded on request."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relvit_d2.conversion.encoder_file import read_encoder, save_encoder
from relvit_d2.data.images.seen import KEY, SeenImages, count_seen, training_metadata
from relvit_d2.data.images.similarity import NEAR, Fingerprint, fingerprint_file
from relvit_d2.encoders import build_encoder
from relvit_d2.utils.errors import UserError
from tests.support.scripts import command, fails, run

DIGITS = st.integers(0, 3)


@st.composite
def prints(draw: st.DrawFn) -> list[Fingerprint]:
    """Fingerprints with equal digests and with hashes that differ in a few bits."""
    bases = [0x0123456789ABCDEF0123456789ABCDEF, 0, (1 << 128) - 1, 0xF0F0 << 60]
    found = []
    for _ in range(draw(st.integers(0, 12))):
        near = bases[draw(DIGITS)]
        for bit in draw(st.sets(st.integers(0, 127), max_size=NEAR + 2)):
            near ^= 1 << bit
        found.append(Fingerprint(bytes([draw(DIGITS)] * 16), None if draw(st.booleans()) else near))
    return found


@settings(max_examples=60, deadline=None)
@given(prints(), prints(), prints())
def test_seen_images_are_those_of_a_comparison_of_all_pairs(
    first: list[Fingerprint], more: list[Fingerprint], tested: list[Fingerprint]
) -> None:
    seen = SeenImages.of(first) | SeenImages.of(more)
    again = SeenImages.of_metadata(json.loads(json.dumps(seen.metadata())))
    assert again is not None

    def close(one: Fingerprint, other: Fingerprint) -> bool:
        if one.exact == other.exact:
            return True
        return None not in (one.near, other.near) and bin(one.near ^ other.near).count("1") <= NEAR  # type: ignore[operator]

    slow = [index for index, one in enumerate(tested) if any(close(one, other) for other in [*first, *more])]
    assert seen.indices(tested) == again.indices(tested) == slow


def test_damaged_fingerprints_are_errors_and_those_of_another_version_are_ignored() -> None:
    entries = SeenImages.of([Fingerprint(bytes(16), 3)]).metadata()
    for broken in ({**entries[KEY], "near": "!"}, {**entries[KEY], "exact": "AAAA"}, ["a"]):
        with pytest.raises(UserError, match="are damaged"):
            SeenImages.of_metadata({KEY: broken})
    assert SeenImages.of_metadata({KEY: {**entries[KEY], "version": -1}}) is None
    assert count_seen({}, {"a": []}) == {}


@pytest.mark.parametrize("quality", [None, 70])
def test_a_planted_photograph_is_found_exact_and_recompressed(
    samples: Path, tmp_path: Path, quality: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    photos = sorted((samples / "VOC2007/JPEGImages").glob("*.jpg"))
    train, test = photos[:20], photos[20:32]
    planted = tmp_path / "under another name.png"
    image = Image.open(test[3]).convert("RGB")
    if quality:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        image = Image.open(content)
    image.save(planted)
    assert (fingerprint_file(test[3]).exact == fingerprint_file(planted).exact) == (quality is None)
    save_encoder(
        build_encoder("vit_nano", patch_size=8, img_size=32),
        tmp_path / "e.safetensors",
        training_metadata({"t": train}),
    )
    clean = count_seen(read_encoder(tmp_path / "e.safetensors")[1], {"test": test})
    assert clean["test"] == (0, 12)
    counts = count_seen(training_metadata({"t": [*train, planted]}), {"test": test})
    assert counts["test"] == (1, 12) and "1 of 12 images of test was seen" in caplog.text


@pytest.fixture(scope="module")
def pretrained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a pre-training on a folder with two of the five test images, of which one is recompressed."""
    here = tmp_path_factory.mktemp("seen")
    photos = here / "photos"
    photos.mkdir()
    for file in (root / "svhn/train").glob("*.png"):
        Image.open(file).save(photos / f"{file.stem}.png")
    Image.open(root / "svhn/test/1.png").save(photos / "copy.bmp")
    Image.open(root / "svhn/test/2.png").save(photos / "copy.jpg", quality=90)
    tiny = command("pretrain_ssl.py", here / "pretrain", "DATASETS.TRAIN", f"('{photos}/',)", "DATASETS.TEST", "()")
    run(root, *tiny)
    return here


def test_evaluations_count_test_images_that_the_encoder_has_seen(root: Path, pretrained: Path) -> None:
    encoder, output = pretrained / "pretrain/encoder.safetensors", pretrained / "train"
    counted = {"seen": 2, "images": 5}
    run(root, *command("train_net.py", output, "MODEL.WEIGHTS", encoder))
    assert json.loads((output / "inference/results.json").read_text())["svhn_test"]["seen_in_pretraining"] == counted
    assert "2 of 5 images of svhn_test were seen in pre-training" in (output / "log.txt").read_text()
    assert "2 of 5 images of svhn_test were seen in pre-training" in (output / "report.html").read_text()
    # A checkpoint has them too.
    alone = ("MODEL.WEIGHTS", output / "model_final.pth")
    run(root, *command("train_net.py", pretrained / "alone", *alone, flags=("--eval-only",)))
    found = json.loads((pretrained / "alone/inference/results.json").read_text())
    assert found["svhn_test"]["seen_in_pretraining"] == counted


def test_check_data_lists_seen_images(root: Path, pretrained: Path) -> None:
    encoder = pretrained / "pretrain/encoder.safetensors"
    check = ("relvit-d2", "check-data", "svhn_test", "--output", pretrained / "check")
    done = run(root, *check, "--against", encoder)
    assert "svhn_test: 2 images were seen in training" in done.stdout
    assert [f"svhn/test/{number}.png" in done.stdout for number in (1, 2, 3)] == [True, True, False]
    seen = json.loads((pretrained / "check/check.json").read_text())["seen"]["svhn_test"]
    assert [Path(file).name for file in seen] == ["1.png", "2.png"]
    plain = pretrained / "plain.safetensors"
    save_encoder(build_encoder("vit_nano", patch_size=4, img_size=32), plain, {})
    assert "plain.safetensors' has no fingerprints" in fails(root, *check, "--against", plain)


def test_excluded_images_are_removed_from_any_folder(root: Path, pretrained: Path) -> None:
    output = pretrained / "without"
    data = (
        "DATASETS.TRAIN",
        f"('{pretrained}/pho*/*.*',)",
        "DATASETS.TEST",
        "()",
        "DATASETS.EXCLUDE",
        "('svhn_test',)",
    )
    run(root, *command("pretrain_ssl.py", output, *data))
    assert "2 of 14 images of" in (output / "log.txt").read_text()
    seen = SeenImages.of_metadata(read_encoder(output / "encoder.safetensors")[1])
    assert seen is not None and len(seen.exact) == 12
    assert "every image of svhn_test is a duplicate" in fails(
        root,
        *command(
            "pretrain_ssl.py", output / "all", "DATASETS.TRAIN", "('svhn_test',)", "DATASETS.EXCLUDE", "('svhn_test',)"
        ),
    )
