"""What several test files share."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relvit_d2.data.detection.streets import generate


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden instead of comparing with it")
    parser.addoption("--fuzz", type=int, default=40, help="damaged data sets for each reader (tests/data/test_fuzz.py)")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests may run beside each other; small tensors gain nothing from a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real data samples; tests that need it skip where it is not given."""
    value = os.environ.get("RELVIT_SAMPLES")
    if not value:
        pytest.skip("RELVIT_SAMPLES is unset: no real data samples here")
    return Path(value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few street numbers in SVHN's place and format."""
    folder = tmp_path_factory.mktemp("datasets")
    generate(folder / "svhn/train", 12, seed=1)
    generate(folder / "svhn/test", 5, seed=2)
    return folder


@pytest.fixture()
def log_lines() -> Iterator[list[str]]:
    """Lines logged by the evaluators, whether or not another test has cut them off from the root logger."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger("relvit_d2.evaluation")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, red and blue pictures of 16 px: ``train`` with 12 each, ``test`` with 6 each."""
    root, random = tmp_path_factory.mktemp("trees"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("red", "blue")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 180
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root
