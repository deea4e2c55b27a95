"""Check data before training: labels, boxes, anchors, every image file, and images shared by train and test sets.

Takes a config, names of data sets, or folders with or without labels. Writes check.json and check.png, which shows 16
samples. Exit status 1 if an error was found that training would stop at, else 0, with or without warnings. Images
without recognised labels are checked for pre-training.
"""

import argparse
from pathlib import Path
from typing import Any

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_json
from relvit_d2.utils.printing import print_text

EXAMPLE = """\
relvit-d2 check-data --config-file configs/demo/streets.yaml
relvit-d2 check-data streets_train streets_test
relvit-d2 check-data path/to/folder
relvit-d2 check-data path/to/folder --against output/pretrain/encoder.safetensors
relvit-d2 check-data --config-file configs/custom.yaml --data path/to/folder --show-augmented INPUT.AUGMENT.MIXUP 0.5"""

DEFAULT = "configs/base/detection.yaml"  # its anchors and training size are checked if no config is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", help="check its DATASETS.TRAIN and DATASETS.TEST")
    parser.add_argument("--data", dest="folder", metavar="DATA", help="the same as DATA; with --config-file too")
    parser.add_argument("--output", type=Path, help="folder for check.json and check.png (default output/check/NAME)")
    parser.add_argument(
        "--against", type=Path, metavar="ENCODER", help="list the training images of this encoder.safetensors"
    )
    parser.add_argument(
        "--show-augmented", action="store_true", help="draw 16 training samples as the config augments them"
    )
    parser.add_argument(
        "data", nargs="*", metavar="DATA", help="data sets or folders; with --config-file: KEY VALUE pairs"
    )


def run(args: argparse.Namespace) -> None:
    """Check the data, print the results and write the files."""
    if not args.config_file and args.folder:
        args.data = [args.folder, *args.data]
    if not args.config_file and not args.data:
        raise UserError("nothing to check: give --config-file, or names of data sets or folders")
    if args.config_file:
        find_config(args.config_file)
    from relvit_d2.analysis.data_checks import (
        check_images,
        check_labels,
        check_seen,
        raise_first_error,
        read_sets,
        unrecognised_warnings,
    )
    from relvit_d2.data.detection.custom import config_pairs, config_pairs_of_inputs, register_custom
    from relvit_d2.data.images.decode import PixelFormat
    from relvit_d2.report.samples import MARKS, augmented_samples, draw_samples, samples_of
    from relvit_d2.tasks import load_config, read_config

    if args.config_file:
        pairs = [*config_pairs(args.folder, read_config(args.config_file, []).TASK), *args.data]
    else:
        pairs = config_pairs_of_inputs(args.data)
    cfg = load_config(args.config_file or DEFAULT, pairs)
    names, tests = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], tuple(cfg.DATASETS.TEST)
    if not names:
        raise UserError(f"config file '{args.config_file}' names no data set (DATASETS.TRAIN)")
    needs_labels = cfg.TASK == "detection"
    if cfg.TASK != "classification":  # classification has no custom sets
        register_custom(cfg.DATASETS, needs_labels)
    sets, classes = read_sets(list(dict.fromkeys(names)), needs_labels, cfg.DATASETS.get("SKIP_MISSING", False))
    labelled = bool(classes)
    title = Path(args.config_file).stem if args.config_file else "_".join(Path(word).name for word in args.data)
    output = args.output or Path("output/check") / title
    if args.show_augmented and not (needs_labels and labelled and cfg.DATASETS.TRAIN):
        raise UserError("--show-augmented needs training images with labels of objects: give a config for detection")
    make_folder(output)

    report: dict[str, Any] = {"errors": [], "warnings": []}
    if needs_labels and not labelled:
        report["warnings"] += unrecognised_warnings(names)
    if labelled:
        report = check_labels(sets, classes, cfg, tuple(dict.fromkeys(cfg.DATASETS.TRAIN)), tests)
        if not args.config_file:
            print_text(f"training size and anchors are those of {DEFAULT}; --config-file FILE checks others")
        print_labels(report, len(classes))
    images = check_images(sets, cfg, not cfg.DATASETS.SKIP_UNREADABLE)
    print_images(images, cfg)
    report = {**report, **images, **{key: report[key] + images[key] for key in ("errors", "warnings")}}
    if args.against:
        seen = check_seen(sets, args.against)
        report |= {"seen": seen["seen"], "warnings": report["warnings"] + seen["warnings"]}
        for name, files in seen["seen"].items():
            print_text(
                "\n".join([f"{name}: {len(files)} images were seen in training", *(f"  {file}" for file in files)])
            )
    for message in report["warnings"]:
        print_text(f"warning: {message}")
    for message in report["errors"] if len(report["errors"]) > 1 else ():  # a single one is the last line
        print_text(f"error: {message}")
    write_json(output / "check.json", report)
    first, items = next(iter(sets.items()))
    drawn = samples_of(items, classes, PixelFormat.of(cfg))
    if drawn:
        legend = "".join(f"   {sign} {key.removeprefix('is')}" for key, sign in MARKS.items()) if labelled else ""
        draw_samples(drawn, output / "check.png", f"{first}: {len(drawn)} of {len(items)} images{legend}")
    print_text(f"written: {output}/check.json" + (f" and {output}/check.png" if drawn else ""))
    if args.show_augmented and not report["errors"]:
        augmented = augmented_samples(cfg, classes)
        draw_samples(
            augmented, output / "augmented.png", f"{', '.join(cfg.DATASETS.TRAIN)}: {len(augmented)} training samples"
        )
        print_text(f"written: {output}/augmented.png")
    if len(report["errors"]) > 1:
        raise UserError(f"training cannot start: correct the {len(report['errors'])} errors above")
    raise_first_error(report)
    ready = "training can start" if labelled else "pre-training can start (no labels were checked)"
    print_text(f"{ready}, {len(report['warnings'])} warnings")


