"""The recipe for custom data: laws of its rules and its file."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relvit_d2.detection.run import repeat_factors
from relvit_d2.experiments.custom_measurements import CONFIG, anchor_choices
from relvit_d2.experiments.custom_run import recipe_yaml
from relvit_d2.experiments.recipe import (
    ENCODERS,
    LARGER,
    Choice,
    Choices,
    Cost,
    Data,
    Machine,
    candidates,
    choose_model,
    choose_pretraining,
    pretraining_choices,
    window_choices,
    with_given,
)
from relvit_d2.experiments.recipe_schedule import EVALUATIONS, MARGIN, Timing, choose_schedules
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

COSTS = {"vit_small": Cost(0.6, 6e7, 0.1), "vit_tiny": Cost(0.25, 3e7, 0.04), "vit_nano": Cost(0.12, 2e7, 0.01)}
CPU = Machine("cpu", 2, 16e9, 16e9, ("float32", "the processor"), COSTS)
TIMING = Timing(0.7, 0.5, 12.0, 0.05, 0.004)


def data_of(object_side: float, images: int = 200, classes: tuple[str, ...] = ("cat", "dog")) -> Data:
    """Images of 640 x 480 with one square object each, whose sides vary by a third around ``object_side``."""
    sides = object_side * np.random.default_rng(0).uniform(0.67, 1.33, images)
    corners = np.full((images, 2), 20.0)
    boxes = np.hstack([corners, corners + sides[:, None]])
    counts = dict.fromkeys(classes, images // len(classes))
    labels = np.arange(images) % len(classes)
    return Data(images, 40, 640.0, 480.0, boxes, labels, np.tile([640.0, 480.0], (images, 1)), counts, False, 1)


def values(choices: Choices) -> dict[str, object]:
    return {key: choice.value for key, choice in choices.items()}


def test_a_recipe_depends_on_data_machine_and_time_alone() -> None:
    first, second = (choose_model(data_of(80), CPU, 1800, {}) for _ in range(2))
    assert first == second
    assert all(choice.reason for choice in first[1].values())
    assert choose_model(data_of(80), CPU, 100, {}) != first
    assert choose_model(data_of(30), CPU, 1800, {}) != first
    assert choose_model(data_of(80), dataclasses.replace(CPU, memory=1.5e8), 1800, {}) != first


def test_decoded_images_are_cached_where_they_fit_the_memory() -> None:
    for images, mode in ((1000, "ram"), (10_000, "off")):  # 0.9 and 9.2 GB of 16
        choices = values(choose_model(data_of(80, images), CPU, 1800, {})[1])
        assert choices["DATALOADER.CACHE"] == mode


def test_more_time_never_gives_a_weaker_encoder_or_a_smaller_image_for_it() -> None:
    before = (len(ENCODERS), 0)
    for seconds in (60, 300, 900, 1800, 3600, 10_000, 100_000):
        encoder, choices = choose_model(data_of(80), CPU, seconds, {})
        cost = COSTS[encoder.name].seconds * (choices["INPUT.MAX_SIZE_TRAIN"].value / 192) ** 2
        assert encoder == ENCODERS[-1] or seconds / cost >= LARGER
        now = (ENCODERS.index(encoder), choices["INPUT.MAX_SIZE_TRAIN"].value)
        assert now[0] < before[0] or (now[0] == before[0] and now[1] >= before[1])
        before = now
    assert before[0] == 0


def test_smaller_objects_get_larger_images_and_finer_levels() -> None:
    large, small = (
        choose_model(data_of(side), CPU, 20_000, {"MODEL.ENCODER.NAME": "vit_nano"})[1] for side in (200, 30)
    )
    assert large["INPUT.MAX_SIZE_TRAIN"].value < small["INPUT.MAX_SIZE_TRAIN"].value <= 640
    short = choose_model(data_of(12), CPU, 20_000, {"MODEL.ENCODER.NAME": "vit_nano"})[1]
    assert short["MODEL.PYRAMID.STRIDES"].value[0] == 4


def test_a_short_time_gives_images_that_it_allows() -> None:
    encoder, choices = choose_model(data_of(12), CPU, 945, {})
    side = choices["INPUT.MAX_SIZE_TRAIN"].value
    seconds = 945 / 6000  # of an image: 30 epochs of 200 images
    assert encoder.name == "vit_nano" and data_of(12).small_object(side) < 2 * encoder.patch
    assert side == 192 and COSTS["vit_nano"].seconds <= seconds < COSTS["vit_nano"].seconds * (224 / 192) ** 2


def test_each_class_has_the_same_weight_in_the_size_of_small_objects() -> None:
    data = data_of(100, 400)
    assert data.small_object(640) == pytest.approx(np.percentile(data.boxes[:, 2] - 20, 10), rel=0.02)
    rare = np.arange(400) < 8  # the smallest objects, and the only ones of their class
    data.boxes[rare, 2:] = data.boxes[rare, :2] + 10
    assert dataclasses.replace(data).small_object(640) > 60  # computed again
    assert dataclasses.replace(data, labels=rare.astype(int)).small_object(640) == pytest.approx(10)


@pytest.mark.parametrize(
    ("objects", "fullest", "proposals", "anchors", "regions"),
    [(1, 3, 100, 64, 32), (13, 30, 100, 64, 32), (20, 60, 200, 128, 64), (125, 158, 400, 256, 256)],
)
def test_crowded_images_get_more_proposals_and_regions(
    objects: int, fullest: int, proposals: int, anchors: int, regions: int
) -> None:
    crowded = dataclasses.replace(data_of(40, 10 * objects), images=10, most_objects=fullest)
    chosen = values(choose_model(crowded, CPU, 1800, {})[1])
    assert chosen["MODEL.RPN.POST_NMS_TOPK_TEST"] == chosen["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == proposals
    assert chosen["MODEL.RPN.BATCH_SIZE_PER_IMAGE"] == anchors
    assert chosen["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == regions
    given = {"TEST.DETECTIONS_PER_IMAGE": 500, "MODEL.RPN.POST_NMS_TOPK_TEST": 700}
    chosen = values(choose_model(crowded, CPU, 1800, given)[1])
    assert chosen["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == 500
    assert (chosen["MODEL.RPN.PRE_NMS_TOPK_TRAIN"], chosen["MODEL.RPN.PRE_NMS_TOPK_TEST"]) == (1000, 1400)


def test_a_pretraining_needs_time_for_five_hundred_iterations() -> None:
    for seconds, enough in ((1000, False), (1100, True)):  # 0.3 of it, 0.64 s for an iteration of 64 views
        given = {"MODEL.ENCODER.NAME": "vit_nano"}
        chosen = choose_pretraining(data_of(80), CPU, seconds, given, candidates(given))
        assert chosen.value == enough and f"about {int(0.3 * seconds / 0.64):,} iterations" in chosen.reason


def test_windows_are_filled_by_the_patches() -> None:
    nano, tiny = ENCODERS[2], ENCODERS[1]
    chosen = values(window_choices(nano, 240, 320))  # 30 x 40 patches
    assert chosen == {"MODEL.ENCODER.WINDOW": 10, "MODEL.ENCODER.GLOBAL_BLOCKS": 1}
    assert values(window_choices(tiny, 384, 512)) == {"MODEL.ENCODER.WINDOW": 8, "MODEL.ENCODER.GLOBAL_BLOCKS": 4}
    assert values(window_choices(tiny, 240, 320)) == {"MODEL.ENCODER.WINDOW": 0}
    assert not window_choices(candidates({"MODEL.ENCODER.NAME": "swin_tiny"})[0], 768, 1024)


def test_anchors_fit_the_objects_of_a_rare_class() -> None:
    data = data_of(200, 400)
    rare = np.arange(400) % 80 == 0
    data.boxes[:, 2:] = 20 + np.where(rare, 24, np.geomspace(60, 400, 400))[:, None]
    choices = choose_model(data, CPU, 1800, {"MODEL.ENCODER.NAME": "vit_nano"}, ENCODERS[2:])[1]
    words = [str(part) for key, choice in choices.items() for part in (key, choice.value)]
    cfg = load_config(CONFIG, [*words, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"])
    scale = choices["INPUT.MAX_SIZE_TRAIN"].value / 640

    def smallest(labels: np.ndarray) -> float:
        chosen = anchor_choices(dataclasses.replace(data, labels=labels), cfg)
        return chosen["MODEL.ANCHOR_GENERATOR.SIZES"].value[0][0] / (24 * scale)

    assert smallest(rare.astype(int)) == pytest.approx(1, abs=0.15) and smallest(np.zeros(400, int)) > 2


def test_a_batch_that_does_not_fit_is_divided() -> None:
    choices = choose_model(data_of(80), dataclasses.replace(CPU, memory=2.2e8), 50_000, {})[1]
    batch, parts = choices["SOLVER.IMS_PER_BATCH"].value, choices["SOLVER.GRAD_ACCUM_STEPS"].value
    assert parts > 1 and batch % parts == 0


@pytest.mark.parametrize(
    ("classes", "flip"),
    [
        (("cat",), "horizontal"),
        (("left shoe", "shoe"), "none"),
        (("copyright", "bright"), "horizontal"),
        (("turn-right",), "none"),
        (("0", "1"), "none"),
        (("10", "50", "k"), "none"),
        (("turnLeft", "stop"), "none"),
        (("digit_3",), "none"),
        (("10", "fifty"), "horizontal"),
    ],
)
def test_classes_with_a_side_are_not_mirrored(classes: tuple[str, ...], flip: str) -> None:
    assert choose_model(data_of(80, classes=classes), CPU, 1800, {})[1]["INPUT.RANDOM_FLIP"].value == flip


@pytest.mark.parametrize("pretraining", [0.0, 0.7])
def test_the_schedule_fills_the_time(pretraining: float) -> None:
    data, timing = data_of(80), Timing(pretraining, 0.5, 12.0, 0.05, 0.004 if pretraining else 0.0)
    before, training, expected = choose_schedules(data, timing, 1800, {}, 8)
    planned = (3 if pretraining else 2) * timing.start
    evaluations = -(-training["SOLVER.MAX_ITER"].value // training["TEST.EVAL_PERIOD"].value)
    planned += (evaluations * data.evaluated + 100) * 0.05  # at the end also of 100 training images
    planned += training["SOLVER.MAX_ITER"].value * timing.training
    if before:
        planned += before["SOLVER.MAX_ITER"].value * pretraining
        planned += 4 * data.evaluated * timing.view
    assert MARGIN * 1800 - 2 < planned <= MARGIN * 1800 + 0.01
    assert abs(expected - planned) < 1
    sentence = (
        r"the time is too short: \d+ iterations of 0.5 s fit in beside \d+ s .* but 20 are needed: add ([\d.]+) or"
    )
    for seconds in (5, 40):
        with pytest.raises(UserError, match=sentence) as error:
            choose_schedules(data, timing, seconds, {}, 8)
        more = re.search(sentence, str(error.value))
        assert more
        choose_schedules(data, timing, seconds + 3600 * float(more[1]), {}, 8)


def test_a_second_plan_keeps_half_of_the_iterations() -> None:
    timing = TIMING._replace(pretraining=0.0)
    planned = choose_schedules(data_of(80), timing, 1800, {}, 8)
    most = planned.training["SOLVER.MAX_ITER"].value
    for seconds in (1900.0, 1500.0, 900.0, 100.0, -5.0):
        again = choose_schedules(data_of(80), timing, seconds, {}, 8, most)
        count = again.training["SOLVER.MAX_ITER"].value
        assert count >= most / 2
        assert count == -(-most // 2) or MARGIN * seconds - 1 < again.seconds <= MARGIN * seconds
        assert (count > most) == (seconds > 1800) and (count > most / 2 + 1) == (seconds > 1000)


@pytest.mark.parametrize(
    ("given", "iterations"),
    [({"SOLVER.MAX_ITER": 400}, 400), ({"SOLVER.EPOCHS": 16.0}, 400), ({"SOLVER.EPOCHS": 0.001}, 1)],
)
def test_warm_up_and_periods_follow_a_given_length(given: dict[str, float], iterations: int) -> None:
    _, training, expected = choose_schedules(data_of(80), TIMING, 1800, given, 8)
    chosen = values(training)
    assert chosen["SOLVER.MAX_ITER"] == iterations
    assert chosen["SOLVER.WARMUP_ITERS"] == iterations // 20
    assert chosen["TEST.EVAL_PERIOD"] == chosen["SOLVER.CHECKPOINT_PERIOD"] == max(iterations // EVALUATIONS, 1)
    assert chosen["TEST.PATIENCE"] == (6 if iterations == 400 else 0)
    assert expected > iterations * TIMING.training
    kept = with_given(training, given)
    assert ("SOLVER.MAX_ITER" in kept) == ("SOLVER.MAX_ITER" in given)


def test_evaluations_take_a_tenth_of_the_time_and_follow_a_given_period() -> None:
    slow = TIMING._replace(image=1.5)  # 60 s for an evaluation
    chosen = values(choose_schedules(data_of(80), slow, 1800, {}, 8).training)
    assert -(-chosen["SOLVER.MAX_ITER"] // chosen["TEST.EVAL_PERIOD"]) == 3  # type: ignore[operator]
    assert chosen["TEST.PATIENCE"] == 0
    given = {"TEST.EVAL_PERIOD": 50, "SOLVER.MAX_ITER": 400}
    assert values(choose_schedules(data_of(80), slow, 1800, given, 8).training)["SOLVER.CHECKPOINT_PERIOD"] == 50
    without = dataclasses.replace(data_of(80), evaluated=0)
    chosen = values(choose_schedules(without, TIMING, 1800, {}, 8).training)
    assert (chosen["TEST.EVAL_PERIOD"], chosen["TEST.BEST_METRIC"], chosen["TEST.PATIENCE"]) == (0, "", 0)


def test_choices_take_given_keys_into_account() -> None:
    def chosen(**given: Any) -> dict[str, Any]:
        known = {key.replace("__", "."): value for key, value in given.items()}
        return values(choose_model(data_of(80), CPU, 1800, known, candidates(known))[1])

    assert chosen(INPUT__MAX_SIZE_TRAIN=300)["INPUT.MIN_SIZE_TRAIN"] == (225,)
    by_shorter = chosen(INPUT__MIN_SIZE_TRAIN=(225, 150))
    assert by_shorter["INPUT.MAX_SIZE_TRAIN"] == 300 and by_shorter["MODEL.ENCODER.IMG_SIZE"] >= 300
    batched = values(
        choose_model(data_of(80), dataclasses.replace(CPU, memory=4e8), 1e5, {"SOLVER.IMS_PER_BATCH": 6})[1]
    )
    assert batched["SOLVER.GRAD_ACCUM_STEPS"] in (2, 3, 6)
    patched = chosen(MODEL__ENCODER__NAME="vit_nano", MODEL__ENCODER__PATCH_SIZE=16)
    assert patched["MODEL.PYRAMID.STRIDES"][-1] == 32
    assert chosen(SOLVER__BASE_LR=0.1)["SOLVER.REFERENCE_BATCH"] == 0
    other = candidates({"MODEL.ENCODER.NAME": "vit_base"})
    assert [encoder.name for encoder in other] == ["vit_base"]


def test_rare_classes_are_repeated() -> None:
    common, rare = data_of(80), dataclasses.replace(data_of(80), classes={"cat": 190, "dog": 150, "owl": 5})
    for data, sampler in ((common, "TrainingSampler"), (rare, "RepeatFactorTrainingSampler")):
        chosen = choose_model(data, CPU, 1800, {})[1]
        assert chosen["DATALOADER.SAMPLER_TRAIN"].value == sampler
    assert chosen["DATALOADER.REPEAT_THRESHOLD"].value == 0.25 * 150 / 200
    assert "'owl', the rarest class, is in 5 of 200 images" in chosen["DATALOADER.SAMPLER_TRAIN"].reason
    words = [str(part) for key, value in values(chosen).items() for part in (key, value)]
    cfg = load_config(CONFIG, [*words, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"])
    records = [{"annotations": [{"category_id": int(i < 5)}]} for i in range(200)]
    factors = repeat_factors(cfg, records)
    assert factors is not None
    assert np.allclose(factors[:5], np.sqrt(0.1875 / 0.025)) and (factors[5:] == 1).all()


def test_a_memory_without_place_for_an_image_is_an_error() -> None:
    with pytest.raises(UserError, match=r"too small for any batch: an image of 128 px needs 17 MiB with vit_nano, but"):
        choose_model(data_of(80), dataclasses.replace(CPU, memory=1e6), 1800, {})
    encoder, choices = choose_model(data_of(12), dataclasses.replace(CPU, memory=1.2e8), 50_000, {})
    assert (encoder.name, choices["SOLVER.GRAD_ACCUM_STEPS"].value) == (
        "vit_nano",
        choices["SOLVER.IMS_PER_BATCH"].value,
    )
    assert "but the memory allows" in choices["MODEL.ENCODER.NAME"].reason


def test_the_file_is_the_config_and_gives_each_reason(tmp_path: Path) -> None:
    data = data_of(80)
    encoder, choices = choose_model(data, CPU, 1800, {})
    choices |= choose_schedules(data, TIMING, 1800, {}, 8).training
    words = [str(part) for key, choice in choices.items() for part in (key, choice.value)]
    cfg = load_config(CONFIG, [*words, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"])
    choices |= anchor_choices(data, cfg)
    words = [str(part) for key, choice in choices.items() for part in (key, choice.value)]
    choices = with_given(choices, {"SEED": "3", "SOLVER.BASE_LR": "0.25"})
    cfg = load_config(CONFIG, [*words, "SEED", "3", "SOLVER.BASE_LR", "0.25"])
    (tmp_path / "recipe.yaml").write_text(text := recipe_yaml(CONFIG, cfg, choices))
    assert load_config(str(tmp_path / "recipe.yaml"), []) == cfg
    assert "  BASE_LR: 0.25  # given\n" in text
    assert all(f"  # {choice.reason}\n" in text for choice in choices.values())
    flip = choose_model(dataclasses.replace(data, classes={"left\nSEED: 4": 200}), CPU, 1800, {})[1][
        "INPUT.RANDOM_FLIP"
    ]
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(CONFIG, cfg, choices | {"INPUT.RANDOM_FLIP": flip}))
    assert load_config(str(tmp_path / "recipe.yaml"), []) == cfg  # a class name in a reason adds no line
    side = pretraining_choices(data_of(80), encoder, CPU)["PRETEXT.IMAGE_SIZE"]
    assert side == Choice(8 * encoder.patch, "8 x 8 patches")
