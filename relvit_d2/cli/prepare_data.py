"""Check whether a data set is there and complete, read it once, and print what is missing and where it belongs.

Nothing is downloaded unless --download asks for it. Exit status 0 when the set can be used, else 1.
"""

import argparse
import os
import shlex
from pathlib import Path

from relvit_d2.data.download_urls import SOURCES, Part, Source
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import dataset_root

EXAMPLE = "relvit-d2 prepare-data voc_2007 --download"

DRAWN = "streets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", choices=[*SOURCES, DRAWN])
    parser.add_argument("--root", type=Path, help="the data root (default $DETECTRON2_DATASETS, else datasets)")
    parser.add_argument("--download", action="store_true", help="download what is missing; continues where it stopped")


def run(args: argparse.Namespace) -> None:
    """Download if asked, verify the layout, read every set of the catalog that belongs to it.

    Raises:
        UserError: a needed part is missing or damaged.
    """
    if args.root:
        os.environ["DETECTRON2_DATASETS"] = str(args.root)
    from relvit_d2.data.detection import catalog
    from relvit_d2.data.detection.preparation import describe, download_missing

    root = dataset_root()
    catalog.register_all()
    source = SOURCES.get(args.name)
    if source:
        if args.download:
            download_missing(source, root, print)
        found = [(part, part.count_files(root)) for part in source.located(root)]
        if missing := [part for part, count in found if part.required and not count]:
            draw_tree(source, root)
            raise UserError(
                f"{source.title} is not whole in '{root}' ({missing[0].pattern} and what else is marked above): put it "
                f"there, or run relvit-d2 prepare-data {args.name} --root {shlex.quote(str(root))} --download"
            )
        for part, count in found:
            state = "" if count == part.count else f" of the official {part.count:,}"
            print(f"{part.pattern}: {count:,} {part.what}{state}")
    for entry in (entry for entry in catalog.DATASETS if entry.startswith(f"{args.name}_")):
        print(describe(entry))


def draw_tree(source: Source, root: Path) -> None:
    """Print the official tree with what is there."""
    size = sum(archive.size for archive, _ in source.archives)
    print(f"{source.title}, {size / 1e9:.1f} GB packed, from {source.page}\n{root}/")
    shown: tuple[str, ...] = ()
    for part in source.located(root):
        *folders, leaf = Path(part.pattern).parts
        for depth, folder in enumerate(folders):
            if shown[: depth + 1] != tuple(folders[: depth + 1]):
                print(f"{'    ' * (depth + 1)}{folder}/")
        shown = tuple(folders)
        print(f"{'    ' * (len(folders) + 1)}{leaf:<28}{part.count:>8,} {part.what}{state_of(part, root)}")


def state_of(part: Part, root: Path) -> str:
    """Return how many files of a part are there."""
    found = part.count_files(root)
    return f" ({found:,} here)" if found else f" <- missing{'' if part.required else ', optional'}"
