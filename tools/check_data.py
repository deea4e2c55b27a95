"""Check data before training on them: labels, boxes, anchors, every image, what train and test share.

Give a config, names of data sets, or folders, with labels or without. Writes check.json and check.png, a page of 16
samples. Exit status 0 when training may start (pre-training where no labels are recognised), warnings or not, else 1.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402
from fvcore.common.config import CfgNode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from relvit_d2.analysis.data_checks import Report, check_images, check_labels, file_of, refuse  # noqa: E402
from relvit_d2.data.detection import catalog  # noqa: E402
from relvit_d2.data.detection.custom import TRAINED_ON, find, named_sets, near_misses, register_own  # noqa: E402
from relvit_d2.data.detection.records import Record  # noqa: E402
from relvit_d2.data.images.decode import PixelFormat  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.report.predictions import in_rgb, legible  # noqa: E402
from relvit_d2.report.samples import Sample, draw_samples  # noqa: E402
from relvit_d2.tasks import load_config  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402
from relvit_d2.utils.files import make_folder, write_json  # noqa: E402

SHOWN = 16
MARKS = {"difficult": "*", "iscrowd": "+"}
DEFAULT = ROOT / "configs/base/detection.yaml"  # whose anchors and training size names alone are held against

Sets = dict[str, list[Any]]  # records, or paths of images


def main() -> int:
    """Parse the command line and check."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python tools/check_data.py --config-file configs/demo/streets.yaml\n"
        "  python tools/check_data.py streets_train streets_test\n  python tools/check_data.py path/to/folder",
    )
    parser.add_argument("--config-file", help="check its DATASETS.TRAIN and DATASETS.TEST")
    parser.add_argument("--output", type=Path, help="folder for check.json and check.png (default output/check/NAME)")
    parser.add_argument("words", nargs="*", help="names or folders; with --config-file KEY VALUE pairs over it")
    args = parser.parse_args()
    return guard(lambda: check(args))


def check(args: argparse.Namespace) -> None:
    """Check, print, write.

    Raises:
        UserError: if the data are missing, or have a fault that training would fail on.
    """
    if not args.config_file and not args.words:
        raise UserError("nothing to check: give --config-file, or names of data sets or folders")
    cfg = load_config(args.config_file or str(DEFAULT), args.words if args.config_file else config_words(args.words))
    names, tests = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], tuple(cfg.DATASETS.TEST)
    if not names:
        raise UserError(f"config file '{args.config_file}' names no data set (DATASETS.TRAIN)")
    labelled = wanted = cfg.TASK == "detection"
    if cfg.TASK != "classification":  # which has folders and archives, but no custom sets
        register_own(cfg.DATASETS, labelled)
    sets, classes = read(list(dict.fromkeys(names)), labelled, cfg.DATASETS.get("SKIP_MISSING", False))
    labelled = bool(classes)
    title = Path(args.config_file).stem if args.config_file else "_".join(Path(word).name for word in args.words)
    output = args.output or Path("output/check") / title
    make_folder(output)

    report: Report = {"faults": [], "warnings": []}
    if wanted and not labelled:
        report["warnings"] += not_recognised(names)
    if labelled:
        report = check_labels(sets, classes, cfg, tuple(dict.fromkeys(cfg.DATASETS.TRAIN)), tests)
        tell_labels(report, len(classes))
    with tqdm(total=len({str(file_of(item)) for items in sets.values() for item in items}), unit="image") as bar:
        images = check_images(sets, cfg, labelled, bar.update)
    tell_images(images, cfg)
    report = {**report, **images, **{key: report[key] + images[key] for key in ("faults", "warnings")}}
    for kind in ("warnings", "faults"):
        for sentence in report[kind]:
            print(f"{kind[:-1]}: {sentence}")
    write_json(output / "check.json", report)
    first, items = next(iter(sets.items()))
    drawn = samples(items, classes, PixelFormat.of(cfg))
    if drawn:
        legend = "".join(f"   {sign} {key.removeprefix('is')}" for key, sign in MARKS.items()) if labelled else ""
        draw_samples(drawn, output / "check.png", f"{first}: {len(drawn)} of {len(items)} images{legend}")
    print(f"written: {output}/check.json" + (f"\nlook at: {output}/check.png" if drawn else ""))
    refuse(report)
    which = "training" if labelled else "no labels were checked: pre-training"
    print(f"{which} may start, {len(report['warnings'])} warnings")


