"""Classification data sets: images, order, errors."""

import io
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, Flowers102

from relvit_d2.data.classification.datasets import CLASS_SETS, get_class_set, list_class_sets
from relvit_d2.data.classification.image_folder import LabelledImages, read_tree
from relvit_d2.data.classification.imagenet100 import synsets
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.utils.errors import UserError

RANDOM = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def tree(root: Path, classes: dict[str, int], size: tuple[int, int] = (32, 32)) -> Path:
    for name, count in classes.items():
        for number in range(count):
            picture(root / name / f"{number:04}.png", size)
    return root


def packed(root: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, arcname="set")
    return archive


def matlab5(arrays: dict[str, np.ndarray], compress: bool) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays, do_compression=compress)
    return buffer.getvalue()


def write_cifar(root: Path, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images per file; their checksums replace the expected ones."""
    folder, key = root / kind.base_folder, "labels" if kind is CIFAR10 else "fine_labels"
    folder.mkdir(parents=True, exist_ok=True)
    for lists in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, lists):
            data = RANDOM.integers(0, 256, (10, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": data, key: list(range(10))})
            (folder / name).write_bytes(content)
            sums.append([name, md5(content).hexdigest()])
        monkeypatch.setattr(kind, lists, sums)
    names = [f"class {i}" for i in range(10 if kind is CIFAR10 else 100)]
    content = pickle.dumps({kind.meta["key"]: names})
    (folder / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(content).hexdigest()})


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_list = {}
    for split, (url, file, _) in SVHN.split_list.items():
        arrays = {
            "X": RANDOM.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8),
            "y": np.arange(1, 11, dtype=np.uint8).reshape(10, 1),
        }
        (root / "svhn").mkdir(parents=True, exist_ok=True)
        content = matlab5(arrays, compress=True)
        (root / "svhn" / file).write_bytes(content)
        split_list[split] = [url, file, md5(content).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", split_list)


def write_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    for number in range(1, 7):
        picture(folder / f"jpg/image_{number:05}.jpg", (40 + number, 36))
    parts = {"trnid": [1, 4], "valid": [2, 5], "tstid": [3, 6]}
    sets = {name: np.array([numbers], dtype=np.uint16) for name, numbers in parts.items()}
    files = {
        "setid": matlab5(sets, compress=True),
        "label": matlab5({"labels": np.array([[1.0, 1, 2, 2, 102, 7]])}, False),
    }
    known = dict(Flowers102._file_dict)
    for key, content in files.items():
        name = known[key][0]
        (folder / name).write_bytes(content)
        known[key] = (name, md5(content).hexdigest())
    monkeypatch.setattr(Flowers102, "_file_dict", known)


def write_tiny(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "tiny-imagenet-200"
    for synset in ("n02", "n01"):
        for number in range(2):
            picture(folder / f"train/{synset}/images/{synset}_{number}.JPEG", (64, 64))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    for number in range(3):
        picture(folder / f"val/images/val_{number}.JPEG", (64, 64))
    rows = [f"val_{number}.JPEG\t{synset}\t0\t0\t9\t9\n" for number, synset in enumerate(["n01", "n02", "n01"])]
    (folder / "val/val_annotations.txt").write_text("".join(rows))


def write_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        tree(root / "imagenet" / split, dict.fromkeys([*synsets(""), "n09999999"], 1), (9, 8))


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "cifar10": lambda root, patch: write_cifar(root, CIFAR10, patch),
    "cifar100": lambda root, patch: write_cifar(root, CIFAR100, patch),
    "svhn_digits": write_svhn,
    "flower102": write_flowers,
    "tiny_imagenet": write_tiny,
    "imagenet100": write_imagenet,
    "imagenet": write_imagenet,
}
EXPECTED = {  # images, classes, first labels
    "cifar10_train": (50, 10, [0, 1, 2]),
    "cifar10_test": (10, 10, [0, 1, 2]),
    "cifar100_train": (10, 100, [0, 1, 2]),
    "cifar100_test": (10, 100, [0, 1, 2]),
    "svhn_digits_train": (10, 10, [1, 2, 3]),
    "svhn_digits_test": (10, 10, [1, 2, 3]),
    "svhn_digits_extra": (10, 10, [1, 2, 3]),
    "flower102_train": (2, 102, [0, 1]),
    "flower102_val": (2, 102, [0, 101]),
    "flower102_test": (2, 102, [1, 6]),
    "tiny_imagenet_train": (4, 2, [0, 0, 1]),
    "tiny_imagenet_val": (3, 2, [1, 0, 1]),
    "imagenet100_train": (100, 100, [0, 1, 2]),
    "imagenet100_val": (100, 100, [0, 1, 2]),
    "imagenet_train": (101, 101, [0, 1, 2]),
    "imagenet_val": (101, 101, [0, 1, 2]),
}


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", list(CLASS_SETS))
def test_every_set_is_read_in_its_official_layout(name: str, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name.rpartition("_")[0]](data_root, monkeypatch)
    found = get_class_set(name)
    count, classes, labels = EXPECTED[name]
    assert (len(found), len(found.classes), found.labels[:3].tolist()) == (count, classes, labels)
    assert isinstance(found.images, ImageStack) == (not name.startswith("flower"))  # its images have several sizes


@pytest.mark.parametrize("name", list(CLASS_SETS))
def test_missing_set_error_contains_the_path(name: str, data_root: Path) -> None:
    with pytest.raises(UserError, match=rf"missing: put it.* at {data_root}/.*DETECTRON2_DATASETS"):
        get_class_set(name)


@pytest.mark.parametrize("name", ["cifar10_train", "cifar100_test", "svhn_digits_train", "flower102_test"])
def test_wrong_checksum_is_an_error(name: str, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name.rpartition("_")[0]](data_root, monkeypatch)
    for file in data_root.rglob("*"):
        if file.is_file() and file.suffix != ".jpg":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"checksum is wrong: delete it and set DATASETS.DOWNLOAD True"):
        get_class_set(name)


def test_svhn_pixels_and_digits(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(data_root, monkeypatch)
    found = get_class_set("svhn_digits_test")
    pixels = loadmat(data_root / "svhn/test_32x32.mat")["X"]
    assert found.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(found.images[3].permute(1, 2, 0).numpy(), pixels[..., 3])


def zipped(root: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, f"set/{path.relative_to(root)}")
    return archive


def test_folder_and_zip_are_equal(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"b": 3, "a": 2})
    picture(root / "a/.hidden.png")
    archive = zipped(root, tmp_path / "t.zip")
    one, other = get_class_set(str(root)), get_class_set(f"{archive}/set")
    assert one.classes == other.classes == ("a", "b") and one.labels.tolist() == other.labels.tolist()
    assert isinstance(one.images, ImageStack) and isinstance(other.images, ImageStack)
    assert torch.equal(one.images.pixels, other.images.pixels)
    picture(root / "b/0000.png", (20, 30))
    found = get_class_set(f"{zipped(root, tmp_path / 'u.zip')}/set[:4]")
    assert list(map(str, found.images)) == [
        f"{tmp_path / 'u.zip'}:set/{name}.png" for name in ("a/0000", "b/0000", "a/0001", "b/0001")
    ]
    (root / "c").mkdir()
    with pytest.raises(UserError, match="no image of the class 'c'"):
        get_class_set(f"{zipped(root, archive)}/set")
    damage(archive)
    with pytest.raises(UserError, match=r"t\.zip' is damaged"):
        get_class_set(f"{archive}/set")


def test_existing_path_with_brackets_is_not_a_subset(tmp_path: Path) -> None:
    root = tree(tmp_path / "set [:3]", {"a [x]": 2, "b": 2})
    assert len(get_class_set(str(root))) == 4
    assert len(get_class_set(f"{root}[:3]")) == 3


def test_folder_and_tar_are_equal(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"b": 3, "a": 2})
    picture(root / "a/.hidden.png")
    (root / "readme.txt").write_text("no class")
    one, other = get_class_set(str(root)), get_class_set(f"{packed(root, tmp_path / 't.tar.gz')}/set")
    assert one.classes == other.classes == ("a", "b")
    assert one.labels.tolist() == other.labels.tolist() == [0, 0, 1, 1, 1]
    assert isinstance(one.images, ImageStack) and isinstance(other.images, ImageStack)
    assert torch.equal(one.images.pixels, other.images.pixels)


def test_images_of_several_sizes_are_not_decoded(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"a": 2, "b": 2})
    picture(root / "b/0000.png", (20, 30))
    archive = packed(root, tmp_path / "t.tar.gz")
    found = get_class_set(f"{archive}/set")
    assert isinstance(found.images, list)
    assert str(found.images[2]) == f"{archive}:set/b/0000.png"


def test_subset_is_balanced_over_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"a": 4, "b": 2, "c": 4})
    assert get_class_set(f"{root}[:4]").labels.tolist() == [0, 1, 2, 0]
    assert get_class_set(f"{root}[:70%]").labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    whole = get_class_set(str(root))
    assert sorted(whole.class_interleaved().tolist()) == list(range(10))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_random_subset_of_a_class_folder_is_class_balanced(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 24)).save(tmp_path / name / f"{number}.png")
    whole = read_tree(tmp_path)

    def files(subset: str) -> list[str]:
        return sorted(str(file) for file in list_class_sets("DATASETS.TRAIN", [f"{tmp_path}{subset}"]).images)

    drawn = [files(f"[:50%@{seed}]") for seed in range(4)]
    assert all([sum(f"/{name}/" in file for file in found) for name in "ab"] == [3, 3] for found in drawn)
    assert drawn[1] == files("[:6@1]") and len({tuple(found) for found in drawn}) > 1
    assert set(files("[:2@1]")) < set(drawn[1]) and files("[:100%@1]") == sorted(map(str, whole.images))
    # The parts of a folder without splits: one image in five of each class, duplicates in the same part.
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/copy.png")
    train, held = files("[train]"), files("[val]")
    assert sorted(train + held) == sorted(map(str, read_tree(tmp_path).images)) and len(held) in (2, 3)
    assert (str(tmp_path / "a/0.png") in held) == (str(tmp_path / "a/copy.png") in held)
    assert set(files("[train][:4@0]")) < set(train)


def test_invalid_class_folders_are_errors(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"a": 2, "b": 40})
    archive = packed(root, tmp_path / "t.tar.gz")
    damage(archive)
    with pytest.raises(UserError, match=r"archive '.*t\.tar\.gz' is damaged"):
        get_class_set(f"{archive}/set")
    (tmp_path / "text.tar").write_text("not an archive")
    with pytest.raises(UserError, match=r"text\.tar' is damaged or not an archive"):
        get_class_set(str(tmp_path / "text.tar"))
    with pytest.raises(UserError, match="contains no class folders"):
        get_class_set(f"{packed(root, archive)}/set/a")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image of the class 'empty'"):
        get_class_set(f"{packed(root, archive)}/set")
    with pytest.raises(UserError, match=r"tree/empty contains no image"):
        get_class_set(str(root))
    (root / "empty").rmdir()
    damage(root / "b/0003.png")
    for name in (str(root), f"{packed(root, archive)}/set"):
        with pytest.raises(UserError, match=r"0003\.png' is damaged or truncated"):
            get_class_set(name, skip_unreadable=False)
        assert len(files := get_class_set(name).images) == 42 and not isinstance(files, ImageStack)
    with pytest.raises(UserError, match="did you mean 'cifar10_train'"):
        get_class_set("cifar10_trian")
    with pytest.raises(UserError, match=r"DATASETS.TRAIN is empty"):
        list_class_sets("DATASETS.TRAIN", [])


def test_labels_out_of_range_and_different_classes(tmp_path: Path) -> None:
    images = ImageStack(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), "x")
    with pytest.raises(UserError, match=r"image 1 of data set 'x' has the label 2, out of range for its 2 classes"):
        LabelledImages("x", images, torch.tensor([0, 2, 1]), ("a", "b"))
    one, other = tree(tmp_path / "one", {"a": 1, "b": 1}), tree(tmp_path / "other", {"a": 1, "c": 1})
    with pytest.raises(UserError, match=r"different classes, 'b' is only in one of them"):
        list_class_sets("DATASETS.TRAIN", [str(one), str(other)])
    both = list_class_sets("DATASETS.TRAIN", [str(one), f"{one}[:1]"]).decoded()
    assert both.labels.tolist() == [0, 1, 0] and isinstance(both.images, ImageStack)


def test_synset_list_gives_the_order_of_classes(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(set(synsets(""))) == 100 == len(synsets(""))
    write_imagenet(data_root, monkeypatch)
    (tmp_path / "two.txt").write_text("n09999999\nn02869837\n")
    assert get_class_set("imagenet100_val", synset_file=str(tmp_path / "two.txt")).classes == ("n09999999", "n02869837")
    (tmp_path / "bad.txt").write_text("tench\n")
    for file, words in (("bad.txt", "contains 'tench', which is not a synset"), ("absent.txt", "cannot be read")):
        with pytest.raises(UserError, match=words):
            synsets(str(tmp_path / file))


def test_jpeg_copies_of_cifar10_have_a_note(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    found = get_class_set("cifar10_test[:20]")
    assert "5.9 gray levels" in found.note and len(found) == 20
    assert found.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert found.labels.bincount().tolist() == [2] * 10
    with tarfile.open(samples / "cifar10_jpg.tar.gz") as tar:
        content = tar.extractfile("test/airplane/0000.jpg")
        assert content is not None
        first = Image.open(io.BytesIO(content.read())).convert("RGB")
    assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), np.asarray(first))


def test_class_folders_can_be_given(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", {"a": 1, "b": 2, "c": 1})
    assert read_tree(root, ["c", "b"]).labels.tolist() == [0, 1, 1]
