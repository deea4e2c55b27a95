"""Check whether a data set is complete: read it once, and print which files are missing and where they belong.

Nothing is downloaded without --download. Exit status 0 if the data set can be used, else 1.
"""

import argparse
import os
from pathlib import Path

from relvit_d2.data.download_urls import SOURCES, Source
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import dataset_root
from relvit_d2.utils.printing import print_text, shell_command

EXAMPLE = "relvit-d2 prepare-data voc_2007 --download"

DRAWN = "streets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", choices=[*SOURCES, DRAWN])
    parser.add_argument("--root", type=Path, help="data root (default $DETECTRON2_DATASETS, or else datasets)")
    parser.add_argument("--download", action="store_true", help="download missing files; resumes partial downloads")


def run(args: argparse.Namespace) -> None:
    """Download if requested, check the files, read every data set of the catalog that uses them."""
    if args.root:
        os.environ["DETECTRON2_DATASETS"] = str(args.root)
    from relvit_d2.data.detection import catalog
    from relvit_d2.data.detection.preparation import describe, download_missing

    root = dataset_root()
    catalog.register_all()
    source = SOURCES.get(args.name)
    if source:
        if args.download:
            download_missing(source, root, print_text)
        found = [(part, part.count_files(root)) for part in source.located(root)]
        if missing := [part for part, count in found if part.required and not count]:
            print_layout(source, root)
            raise UserError(
                f"{source.title} is incomplete in '{root}': {missing[0].pattern} is missing (see above); add it, or "
                f"run {shell_command(['relvit-d2', 'prepare-data', args.name, '--root', str(root), '--download'])}"
            )
        for part, count in found:
            state = "" if count == part.count else f" of the official {part.count:,}"
            print_text(f"{part.pattern}: {count:,} {part.what}{state}")
    for entry in (entry for entry in catalog.DATASETS if entry.startswith(f"{args.name}_")):
        print_text(describe(entry))


def print_layout(source: Source, root: Path) -> None:
    """Print the official directory layout, with the number of files found in each part."""
    size = sum(archive.size for archive, _ in source.archives)
    print_text(f"{source.title}, {size / 1e9:.1f} GB compressed, from {source.page}\n{root}/")
    shown: tuple[str, ...] = ()
    for part in source.located(root):
        *folders, leaf = Path(part.pattern).parts
        for depth, folder in enumerate(folders):
            if shown[: depth + 1] != tuple(folders[: depth + 1]):
                print_text(f"{'    ' * (depth + 1)}{folder}/")
        shown = tuple(folders)
        found = part.count_files(root)
        state = f" ({found:,} found)" if found else f" <- missing{'' if part.required else ', optional'}"
        print_text(f"{'    ' * (len(folders) + 1)}{leaf:<28}{part.count:>8,} {part.what}{state}")
