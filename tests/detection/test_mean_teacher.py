"""Semi-supervised training: pseudo-labels, the losses on them, the images of student and teacher, and batches."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from PIL import Image

from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.loader import EndlessOrder
from relvit_d2.detection.mean_teacher import (
    TRAINED,
    WEAK,
    MixedBatches,
    Teacher,
    UnlabelledMapper,
    first_iteration,
    pseudo_labels,
)
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import training_batches
from relvit_d2.engine.weight_average import WeightAverage
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import picture
from tests.support.detectors import tiny_config
from tests.support.runs import equal

THRESHOLD = 0.35  # some of the detections of an untrained detector are above it


def config(*overrides: object) -> CfgNode:
    return tiny_config("SEMI.UNLABELLED", "somewhere", "SEMI.THRESHOLD", THRESHOLD, "SEMI.WEIGHT", 0.5, *overrides)


@pytest.fixture(scope="module")
def student() -> GeneralizedRCNN:
    """An untrained detector with detections of many scores."""
    torch.manual_seed(0)
    model = build_detector(config())
    rpn, box = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for layer in (rpn.objectness_logits, rpn.anchor_deltas, box.cls_score, box.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model.train()


@pytest.fixture()
def teacher(student: GeneralizedRCNN) -> Teacher:
    """A teacher whose weights differ from the student's."""
    average = WeightAverage(student, 0.9)
    for value in average.state_dict()["model"].values():
        value += 0.02 * torch.randn_like(value)
    return Teacher(config(), student, average)


def noise(seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def labelled_entry(seed: int) -> dict[str, Any]:
    boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 40.0]]))
    return {"image": noise(seed), "instances": Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([3]))}


def mixed_batch() -> list[dict[str, Any]]:
    unlabelled = [{"image": noise(i, 64, 48 + 16 * i), WEAK: noise(10 + i, 64, 48 + 16 * i)} for i in range(2)]
    return [labelled_entry(20), *unlabelled]


def expected_labels(detections: Instances, threshold: float) -> list[tuple[list[float], int]]:
    """Select the pseudo-labels of an image one by one."""
    found = []
    for box, score, label in zip(
        detections.pred_boxes.tensor.tolist(), detections.scores.tolist(), detections.pred_classes.tolist(), strict=True
    ):
        if score > threshold and box[2] > box[0] and box[3] > box[1]:
            found.append((box, label))
    return found


def as_pairs(labels: Instances) -> list[tuple[list[float], int]]:
    return list(zip(labels.gt_boxes.tensor.tolist(), labels.gt_classes.tolist(), strict=True))


def test_confident_detections_with_an_area_are_pseudo_labels() -> None:
    boxes = torch.tensor([[0, 0, 9, 9], [5, 5, 5, 20], [1, 2, 3, 4], [7, 7, 30, 20], [0, 0, 1, 1]]).float()
    scores = torch.tensor([0.9, 0.95, 0.7, 0.7001, 0.1])
    detections = Instances((32, 32), pred_boxes=Boxes(boxes), scores=scores, pred_classes=torch.arange(5))
    labels = pseudo_labels(detections, 0.7)
    assert as_pairs(labels) == expected_labels(detections, 0.7) == [([0, 0, 9, 9], 0), ([7, 7, 30, 20], 3)]
    assert labels.regions.tensor.tolist() == boxes[[2, 4]].tolist()  # uncertain: neither object nor background
    assert len(pseudo_labels(detections, 0.99)) == 0


def test_the_teacher_is_a_detector_with_the_average_weights(student: GeneralizedRCNN, teacher: Teacher) -> None:
    batch = mixed_batch()
    before, average = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher._average.state_dict())
    labelled, unlabelled = teacher.label(batch)
    assert equal(before, dict(student.state_dict())) and equal(average, teacher._average.state_dict())
    assert all(module.training for module in student.modules())
    assert labelled == batch[:1] and [entry["image"] for entry in unlabelled] == [entry["image"] for entry in batch[1:]]

    other = copy.deepcopy(student).eval()
    other.teacher = None
    other.load_state_dict(average["model"])
    kept = 0
    for entry, source in zip(unlabelled, batch[1:], strict=True):
        height, width = source[WEAK].shape[1:]
        with torch.no_grad():
            detections = other([{"image": source[WEAK], "height": height, "width": width}])[0]["instances"]
        expected = expected_labels(detections, THRESHOLD)
        assert 0 < len(expected) < len(detections)
        assert [label for _, label in as_pairs(entry["instances"])] == [label for _, label in expected]
        np.testing.assert_allclose(
            entry["instances"].gt_boxes.tensor.tolist(), [box for box, _ in expected], rtol=1e-3, atol=1e-2
        )
        kept += len(expected)
    with EventStorage():
        metric = teacher.losses(unlabelled)["pseudo_labels"]
    assert metric.value == kept / 2 and metric.kind == "count"


