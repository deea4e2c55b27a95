"""The rows of the paper's tables: the runs of each arm, the paper's data sets and its published figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from relvit_d2.experiments.paper_tables import DETECTION_METRICS, MISPRINTS, REMARKS, TABLE1, TABLE2, TABLE3
from relvit_d2.experiments.statistics import RunStatistics
from relvit_d2.experiments.steps import Overrides, Step


class Published(NamedTuple):
    """A figure of the paper.

    Attributes:
        runs: mean and standard deviation in percent. The paper does not state the number of runs behind a standard
            deviation; two are assumed, which gives the widest interval.
        misprint: whether it is probably a misprint.
    """

    runs: RunStatistics
    misprint: bool = False


@dataclass(frozen=True)
class Arm:
    """One of the trainings that a row compares.

    Attributes:
        name: name of the arm.
        steps: its runs in order; the last one is evaluated.
        baseline: name of the arm that it is compared with; empty for none.
        published: the paper's figures by metric; empty where the paper has no such arm.
    """

    name: str
    steps: tuple[Step, ...]
    baseline: str = ""
    published: Mapping[str, Published] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperData:
    """Data and protocol behind the paper's figures.

    Attributes:
        train, test: names of the data sets in this project.
        train_images, test_images: numbers of images.
        best_on_test: whether the paper reports the best of several evaluations on the test images.
        doubt: why data or protocol may differ although names and numbers agree; empty if they are the same.
    """

    train: str
    test: str
    train_images: int
    test_images: int
    best_on_test: bool = False
    doubt: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        title: data set, encoder and image size.
        metrics: path of each metric in the results of a run, as :meth:`relvit_d2.experiments.runs.Run.metric` takes it.
        arms: in the order of the table.
        paper: the paper's data, None for a row that is not in the paper.
        remarks: sentences about the paper's row.
    """

    title: str
    metrics: Mapping[str, tuple[str, ...]]
    arms: tuple[Arm, ...]
    paper: PaperData | None = None
    remarks: tuple[str, ...] = ()

    def steps(self) -> list[Step]:
        """Return the steps of all arms, shared ones repeated."""
        return [step for arm in self.arms for step in arm.steps]


_LABEL_SHARES = (0.1, 0.25, 0.5, 1.0)

# Rows of the tables: data set and encoder, name of the configs, the paper's training and test set with their images.
_CLASSIFIERS = {  # of Flower-102 the authors' code never reads the test images
    "cifar10": ("CIFAR-10, ViT-S/4", "cifar10_vit_s4", ("cifar10_train", "cifar10_test", 50_000, 10_000)),
    "cifar100": ("CIFAR-100, ViT-S/4", "cifar100_vit_s4", ("cifar100_train", "cifar100_test", 50_000, 10_000)),
    "svhn": ("SVHN, ViT-S/4", "svhn_vit_s4", ("svhn_digits_train", "svhn_digits_test", 73_257, 26_032)),
    "flower102": ("Flower-102, ViT-S/32", "flower102_vit_s32", ("flower102_train", "flower102_val", 1_020, 1_020)),
    "tiny_imagenet": (
        "Tiny-ImageNet, ViT-S/8",
        "tiny_imagenet_vit_s8",
        ("tiny_imagenet_train", "tiny_imagenet_val", 100_000, 10_000),
    ),
    "imagenet100": (
        "ImageNet-100, ViT-S/32",
        "imagenet100_vit_s32",
        ("imagenet100_train", "imagenet100_val", 126_689, 5_000),
    ),
    "imagenet": ("ImageNet-1K, ViT-S/32", "imagenet_vit_s32", ("imagenet_train", "imagenet_val", 1_281_167, 50_000)),
}
_VOC = ("voc_2007_trainval", "voc_2007_test", 5_011, 4_952)
_DETECTORS = {
    "table2": {
        "vit_s": ("VOC 2007, ViT-S/16", "voc_vit_s", _VOC),
        "swin_t": ("VOC 2007, Swin-T", "voc_swin_t", _VOC),
        "t2t_vit_14": ("VOC 2007, T2T-ViT-14", "voc_t2t_vit_14", _VOC),
    },
    "table3": {
        "coco": ("COCO 2017, ViT-S/16", "coco_vit_s", ("coco_2017_train", "coco_2017_val", 118_287, 5_000)),
        "kitti": ("KITTI, ViT-S/16", "kitti_vit_s", ("kitti_train", "kitti_val", 5_611, 1_870)),
        "svhn": ("SVHN, ViT-S/16", "svhn_vit_s", ("svhn_train", "svhn_test", 33_402, 13_068)),
    },
}
# Why a row's data or protocol may differ from the paper's although names and numbers agree.
_DOUBTS = {
    ("table1", "imagenet100"): "the paper's hundred classes are those of the Kaggle set ambityga/imagenet100, and how "
    "many images it has is not known here",
    ("table3", "coco"): 'the paper tests on "mini-val", which is taken for val2017',
    ("table3", "kitti"): "the paper splits KITTI at random and does not publish the split, so its test images differ",
}
_DETECTOR_DOUBT = (
    "the paper states neither image size nor schedule of its detectors, so it is not known whether its figures belong "
    "to these settings, which are this project's choice"
)

