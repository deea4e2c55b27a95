"""The rows of the paper's Table 1: which configs they are, and what was published."""

from dataclasses import dataclass

from relvit_d2.engine.config_file import load_config


@dataclass(frozen=True)
class Table1Row:
    """One data set, a ViT-S.

    Its files are ``configs/ssl/CONFIG.yaml`` (pre-training), ``configs/cls/CONFIG.yaml`` (fine-tuning) and
    ``configs/cls/CONFIG_supervised.yaml``.

    Attributes:
        title: what it is, in words.
        config: name of its files.
        images: training and test images of the whole data set.
        supervised, finetuned: published top-1 accuracy in percent; None where it is not known to this project (of
            ImageNet-1K 68.28 is, without the arm that it belongs to). Of none is the spread known.
        joint: whether there is a ``configs/cls/CONFIG_joint.yaml`` too.
    """

    title: str
    config: str
    images: tuple[int, int]
    supervised: float | None = None
    finetuned: float | None = None
    joint: bool = False


TABLE1 = {
    "cifar10": Table1Row("CIFAR-10, ViT-S/4", "cifar10_vit_s4", (50_000, 10_000), 86.09, 90.23, joint=True),
    "cifar100": Table1Row("CIFAR-100, ViT-S/4", "cifar100_vit_s4", (50_000, 10_000), 59.19, 64.99),
    "svhn": Table1Row("SVHN, ViT-S/4", "svhn_vit_s4", (73_257, 26_032)),
    "flower102": Table1Row("Flower-102, ViT-S/32", "flower102_vit_s32", (1_020, 6_149)),
    "tiny_imagenet": Table1Row("Tiny-ImageNet, ViT-S/8", "tiny_imagenet_vit_s8", (100_000, 10_000)),
    "imagenet100": Table1Row("ImageNet-100, ViT-S/32", "imagenet100_vit_s32", (126_689, 5_000)),
    "imagenet": Table1Row("ImageNet-1K, ViT-S/32", "imagenet_vit_s32", (1_281_167, 50_000)),
}


def both_phases(row: Table1Row, folder: str = "configs") -> tuple[tuple[str, object], ...]:
    """Return the keys that give the supervised arm the iterations of pre-training and fine-tuning together.

    An iteration of either costs nearly the same: one pass of the same encoder over a batch of the same size.

    Args:
        row: whose.
        folder: where the configs lie.
    """
    phases = [load_config(f"{folder}/{part}/{row.config}.yaml", []).SOLVER for part in ("ssl", "cls")]
    return tuple((f"SOLVER.{key}", sum(phase[key] for phase in phases)) for key in ("MAX_ITER", "WARMUP_ITERS"))
