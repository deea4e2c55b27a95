"""Data sets by name: Detectron2's catalogs, subsets, images without labels, missing data."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relvit_d2.data.detection import streets
from relvit_d2.data.detection.catalog import (
    DATASETS,
    dataset_root,
    get_images,
    get_metadata,
    get_records,
    register_all,
    resolve,
)
from relvit_d2.data.images.folder import list_images
from relvit_d2.data.subsets import classes_of, random_subset, subset_name
from relvit_d2.utils.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a small drawn streets in it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(streets, "SPLITS", {"train": (1, 12), "test": (2, 5)})
    register_all()
    return tmp_path


@pytest.fixture
def real(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a copy of the real samples."""
    for name in ("VOC2007", "coco", "svhn", "kitti"):
        shutil.copytree(samples / name, tmp_path / name)
    for folder in tmp_path.rglob("*/"):
        folder.chmod(0o755)
    # The samples have no mapping to drives: use two images of one drive and one of another.
    (tmp_path / "kitti" / "mapping").mkdir()
    drives = "".join(f"2011_09_26 2011_09_26_drive_000{drive}_sync 0000000000\n" for drive in (1, 1, 2))
    (tmp_path / "kitti" / "mapping" / "train_mapping.txt").write_text(drives)
    (tmp_path / "kitti" / "mapping" / "train_rand.txt").write_text("3,1,2")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    return tmp_path


@given(st.lists(st.frozensets(st.integers(0, 5), max_size=3), min_size=1, max_size=30), st.integers(0, 9))
def test_random_subsets_are_nested_and_have_every_class(labels: list[frozenset[int]], seed: int) -> None:
    records = [{"n": n, "annotations": [{"category_id": c} for c in sorted(x)]} for n, x in enumerate(labels)]
    found = [random_subset(records, count, seed) for count in range(len(records) + 1)]
    for fewer, more in pairwise(found):
        indices = [record["n"] for record in more]
        assert indices == sorted(indices) and {r["n"] for r in fewer} < set(indices)
    assert found[-1] == records
    classes = set().union(*labels)
    assert set().union(*map(classes_of, found[min(len(classes), len(records))])) == classes
    assert random_subset(records, 1, seed) == found[1]


def test_random_subsets_differ_by_seed_and_have_the_images_of_their_records(root: Path) -> None:
    subsets = [get_records(f"streets_train[:50%@{seed}]") for seed in range(6)]
    assert {len(records) for records in subsets} == {6}
    assert len({tuple(record["image_id"] for record in records) for records in subsets}) > 1
    for seed, records in enumerate(subsets):
        name = f"streets_train[:50%@{seed}]"
        assert [Path(record["file_name"]) for record in records] == get_images(name)
        assert subset_name(name, 0.5) == f"streets_train[:25%@{seed}]"


def check_contract(name: str) -> None:
    """Assert the properties of every entry of the registry."""
    # Most rows of SVHN's samples have no image.
    records = get_records(name, skip_missing=name.startswith("svhn"))
    assert name.startswith("svhn") or records == DatasetCatalog.get(name)
    classes = get_metadata(name).thing_classes
    assert list(DATASETS[name].classes) == classes
    assert get_metadata(name).metrics == DATASETS[name].metrics
    assert len({record["image_id"] for record in records}) == len(records) > 0
    assert [Path(record["file_name"]) for record in records] == get_images(name)
    for record in records:
        assert Path(record["file_name"]).is_file()
        for annotation in record["annotations"]:
            assert 0 <= annotation["category_id"] < len(classes)
            assert annotation["iscrowd"] in (0, 1)
            assert annotation["bbox_mode"] in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            assert 0 <= x0 < x1 <= record["width"] + 0.01
            assert 0 <= y0 < y1 <= record["height"] + 0.01


@pytest.mark.parametrize("name", [name for name in DATASETS if name.startswith("streets")])
def test_entries_of_drawn_sets(root: Path, name: str) -> None:
    check_contract(name)
    assert (root / "streets" / "streets.json").is_file()


