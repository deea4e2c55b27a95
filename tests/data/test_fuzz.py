"""Every reader on randomly damaged data sets: valid records or a one-sentence error.

``make fuzz`` runs 1,100 damaged sets for each reader, the ordinary tests a few.
"""

import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from relvit_d2.data.detection import custom, svhn
from relvit_d2.data.detection.catalog import DATASETS
from relvit_d2.utils.errors import UserError
from tests.support.fuzzing import READERS, outcome
from tests.support.mutations import spoil

Folders = tuple[Path, Path, Path, Path]
MEMORY = Path("/dev/shm")  # in memory: otherwise most of the time is file access


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folders]:
    """Folders for the original set, the data root, files that must not be read, and the user's cache."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as parent:
        original, root, outside, cache = (Path(parent, name) for name in ("original", "root", "outside", "cache"))
        for path in (original, root, outside, cache):
            path.mkdir()
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(svhn, "PATIENCE", 5)
        yield original, root, outside, cache


def start(original: Path, root: Path, outside: Path) -> None:
    for folder in (root, outside):
        shutil.rmtree(folder, ignore_errors=True)
    outside.mkdir()
    shutil.copytree(original, root)


@pytest.mark.parametrize("name", READERS)
def test_damaged_data_sets(
    name: str,
    folders: Folders,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = READERS[name]
    original, root, outside, cache = folders
    reader.make(original)
    start(original, root, outside)
    whole = outcome(reader, root, cache)
    assert not isinstance(whole, UserError) and whole, whole
    amount = request.config.getoption("--fuzz")
    seen: Counter[str] = Counter()

    @settings(
        max_examples=amount,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=amount < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
    def try_one(seeds: list[int]) -> None:
        start(original, root, outside)
        done = [spoil(root, outside, seed, original, not name.startswith("custom_")) for seed in seeds]
        try:
            result = outcome(reader, root, cache)
        except BaseException as error:
            error.add_note(f"after {', then '.join(done)}") if hasattr(error, "add_note") else None
            raise
        assert not list(cache.rglob("*.part")), "a half-written cache"
        seen["refused" if isinstance(result, UserError) else "read"] += 1

    begin = time.monotonic()
    try_one()
    with capsys.disabled():
        if amount >= 1000:
            print(f"\n{name}: {seen.total()} damaged sets in {time.monotonic() - begin:.0f} s, {dict(seen)}", end="")
    # Damaged images are errors only one by one.
    assert seen["read"] > 0 and (seen["refused"] > 0.2 * amount or not reader.classes)


@pytest.mark.parametrize("name", READERS)
def test_readers_write_no_data_and_tolerate_a_full_disk(name: str, folders: Folders) -> None:
    reader = READERS[name]
    original, root, outside, cache = folders
    reader.make(original)
    start(original, root, outside)
    before = {path: path.stat() for path in root.rglob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # maximum file size in bytes
    try:
        full = outcome(reader, root, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in cache.rglob("*") if path.is_file()], "a half-written cache"
    first, second = outcome(reader, root, cache), outcome(reader, root, cache)
    assert first == second and isinstance(first, list) and first
    assert isinstance(full, UserError) or full == first
    after = {path: path.stat() for path in root.rglob("*")}
    assert {path: (s.st_size, s.st_mtime_ns) for path, s in before.items()} == {
        path: (s.st_size, s.st_mtime_ns) for path, s in after.items()
    }


def test_every_reader_is_fuzzed() -> None:
    families = {name.partition("_")[0] for name in DATASETS}
    # Streets are read by SVHN's reader.
    assert families - {"streets"} <= set(READERS)
    assert {f"custom_{form}" for form in custom.FORMATS} <= set(READERS)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_inside_the_data_are_followed(kind: str, folders: Folders) -> None:
    """A folder may be a link to another disk, and a file a link to elsewhere in the data root."""
    original, root, outside, _ = folders
    READERS["voc"].make(original)
    start(original, root, outside)
    folder = root / "VOC2007/JPEGImages"
    if kind == "folder":
        folder.rename(outside / "images")
        folder.symlink_to(outside / "images")
    else:
        (root / "elsewhere").mkdir()
        (folder / "000001.jpg").rename(root / "elsewhere/a.jpg")
        (folder / "000001.jpg").symlink_to(os.path.relpath(root / "elsewhere/a.jpg", folder))
    assert len(READERS["voc"].read(root)) == 3
