"""The rows of the paper's tables as runs: the configs of each arm, the paper's data and its figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from relvit_d2.experiments.paper_tables import DETECTION_METRICS, REMARKS, SLIPS, TABLE1, TABLE2, TABLE3
from relvit_d2.experiments.statistics import RunStatistics
from relvit_d2.experiments.steps import Overrides, Step


class Published(NamedTuple):
    """A figure of the paper.

    Attributes:
        runs: mean and spread in percent. The paper does not state over how many runs a spread is: two are assumed, the
            fewest that have one, so that a margin is rather too wide.
        slip: whether it is probably a printing error.
    """

    runs: RunStatistics
    slip: bool = False


@dataclass(frozen=True)
class Arm:
    """One of the trainings that a row compares.

    Attributes:
        name: of the arm.
        steps: run one after the other; the last one is measured.
        baseline: name of the arm that it is compared with; empty for none.
        published: the paper's figures by metric; empty where the paper has no such arm.
    """

    name: str
    steps: tuple[Step, ...]
    baseline: str = ""
    published: Mapping[str, Published] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperData:
    """The data and the protocol behind the paper's figures.

    Attributes:
        train, test: this project's names of the data sets.
        images: number of training and of test images.
        best_on_test: whether the paper reports the best of several evaluations on the test images.
        doubt: why data or protocol may be others although names and numbers agree; empty if they are the same.
    """

    train: str
    test: str
    images: tuple[int, int]
    best_on_test: bool = False
    doubt: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        title: data set, encoder and image size.
        metrics: the place of each metric in the part of ``inference/results.json`` that belongs to a data set; of a
            classifier below ``test`` or ``best_on_test``.
        arms: in the order of the table.
        paper: the paper's data, None for a row that is not in the paper.
        remarks: sentences about the paper's row.
    """

    title: str
    metrics: Mapping[str, tuple[str, ...]]
    arms: tuple[Arm, ...]
    paper: PaperData | None = None
    remarks: tuple[str, ...] = ()


_SHARES = (0.1, 0.25, 0.5, 1.0)

_CLASSIFIERS = {
    "cifar10": ("CIFAR-10, ViT-S/4", "cifar10_vit_s4", PaperData("cifar10_train", "cifar10_test", (50_000, 10_000))),
    "cifar100": (
        "CIFAR-100, ViT-S/4",
        "cifar100_vit_s4",
        PaperData("cifar100_train", "cifar100_test", (50_000, 10_000)),
    ),
    "svhn": (
        "SVHN, ViT-S/4",
        "svhn_vit_s4",
        PaperData("svhn_digits_train", "svhn_digits_test", (73_257, 26_032)),
    ),
    "flower102": (  # the authors' code never reads the test images
        "Flower-102, ViT-S/32",
        "flower102_vit_s32",
        PaperData("flower102_train", "flower102_val", (1_020, 1_020)),
    ),
    "tiny_imagenet": (
        "Tiny-ImageNet, ViT-S/8",
        "tiny_imagenet_vit_s8",
        PaperData("tiny_imagenet_train", "tiny_imagenet_val", (100_000, 10_000)),
    ),
    "imagenet100": (
        "ImageNet-100, ViT-S/32",
        "imagenet100_vit_s32",
        PaperData(
            "imagenet100_train",
            "imagenet100_val",
            (126_689, 5_000),
            doubt="the paper's hundred classes are those of the Kaggle set ambityga/imagenet100, and how many images "
            "it has is not known here",
        ),
    ),
    "imagenet": (
        "ImageNet-1K, ViT-S/32",
        "imagenet_vit_s32",
        PaperData("imagenet_train", "imagenet_val", (1_281_167, 50_000)),
    ),
}

# How the names of the configs of a detector's arms end.
_ARMS = {"supervised": "_supervised", "joint": "_joint", "upstream": "", "mega": "_mega"}
# Arms that are trained with each pyramid of an encoder whose maps have one stride.
_BY_PYRAMID = ("supervised", "upstream")