@pytest.mark.parametrize("name", [name for name in DATASETS if not name.startswith("streets")])
def test_entries_of_real_sets(real: Path, name: str) -> None:
    check_contract(name)


def test_registration_is_idempotent_and_replaces_detectron2s_voc(real: Path) -> None:
    register_all()
    register_all()
    record = DatasetCatalog.get("voc_2007_test")[0]
    assert all("difficult" in annotation for annotation in record["annotations"])
    metadata = MetadataCatalog.get("voc_2007_test")
    assert (metadata.year, metadata.split, metadata.evaluator_type) == (2007, "test", "pascal_voc")
    assert Path(metadata.dirname, "Annotations").is_dir()
    assert len(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id) == 80


def test_voc_is_found_in_vocdevkit_too(real: Path) -> None:
    expected = [path.name for path in get_images("voc_2007_train")]
    (real / "VOCdevkit").mkdir()
    (real / "VOC2007").rename(real / "VOCdevkit" / "VOC2007")
    assert [path.name for path in get_images("voc_2007_train")] == expected
    register_all()
    assert Path(MetadataCatalog.get("voc_2007_train").dirname, "Annotations").is_dir()


@pytest.mark.parametrize("amount", [1, 8, 11, 12, 99])
def test_subset_by_count(root: Path, amount: int) -> None:
    name = f"streets_train[:{amount}]"
    assert resolve(name) == name
    assert DatasetCatalog.get(name) == get_records("streets_train")[:amount]
    assert get_images(name) == get_images("streets_train")[:amount]


@pytest.mark.parametrize(("percent", "count"), [("100", 12), ("50", 6), ("10", 1), ("24.9", 2), ("25", 3), ("0.1", 1)])
def test_subset_by_percent(root: Path, percent: str, count: int) -> None:
    name = f"streets_train[:{percent}%]"
    assert get_records(name) == get_records("streets_train")[:count]
    assert get_images(name) == get_images("streets_train")[:count]


@pytest.mark.parametrize("base", ["voc_2007_test", "coco_2017_val", "svhn_test"])
def test_subset_metadata_have_no_ground_truth_file(real: Path, base: str) -> None:
    metadata = get_metadata(f"{base}[:2]")
    assert metadata.thing_classes == get_metadata(base).thing_classes
    assert metadata.metrics == get_metadata(base).metrics
    assert not {"json_file", "image_root", "dirname", "split"} & metadata.as_dict().keys()
    assert len(get_records(f"{base}[:2]", skip_missing=True)) == 2


