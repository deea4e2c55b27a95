"""What several test files share."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relvit_d2.data.detection.streets import generate
from tests.support.labelled_folders import draw_trees


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
    """The images of :func:`draw_trees`."""
    root = tmp_path_factory.mktemp("trees")
    draw_trees(root)
    return root
