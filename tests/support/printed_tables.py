"""The paper's tables, typed a second time from the print, independently of the package."""

# Arms: supervised; joint; pre-trained; pre-trained on mega-patches.
PRINTED_TABLE1 = """
cifar10        86.09 0.46   90.23 0.09   +4.14
svhn           96.01 0.07   97.14 0.03   +1.13
cifar100       59.19 0.84   64.99 0.46   +5.85
flower102      42.08 0.29   45.78 0.75   +3.70
tiny_imagenet  43.19 0.78   51.98 0.20   +8.79
imagenet100    58.04 0.91   66.46 0.45   +8.42
imagenet       65.34 -      68.28 -      +2.94
"""
PRINTED_DETECTION = """
table2 vit_s       14.31 30.04 11.59   14.59 30.86 15.16   15.16 31.51 12.78   16.87 34.06 14.73   +2.56 +4.02 +3.14
table2 swin_t      15.43 32.40 12.73   12.98 28.37 10.21   20.98 40.02 19.60   21.65 41.04 20.65   +6.22 +8.64 +7.92
table2 t2t_vit_14  14.20 30.09 11.32   14.74 30.38 12.54   15.85 32.17 13.45   16.61 33.60 14.53   +2.41 +3.51 +3.21
table3 coco        20.43 35.36 20.27   -     -     -       22.44 37.35 22.59   22.03 36.79 22.37   +2.01 +1.99 +2.32
table3 svhn        32.55 74.01 21.73   34.42 76.52 24.51   32.30 74.84 20.68   34.36 76.71 24.10   +1.81 +2.70 +2.37
table3 kitti       32.17 55.73 33.26   29.82 52.81 30.50   37.02 63.52 35.79   33.86 58.39 34.40   +4.85 +7.99 +2.53
"""
# Printed gains that are not the difference of the printed figures.
GAIN_SLIPS = {"cifar100": ("+5.85", "5.80"), "kitti": ("+7.99", "7.79")}
ARMS = ("supervised", "joint", "upstream", "mega")
METRICS = ("box AP", "box AP50", "box AP75")


def printed() -> dict[tuple[str, str, str], dict[str, tuple[str, str]]]:
    """The figures and spreads of the lists above as text, ``-`` for none, by table, row and arm, then by metric."""
    found: dict[tuple[str, str, str], dict[str, tuple[str, str]]] = {}
    for line in PRINTED_TABLE1.split("\n")[1:-1]:
        name, supervised, spread, upstream, other, _ = line.split()
        found["table1", name, "supervised"] = {"top-1 accuracy": (supervised, spread)}
        found["table1", name, "upstream"] = {"top-1 accuracy": (upstream, other)}
    for line in PRINTED_DETECTION.split("\n")[1:-1]:
        table, name, *cells = line.split()
        for arm, start in zip(ARMS, (0, 3, 6, 9), strict=True):
            figures = {m: (x, "-") for m, x in zip(METRICS, cells[start : start + 3], strict=True) if x != "-"}
            found[table, name, arm] = figures
    return found


def plain(name: str) -> str:
    """Return a row's name in the paper: there is one figure for every image size and choice of the model."""
    return name.removesuffix("_512").removesuffix("_authors")


def paper_name(name: str) -> str:
    """Return a row's name in the paper, which has one figure for every image size and choice of the model."""
    return name.removesuffix("_512").removesuffix("_authors")
