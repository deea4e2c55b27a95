"""Downloads the missing parts of a public data set and summarizes a data set."""

from collections.abc import Callable
from pathlib import Path

from relvit_d2.data.detection import catalog
from relvit_d2.data.download import fetch, unpack
from relvit_d2.data.download_urls import Source
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.progress import Progress

OPTIONAL = ("svhn_extra", "_sequences")  # data sets that need additional files
DOWNLOADS = ".downloads"  # under the data root; an archive is kept until it is unpacked


def download_missing(source: Source, root: Path, report: Callable[[str], None]) -> None:
    """Download and unpack the archives of parts that are missing; ``report`` is called with each line of progress."""
    for archive, prefixes in source.archives:
        parts = [part for part in source.located(root) if part.pattern.startswith(prefixes)]
        if not (root / DOWNLOADS / archive.name).exists() and parts and all(part.count_files(root) for part in parts):
            continue
        if not archive.checksum:
            report(f"{archive.name}: no checksum is known, only the size is checked")
        with Progress(total=archive.size, unit="B", unit_scale=True, desc=archive.name) as bar:
            path = fetch(archive, root / DOWNLOADS, bar.update)
        report(f"{archive.name}: unpacking")
        unpack(path, root / source.folder)
        path.unlink()


def describe(name: str) -> str:
    """Read a data set, which fills the reader's cache, and return a line with its size.

    Raises:
        UserError: it is missing or damaged, and not in :data:`OPTIONAL`.
    """
    try:
        records = catalog.get_records(name)
    except UserError as error:
        if not any(part in name for part in OPTIONAL):
            raise
        return f"{name}: not usable ({error})"
    objects = sum(not a["iscrowd"] for record in records for a in record["annotations"])
    return f"{name}: {len(records):,} images, {objects:,} objects"
