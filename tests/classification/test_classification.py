"""The classifier: augmentation, pooling, model selection, and probes."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from relvit_d2.classification.augmentation import Augmentation, AugmentationConfig
from relvit_d2.classification.model import Classifier, build_classifier
from relvit_d2.classification.probes import fit_linear, linear_probe, linear_scores
from relvit_d2.classification.run import (
    evaluate,
    load_data,
    next_command,
    probe,
    resolve_config,
)
from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.data.classification.division import split
from relvit_d2.data.classification.image_folder import LabelledImages
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.encoders import ENCODERS, build_encoder
from relvit_d2.encoders.vit import ViT
from relvit_d2.engine.weights import load_trained
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.pretext.resampling import random_flips, random_pad_corners
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import image_keys
from tests.support.classifiers import config, trained


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_a_padded_crop_equals_a_loop_over_images() -> None:
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    config = AugmentationConfig(8, pad=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    sizes = torch.full((9, 2), 8)
    keys = image_keys(0, "views", 5, torch.arange(9))
    found = Augmentation(config).train(images, sizes, keys)
    flips, corners = random_flips(keys, 0.5), random_pad_corners(keys, 3)
    assert flips.any() and not flips.all()
    for image, view, flip, (top, left) in zip(images, found, flips, corners.tolist(), strict=True):
        window = F.pad(image, (3, 3, 3, 3))[:, top : top + 8, left : left + 8]
        window = (window.flip(2) if flip else window) / 255
        expected = (window - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
        torch.testing.assert_close(view, expected)


@pytest.mark.parametrize("randaugment", [0, 2])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_augmentation_of_parts_of_a_batch_equals_that_of_the_whole(crop: str, randaugment: int) -> None:
    images, sizes = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), torch.full((6, 2), 16)
    augmentation = Augmentation(AugmentationConfig(16, crop, randaugment=randaugment))
    keys, before = image_keys(1, "views", 0, torch.arange(6)), torch.get_rng_state()
    whole = augmentation.train(images, sizes, keys)
    for part in (slice(0, 2), slice(2, 6)):
        torch.testing.assert_close(augmentation.train(images[part], sizes[part], keys[part]), whole[part])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(augmentation.train(images, sizes, keys.flip(0)), whole)


def test_the_centre_crop_equals_torchvisions() -> None:
    """On smooth images, since torchvision resamples in two steps."""
    waves = torch.linspace(0, 3, 60)[:, None].sin() * torch.linspace(0, 4, 90).cos()
    image = (waves * 100 + 128).to(torch.uint8).expand(3, -1, -1)
    config = AugmentationConfig(28, "resized", centre=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    found = Augmentation(config).evaluate(image[None], torch.tensor([[60, 90]]))[0]
    expected = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])(image) / 255
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    squeezed = Augmentation(AugmentationConfig(28, mean=(0, 0, 0), std=(1, 1, 1)))
    found = squeezed.evaluate(image[None], torch.tensor([[60, 90]]))[0]
    torch.testing.assert_close(found, v2.Resize((28, 28), antialias=True)(image / 255), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["vit_nano", "swin_tiny", "t2t_vit_14"])
def test_pool_mean_is_the_mean_of_the_patch_tokens(name: str) -> None:
    network = Classifier(build_encoder(name, img_size=64), 5, "mean").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        scores, _ = network(images)
        torch.testing.assert_close(scores, network.head(network.encoder.tokens(images).mean(1)))
        network.pool = "cls"
        assert torch.allclose(network(images)[0], scores, atol=1e-6) == (name == "swin_tiny")
    with pytest.raises(UserError, match=r"MODEL.CLASSIFIER.POOL 'max' is unknown; give cls or mean"):
        Classifier(network.encoder, 5, "max")


@pytest.mark.parametrize("name", list(ENCODERS))
def test_pool_cls_is_the_class_token_or_the_mean(name: str) -> None:
    if name in ("vit_base",):
        pytest.skip("a wide vit_small")
    encoder = build_encoder(name, img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        summary, tokens = encoder.pooled_features(images)
        torch.testing.assert_close(tokens, encoder.tokens(images))
    assert summary.shape == (2, encoder.dim)
    has_class_token = any("cls_token" in key for key, _ in encoder.named_parameters())
    assert torch.allclose(summary, tokens.mean(1), atol=1e-5) == (not has_class_token)
    if isinstance(encoder, ViT):
        with torch.no_grad():
            torch.testing.assert_close(summary, encoder.vit.forward_head(encoder.vit.forward_features(images)))


def test_a_fraction_of_each_class_is_held_out_by_the_seed() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 7)[torch.randperm(21)]
    stack = ImageStack(torch.arange(21, dtype=torch.uint8).view(21, 1, 1, 1).expand(-1, 3, 2, 2), "x")
    data = LabelledImages("x", stack, labels, ("a", "b", "c"))
    train, held = split(data, 0.5, seed=3)
    assert held.labels.bincount().tolist() == [5, 2, 3] and train.labels.bincount().tolist() == [5, 2, 4]
    numbers = [[int(image[0, 0, 0]) for image in part.images] for part in (train, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(21))
    assert all(labels[number] == label for number, label in zip(numbers[1], held.labels.tolist(), strict=True))
    again, other = split(data, 0.5, seed=3)[1], split(data, 0.5, seed=4)[1]
    assert torch.equal(again.images[0], held.images[0]) and not torch.equal(
        torch.stack(list(other.images)), torch.stack(list(held.images))
    )
    with pytest.raises(UserError, match="holds out 0 of the 21"):
        split(data, 0.01, seed=0)


MODES: dict[str, tuple[object, ...]] = {
    "supervised": (),
    "joint": ("MODEL.RELVIT.JOINT", True),
    "everything": (
        *("INPUT.VIEW.RANDAUGMENT", 2, "INPUT.VIEW.MIXUP", 0.2, "INPUT.VIEW.CUTMIX", 1.0),
        *("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5),
        *("SOLVER.GRAD_ACCUM_STEPS", 2, "MODEL.RELVIT.JOINT", True),
    ),
    "large images": ("INPUT.VIEW.CROP", "resized", "INPUT.VIEW.CENTRE", 0.875),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_selects_on_validation_and_evaluates_the_test_set_once(
    mode: str, trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "large images":  # too large to keep decoded, so the data loader reads them
        monkeypatch.setattr("relvit_d2.data.classification.image_folder.IN_MEMORY", 100)
    cfg = config(trees, tmp_path, *MODES[mode])
    model, data, results = trained(cfg)
    assert data.train and isinstance(data.train.images, ImageStack) == (mode != "large images")
    rows = metrics(tmp_path)
    assert len(rows) == 4 and {"loss_class", "accuracy_class"} <= rows[0].keys()
    assert [("validation/top1" in row) for row in rows] == [False, True, False, True]
    assert not any("test" in key for row in rows for key in row)
    found = results[f"{trees}/test"]
    assert {"top1", "loss"} == found["test"].keys() and found["images"] == 12
    assert "the best by validation/top1" in results["model"]
    assert (tmp_path / "encoder.safetensors").is_file()
    joint = "JOINT" in str(MODES[mode])
    assert ("loss_relation" in rows[0]) == joint and (model.pretext is not None) == joint
    if joint:
        assert rows[0]["chance_position"] == 0.25


def test_results_selected_on_the_test_set_are_named_so(trees: Path, tmp_path: Path) -> None:
    *_, results = trained(config(trees, tmp_path, "TEST.BEST_ON_TEST", True, "DATASETS.VALIDATION", ""))
    assert results[f"{trees}/test"].keys() == {"best_on_test", "images"} and "watched_test" in results
    assert "watched_test/top1" in metrics(tmp_path)[1]


def test_without_validation_the_last_model_is_tested(trees: Path, tmp_path: Path) -> None:
    _, data, results = trained(config(trees, tmp_path, "DATASETS.VALIDATION", ""))
    assert data.train and len(data.train) == 24 and results["model"] == "the last one"
    assert not (tmp_path / "model_best.pth").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "classify --config-file {0}/config.yaml --eval linear MODEL.WEIGHTS {0}/encoder.safetensors"),
        (
            ("DATASETS.VALIDATION", ""),
            "classify --config-file {0}/config.yaml --eval knn MODEL.WEIGHTS {0}/encoder.safetensors",
        ),
        (("DATASETS.TEST", "()"), "report {0} --output report.html"),
    ],
)
def test_the_next_command_can_be_run(overrides: tuple[str, ...], words: str, trees: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "runs", tmp_path / "my 1'st run"):
        cfg = config(trees, folder, *overrides)
        given = shlex.split(next_command(cfg, load_data(cfg, training=True)))
        assert given == ["relvit-d2", *(word.format(folder) for word in words.split())]


def test_training_and_probes_reach_high_accuracy(trees: Path, tmp_path: Path) -> None:
    cfg = config(trees, tmp_path, "SOLVER.MAX_ITER", 40, "TEST.EVAL_PERIOD", 40)
    model, data, results = trained(cfg)
    assert results[f"{trees}/test"]["test"]["top1"] == 100
    for kind in ("knn", "linear"):
        assert probe(cfg, model, data, kind)[kind]["top1"] > 90


@pytest.mark.parametrize("selected", [True, False])
def test_the_average_of_the_weights_is_tested_and_exported_too(selected: bool, trees: Path, tmp_path: Path) -> None:
    keys = ("SOLVER.EMA.ENABLED", True, "SOLVER.BASE_LR", 1e-2, "TEST.EVAL_PERIOD", 2 if selected else 0)
    cfg = config(trees, tmp_path, *keys)
    model, data, results = trained(cfg)
    assert data.test
    found = results[f"{trees}/test"]
    assert {"validation", "validation_ema"} <= results.keys()
    stem = "model_best" if selected else "model_final"
    for suffix in ("", "_ema"):
        load_trained(cfg, model, tmp_path / f"{stem}{suffix}.pth")
        assert evaluate(cfg, model, data.test) == found[f"test{suffix}"]
        tensors, metadata = read_encoder(tmp_path / f"encoder{suffix}.safetensors")
        assert all(torch.equal(tensors[name], value) for name, value in model.encoder.state_dict().items())
        assert metadata["results"][f"test{suffix}"] == found[f"test{suffix}"]
    assert found["test"]["loss"] != found["test_ema"]["loss"]


def test_the_linear_probe_has_zero_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(80, 5, generator=generator), torch.randint(3, (80,), generator=generator)
    solution = fit_linear(features, labels, 3, penalty=0.01).requires_grad_()
    loss = F.cross_entropy(linear_scores(features, solution), labels) + 0.005 * solution[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, solution)
    assert gradient.abs().max() < 1e-4
    with torch.no_grad():
        shifted = solution + 0.1 * torch.randn(solution.shape, generator=generator)
        worse = F.cross_entropy(linear_scores(features, shifted), labels) + 0.005 * shifted[:, :-1].square().sum()
    assert worse > loss


def test_the_linear_probe_separates_linear_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 3 * torch.randn(4, 8, generator=generator)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 4
        return centres[labels] + torch.randn(count, 8, generator=generator), labels

    figures = linear_probe(draw(200), draw(60), draw(60), 4)
    assert figures["top1"] > 95 and figures["penalty"] in (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)


def test_knn_uses_neighbours_in_another_set() -> None:
    generator = torch.Generator().manual_seed(2)
    known, unseen = torch.randn(40, 6, generator=generator), torch.randn(15, 6, generator=generator)
    theirs, labels = torch.randint(3, (40,), generator=generator), torch.randint(3, (15,), generator=generator)
    hits = 0
    for feature, label in zip(unseen, labels, strict=True):
        cosine = F.cosine_similarity(feature[None], known)
        votes = [0.0, 0.0, 0.0]
        for index in cosine.argsort(descending=True)[:5].tolist():
            votes[int(theirs[index])] += float(cosine[index])
        hits += votes.index(max(votes)) == int(label)
    assert knn_accuracy(unseen, labels, 5, known=(known, theirs)) == pytest.approx(hits / 15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("INPUT.VIEW.SIZE", 32), r"16x16 pixels, but INPUT.VIEW.CROP pad needs images of INPUT.VIEW.SIZE 32"),
        (("INPUT.VIEW.CROP", "centre"), "CROP 'centre' is unknown; give pad or resized"),
        (("INPUT.VIEW.FLIP", 2.0), "FLIP 2.0 is out of range"),
        (("INPUT.VIEW.SCALE", "[0.5]"), "SCALE .* is not a range"),
        (("INPUT.VIEW.MIXUP", 0.2, "SOLVER.IMS_PER_BATCH", 3), "it is 3: change"),
        (("INPUT.VIEW.CUTMIX", -1.0), "give 0 for none"),
        (("DATASETS.VALIDATION", "100%"), "give another percentage"),
        (("DATASETS.TEST", "()", "TEST.BEST_ON_TEST", True), "DATASETS.TEST, which is empty"),
    ],
)
def test_invalid_keys_are_reported(overrides: tuple[object, ...], message: str, trees: Path, tmp_path: Path) -> None:
    cfg = config(trees, tmp_path, *overrides)
    with pytest.raises(UserError, match=message):
        data = load_data(cfg, training=True)
        build_classifier(resolve_config(cfg, data), data.classes)


def test_mixed_image_sizes_are_reported_with_the_file(trees: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "mixed" / name).mkdir(parents=True)
        for number, side in enumerate((16, 18)):
            Image.new("RGB", (side, 16)).save(tmp_path / f"mixed/{name}/{number}.png")
    names = ("DATASETS.TRAIN", f"('{tmp_path}/mixed',)", "DATASETS.TEST", "()", "DATASETS.VALIDATION", "")
    with pytest.raises(UserError, match=r"a/1\.png' is 18x16 pixels, but INPUT.VIEW.CROP pad"):
        load_data(config(trees, tmp_path, *names), training=True)
    assert load_data(config(trees, tmp_path, *names, "INPUT.VIEW.CROP", "resized"), training=True).classes == 2