def test_pseudo_labels_train_no_box_regression(student: GeneralizedRCNN, teacher: Teacher) -> None:
    student.zero_grad()
    _, unlabelled = teacher.label(mixed_batch())
    with EventStorage():
        losses = teacher.losses(unlabelled)
    assert {name for name in losses if name != "pseudo_labels"} == {f"{name}_pseudo" for name in TRAINED}
    sum(losses[f"{name}_pseudo"] for name in TRAINED).backward()
    rpn, box = student.proposal_generator.rpn_head, student.roi_heads.box_predictor
    for layer in (rpn.anchor_deltas, box.bbox_pred):
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    for layer in (rpn.objectness_logits, box.cls_score, student.backbone):
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_the_losses_of_a_mixed_batch_are_those_of_its_parts(student: GeneralizedRCNN, teacher: Teacher) -> None:
    batch = mixed_batch()
    with EventStorage() as storage:
        torch.manual_seed(3)
        alone = student(batch[:1])
        student.teacher = teacher
        torch.manual_seed(3)
        together = student(batch)
        student.teacher = None
    for name, value in alone.items():
        assert torch.equal(together.pop(name), value)
    assert set(together) == {"loss_rpn_cls_pseudo", "loss_cls_pseudo", "pseudo_labels"}
    assert "pseudo/roi_head/num_fg_samples" in storage.latest()

    _, unlabelled = teacher.label(batch)
    losses = {}
    for weight in (0.5, 1.0):
        teacher._weight = weight
        torch.manual_seed(4)
        with EventStorage():
            losses[weight] = teacher.losses(unlabelled)
    for name in TRAINED:
        assert torch.allclose(2 * losses[0.5][f"{name}_pseudo"], losses[1.0][f"{name}_pseudo"])


def test_masks_are_not_trained_on_pseudo_labels() -> None:
    cfg = config("MODEL.MASK_ON", True)
    model = build_detector(cfg).train()
    model.teacher = Teacher(cfg, model, WeightAverage(model, 0.9))
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    with EventStorage():
        losses = model.teacher.losses(model.teacher.label(mixed_batch())[1])
    assert set(losses) == {"loss_rpn_cls_pseudo", "loss_cls_pseudo", "pseudo_labels"}


def test_an_image_without_pseudo_labels_is_background(student: GeneralizedRCNN, teacher: Teacher) -> None:
    teacher._threshold = 1.0
    _, unlabelled = teacher.label(mixed_batch())
    with EventStorage():
        losses = teacher.losses(unlabelled)
    assert losses["pseudo_labels"].value == 0
    assert all(torch.isfinite(losses[f"{name}_pseudo"]) for name in TRAINED)


