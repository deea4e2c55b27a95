"""The SVHN reader on real and damaged files."""

import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from relvit_d2.data.detection import svhn
from relvit_d2.data.detection.svhn import FIELDS, _read_rows, load_svhn, svhn_images
from relvit_d2.utils.errors import UserError
from tests.support.damaged_files import write_mat


def make_svhn(folder: Path, digits: list[tuple[float, ...]], name: str = "1.png") -> Path:
    Image.new("RGB", (40, 30)).save(folder / "1.png")
    write_mat(folder / "digitStruct.mat", [(name, digits)])
    return folder


def slow_rows(path: Path) -> list[tuple[str, list[tuple[float, ...]]]]:
    """A simple reader with h5py's high-level interface."""
    rows = []
    with h5py.File(path) as file:
        for name, bbox in zip(file["digitStruct/name"][:, 0], file["digitStruct/bbox"][:, 0], strict=True):
            columns: list[Any] = []
            for field in FIELDS:
                value = file[bbox][field]
                columns.append([file[reference][0, 0] for reference in value[:, 0]] if value.shape[0] > 1 else value[0])
            rows.append(("".join(map(chr, file[name][:, 0])), list(zip(*columns, strict=True))))
    return rows


def test_real_files_equal_a_simple_reader(samples: Path) -> None:
    counts = {}
    for split in ("train", "test", "extra"):
        rows = _read_rows(samples / "svhn" / split / "digitStruct.mat")
        assert rows == slow_rows(samples / "svhn" / split / "digitStruct.mat")
        counts[split] = len(rows)
    assert counts == {"train": 39, "test": 40, "extra": 40}


def test_real_images_with_their_digits(samples: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        records = load_svhn(samples / "svhn" / "test", skip_missing=True)
    assert "37 of the 40 images" in caplog.text
    # The house numbers, read from the images by eye.
    numbers = ["".join(str(digit["category_id"]) for digit in record["annotations"]) for record in records]
    assert numbers == ["5", "210", "6"]
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
    with pytest.raises(UserError, match=r"4\.png .* is missing"):
        load_svhn(samples / "svhn" / "test")


@pytest.mark.parametrize(
    ("digit", "box"),
    [
        ((2, 3, 10, 20, 10), [2, 3, 12, 23]),
        ((0, -1, 10, 20, 1), [0, 0, 10, 19]),
        ((35.5, 25, 10, 20, 9), [35.5, 25, 40, 30]),
    ],
)
def test_boxes_are_clipped(tmp_path: Path, digit: tuple[float, ...], box: list[float]) -> None:
    (record,) = load_svhn(make_svhn(tmp_path, [digit]))
    (annotation,) = record["annotations"]
    assert annotation["bbox"] == box
    assert annotation["category_id"] == digit[4] % 10


def test_boxes_outside_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = (1, 1, 5, 5, 3)
    with caplog.at_level(logging.WARNING):
        (record,) = load_svhn(make_svhn(tmp_path, [(50, 5, 9, 9, 1), good, (5, -9, 9, 9, 2), (5, 5, -3, 9, 4)]))
    assert [annotation["category_id"] for annotation in record["annotations"]] == [3]
    assert "3 boxes" in caplog.text


@pytest.mark.parametrize(
    "digits",
    [
        [(1, 1, 5, 5, 11)],
        [(1, 1, 5, 5, 0)],
        [(1, 1, 5, 5, 1.5)],
        [(1, 1, 5, 5, 1), (float("nan"), 1, 5, 5, 2)],
        [(1, float("inf"), 5, 5, 1)],
    ],
)
def test_invalid_digit_error_contains_file_and_row(tmp_path: Path, digits: list[tuple[float, ...]]) -> None:
    with pytest.raises(UserError, match=r"digitStruct\.mat, row 1 \(1\.png\)"):
        load_svhn(make_svhn(tmp_path, digits))


@pytest.mark.parametrize("name", ["../1.png", "a/1.png", "a\\1.png", "/1.png", "..", "1.png\0"])
def test_names_outside_the_folder_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"digitStruct\.mat, row 1"):
        load_svhn(make_svhn(tmp_path, [(1, 1, 5, 5, 1)], name), skip_missing=True)


def test_duplicate_names_are_errors(tmp_path: Path) -> None:
    make_svhn(tmp_path, [(1, 1, 5, 5, 1)])
    write_mat(tmp_path / "digitStruct.mat", [("1.png", [(1, 1, 5, 5, 1)])] * 2)
    with pytest.raises(UserError, match="more than once"):
        load_svhn(tmp_path)


def break_struct(file: h5py.File) -> None:
    del file["digitStruct/bbox"]


def break_field(file: h5py.File) -> None:
    del file["#refs#/b0/label"]


def break_length(file: h5py.File) -> None:
    del file["#refs#/b0/left"]
    file["#refs#/b0/left"] = np.ones((1, 1))


def reference_to_itself(file: h5py.File) -> None:
    column = file["#refs#/b0/left"]
    column[...] = np.array([[column.ref], [column.ref]], h5py.ref_dtype)


def reference_to_a_group(file: h5py.File) -> None:
    file["#refs#/b0/left"][...] = np.array([[file["#refs#"].ref]] * 2, h5py.ref_dtype)


def reference_to_nothing(file: h5py.File) -> None:
    file["#refs#/b0/left"][...] = np.array([[h5py.Reference()]] * 2, h5py.ref_dtype)


def boxes_are_names(file: h5py.File) -> None:
    file["digitStruct/bbox"][...] = file["digitStruct/name"][...]