_VOC = PaperData("voc_2007_trainval", "voc_2007_test", (5_011, 4_952))
_DETECTORS = {
    "table2": {
        "vit_s": ("VOC 2007, ViT-S/16", "voc_vit_s", _VOC),
        "swin_t": ("VOC 2007, Swin-T", "voc_swin_t", _VOC),
        "t2t_vit_14": ("VOC 2007, T2T-ViT-14", "voc_t2t_vit_14", _VOC),
    },
    "table3": {
        "coco": (
            "COCO 2017, ViT-S/16",
            "coco_vit_s",
            PaperData(
                "coco_2017_train",
                "coco_2017_val",
                (118_287, 5_000),
                doubt='the paper tests on "mini-val", which is taken for val2017',
            ),
        ),
        "kitti": (
            "KITTI, ViT-S/16",
            "kitti_vit_s",
            PaperData(
                "kitti_train",
                "kitti_val",
                (5_611, 1_870),
                doubt="the paper splits KITTI at random and does not publish the split, so its test images are others",
            ),
        ),
        "svhn": ("SVHN, ViT-S/16", "svhn_vit_s", PaperData("svhn_train", "svhn_test", (33_402, 13_068))),
    },
}
_DETECTOR_DOUBT = (
    "the paper states neither image size nor schedule of its detectors, so it is not known whether its figures belong "
    "to these settings, which are this project's choice"
)


def row_names() -> dict[str, list[str]]:
    """Return the names of the rows of :func:`tables`, without reading configs."""
    names = {"demo": ["streets"], "table1": [row for name in _CLASSIFIERS for row in (name, f"{name}_authors")]}
    for table, rows in _DETECTORS.items():
        names[table] = [row for name in rows for row in (name, f"{name}_512", f"{name}_labels")]
    return names


def tables() -> dict[str, dict[str, Row]]:
    """Return the rows by table and name.

    In Table 1 ``NAME_authors`` is the row with the authors' choice of the model: trained on all training images, the
    best on the test images reported. ``supervised_longer`` trains for as many iterations as both phases of ``upstream``
    together. A detector's row has images of 224 px, ``NAME_512`` larger ones; ``NAME_labels`` is :func:`by_labels` of
    the first. The table ``demo`` is that of ``make demo``, which needs no data.
    """
    found: dict[str, dict[str, Row]] = {"demo": {"streets": _demo()}, "table1": {}}
    for name, (title, config, paper) in _CLASSIFIERS.items():
        found["table1"] |= {
            name: _classifier(name, title, config, paper),
            f"{name}_authors": _classifier(name, f"{title}, the authors' choice of the model", config, paper, True),
        }
    for table, rows in _DETECTORS.items():
        found[table] = {}
        for name, (title, config, paper) in rows.items():
            row = _detectors(table, name, f"{title} at 224 px", f"{config}_224", config, paper)
            larger = _detectors(table, name, f"{title}, larger images", config, config, paper)
            found[table] |= {name: row, f"{name}_512": larger, f"{name}_labels": by_labels(row)}
    return found