@pytest.mark.parametrize("channels", [1, 3])
def test_student_and_teacher_see_the_same_geometry(channels: int, tmp_path: Path) -> None:
    """The right half of the image is white: of both views, the same half is brighter, but for the erased part."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:, 40:] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    statistics = ("MODEL.PIXEL_MEAN", [100.0] * channels, "MODEL.PIXEL_STD", [50.0] * channels)
    cfg = config("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (32, 48), "INPUT.CHANNELS", channels)
    cfg.merge_from_list(list(statistics))
    mapper, plain = UnlabelledMapper(cfg), DetectionMapper(cfg, is_train=True)
    seen = set()
    for seed in range(12):
        np.random.seed(seed)
        found = mapper(tmp_path / "a.png")
        np.random.seed(seed)
        alone = plain({"file_name": str(tmp_path / "a.png")})["image"]
        assert torch.equal(found[WEAK], alone)
        assert found["image"].shape == alone.shape and not torch.equal(found["image"], alone)
        seen.add((alone.shape[1], bool(alone[0, 0, 0] > 100)))
        left, right = found["image"].float().mean(0).tensor_split(2, dim=1)
        brighter = (
            (right.quantile(0.9) > left.quantile(0.1))
            if alone[0, 0, 0] < 100
            else (left.quantile(0.9) > right.quantile(0.1))
        )
        assert brighter
    assert seen == {(32, False), (32, True), (48, False), (48, True)}


def names_of(batch: Sequence[dict[str, Any]]) -> list[Any]:
    return [entry["image"].sum().item() if WEAK not in entry else entry[WEAK].sum().item() for entry in batch]


def test_batches_are_functions_of_the_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        picture(file, number)
    records = [
        {"file_name": str(file), "image_id": i, "height": 30, "width": 40, "annotations": []}
        for i, file in enumerate(files[:2])
    ]
    keys = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.GRAD_ACCUM_STEPS", 2, "INPUT.RANDOM_FLIP", "horizontal")
    cfg, first = config(*keys), 2

    def batches(start: int, count: int) -> list[list[dict[str, Any]]]:
        source = MixedBatches(cfg, partial(training_batches, cfg, records), files[2:], first, start)
        found = [batch for batch, _ in zip(source, range(2 * count), strict=False)]
        assert source.replaced == []
        assert 2 * len(source.names(first - 1)) == len(source.names(first)) == 8 // comm.get_world_size()
        return found

    every = batches(0, 6)
    labelled = [batch for batch, _ in zip(training_batches(cfg, records, 0), range(12), strict=False)]
    for part, (batch, alone) in enumerate(zip(every, labelled, strict=True)):
        assert len(batch) == (2 if part < 2 * first else 4)
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, alone, strict=False))
        assert all(WEAK in entry for entry in batch[2:])
    for start in (1, 2, 4):  # before, at and after the first iteration with unlabelled images
        for resumed, whole in zip(batches(start, 6 - start), every[2 * start :], strict=True):
            for a, b in zip(resumed, whole, strict=True):
                assert torch.equal(a["image"], b["image"]) and (WEAK not in a or torch.equal(a[WEAK], b[WEAK]))

    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    by_rank = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        by_rank.append(batches(0, 6))
    for iteration in range(6):
        span = slice(2 * iteration, 2 * iteration + 2)
        together = [entry for found in by_rank for batch in found[span] for entry in batch]
        assert sorted(names_of(together)) == sorted(names_of([entry for batch in every[span] for entry in batch]))


def test_the_burn_in_is_a_number_or_a_share_of_the_iterations() -> None:
    for share, expected in ((0.0, 0), (0.25, 25), (0.999, 100), (7.0, 7), (99.0, 99)):
        if expected < 100:
            assert first_iteration(config("SOLVER.MAX_ITER", 100, "SEMI.BURN_IN", share), 12) == expected
    epochs = config("SOLVER.MAX_ITER", 0, "SOLVER.EPOCHS", 10.0, "SOLVER.IMS_PER_BATCH", 4, "SEMI.BURN_IN", 0.5)
    assert first_iteration(epochs, 12) == 15  # of 30
    for share in (100.0, 0.999):
        with pytest.raises(UserError, match=r"SEMI.BURN_IN \S+ leaves none of the 100 iterations for unlabelled"):
            first_iteration(config("SOLVER.MAX_ITER", 100, "SEMI.BURN_IN", share), 12)


def test_the_key_switches_the_average_on() -> None:
    assert not load_config("configs/custom.yaml", []).SOLVER.EMA.ENABLED
    assert load_config("configs/custom.yaml", ["SEMI.UNLABELLED", "photos"]).SOLVER.EMA.ENABLED
    for key, value in (("THRESHOLD", "1.5"), ("THRESHOLD", "-0.1"), ("WEIGHT", "-1"), ("BURN_IN", "-1")):
        with pytest.raises(UserError, match=rf"SEMI.{key} {float(value)} is too "):
            load_config("configs/custom.yaml", [f"SEMI.{key}", value])


def test_orders_of_labelled_and_unlabelled_images_differ() -> None:
    """The same number of images is not visited in the same order."""
    cfg = config("SOLVER.IMS_PER_BATCH", 8)
    source = MixedBatches(
        cfg,
        lambda start: training_batches(cfg, [{"file_name": str(i), "image_id": i} for i in range(8)], start),
        [Path(str(i)) for i in range(8)],
        0,
        0,
    )
    names = source.names(0)
    assert sorted(names[8:]) == sorted(str(i) for i in range(8))
    order = [str(index) for _, index in EndlessOrder(8, 8, cfg.SEED, 0).keys(0)]
    assert names[8:] != order
