"""The rows of the papers' tables: what is run for each, and what was published."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from relvit_d2.classification.table1 import TABLE1, Table1Row, both_phases
from relvit_d2.report.comparison import Runs

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """One run of a script.

    Attributes:
        name: of its folder below that of the seed; steps of one name are one run.
        script: in the repository's root.
        config: its config file, from the repository's root.
        encoder: name of the step whose ``encoder.safetensors`` it starts from; empty for none.
        labels: share of the training images that it sees, 0..1, the first ones.
        overrides: further keys of the config and their values.
    """

    name: str
    script: str
    config: str
    encoder: str = ""
    labels: float = 1.0
    overrides: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Arm:
    """One of the trainings that a row compares.

    Attributes:
        name: of the arm.
        steps: run one after the other; the last one gives the figure.
        baseline: name of the arm that it is compared with; empty for none.
        published: the paper's figure, None where it is not known here.
    """

    name: str
    steps: tuple[Step, ...]
    baseline: str = ""
    published: Runs | None = None

    @property
    def pretrained(self) -> bool:
        """Whether a pre-training comes first."""
        return bool(self.steps[-1].encoder)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        title: what it is, in words.
        metric: the figure's name.
        place: where it stands in the part of ``inference/results.json`` that is a data set's.
        arms: in the order of the table.
        images: images that the paper trained and tested on, None where that is not known here.
        best: the paper's figure of its best arm with pre-training.
    """

    title: str
    metric: str
    place: tuple[str, ...]
    arms: tuple[Arm, ...]
    images: tuple[int, int] | None = None
    best: Runs | None = None


# How the configs of a detector's arms end.
_ARMS = {"supervised": "_supervised", "joint": "_joint", "upstream": "", "mega": "_mega"}
_SHARES = (0.1, 0.25, 0.5, 1.0)

# The paper on ImageNet and detection, box AP in percent, one run each. Of ViT-S and T2T-ViT-14 in its Table 2 only the
# supervised and the best figure are known here, of KITTI in its Table 3 no pre-trained one, of COCO none.
_VOC = (5011, 4952)
_DETECTORS: dict[str, dict[str, tuple[str, str, dict[str, float], tuple[int, int]]]] = {
    "table2": {
        "vit_s": ("VOC 2007, ViT-S/16", "voc_vit_s", {"supervised": 14.31, "best": 16.87}, _VOC),
        "swin_t": ("VOC 2007, Swin-T", "voc_swin_t", {"supervised": 15.43, "joint": 12.98, "best": 21.65}, _VOC),
        "t2t_vit_14": ("VOC 2007, T2T-ViT-14", "voc_t2t_vit_14", {"supervised": 14.20, "best": 16.61}, _VOC),
    },
    "table3": {
        "coco": ("COCO 2017, ViT-S/16", "coco_vit_s", {}, (118_287, 5000)),
        "kitti": ("KITTI, ViT-S/16", "kitti_vit_s", {"supervised": 32.17, "joint": 29.82}, (5611, 1870)),
        "svhn": (
            "SVHN, ViT-S/16",
            "svhn_vit_s",
            {"supervised": 32.55, "joint": 34.42, "upstream": 32.30, "best": 34.36},
            (33_402, 13_068),
        ),
    },
}


def tables() -> dict[str, dict[str, Row]]:
    """Return the rows by table and name.

    A detector's row stands for the track at 224 px, ``NAME_512`` for the one at 512, ``NAME_labels`` for
    :func:`by_labels` of the first. In Table 1 ``supervised_longer`` trains for as many iterations as both phases of
    ``upstream`` together. The table ``demo`` is that of ``make demo``, which needs no data.
    """
    found: dict[str, dict[str, Row]] = {"demo": {"streets": _demo()}}
    found["table1"] = {name: _classifier(row) for name, row in TABLE1.items()}
    for table, rows in _DETECTORS.items():
        found[table] = {}
        for name, (title, config, published, images) in rows.items():
            row = _detectors(f"{title} at 224 px", config, "_224", published, images)
            larger = _detectors(f"{title} at 512 px", config, "", published, images)
            found[table] |= {name: row, f"{name}_512": larger, f"{name}_labels": by_labels(row)}
    return found


def _classifier(row: Table1Row) -> Row:
    """Return a row of Table 1; supervised training gets fine-tuning's schedule, and that of both phases beside it."""

    def step(name: str, ending: str, encoder: str = "", overrides: tuple[tuple[str, object], ...] = ()) -> Step:
        config = f"configs/cls/{row.config}{ending}.yaml"
        return Step(name, "train_cls.py", config, encoder, overrides=overrides)

    pretrain = Step("pretrain", "pretrain_ssl.py", f"configs/ssl/{row.config}.yaml")
    twice = step("supervised_longer", "_supervised", overrides=both_phases(row, f"{ROOT}/configs"))
    arms = [
        Arm("supervised", (step("supervised", "_supervised"),), published=Runs.known(row.supervised)),
        Arm("supervised_longer", (twice,), "supervised"),
        Arm("upstream", (pretrain, step("upstream", "", "pretrain")), "supervised", Runs.known(row.finetuned)),
    ]
    if row.joint:
        arms.insert(2, Arm("joint", (step("joint", "_joint"),), "supervised"))
    return Row(row.title, "top-1 accuracy", ("test", "top1"), tuple(arms), row.images)


def _detectors(title: str, config: str, track: str, published: Mapping[str, float], images: tuple[int, int]) -> Row:
    arms = []
    for name, ending in _ARMS.items():
        before: tuple[Step, ...] = ()
        if name in ("upstream", "mega"):
            before = (Step(f"pretrain{ending}", "pretrain_ssl.py", f"configs/ssl/{config}{ending}.yaml"),)
        encoder = before[0].name if before else ""
        step = Step(name, "train_net.py", f"configs/{config}{track}{ending}.yaml", encoder)
        figure = Runs.known(published.get(name))
        arms.append(Arm(name, (*before, step), "" if name == "supervised" else "supervised", figure))
    best = Runs.known(published.get("best"))
    return Row(title, "box AP", ("bbox", "AP"), tuple(arms), images, best)


def _demo() -> Row:
    pretrain = Step("pretrain", "pretrain_ssl.py", "configs/demo/ssl_streets.yaml")
    supervised = Step("supervised", "train_net.py", "configs/demo/streets.yaml")
    upstream = replace(supervised, name="upstream", encoder="pretrain")
    arms = (Arm("supervised", (supervised,)), Arm("upstream", (pretrain, upstream), "supervised"))
    return Row("synthetic street numbers, ViT-nano/4", "box AP", ("bbox", "AP"), arms)


def by_labels(row: Row) -> Row:
    """Return the arms "supervised" and "upstream" with a tenth, a quarter, half and all of the labelled images.

    Pre-training sees all images; the schedule, in iterations, is that of all labels; nothing was published.
    """
    arms = []
    for share in _SHARES:
        ending = f"_{100 * share:.0f}"
        for arm in (arm for arm in row.arms if arm.name in ("supervised", "upstream")):
            *before, last = arm.steps
            step = replace(last, name=arm.name + ending, labels=share)
            arms.append(Arm(arm.name + ending, (*before, step), arm.baseline and arm.baseline + ending))
    return Row(f"{row.title}, by percent of labelled images", row.metric, row.place, tuple(arms), row.images)
