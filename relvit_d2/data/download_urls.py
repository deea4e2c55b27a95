"""Public data sets: files, sizes, download addresses and checksums."""

from dataclasses import dataclass, replace
from pathlib import Path

from relvit_d2.data.download import Archive


@dataclass(frozen=True)
class Part:
    """Files of one kind.

    Attributes:
        pattern: relative to the data root, such as ``coco/val2017/*.jpg``.
        count: number of files in the official data set.
        what: description.
        required: whether the data set cannot be used without them.
    """

    pattern: str
    count: int
    what: str
    required: bool = True

    def count_files(self, root: Path) -> int:
        """Return the number of existing files."""
        folder, name = (root / self.pattern).parent, Path(self.pattern).name
        return sum(1 for _ in folder.glob(name)) if folder.is_dir() else 0


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        title: full name.
        page: the authors' page with the description and the downloads.
        folder: relative to the data root, to unpack the archives in.
        archives: the downloads, each with the prefixes of the patterns of its parts.
        alternative: a folder of the patterns, and the folder that may replace it.
    """

    title: str
    page: str
    folder: str
    parts: tuple[Part, ...]
    archives: tuple[tuple[Archive, tuple[str, ...]], ...]
    alternative: tuple[str, str] = ("", "")

    def located(self, root: Path) -> tuple[Part, ...]:
        """Return the parts with the patterns that apply to this data root."""
        usual, other = self.alternative
        if not usual or (root / usual).exists() or not (root / other).exists():
            return self.parts
        return tuple(replace(part, pattern=part.pattern.replace(usual, other, 1)) for part in self.parts)


_VOC, _COCO = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007", "http://images.cocodataset.org"
_KITTI, _SVHN = "https://s3.eu-central-1.amazonaws.com/avg-kitti", "http://ufldl.stanford.edu/housenumbers"
_DEVKIT = "VOCdevkit/VOC2007"

# Sizes, and checksums of COCO and KITTI: tensorflow_datasets, url_checksums/{voc,coco,kitti}.txt. Checksums of VOC:
# torchvision, datasets/voc.py:49-57; of SVHN: mindee/doctr, doctr/datasets/svhn.py; none was found for its `extra`.
_SHA256 = {
    "annotations_trainval2017.zip": "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    "val2017.zip": "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    "train2017.zip": "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    "data_object_label_2.zip": "4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880",
    "data_object_image_2.zip": "351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617",
    "train.tar.gz": "4b17bb33b6cd8f963493168f80143da956f28ec406cc12f8e5745a9f91a51898",
    "test.tar.gz": "57ac9ceb530e4aa85b55d991be8fc49c695b3d71c6f6a88afea86549efde7fb5",
}


def _archive(url: str, size: int, *parts: str, md5: str = "") -> tuple[Archive, tuple[str, ...]]:
    sha256 = _SHA256.get(url.rpartition("/")[2])
    return Archive(url, size, f"md5:{md5}" if md5 else f"sha256:{sha256}" if sha256 else ""), parts


SOURCES = {
    "voc_2007": Source(
        "PASCAL VOC 2007",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        "",
        (
            Part(f"{_DEVKIT}/JPEGImages/*.jpg", 9963, "images"),
            Part(f"{_DEVKIT}/Annotations/*.xml", 9963, "labels"),
            Part(f"{_DEVKIT}/ImageSets/Main/trainval.txt", 1, "list of 5,011 images"),
            Part(f"{_DEVKIT}/ImageSets/Main/test.txt", 1, "list of 4,952 images"),
        ),
        (
            _archive(
                f"{_VOC}/VOCtrainval_06-Nov-2007.tar",
                460_032_000,
                f"{_DEVKIT}/ImageSets/Main/trainval",
                f"{_DEVKIT}/JPEG",
                f"{_DEVKIT}/Annotations",
                md5="c52e279531787c972589f7e41ab4ae64",
            ),
            _archive(
                f"{_VOC}/VOCtest_06-Nov-2007.tar",
                451_020_800,
                f"{_DEVKIT}/ImageSets/Main/test",
                f"{_DEVKIT}/JPEG",
                f"{_DEVKIT}/Annotations",
                md5="b6e924de25625d8de591ea690078ad9f",
            ),
        ),
        (_DEVKIT, "VOC2007"),
    ),
    "coco_2017": Source(
        "COCO 2017",
        "https://cocodataset.org/#download",
        "coco",
        (
            Part("coco/annotations/instances_train2017.json", 1, "training labels"),
            Part("coco/annotations/instances_val2017.json", 1, "evaluation labels"),
            Part("coco/train2017/*.jpg", 118_287, "training images"),
            Part("coco/val2017/*.jpg", 5000, "evaluation images"),
        ),
        (
            _archive(f"{_COCO}/annotations/annotations_trainval2017.zip", 252_907_541, "coco/annotations"),
            _archive(f"{_COCO}/zips/val2017.zip", 815_585_330, "coco/val2017"),
            _archive(f"{_COCO}/zips/train2017.zip", 19_336_861_798, "coco/train2017"),
        ),
    ),
    "kitti": Source(
        "KITTI's object detection set",
        "https://www.cvlibs.net/datasets/kitti/eval_object.php?obj_benchmark=2d",
        "kitti",
        (
            Part("kitti/training/image_2/*.png", 7481, "images"),
            Part("kitti/training/label_2/*.txt", 7481, "labels"),
        ),
        (
            _archive(f"{_KITTI}/data_object_label_2.zip", 5_601_213, "kitti/training/label_2"),
            _archive(f"{_KITTI}/data_object_image_2.zip", 12_569_945_557, "kitti/training/image_2"),
        ),
        ("kitti/training", "kitti/object/training"),
    ),
    "svhn": Source(
        "SVHN, format 1",
        "http://ufldl.stanford.edu/housenumbers/",
        "svhn",
        (
            Part("svhn/train/digitStruct.mat", 1, "training labels"),
            Part("svhn/train/*.png", 33_402, "training images"),
            Part("svhn/test/digitStruct.mat", 1, "evaluation labels"),
            Part("svhn/test/*.png", 13_068, "evaluation images"),
            Part("svhn/extra/digitStruct.mat", 1, "labels of the extra images", required=False),
            Part("svhn/extra/*.png", 202_353, "extra training images", required=False),
        ),
        (
            _archive(f"{_SVHN}/train.tar.gz", 404_141_560, "svhn/train"),
            _archive(f"{_SVHN}/test.tar.gz", 276_555_967, "svhn/test"),
            _archive(f"{_SVHN}/extra.tar.gz", 1_955_489_752, "svhn/extra"),
        ),
    ),
}