# Overrides that distinguish the arms of a detector, by encoder where they differ.
_JOINT: Overrides = (("MODEL.RELVIT.JOINT", True),)
_JOINT_T2T: Overrides = (*_JOINT, ("PRETEXT.POOL", 2))
_MEGA: Overrides = (("PRETEXT.MEGA.M", 10),)
_MEGA_7X7: Overrides = (("PRETEXT.MEGA.M", 7), ("PRETEXT.MEGA.UNIT", 16), ("PRETEXT.MEGA.KEEP_SIZE", True))
# Without a position embedding a permutation of the patches changes nothing.
_PERMUTED: Overrides = (("MODEL.ENCODER.POS_EMBED", True), ("PRETEXT.PERMUTE", "always"))
_MULTITAP: Overrides = (("MODEL.PYRAMID.NAME", "multitap"),)


def row_names() -> dict[str, list[str]]:
    """Return the names of the rows of :func:`tables`, without reading configs."""
    names = {"demo": ["streets"], "table1": [row for name in _CLASSIFIERS for row in (name, f"{name}_authors")]}
    for table, rows in _DETECTORS.items():
        names[table] = [row for name in rows for row in (name, f"{name}_512", f"{name}_labels")]
    return names


def tables() -> dict[str, dict[str, Row]]:
    """Return the rows by table and name.

    In Table 1 the rows ``NAME_authors`` select the model as the authors do: trained on all training images, the best
    result on the test images is reported. ``supervised_longer`` has as many iterations as both phases of ``upstream``
    together. The row of a detector uses images of 224 px, ``NAME_512`` larger ones; ``NAME_labels`` is
    :func:`by_labels` of the first. The table ``demo`` needs no data.
    """
    found: dict[str, dict[str, Row]] = {"demo": {"streets": _demo()}, "table1": {}}
    for name, (title, config, data) in _CLASSIFIERS.items():
        paper = PaperData(*data, True, _DOUBTS.get(("table1", name), ""))
        found["table1"] |= {
            name: _classifier(name, title, config, paper),
            f"{name}_authors": _classifier(name, f"{title}, model selected as by the authors", config, paper, True),
        }
    for table, rows in _DETECTORS.items():
        found[table] = {}
        for name, (title, config, data) in rows.items():
            doubt = "; ".join(filter(None, (_DETECTOR_DOUBT, _DOUBTS.get((table, name)))))
            paper = PaperData(*data, doubt=doubt)
            row = _detector(table, name, f"{title} at 224 px", f"paper/{config}_224", config, paper)
            larger = _detector(table, name, f"{title}, larger images", config, config, paper)
            found[table] |= {name: row, f"{name}_512": larger, f"{name}_labels": by_labels(row)}
    return found


