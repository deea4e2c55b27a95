"""Every reader on sets that were spoilt at random: sound records or one sentence, never anything else.

``make fuzz`` runs 1,100 spoilt sets for each reader; the ordinary tests a few of them.
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

from relvit_d2.data.detection import custom
from relvit_d2.data.detection.catalog import DATASETS
from relvit_d2.utils.errors import UserError
from tests.support.fuzzing import READERS, outcome
from tests.support.mutations import spoil

MEMORY = Path("/dev/shm")  # a file system in memory: most of a spoilt set's time is its files' otherwise


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, Path, Path]]:
    """A sound set's place, a data root, a folder beside it that nobody may read, and the user's cache."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as place:
        sound, root, outside, cache = (Path(place, name) for name in ("sound", "root", "outside", "cache"))
        for folder in (sound, root, outside, cache):
            folder.mkdir()
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        yield sound, root, outside, cache


def start(sound: Path, root: Path, outside: Path) -> None:
    for folder in (root, outside):
        shutil.rmtree(folder, ignore_errors=True)
    outside.mkdir()
    shutil.copytree(sound, root)


@pytest.mark.parametrize("name", READERS)
def test_spoilt_sets(
    name: str, places: tuple[Path, Path, Path, Path], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = READERS[name]
    sound, root, outside, cache = places
    reader.make(sound)
    start(sound, root, outside)
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
        start(sound, root, outside)
        done = [spoil(root, outside, seed, sound, not name.startswith("custom_")) for seed in seeds]
        try:
            answer = outcome(reader, root, cache)
        except BaseException as error:
            error.add_note(f"after {', then '.join(done)}") if hasattr(error, "add_note") else None
            raise
        assert not list(cache.rglob("*.part")), "a half-written cache"
        seen["refused" if isinstance(answer, UserError) else "read"] += 1

    begin = time.monotonic()
    try_one()
    with capsys.disabled():
        if amount >= 1000:
            print(f"\n{name}: {seen.total()} spoilt sets in {time.monotonic() - begin:.0f} s, {dict(seen)}", end="")
    # Images are refused one by one.
    assert seen["read"] > 0 and (seen["refused"] > 0.2 * amount or not reader.classes)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_writes_nothing_into_the_data_and_bears_a_full_disk(
    name: str, places: tuple[Path, Path, Path, Path]
) -> None:
    reader = READERS[name]
    sound, root, outside, cache = places
    reader.make(sound)
    start(sound, root, outside)
    before = {path: path.stat() for path in root.rglob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # bytes a file may have
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


def test_no_reader_is_missing_here() -> None:
    families = {name.partition("_")[0] for name in DATASETS}
    # Streets are drawn here and read by SVHN's reader.
    assert families - {"streets"} <= set(READERS)
    assert {f"custom_{form}" for form in custom.FORMATS} <= set(READERS)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_inside_the_data_are_followed(kind: str, places: tuple[Path, Path, Path, Path]) -> None:
    """A folder may lie on another disk, and a file elsewhere in the data root."""
    sound, root, outside, _ = places
    READERS["voc"].make(sound)
    start(sound, root, outside)
    folder = root / "VOC2007/JPEGImages"
    if kind == "folder":
        folder.rename(outside / "images")
        folder.symlink_to(outside / "images")
    else:
        (root / "elsewhere").mkdir()
        (folder / "000001.jpg").rename(root / "elsewhere/a.jpg")
        (folder / "000001.jpg").symlink_to(os.path.relpath(root / "elsewhere/a.jpg", folder))
    assert len(READERS["voc"].read(root)) == 3
