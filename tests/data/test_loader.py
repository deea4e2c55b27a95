"""The order of samples as a pure function of the seed and the iteration."""

import itertools
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from relvit_d2.data.detection.mapper import pad_images
from relvit_d2.data.images.decode import read_rgb
from relvit_d2.data.loader import Batches, EndlessOrder, ordered_batches
from relvit_d2.data.workers import _load, _store
from relvit_d2.utils.errors import ResumableError, UserError


def take(order: EndlessOrder, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(iter(order), count))


FACTORS = st.none() | arrays(np.float32, 30, elements=st.floats(1, 6, width=32))


@given(count=st.integers(1, 30), batch=st.integers(1, 12), start=st.integers(0, 20), factors=FACTORS)
def test_later_start_gives_the_same_batches(count: int, batch: int, start: int, factors: np.ndarray | None) -> None:
    repeats = None if factors is None else factors[:count]
    straight = take(EndlessOrder(count, batch, 3, 0, repeats=repeats), start + 5)
    assert take(EndlessOrder(count, batch, 3, start, repeats=repeats), 5) == straight[start:]


@given(count=st.integers(1, 30), share=st.integers(1, 5), world=st.integers(1, 4), factors=FACTORS)
def test_processes_together_read_the_batches_of_one_process(
    count: int, share: int, world: int, factors: np.ndarray | None
) -> None:
    repeats = None if factors is None else factors[:count]
    one = take(EndlessOrder(count, share * world, 5, 2, repeats=repeats), 4)
    ranks = [take(EndlessOrder(count, share * world, 5, 2, rank, world, repeats=repeats), 4) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == one


def test_each_epoch_is_another_permutation() -> None:
    keys = list(itertools.chain(*take(EndlessOrder(10, 4, 0, 0), 5)))
    assert Counter(index for epoch, index in keys if epoch == 0) == Counter(range(10))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


def test_samples_are_repeated_as_often_as_their_factor() -> None:
    """Counts over many epochs are those of Detectron2's sampler up to rounding; no two draws have the same seed."""
    factors = np.array([1.0, 1.25, 2.0, 3.6], dtype=np.float32)
    keys = list(itertools.chain(*take(EndlessOrder(4, 8, 0, 0, repeats=factors), 2000)))
    counts = np.bincount([index for _, index in keys])
    theirs = RepeatFactorTrainingSampler(torch.from_numpy(factors), seed=0)
    expected = np.bincount(list(itertools.islice(iter(theirs), len(keys))))
    assert np.abs(counts / len(keys) - expected / len(keys)).max() < 0.01
    assert np.abs(counts / counts[0] - factors).max() < 0.06
    assert len(set(keys)) == len(keys)
    first = [index for _, index in keys[: int(np.ceil(factors).sum())]]
    assert np.bincount(first)[2] in (2, 3) and first != sorted(first)


def draw(sample: int) -> tuple[int, float, float]:
    return sample, float(np.random.rand()), random.random()


def test_random_draws_do_not_depend_on_the_number_of_workers() -> None:
    def batches(workers: int) -> list[list[tuple[int, float, float]]]:
        loader = Batches(range(7), draw, list, EndlessOrder(7, 3, 1, 4), 1, workers)
        return list(itertools.islice(iter(loader), 6))

    alone = batches(0)
    assert alone == batches(2)
    assert len({item[1] for batch in alone for item in batch}) == 18


def test_open_workers_do_not_keep_a_script_from_ending() -> None:
    script = """
from relvit_d2.data.loader import ordered_batches
batches = iter(ordered_batches(range(100), abs, list, 2, 1))
next(batches)
raise ZeroDivisionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError\n")


def test_a_signal_to_a_worker_that_has_just_started_does_not_end_it() -> None:
    script = """
import os, signal
from relvit_d2.data.loader import ordered_batches
signal.signal(signal.SIGINT, signal.SIG_DFL)
for number in (signal.SIGINT, signal.SIGTERM):
    os.register_at_fork(after_in_child=lambda number=number: os.kill(os.getpid(), number))
assert sum(map(sum, ordered_batches(range(9), abs, list, 2, 2))) == 36
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def refuse(sample: int) -> int:
    if sample == 3:
        raise UserError("sample 3 is damaged; replace it")
    return sample


def batches_of_arrays(sample: int) -> tuple[np.ndarray, torch.Tensor]:
    return np.full(1000, sample), torch.full((300, 300), sample)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_is_killed_at_any_moment_is_one_error_and_none_remains(seed: int, workers: int) -> None:
    random_moment = random.Random(seed)
    loader = Batches(range(7), batches_of_arrays, list, EndlessOrder(7, 3, 1, 0), 1, workers)
    batches = iter(loader)
    next(batches)
    other = iter(ordered_batches(range(9), int, list, 1, 1))  # an evaluation, while the training loader is open
    next(other)
    children = multiprocessing.active_children()
    assert len(children) == workers + 1
    victim = random_moment.choice(children)
    threading.Timer(random_moment.uniform(0, 0.2), victim.kill).start()
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"process {victim.pid}\) was killed \(SIGKILL\)"):
        for batch in batches:
            assert len(batch) == 3
            time.sleep(random_moment.uniform(0, 0.01))
            assert time.monotonic() - began < 30
    other.close()
    assert not multiprocessing.active_children()


