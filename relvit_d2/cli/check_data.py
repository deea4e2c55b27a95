"""Check data before training on them: labels, boxes, anchors, every image, what train and test share.

Give a config, names of data sets, or folders, with labels or without. Writes check.json and check.png, a page of 16
samples. Exit status 0 when training may start (pre-training where no labels are recognised), warnings or not, else 1.
"""

import argparse
from pathlib import Path
from typing import Any

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_json

EXAMPLE = """\
relvit-d2 check-data --config-file configs/demo/streets.yaml
relvit-d2 check-data streets_train streets_test
relvit-d2 check-data path/to/folder
relvit-d2 check-data path/to/folder --against output/pretrain/encoder.safetensors"""

DEFAULT = "configs/base/detection.yaml"  # its anchors and training size apply where no config is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", help="check its DATASETS.TRAIN and DATASETS.TEST")
    parser.add_argument("--output", type=Path, help="folder for check.json and check.png (default output/check/NAME)")
    parser.add_argument(
        "--against", type=Path, metavar="ENCODER", help="list the images that this encoder.safetensors was trained on"
    )
    parser.add_argument("words", nargs="*", help="names or folders; with --config-file KEY VALUE pairs over it")


def run(args: argparse.Namespace) -> None:
    """Check, print, write.

    Raises:
        UserError: if the data are missing, or have a fault that training would fail on.
    """
    if not args.config_file and not args.words:
        raise UserError("nothing to check: give --config-file, or names of data sets or folders")
    if args.config_file:
        find_config(args.config_file)
    from tqdm import tqdm

    from relvit_d2.analysis.data_checks import (
        check_images,
        check_labels,
        check_seen,
        file_of,
        not_recognised,
        read_sets,
        refuse,
    )
    from relvit_d2.data.detection.custom import config_words, register_own
    from relvit_d2.data.images.decode import PixelFormat
    from relvit_d2.report.samples import MARKS, draw_samples, samples_of
    from relvit_d2.tasks import load_config

    cfg = load_config(args.config_file or DEFAULT, args.words if args.config_file else config_words(args.words))
    names, tests = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], tuple(cfg.DATASETS.TEST)
    if not names:
        raise UserError(f"config file '{args.config_file}' names no data set (DATASETS.TRAIN)")
    labelled = wanted = cfg.TASK == "detection"
    if cfg.TASK != "classification":  # which has folders and archives, but no custom sets
        register_own(cfg.DATASETS, labelled)
    sets, classes = read_sets(list(dict.fromkeys(names)), labelled, cfg.DATASETS.get("SKIP_MISSING", False))
    labelled = bool(classes)
    title = Path(args.config_file).stem if args.config_file else "_".join(Path(word).name for word in args.words)
    output = args.output or Path("output/check") / title
    make_folder(output)

    report: dict[str, Any] = {"faults": [], "warnings": []}
    if wanted and not labelled:
        report["warnings"] += not_recognised(names)
    if labelled:
        report = check_labels(sets, classes, cfg, tuple(dict.fromkeys(cfg.DATASETS.TRAIN)), tests)
        print_labels(report, len(classes))
    with tqdm(total=len({str(file_of(item)) for items in sets.values() for item in items}), unit="image") as bar:
        images = check_images(sets, cfg, labelled, bar.update)
    print_images(images, cfg)
    report = {**report, **images, **{key: report[key] + images[key] for key in ("faults", "warnings")}}
    if args.against:
        seen = check_seen(sets, args.against)
        report = {**report, "seen": seen["seen"], "warnings": report["warnings"] + seen["warnings"]}
        for name, files in seen["seen"].items():
            print("\n".join([f"{name}: {len(files)} images were seen in training", *(f"  {file}" for file in files)]))
    for kind in ("warnings", "faults"):
        for sentence in report[kind]:
            print(f"{kind[:-1]}: {sentence}")
    write_json(output / "check.json", report)
    first, items = next(iter(sets.items()))
    drawn = samples_of(items, classes, PixelFormat.of(cfg))
    if drawn:
        legend = "".join(f"   {sign} {key.removeprefix('is')}" for key, sign in MARKS.items()) if labelled else ""
        draw_samples(drawn, output / "check.png", f"{first}: {len(drawn)} of {len(items)} images{legend}")
    print(f"written: {output}/check.json" + (f"\nlook at: {output}/check.png" if drawn else ""))
    refuse(report)
    which = "training" if labelled else "no labels were checked: pre-training"
    print(f"{which} may start, {len(report['warnings'])} warnings")


def print_labels(report: dict[str, Any], classes: int) -> None:
    """Print the counts, and how well the anchors cover the boxes."""
    facts = report["sets"]
    width = max(len(label) for facts_of in facts.values() for label in facts_of["classes"])
    for name, row in facts.items():
        counted = ("images", "objects", "crowds", "difficult", "without_objects")
        print(f"{name}: " + ", ".join(f"{row[key]} {key.replace('_', ' ')}" for key in counted))
    print("objects of each class, in " + ", ".join(facts))
    for label in next(iter(facts.values()))["classes"]:
        print(f"  {label:<{width}}" + "".join(f"{row['classes'][label]:>9}" for row in facts.values()))
    if not report["anchors"]:
        return
    fit = report["anchors"]
    print(f"boxes of {next(iter(facts))} at training size ({fit['boxes']} looked at), 1, 25, 50, 75 and 99 % of them:")
    for what, text in (("side", "square root of the area, pixels"), ("ratio", "height over width")):
        print(f"  {text:<32}" + "".join(f"{value:>9.2f}" for value in fit[what].values()))
    for which in ("anchors", "proposal"):
        row = fit[which]
        print(
            f"{which}: SIZES {row['SIZES']} ASPECT_RATIOS {row['ASPECT_RATIOS']}\n"
            f"  mean best IoU {row['best_iou']:.3f}; overlapped by 0.5: {row['reach_50']:.1%}, by "
            f"{fit['positive_iou']:g}: {row['reach_positive']:.1%}"
        )


def print_images(images: dict[str, Any], cfg: Any) -> None:
    """Print the result on the images, and their pixel statistics beside the config's."""
    print("images: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in images["images"].items()))
    from relvit_d2.data.images.decode import PixelFormat

    order = f" {cfg.INPUT.get('FORMAT', 'RGB')}" if PixelFormat.of(cfg).channels == 3 else ""
    for what, key in (("mean", "PIXEL_MEAN"), ("std", "PIXEL_STD")):
        own = ", ".join(f"{value:.2f}" for value in images[what])
        print(f"pixel {what}: [{own}]{order}; MODEL.{key} is {list(cfg.MODEL[key])}")