def print_labels(report: dict[str, Any], classes: int) -> None:
    """Print the number of images and objects, and how well the anchors fit the boxes."""
    counts = report["sets"]
    width = max(len(label) for row in counts.values() for label in row["classes"])
    for name, row in counts.items():
        counted = ("images", "objects", "crowds", "difficult", "without_objects")
        print_text(f"{name}: " + ", ".join(f"{row[key]} {key.replace('_', ' ')}" for key in counted))
    print_text("objects per class in " + ", ".join(counts))
    for label in next(iter(counts.values()))["classes"]:
        print_text(f"  {label:<{width}}" + "".join(f"{row['classes'][label]:>9}" for row in counts.values()))
    if not report["anchors"]:
        return
    from relvit_d2.analysis.anchors import anchor_keys

    fit = report["anchors"]
    print_text(f"{fit['boxes']} boxes of {next(iter(counts))} at training size, percentiles 1, 25, 50, 75 and 99:")
    for key, text in (("side", "square root of the area, pixels"), ("ratio", "height over width")):
        print_text(f"  {text:<32}" + "".join(f"{value:>9.2f}" for value in fit[key].values()))
    for key, title in (("anchors", "anchors of the config"), ("proposal", "proposed anchors")):
        row = fit[key]
        print_text("\n".join([f"{title}:", *(f"  {line}" for line in anchor_keys(row))]))
        print_text(
            f"  mean best IoU {row['best_iou']:.3f}; boxes with an IoU of 0.5 or more: {row['reach_50']:.1%}, of "
            f"{fit['positive_iou']:g} or more: {row['reach_positive']:.1%}"
        )


def print_images(images: dict[str, Any], cfg: Any) -> None:
    """Print the number of images read, and their pixel statistics beside those of the config."""
    print_text("images: " + ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in images["images"].items()))
    from relvit_d2.data.images.decode import PixelFormat

    order = f" {cfg.INPUT.get('FORMAT', 'RGB')}" if PixelFormat.of(cfg).channels == 3 else ""
    for statistic, key in (("mean", "PIXEL_MEAN"), ("std", "PIXEL_STD")):
        values = ", ".join(f"{value:.2f}" for value in images[statistic])
        print_text(f"pixel {statistic}: [{values}]{order}; MODEL.{key} is {list(cfg.MODEL[key])}")