def names_are_boxes(file: h5py.File) -> None:
    file["digitStruct/name"][...] = file["digitStruct/bbox"][...]


def no_references(file: h5py.File) -> None:
    del file["digitStruct/name"]
    file["digitStruct/name"] = np.ones((1, 1))


def endless_name(file: h5py.File) -> None:
    huge = file.create_dataset("#refs#/huge", shape=(10**12, 1), dtype=np.uint16, chunks=(1000, 1))
    file["digitStruct/name"][...] = np.array([[huge.ref]], h5py.ref_dtype)


def one_number(file: h5py.File, **storage: Any) -> None:
    """Replace a digit's top by a valid number with another storage."""
    cell = file.create_dataset("#refs#/cell", (1, 1), np.float64, **storage)
    file["#refs#/b0/top"][...] = np.array([[cell.ref]] * 2, h5py.ref_dtype)


def other_file(file: h5py.File) -> Path:
    """The same labels beside the data."""
    target = Path(file.filename).parent.with_suffix(".mat")
    file.flush()
    shutil.copy(file.filename, target)
    return target


def link_to_another_file(file: h5py.File) -> None:
    target = other_file(file)
    del file["#refs#/b0/label"]
    file["#refs#/b0/label"] = h5py.ExternalLink(str(target), "/#refs#/b0/label")


def structure_in_another_file(file: h5py.File) -> None:
    target = other_file(file)
    del file["digitStruct"]
    file["digitStruct"] = h5py.ExternalLink(str(target), "/digitStruct")


def link_by_path_to_another_file(file: h5py.File) -> None:
    file["other"] = h5py.ExternalLink(str(other_file(file)), "/#refs#/b0")
    del file["#refs#/b0/label"]
    file["#refs#/b0/label"] = h5py.SoftLink("/other/label")


def numbers_in_another_file(file: h5py.File) -> None:
    raw = other_file(file).with_suffix(".raw")
    raw.write_bytes(np.ones(1).tobytes())
    one_number(file, external=[(str(raw), 0, 8)])


def number_that_is_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((1, 1), np.float64)
    layout[...] = h5py.VirtualSource(str(other_file(file)), "#refs#/0left0", (1, 1))
    cell = file.create_virtual_dataset("#refs#/cell", layout)
    file["#refs#/b0/top"][...] = np.array([[cell.ref]] * 2, h5py.ref_dtype)


def endless_rows(file: h5py.File) -> None:
    del file["digitStruct/name"]
    file.create_dataset("digitStruct/name", (10**9, 1), h5py.ref_dtype, chunks=(1000, 1))


@pytest.mark.parametrize(
    "damage",
    [
        link_to_another_file,
        structure_in_another_file,
        link_by_path_to_another_file,
        numbers_in_another_file,
        number_that_is_virtual,
        endless_rows,
        break_struct,
        break_field,
        break_length,
        reference_to_itself,
        reference_to_a_group,
        reference_to_nothing,
        boxes_are_names,
        names_are_boxes,
        no_references,
        endless_name,
    ],
)
def test_damaged_structure_is_an_error(tmp_path: Path, damage: Any) -> None:
    make_svhn(tmp_path, [(1, 1, 5, 5, 1), (7, 1, 5, 5, 2)])
    with h5py.File(tmp_path / "digitStruct.mat", "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=r"digitStruct\.mat") as caught:
        load_svhn(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_the_library_never_finishes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_svhn(tmp_path, [(1, 1, 5, 5, 1), (7, 1, 5, 5, 2)])
    path = tmp_path / "digitStruct.mat"
    with h5py.File(path, "r+") as file:
        number_that_is_virtual(file)
    data = bytearray(path.read_bytes())
    first = data.index(b"GCOL") + 16  # an object of the heap: header of 16 bytes with its size, content
    free = first + 16 + -(-int.from_bytes(data[first + 8 : first + 16], "little") // 8) * 8
    data[free + 8 : free + 16] = bytes(8)  # the size of the free space after it, by which the library goes on
    path.write_bytes(data)
    monkeypatch.setattr(svhn, "PATIENCE", 2)
    with pytest.raises(UserError, match=r"digitStruct\.mat is damaged .*no row was read in 2 seconds"):
        load_svhn(tmp_path)
    assert not multiprocessing.active_children()


def test_truncated_files_are_errors(tmp_path: Path) -> None:
    path = make_svhn(tmp_path, [(1, 1, 5, 5, 1), (7, 1, 5, 5, 2)]) / "digitStruct.mat"
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"digitStruct\.mat"):
            load_svhn(tmp_path)


def test_missing_and_damaged_images(tmp_path: Path) -> None:
    make_svhn(tmp_path, [(1, 1, 5, 5, 1)])
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    (damaged,) = load_svhn(tmp_path)
    assert (damaged["width"], damaged["height"], damaged["annotations"]) == (0, 0, [])  # the catalog leaves it out
    (tmp_path / "1.png").unlink()
    # Without any image, skipping missing images would leave no record.
    with pytest.raises(UserError, match=r"1\.png is missing"):
        load_svhn(tmp_path, skip_missing=True)
    with pytest.raises(UserError, match="no PNG"):
        svhn_images(tmp_path)


def test_images_come_in_the_order_of_the_rows_without_labels(samples: Path, tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        shutil.copy(samples / "svhn" / "train" / name, tmp_path)
    shutil.copy(tmp_path / "1.png", tmp_path / "10.png")
    assert [path.name for path in svhn_images(tmp_path)] == ["1.png", "2.png", "3.png", "10.png"]
