"""Changes of the training data are detected when a run is resumed."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relvit_d2.data.images.batches import ImageStack
from relvit_d2.data.images.folder import unlabelled_images
from relvit_d2.data.listing import data_lines
from relvit_d2.engine.resume import DataList
from tests.support.scripts import command, digests, fails, run


def write(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        write(folder / f"{index:02}.png", index)
    return folder


def replace(folder: Path) -> None:
    """Replace an image by one of equal size in bytes."""
    path = folder / "03.png"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def add_and_remove(folder: Path) -> None:
    (folder / "05.png").unlink()
    write(folder / "20.png", 20)


def add(folder: Path) -> None:
    write(folder / "045.png", 20)


def exchange(folder: Path) -> None:
    for one, other in (("01", "temporary"), ("02", "01"), ("temporary", "02")):
        (folder / f"{one}.png").rename(folder / f"{other}.png")


def touch(folder: Path) -> None:
    os.utime(folder / "07.png")


CHANGES: list[tuple[Callable[[Path], None], str, str]] = [
    (replace, "'{}/03.png' has changed (its contents or modification time)", "the same"),
    (add_and_remove, "'{}/05.png' is missing", "the same"),
    (add, "'{}/045.png' was added", "the same"),
    (exchange, "'{}/01.png' has changed (its contents or modification time)", "the same"),
    (touch, "'{}/07.png' has changed (its contents or modification time)", ""),
]


@pytest.mark.parametrize(("change", "expected", "by_contents"), CHANGES)
def test_the_first_difference_is_described(
    change: Callable[[Path], None], expected: str, by_contents: str, folder: Path, tmp_path: Path
) -> None:
    def listed(hash_contents: bool) -> DataList:
        return DataList(data_lines(unlabelled_images(str(folder)), None, hash_contents))

    before = {hash_contents: listed(hash_contents) for hash_contents in (False, True)}
    assert all(listed(hash_contents).digest == one.digest for hash_contents, one in before.items())
    change(folder)
    for hash_contents, one in before.items():
        now = listed(hash_contents)
        if hash_contents and not by_contents:
            assert now.digest == one.digest
            continue
        one.write(tmp_path)
        assert now.difference(tmp_path, one.digest) in (
            expected.format(folder),
            expected.format(folder).replace("(its", "(its size, its"),
        )
    (tmp_path / DataList.NAME).write_text("")
    assert "is missing or has changed" in now.difference(tmp_path, one.digest)


def test_records_labels_and_images_in_memory_are_listed(folder: Path, tmp_path: Path) -> None:
    files = unlabelled_images(str(folder))
    labels, stack = torch.arange(12), ImageStack(torch.zeros(12, 3, 4, 4, dtype=torch.uint8), "zeros")
    records = [{"file_name": str(file), "annotations": [{"bbox": [0.0, 0, 1, 2]}]} for file in files]

    def difference(before: list[str], after: list[str]) -> str:
        one = DataList(before)
        one.write(tmp_path)
        return DataList(after).difference(tmp_path, one.digest)

    changed = labels.clone()
    changed[4] = 3
    assert "04.png' has changed (its annotations)" in difference(data_lines(files, labels), data_lines(files, changed))
    brighter = ImageStack(stack.pixels.clone(), "zeros")
    brighter.pixels[7, 0, 0, 0] = 1
    assert "'zeros 7' has changed (its contents" in difference(data_lines(stack), data_lines(brighter))
    moved = [
        record | {"annotations": [{"bbox": [0.0, 0, 1, 3]}]} if i == 9 else record for i, record in enumerate(records)
    ]
    assert "09.png' has changed (its annotations)" in difference(data_lines(records), data_lines(moved))
    assert "order has changed" in difference(data_lines(records), data_lines(records[::-1]))
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, "images")
    members = unlabelled_images(str(tmp_path / "images.tar"))
    before = data_lines(members)
    assert len(before) == 12
    assert "11.png' is missing" in difference(before, data_lines(members[:11]))


def test_paths_are_relative_to_the_data_root(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy / "images")  # with modification times
    lines = []
    for root in (tmp_path, copy):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        lines.append(data_lines(unlabelled_images(str(root / "images"))))
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_run_is_not_resumed_with_changed_images_unless_allowed(folder: Path, tmp_path: Path) -> None:
    data = ("DATASETS.TRAIN", f"('{folder}',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER")
    for contents in (False, True):
        output, more = tmp_path / str(contents), ("DATASETS.HASH_CONTENTS", contents)
        run(tmp_path, *command("pretrain_ssl.py", output, *data, 2, *more))
        before = digests(output)
        touch(folder)
        resume = command("pretrain_ssl.py", output, *data, 2, *more, flags=("--resume",))
        if contents:
            run(tmp_path, *resume)
            replace(folder)
        sentence = fails(tmp_path, *resume)
        name = "03" if contents else "07"
        assert f"'images/{name}.png' has changed" in sentence
        assert sentence.endswith("accept the change with --resume --allow-changes")
        assert contents or before == digests(output)
        allowed = command("pretrain_ssl.py", output, *data, 4, *more, flags=("--resume", "--allow-changes"))
        assert "the training data of the run have changed" in run(tmp_path, *allowed).stdout
        run(tmp_path, *command("pretrain_ssl.py", output, *data, 4, *more, flags=("--resume",)))