def _classifier(name: str, title: str, config: str, paper: PaperData, authors: bool = False) -> Row:
    """Return a row of Table 1; supervised training gets fine-tuning's schedule, and that of both phases beside it.

    Args:
        name: of the row.
        title: data set and encoder.
        config: name of its files in ``configs/ssl`` and ``configs/cls``.
        paper: the paper's data.
        authors: whether the model is chosen as the authors do.
    """
    from relvit_d2.tasks import load_config  # not at the top: the command line lists the rows without torch

    pretraining = load_config(f"configs/ssl/{config}.yaml", []).SOLVER
    solver = load_config(f"configs/cls/{config}.yaml", []).SOLVER
    keys: Overrides = ()
    if authors:
        solver = pretraining  # 100 epochs of all training images too
        keys = (
            ("DATASETS.VALIDATION", ""),
            ("DATASETS.TEST", (paper.test,)),
            ("TEST.BEST_ON_TEST", True),
            ("TEST.EVAL_PERIOD", round(solver.MAX_ITER / 100)),
            ("SOLVER.MAX_ITER", solver.MAX_ITER),
            ("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS),
        )
    longer = tuple((f"SOLVER.{key}", solver[key] + pretraining[key]) for key in ("MAX_ITER", "WARMUP_ITERS"))

    def step(name: str, ending: str, encoder: str = "", more: Overrides = ()) -> Step:
        overrides = tuple((dict(keys) | dict(more)).items())
        return Step(name, f"configs/cls/{config}{ending}.yaml", encoder, overrides=overrides)

    pretrain = Step("pretrain", f"configs/ssl/{config}.yaml")
    published = {
        arm: {"top-1 accuracy": Published(RunStatistics(mean, spread, 2 if spread else 1))}
        for arm, (mean, spread) in TABLE1[name].items()
    }
    arms = [
        Arm("supervised", (step("supervised", "_supervised"),), published=published["supervised"]),
        Arm("supervised_longer", (step("supervised_longer", "_supervised", more=longer),), "supervised"),
        Arm("upstream", (pretrain, step("upstream", "", "pretrain")), "supervised", published["upstream"]),
    ]
    if name == "cifar10":  # the only data set with a config for it; the paper has no such arm
        arms.insert(2, Arm("joint", (step("joint", "_joint"),), "supervised"))
    remarks = REMARKS.get(("table1", name), ())
    return Row(title, {"top-1 accuracy": ("top1",)}, tuple(arms), replace(paper, best_on_test=True), remarks)


def _detectors(table: str, name: str, title: str, config: str, pretraining: str, paper: PaperData) -> Row:
    """Return a row of Table 2 or 3.

    Args:
        table, name: of the row.
        title: data set, encoder and image size.
        config: of the detector, a name in ``configs`` without the arm's ending.
        pretraining: the same in ``configs/ssl``.
        paper: the paper's data.
    """
    paper = replace(paper, doubt="; ".join(filter(None, (_DETECTOR_DOUBT, paper.doubt))))
    figures = (TABLE2 if table == "table2" else TABLE3)[name]
    arms = []
    for arm, ending in _ARMS.items():
        before: tuple[Step, ...] = ()
        if arm in ("upstream", "mega"):
            before = (Step(f"pretrain{ending}", f"configs/ssl/{pretraining}{ending}.yaml"),)
        encoder = before[0].name if before else ""
        step = Step(arm, f"configs/{config}{ending}.yaml", encoder)
        published = {
            f"box {metric}": Published(RunStatistics(value), (table, name, arm, metric) in SLIPS)
            for metric, value in zip(DETECTION_METRICS, figures.get(arm, ()), strict=False)
        }
        arms.append(Arm(arm, (*before, step), "" if arm == "supervised" else "supervised", published))
    if name != "swin_t":  # which has an FPN already
        for plain in [arm for arm in arms if arm.name in _BY_PYRAMID]:
            *steps, step = plain.steps
            tapped = replace(step, name=f"{plain.name}_multitap", overrides=(("MODEL.PYRAMID.NAME", "multitap"),))
            baseline = plain.baseline and f"{plain.baseline}_multitap"
            arms.append(Arm(tapped.name, (*steps, tapped), baseline, plain.published))
    metrics = {f"box {metric}": ("bbox", metric) for metric in DETECTION_METRICS}
    return Row(title, metrics, tuple(arms), paper, REMARKS.get((table, name), ()))


def _demo() -> Row:
    pretrain = Step("pretrain", "configs/demo/ssl_streets.yaml")
    supervised = Step("supervised", "configs/demo/streets.yaml")
    upstream = replace(supervised, name="upstream", encoder="pretrain")
    arms = (Arm("supervised", (supervised,)), Arm("upstream", (pretrain, upstream), "supervised"))
    return Row("synthetic street numbers, ViT-nano/4", {"box AP": ("bbox", "AP")}, arms)


def by_labels(row: Row) -> Row:
    """Return the arms "supervised" and "upstream" with a tenth, a quarter, half and all of the labelled images.

    Pre-training sees all images; the schedule, in iterations, is that of all labels; the paper has no such row.
    """
    arms = []
    for share in _SHARES:
        ending = f"_{100 * share:.0f}"
        for arm in (arm for arm in row.arms if arm.name in ("supervised", "upstream")):
            *before, last = arm.steps
            step = replace(last, name=arm.name + ending, labels=share)
            arms.append(Arm(arm.name + ending, (*before, step), arm.baseline and arm.baseline + ending))
    return Row(f"{row.title}, by percent of labelled images", row.metrics, tuple(arms))
