"""Download of a public data set's missing parts, and a summary of what is there."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from relvit_d2.data.detection import catalog
from relvit_d2.data.download import fetch, unpack
from relvit_d2.data.download_urls import Source
from relvit_d2.utils.errors import UserError

OPTIONAL = ("svhn_extra", "_sequences")  # sets that need what the others do not
DOWNLOADS = ".downloads"  # under the data root; an archive stays until it is unpacked


def download_missing(source: Source, root: Path, report: Callable[[str], None]) -> None:
    """Download and unpack the archives of parts that are missing.

    Args:
        source: the data set.
        root: the data root.
        report: called with each line for the user.
    """
    for archive, holds in source.archives:
        place = root / DOWNLOADS / archive.name
        parts = [part for part in source.laid(root) if part.pattern.startswith(holds)]
        if not place.exists() and parts and all(part.found(root) for part in parts):
            continue
        if not archive.checksum:
            report(f"{archive.name}: no checksum is known, only its size is compared")
        with tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.name) as bar:
            path = fetch(archive, root / DOWNLOADS, bar.update)
        report(f"{archive.name}: unpacking")
        unpack(path, root / source.folder)
        path.unlink()


def describe(name: str) -> str:
    """Read one set as training does, which fills the reader's cache; return a line on its size.

    Raises:
        UserError: it is missing or damaged, and not one of :data:`OPTIONAL`.
    """
    try:
        records = catalog.get_records(name)
    except UserError as error:
        if not any(word in name for word in OPTIONAL):
            raise
        return f"{name}: not usable ({error})"
    objects = sum(not thing["iscrowd"] for record in records for thing in record["annotations"])
    return f"{name}: {len(records):,} images, {objects:,} objects"