@pytest.mark.parametrize(
    "name", ["streets_train[:0]", "streets_train[:0%]", "streets_train[:101%]", "streets_train[:1.5]"]
)
def test_invalid_subsets_are_errors(root: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a valid subset"):
        resolve(name)


@pytest.mark.parametrize("name", ["streets_trian", "streets_trian[:8]", "streets_train[8]", "streets_train[:4][:2]"])
@pytest.mark.parametrize("ask", [resolve, get_records, get_images, get_metadata])
def test_unknown_name_suggests_the_nearest(root: Path, name: str, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(UserError, match="did you mean 'streets_train'"):
        ask(name)


def test_a_users_own_registration_is_accepted(root: Path) -> None:
    rows = [{"file_name": str(root / f"{index}.jpg"), "image_id": index, "annotations": []} for index in range(4)]
    for row in rows:
        Path(str(row["file_name"])).touch()
    DatasetCatalog.register("own_set", lambda: rows)
    try:
        assert get_records("own_set[:50%]") == rows[:2]
        assert get_images("own_set[:3]") == [root / f"{index}.jpg" for index in range(3)]
        (root / "1.jpg").unlink()
        with pytest.raises(UserError, match=r"1\.jpg is missing but listed in data set 'own_set'"):
            get_records("own_set")
        assert get_records("own_set[:2]", skip_missing=True) == [rows[0], rows[2]]
    finally:
        DatasetCatalog.remove("own_set")
        DatasetCatalog.remove("own_set[:50%]")


@pytest.mark.parametrize("name", ["voc_2007_test", "coco_2017_val"])
def test_missing_images_are_errors_or_left_out(real: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = get_records(name)
    for index in (1, 3):
        Path(whole[index]["file_name"]).unlink()
    first = Path(whole[1]["file_name"]).name
    for read in (get_records, get_images):
        with pytest.raises(UserError, match=rf"{first} \(and 1 more\) is missing .* DATASETS.SKIP_MISSING True"):
            read(name)
    left = [whole[0], whole[2], *whole[4:]]
    assert get_records(name, skip_missing=True) == left
    assert get_records(f"{name}[:3]", skip_missing=True) == left[:3]
    assert get_images(name, skip_missing=True) == [Path(record["file_name"]) for record in left]
    assert f"2 of the {len(whole)} images listed in" in caplog.text
    assert first in caplog.text
    for record in left:
        Path(record["file_name"]).unlink()
    with pytest.raises(UserError, match=r"is missing .*: restore it$"):
        get_records(name, skip_missing=True)


def test_images_need_no_labels(real: Path) -> None:
    labelled = {name: get_images(name) for name in ("voc_2007_trainval", "svhn_train")}
    shutil.rmtree(real / "VOC2007" / "Annotations")
    (real / "svhn" / "train" / "digitStruct.mat").unlink()
    for name, images in labelled.items():
        assert get_images(name) == images
        with pytest.raises(UserError):
            get_records(name, skip_missing=True)
    coco = get_images("coco_2017_val")
    shutil.rmtree(real / "coco" / "annotations")
    assert sorted(map(str, get_images("coco_2017_val"))) == sorted(map(str, coco))
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        get_records("coco_2017_val")


def test_damaged_coco_annotations_are_errors(real: Path) -> None:
    path = real / "coco" / "annotations" / "instances_val2017.json"
    text = path.read_text()
    path.unlink()
    for damaged in ("", text[:1000], "{}", "[]"):
        path.write_text(damaged)
        for ask in (get_records, get_images):
            with pytest.raises(UserError, match=r"instances_val2017\.json"):
                ask("coco_2017_val")


@pytest.mark.parametrize("name", [name for name in DATASETS if not name.startswith("streets")])
@pytest.mark.parametrize("ask", [get_records, get_images])
def test_missing_data_error_contains_the_path(root: Path, name: str, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(UserError) as caught:
        ask(name)
    message = str(caught.value)
    assert f"DETECTRON2_DATASETS is '{root}'" in message
    assert "'make demo'" in message
    if name.startswith("voc"):
        assert "$DETECTRON2_DATASETS/VOC2007 or $DETECTRON2_DATASETS/VOCdevkit/VOC2007" in message


def test_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert dataset_root() == Path("datasets")
    with pytest.raises(UserError, match="DETECTRON2_DATASETS is not set"):
        get_images("voc_2007_train")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/somewhere")
    assert dataset_root() == Path.home() / "somewhere"


@pytest.mark.parametrize("state", ["unset", "absent"])
def test_streets_are_drawn_in_the_cache_if_the_root_is_not_writable(
    root: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    cache = root / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if state == "unset":
        monkeypatch.delenv("DETECTRON2_DATASETS")
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "nowhere"))
    assert get_images("streets_test")[0] == cache / "relvit_d2" / "streets" / "test" / "1.png"


def test_a_folder_of_images(root: Path) -> None:
    folder = root / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "._a.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(folder / name, format="png")
    expected = [folder / "a.png", folder / "b.JPG", folder / "sub" / "c.jpeg"]
    assert list_images(folder) == get_images(str(folder)) == expected
    assert get_images(f"{folder}/") == expected
    with pytest.raises(UserError, match="does not exist"):
        get_images(str(root / "nowhere"))
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="contains no image"):
        get_images(str(root / "empty"))