def _classifier(name: str, title: str, config: str, paper: PaperData, authors: bool = False) -> Row:
    """Return a row of Table 1.

    Args:
        title: data set and encoder.
        config: name of its files in ``configs/ssl`` and ``configs/cls``.
        authors: whether the model is selected as the authors do.
    """
    from relvit_d2.tasks import load_config  # not at the top: the command line lists the rows without torch

    pretraining = load_config(f"configs/ssl/{config}.yaml", []).SOLVER
    solver = load_config(f"configs/cls/{config}.yaml", []).SOLVER
    keys: Overrides = ()
    if authors:
        solver = pretraining  # 100 epochs of all training images, as in the fine-tuning
        keys = (
            ("DATASETS.VALIDATION", ""),
            ("DATASETS.TEST", (paper.test,)),
            ("TEST.BEST_ON_TEST", True),
            ("TEST.EVAL_PERIOD", round(solver.MAX_ITER / 100)),
            ("SOLVER.MAX_ITER", solver.MAX_ITER),
            ("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS),
        )
    longer = tuple((f"SOLVER.{key}", solver[key] + pretraining[key]) for key in ("MAX_ITER", "WARMUP_ITERS"))

    def step(name: str, more: Overrides = (), encoder: str = "") -> Step:
        overrides = tuple((dict(keys) | dict(more)).items())
        return Step(name, f"configs/cls/{config}.yaml", encoder, overrides=overrides)

    published = {
        arm: {"top-1 accuracy": Published(RunStatistics(mean, std, 2 if std else 1))}
        for arm, (mean, std) in TABLE1[name].items()
    }
    pretrain = Step("pretrain", f"configs/ssl/{config}.yaml")
    arms = [
        Arm("supervised", (step("supervised"),), published=published["supervised"]),
        Arm("supervised_longer", (step("supervised_longer", longer),), "supervised"),
        Arm("upstream", (pretrain, step("upstream", encoder="pretrain")), "supervised", published["upstream"]),
    ]
    if name == "cifar10":  # an arm of this project; the paper has no joint row in Table 1
        arms.insert(2, Arm("joint", (step("joint", _JOINT),), "supervised"))
    remarks = REMARKS.get(("table1", name), ())
    return Row(title, {"top-1 accuracy": ("top1",)}, tuple(arms), paper, remarks)


def _detector(table: str, row: str, title: str, config: str, pretraining: str, paper: PaperData) -> Row:
    """Return a row of Table 2 or 3.

    Args:
        table, row: table and name of the row.
        title: data set, encoder and image size.
        config: name of the detector's config in ``configs``.
        pretraining: name of its pre-training's config in ``configs/ssl``.
    """
    figures = (TABLE2 if table == "table2" else TABLE3)[row]

    pretrain = Step("pretrain", f"configs/ssl/{pretraining}.yaml")

    def arm(name: str, before: Step | None = None, overrides: Overrides = ()) -> Arm:
        """Return an arm; ``before`` is its pre-training, None for training from scratch."""
        step = Step(name, f"configs/{config}.yaml", before.name if before else "", overrides=overrides)
        plain = name.removesuffix("_multitap")
        baseline = name.replace(plain, "supervised")
        published = {
            f"box {metric}": Published(RunStatistics(value), (table, row, plain, metric) in MISPRINTS)
            for metric, value in zip(DETECTION_METRICS, figures.get(plain, ()), strict=False)
        }
        return Arm(name, (before, step) if before else (step,), baseline if baseline != name else "", published)

    mega = _MEGA_7X7 if row in ("swin_t", "t2t_vit_14") else _MEGA
    arms = [
        arm("supervised"),
        arm("joint", overrides=_JOINT_T2T if row == "t2t_vit_14" else _JOINT),
        arm("upstream", pretrain),
        arm("mega", replace(pretrain, name="pretrain_mega", overrides=mega)),
    ]
    if (table, row) == ("table2", "vit_s"):
        arms += [
            arm("perm", replace(pretrain, name="pretrain_perm", overrides=_PERMUTED)),
            arm("mega_perm", replace(pretrain, name="pretrain_mega_perm", overrides=_PERMUTED + mega)),
        ]
    if row != "swin_t":  # its feature maps have several strides: its pyramid is an FPN without multitap
        arms += [arm("supervised_multitap", None, _MULTITAP), arm("upstream_multitap", pretrain, _MULTITAP)]
    metrics = {f"box {metric}": ("bbox", metric) for metric in DETECTION_METRICS}
    return Row(title, metrics, tuple(arms), paper, REMARKS.get((table, row), ()))


def _demo() -> Row:
    pretrain = Step("pretrain", "configs/demo/ssl_streets.yaml")
    supervised = Step("supervised", "configs/demo/streets.yaml")
    upstream = replace(supervised, name="upstream", encoder="pretrain")
    arms = (Arm("supervised", (supervised,)), Arm("upstream", (pretrain, upstream), "supervised"))
    return Row("synthetic street numbers, ViT-nano/4", {"box AP": ("bbox", "AP")}, arms)


def by_labels(row: Row) -> Row:
    """Return the arms "supervised" and "upstream" with 10, 25, 50 and 100 % of the labelled images.

    Pre-training uses all images; the number of iterations is that of all labels. The paper has no such row.
    """
    arms = []
    for share in _LABEL_SHARES:
        suffix = f"_{100 * share:.0f}"
        for arm in (arm for arm in row.arms if arm.name in ("supervised", "upstream")):
            *before, last = arm.steps
            step = replace(last, name=arm.name + suffix, labels=share)
            arms.append(Arm(arm.name + suffix, (*before, step), arm.baseline and arm.baseline + suffix))
    return Row(f"{row.title}, by percent of labelled images", row.metrics, tuple(arms))