def hang(sample: int) -> int:
    if sample == 3:
        time.sleep(1000)
    return sample


def test_a_worker_that_hangs_is_an_error_after_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"worker 1 \(process \d+\) returned no batch within 2 s: .*DATALOADER.TIMEOUT"):
        list(ordered_batches(range(8), hang, list, 1, 2, timeout=2))
    assert 2 < time.monotonic() - began < 20
    assert not multiprocessing.active_children()


def divide(sample: int) -> float:
    return 1 / (sample - 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_of_the_mapper_is_one_sentence_with_its_traceback_for_debugging(workers: int) -> None:
    with pytest.raises(UserError, match=r"^reading 3 failed \(ZeroDivisionError: .*\); RELVIT_DEBUG=1") as raised:
        list(ordered_batches(range(8), divide, list, 2, workers))
    assert "in divide" in (raised.value.details or "".join(traceback.format_exception(raised.value)))
    assert not multiprocessing.active_children()


def open_many(sample: int) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    with Path(__file__).open() as file:
        return file.fileno()


def allocate(sample: int) -> torch.Tensor:
    return torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize(("mapper", "message"), [(open_many, "too many files are open"), (allocate, "out of memory")])
def test_a_lack_of_resources_in_a_worker_is_one_sentence(mapper: Callable[[int], object], message: str) -> None:
    with pytest.raises(ResumableError, match=message):
        list(ordered_batches(range(8), mapper, list, 2, 1))


@given(
    arrays(st.sampled_from(["u1", "i8", "f4", "?"]), array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
    st.binary(max_size=200),
)
def test_a_batch_arrives_as_it_was_sent(array: np.ndarray, text: bytes) -> None:
    sent = {"tensor": torch.from_numpy(array), "view": array.T, "arrays": [array, array[..., None]], "text": text}
    found = _load(_store(sent))
    torch.testing.assert_close(found["tensor"], sent["tensor"], rtol=0, atol=0, equal_nan=True)  # and the dtype
    for one, other in zip([found["view"], *found["arrays"]], [sent["view"], *sent["arrays"]], strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert found["text"] == text
    found["tensor"].zero_()  # writable


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_of_workers_are_raised_in_the_main_process(workers: int) -> None:
    with pytest.raises(UserError, match=r"^sample 3 is damaged; replace it$"):
        list(ordered_batches(range(5), refuse, list, 2, workers))


def test_the_error_of_a_worker_is_raised_in_its_turn_whatever_the_others_do_before() -> None:
    found = []
    with pytest.raises(UserError, match=r"^sample 3 is damaged; replace it$"):
        for batch in ordered_batches(range(9), refuse, list, 1, 3):
            found += batch
            time.sleep(0.2)  # in which the workers read on
    assert found == [0, 1, 2]


@pytest.mark.parametrize(("count", "world"), [(7, 3), (2, 3), (6, 2)])
def test_ordered_batches_read_each_sample_in_exactly_one_process(count: int, world: int) -> None:
    shares = [ordered_batches(range(count), int, list, 2, 0, rank, world) for rank in range(world)]
    assert [i for share in shares for batch in share for i in batch] == list(range(count))


def test_padding_keeps_pixels_and_sizes() -> None:
    images = [torch.full((3, 5, 2), 7, dtype=torch.uint8), torch.full((3, 3, 4), 9, dtype=torch.uint8)]
    batch = pad_images(images)
    assert batch["images"].shape == (2, 3, 5, 4)
    assert batch["sizes"].tolist() == [[5, 2], [3, 4]]
    assert (batch["images"][0, :, :, :2] == 7).all()
    assert batch["images"].sum() == 7 * 30 + 9 * 36


def test_large_images_are_reduced_when_read(tmp_path: Path) -> None:
    Image.new("RGB", (300, 100), (10, 200, 30)).save(tmp_path / "wide.jpg")
    assert read_rgb(tmp_path / "wide.jpg", longest=60).shape == (20, 60, 3)
    assert read_rgb(tmp_path / "wide.jpg", longest=400).shape == (100, 300, 3)


def test_unreadable_images_are_errors(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=name):
            read_rgb(tmp_path / name)
