"""The VOC reader on generated and real files."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from PIL import Image

from relvit_d2.data.detection.custom import open_folder
from relvit_d2.data.detection.voc import VocFolder, load_voc, voc_images
from relvit_d2.utils.errors import UserError
from tests.support.custom_data import read_all

OBJECT = (
    "<object><name>dog</name><difficult>1</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax>"
    "<ymax>30</ymax></bndbox></object>"
)
ANNOTATION = f"<annotation><size><width>40</width><height>30</height></size>{OBJECT}</annotation>"


def make_voc(root: Path, annotation: str | bytes = ANNOTATION, split: bytes = b"000001\n") -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem in ("000001", "000002"):
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{stem}.jpg")
        data = annotation.encode() if isinstance(annotation, str) else annotation
        (root / "Annotations" / f"{stem}.xml").write_bytes(data)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(split)
    return root


def test_the_box_and_the_flags(tmp_path: Path) -> None:
    (record,) = load_voc(make_voc(tmp_path), "train", CLASS_NAMES)
    assert (record["image_id"], record["width"], record["height"]) == ("000001", 40, 30)
    (annotation,) = record["annotations"]
    assert annotation["bbox"] == [1, 2, 20, 30]
    assert CLASS_NAMES[annotation["category_id"]] == "dog"
    assert (annotation["difficult"], annotation["iscrowd"]) == (1, 0)


def test_real_sample_equals_detectron2s_own_reader(samples: Path) -> None:
    root = samples / "VOC2007"
    records = []
    for split in ("trainval", "test"):
        ours = load_voc(root, split, CLASS_NAMES)
        theirs = load_voc_instances(str(root), split, CLASS_NAMES)
        for mine, other in zip(ours, theirs, strict=True):
            for key in ("file_name", "image_id", "height", "width"):
                assert mine[key] == other[key]
            for a, b in zip(mine["annotations"], other["annotations"], strict=True):
                assert all(a[key] == b[key] for key in b)
        records += ours
    annotations = [annotation for record in records for annotation in record["annotations"]]
    # The counts are those in the README of the samples, without the 15 nested <part> boxes.
    assert (len(records), len(annotations), sum(annotation["difficult"] for annotation in annotations)) == (
        80,
        333,
        112,
    )
    assert {annotation["category_id"] for annotation in annotations} == set(range(20))


def test_parts_are_not_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    # The part precedes the object's own box: a search through all descendants would return its corners.
    nested = ANNOTATION.replace("<difficult>1", f"{part}<difficult>1")
    (record,) = load_voc(make_voc(tmp_path, nested), "train", CLASS_NAMES)
    assert [annotation["bbox"] for annotation in record["annotations"]] == [[1, 2, 20, 30]]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("<xmin>2<", "<xmin>20<", "without area"),
        ("<xmin>2<", "<xmin>21<", "without area"),
        ("<ymax>30<", "<ymax>3<", "without area"),
        ("<xmin>2<", "<xmin>nan<", "finite"),
        ("<xmax>20<", "<xmax>inf<", "finite"),
        ("<xmin>2<", "<xmin>two<", "not a number"),
        ("<xmin>2</xmin>", "", "<xmin>"),
        ("<xmin>2<", "<xmin><", "<xmin>"),
        ("<xmax>20<", "<xmax>42<", "outside"),
        ("<ymax>30<", "<ymax>31.5<", "outside"),
        ("<xmin>2<", "<xmin>-1<", "outside"),
        ("<name>dog<", "<name>dgo<", "did you mean 'dog'"),
        ("<name>dog</name>", "", "<name>"),
        ("<difficult>1<", "<difficult>maybe<", "<difficult>"),
        ("<width>40</width>", "", "<size/width>"),
        ("<height>30<", "<height>0<", "<size/height>"),
        ("<height>30<", "<height>inf<", "<size/height>"),
        ("<bndbox>", "<box>", "not valid XML"),
        ("</annotation>", "", "not valid XML"),
        (ANNOTATION, "", "not valid XML"),
        ("<annotation>", '<?xml version="1.0" encoding="no-such"?><annotation>', "not valid XML"),
        (
            "<annotation>",
            '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;&b;">]><annotation>',
            "not valid XML",
        ),
    ],
)
def test_invalid_annotation_error_contains_the_file(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in ANNOTATION
    root = make_voc(tmp_path, ANNOTATION.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_voc(root, "train", CLASS_NAMES)
    message = str(caught.value)
    assert "000001.xml" in message
    assert expected in message
    assert "\n" not in message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    path = root / "Annotations" / "000001.xml"
    for length in range(len(ANNOTATION)):
        path.write_text(ANNOTATION[:length])
        with pytest.raises(UserError, match=r"000001\.xml"):
            load_voc(root, "train", CLASS_NAMES)


@pytest.mark.parametrize(
    ("old", "new", "box"),
    [
        ("<xmin>2<", "<xmin>0<", [0, 2, 20, 30]),  # counted from 0
        ("<xmax>20<", "<xmax>40.6<", [1, 2, 40, 30]),  # rescaled and rounded
        ("<xmin>2<", "<xmin>2.25<", [1.25, 2, 20, 30]),
    ],
)
def test_a_box_less_than_a_pixel_off_is_clipped(tmp_path: Path, old: str, new: str, box: list[float]) -> None:
    (record,) = load_voc(make_voc(tmp_path, ANNOTATION.replace(old, new)), "train", CLASS_NAMES)
    assert record["annotations"][0]["bbox"] == box


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        *((text, 0) for text in ("<difficult/>", "")),
        *((f"<difficult>{text}</difficult>", 0) for text in ("Unspecified", "False", "0.0", " 0 ", "no")),
        *((f"<difficult>{text}</difficult>", 1) for text in ("True", "1.0", "1e0", "yes")),
    ],
)
def test_flags_in_any_notation(tmp_path: Path, text: str, flag: int) -> None:
    root = make_voc(tmp_path, ANNOTATION.replace("<difficult>1</difficult>", text))
    assert load_voc(root, "train", CLASS_NAMES)[0]["annotations"][0]["difficult"] == flag


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-16", "gb2312", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "windows-1251"]
)
def test_declared_encodings(tmp_path: Path, encoding: str) -> None:
    name = {"shift_jis": "犬①", "euc-kr": "개", "windows-1251": "пёс"}.get(encoding, "狗")
    if encoding == "gb2312":  # is declared by files with other characters
        name = "狗镕"
    text = f'<?xml version="1.0" encoding="{encoding}"?><!--{"x" * 9000}-->' + ANNOTATION.replace("dog", name)
    actual = {"gb2312": "gbk", "shift_jis": "cp932"}.get(encoding, encoding)
    root = make_voc(tmp_path, text.encode(actual))
    shutil.rmtree(root / "ImageSets")  # then VOC's format is detected by the content
    folder = VocFolder.find(root)
    assert folder and folder.classes() == (name,)
    for path in (root / "Annotations").iterdir():
        path.write_bytes(path.read_bytes().replace(encoding.encode(actual), b"ascii", 1))
    if encoding not in ("utf-16", "utf-8"):
        with pytest.raises(UserError, match="not valid XML"):
            open_folder(root)[1].classes()


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        (b"000001.jpg\n000002.XML 1\n", ["000001", "000002"]),
        (b"\xef\xbb\xbf000001\n", ["000001"]),
        (b"000001", ["000001"]),
        (b"000002\r\n000001\r\n", ["000002", "000001"]),
        (b"\n000001 -1\n\n000002  1\n", ["000001", "000002"]),
    ],
)
def test_formats_of_the_image_list(tmp_path: Path, split: bytes, ids: list[str]) -> None:
    root = make_voc(tmp_path, split=split)
    assert [path.stem for path in voc_images(root, "train")] == ids
    assert [record["image_id"] for record in load_voc(root, "train", CLASS_NAMES)] == ids


def test_ids_with_spaces_and_extensions(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")]
    root = make_voc(tmp_path, split=f"a b.jpg\nc.png 1\n{names[0]}.jpg\n".encode())
    for old, new in (("000001", "a b"), ("000002", "c.png")):
        (root / f"Annotations/{old}.xml").rename(root / f"Annotations/{new}.XML")
        (root / f"JPEGImages/{old}.jpg").rename(root / f"JPEGImages/{new}.jpg")
    shutil.copy(root / "Annotations/a b.XML", root / f"Annotations/{names[1]}.xml")
    shutil.copy(root / "JPEGImages/a b.jpg", root / f"JPEGImages/{names[0]}.jpg")
    for old, new in (
        ("Annotations", "annotations"),
        ("JPEGImages", "JpegImages"),
        ("ImageSets/Main", "ImageSets/MAIN"),
    ):
        (root / old).rename(root / new)
    records = read_all(root, "voc")
    assert [record["image_id"] for record in records] == ["a b", "c.png", names[0]]
    assert all(len(record["annotations"]) == 1 for record in records)


def test_official_lists_with_windows_line_ends(samples: Path, tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for split, count in (("train", 2501), ("val", 2510), ("trainval", 5011), ("test", 4952)):
        shutil.copy(samples / "VOC2007_official_lists" / f"{split}.txt", root / "ImageSets" / "Main")
        ids = (root / "ImageSets" / "Main" / f"{split}.txt").read_bytes().split()
        assert len(ids) == count
        for name in ids:
            (root / "JPEGImages" / f"{name.decode()}.jpg").touch()
        assert [path.stem.encode() for path in voc_images(root, split)] == ids


@pytest.mark.parametrize("split", [b"", b"\n\n", b"../000001\n", b"000001\n000001\n", b"000003\n", b"\xff\n"])
def test_invalid_list_is_an_error(tmp_path: Path, split: bytes) -> None:
    with pytest.raises(UserError, match=r"train\.txt"):
        voc_images(make_voc(tmp_path, split=split), "train")


def test_missing_files_are_errors(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    with pytest.raises(UserError, match=r"val\.txt"):
        load_voc(root, "val", CLASS_NAMES)
    (root / "Annotations" / "000001.xml").unlink()
    with pytest.raises(UserError, match=r"000001\.xml"):
        load_voc(root, "train", CLASS_NAMES)
    (root / "JPEGImages" / "000001.jpg").unlink()
    with pytest.raises(UserError, match=r"000001\.jpg"):
        load_voc(root, "train", CLASS_NAMES)