def not_recognised(names: list[str]) -> list[str]:
    """Return a warning for each of ``names`` that is a source of images without labels."""
    warnings = []
    for name in filter(catalog.is_folder, dict.fromkeys(names)):
        path = Path(catalog.subset(name)[0]).expanduser()
        near = "".join(f"; {reason}" for reason in (near_misses(path) if path.is_dir() else []))
        warnings.append(f"{name}: no labels were recognised, so it serves for pre-training only{near}")
    return warnings


def config_words(words: list[str]) -> list[Any]:
    """Return the config's keys and values, in turn, for names and folders; a folder with labels becomes its sets.

    Raises:
        UserError: if two folders' sets would have one name.
    """
    custom: dict[str, dict[str, str]] = {}
    train: list[str] = []
    test: list[str] = []
    for word in words:
        root = Path(word).expanduser()
        found = find(root) if root.is_dir() and catalog.is_folder(word) else None
        sets = named_sets(word, *found) if found else {}
        if twice := custom.keys() & sets.keys():
            first = custom[min(twice)]["ROOT"]
            raise UserError(f"'{first}' and '{word}' both hold the set {min(twice)}: check them one by one")
        custom |= sets
        train += [name for name, keys in sets.items() if keys["SPLIT"] in TRAINED_ON] if found else [word]
        test += [name for name, keys in sets.items() if keys["SPLIT"] not in TRAINED_ON]
    return ["DATASETS.CUSTOM", custom, "DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test)]


def read(names: list[str], labelled: bool, skip_missing: bool) -> tuple[Sets, list[str]]:
    """Return records and their classes, or images and no class where labels do not matter or a name is a folder."""
    if not labelled or any(catalog.is_folder(name) for name in names):
        return {name: catalog.get_images(name, skip_missing) for name in names}, []
    classes = {name: list(catalog.get_metadata(name).thing_classes) for name in names}
    for name in names[1:]:
        if classes[name] != classes[names[0]]:
            raise UserError(f"data sets '{names[0]}' and '{name}' have different classes: check them one by one")
    return {name: catalog.get_records(name, skip_missing) for name in names}, classes[names[0]]


def tell_labels(report: Report, classes: int) -> None:
    """Print the counts and how the boxes lie to the anchors."""
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


def tell_images(images: Report, cfg: CfgNode) -> None:
    """Print what was found in the images."""
    print("images: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in images["images"].items()))
    order = f" {cfg.INPUT.get('FORMAT', 'RGB')}" if PixelFormat.of(cfg).channels == 3 else ""
    for what, key in (("mean", "PIXEL_MEAN"), ("std", "PIXEL_STD")):
        own = ", ".join(f"{value:.2f}" for value in images[what])
        print(f"pixel {what}: [{own}]{order}; MODEL.{key} is {list(cfg.MODEL[key])}")


def samples(items: list[Any], classes: list[str], pixels: PixelFormat) -> list[Sample]:
    """Return images spread evenly over those with objects, if labelled; none that cannot be read."""
    classes = legible(classes)
    shown = [item for item in items if not isinstance(item, dict) or item.get("annotations")] or items
    drawn = []
    for index in np.unique(np.linspace(0, len(shown) - 1, min(SHOWN, len(shown))).round().astype(int)):
        item = shown[index]
        try:
            image = in_rgb(pixels.read(file_of(item)))
        except UserError:
            continue
        things = item.get("annotations", []) if isinstance(item, dict) else []
        things = [thing for thing in things if thing["category_id"] in range(len(classes))]
        # A region that is no background of any class is there once for each of them.
        regions = {(*thing["bbox"], thing.get("type")): thing for thing in things if thing.get("iscrowd")}
        things = [thing for thing in things if not thing.get("iscrowd")] + list(regions.values())
        boxes = [BoxMode.convert(list(thing["bbox"]), thing["bbox_mode"], BoxMode.XYXY_ABS) for thing in things]
        numbers = np.array([thing["category_id"] for thing in things], dtype=int)
        labels = [label_of(thing, classes) for thing in things]
        drawn.append(Sample(image, np.array(boxes).reshape(-1, 4), numbers, labels, Path(str(file_of(item))).name))
    return drawn


def label_of(thing: Record, classes: list[str]) -> str:
    """Return what is written at an object's box: what it is, and marks."""
    marks = "".join(sign for key, sign in MARKS.items() if thing.get(key))
    return str(thing.get("type") or classes[thing["category_id"]]) + marks


if __name__ == "__main__":
    sys.exit(main())
