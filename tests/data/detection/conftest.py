"""Fixtures of the readers' tests."""

from pathlib import Path

import pytest

from relvit_d2.data import cache
from relvit_d2.data.detection import yolo


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_logged", set())
    yolo._warn_unnamed_classes.cache_clear()
