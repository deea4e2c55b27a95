"""Look whether a data set is there and whole, read it once, and say what is missing and where it belongs.

Nothing is downloaded unless --download asks for it. Exit status 0 when the set can be used, else 1.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from relvit_d2.data.detection import catalog  # noqa: E402
from relvit_d2.data.download import fetch, unpack  # noqa: E402
from relvit_d2.data.download_urls import SOURCES, Part, Source  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402

DRAWN = "streets"
OPTIONAL = ("svhn_extra", "_sequences")  # sets that need what the others do not
DOWNLOADS = ".downloads"  # under the data root; an archive stays until it is unpacked


def main() -> int:
    """Parse the command line and prepare."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/prepare_datasets.py voc_2007 --download",
    )
    parser.add_argument("name", choices=[*SOURCES, DRAWN])
    parser.add_argument("--root", type=Path, help="the data root (default $DETECTRON2_DATASETS, else datasets)")
    parser.add_argument("--download", action="store_true", help="download what is missing; goes on where it stopped")
    args = parser.parse_args()
    if args.root:
        os.environ["DETECTRON2_DATASETS"] = str(args.root)
    return guard(lambda: prepare(args.name, args.download))


def prepare(name: str, download: bool) -> None:
    """Download if asked, verify the layout, read every set of the catalog that belongs to it.

    Raises:
        UserError: something that is needed is missing or damaged.
    """
    root = catalog.dataset_root()
    catalog.register_all()
    source = SOURCES.get(name)
    if source:
        if download:
            get(source, root)
        found = [(part, part.found(root)) for part in source.laid(root)]
        if missing := [part for part, count in found if part.needed and not count]:
            draw_tree(source, root)
            raise UserError(
                f"{source.title} is not whole in '{root}' ({missing[0].pattern} and what else is marked above): put it "
                f"there, or run python tools/prepare_datasets.py {name} --root {shlex.quote(str(root))} --download"
            )
        for part, count in found:
            state = "" if count == part.count else f" of the official {part.count:,}"
            print(f"{part.pattern}: {count:,} {part.what}{state}")
    for entry in (entry for entry in catalog.DATASETS if entry.startswith(f"{name}_")):
        read(entry)


def get(source: Source, root: Path) -> None:
    """Download and unpack the archives of parts that are missing."""
    for archive, holds in source.archives:
        place = root / DOWNLOADS / archive.name
        parts = [part for part in source.laid(root) if part.pattern.startswith(holds)]
        if not place.exists() and parts and all(part.found(root) for part in parts):
            continue
        if not archive.checksum:
            print(f"{archive.name}: no checksum is known, only its size is compared")
        with tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.name) as bar:
            path = fetch(archive, root / DOWNLOADS, bar.update)
        print(f"{archive.name}: unpacking", flush=True)
        unpack(path, root / source.folder)
        path.unlink()


def read(name: str) -> None:
    """Read one set as training will, which also converts and keeps what the reader keeps; say how much it holds.

    Raises:
        UserError: it is damaged, and none of those that few have.
    """
    try:
        records = catalog.get_records(name)
    except UserError as error:
        if not any(word in name for word in OPTIONAL):
            raise
        print(f"{name}: not usable ({error})")
        return
    objects = sum(not thing["iscrowd"] for record in records for thing in record["annotations"])
    print(f"{name}: {len(records):,} images, {objects:,} objects")


def draw_tree(source: Source, root: Path) -> None:
    """Print the official tree with what is there."""
    size = sum(archive.size for archive, _ in source.archives)
    print(f"{source.title}, {size / 1e9:.1f} GB packed, from {source.page}\n{root}/")
    shown: tuple[str, ...] = ()
    for part in source.laid(root):
        *folders, leaf = Path(part.pattern).parts
        for depth, folder in enumerate(folders):
            if shown[: depth + 1] != tuple(folders[: depth + 1]):
                print(f"{'    ' * (depth + 1)}{folder}/")
        shown = tuple(folders)
        print(f"{'    ' * (len(folders) + 1)}{leaf:<28}{part.count:>8,} {part.what}{state_of(part, root)}")


def state_of(part: Part, root: Path) -> str:
    """Say how much of a part is there."""
    found = part.found(root)
    return f" ({found:,} here)" if found else f" <- missing{'' if part.needed else ', may be'}"


if __name__ == "__main__":
    sys.exit(main())
