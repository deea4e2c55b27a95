"""What spoils the files of a data set, by their ending."""

import filecmp
import json
import os
import random
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from relvit_d2.data.images.folder import EXTENSIONS
from tests.support.damaged_files import huge_png

SECRET = "secret"
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1e308",
    "1e999",
    "-1",
    "0",
    "0.5",
    "1e-320",
    "9" * 400,
    "0x1F",
    "1_0",
    "٣",
    "",
)
NAMES = ("", ".", "..", "a/b", "a\\b", "C:\\a", "a\0b", "\u202e", "x" * 300, "~", "%2e%2e", " ", "\ud800", "é", "a\nb")


def nasty_name(draw: random.Random, outside: Path) -> str:
    """A name that no file of a set should have."""
    ups = "../" * draw.randint(1, 8)
    return draw.choice((*NAMES, f"{ups}{outside.name}/{SECRET}", str(outside / SECRET), f"../{SECRET}"))


def nasty_text(draw: random.Random, outside: Path) -> str:
    """A number or a name."""
    return draw.choice(NUMBERS) if draw.random() < 0.5 else nasty_name(draw, outside)


def encoded(text: str) -> bytes:
    """Bytes of a text that may not be one."""
    return text.encode("utf-8", "surrogatepass")


Mutation = Callable[[Path, random.Random, Path], None]


def flip(path: Path, draw: random.Random, outside: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8) if data else 0):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randint(0, len(data))])


def stir(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    first, last = sorted(draw.randint(0, len(data)) for _ in range(2))
    path.write_bytes(
        data[:first] + draw.choice((b"", draw.randbytes(9), data[first:last] * 2, b"\0" * 50)) + data[last:]
    )


def empty(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()


def folder_instead(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def link_out(path: Path, draw: random.Random, outside: Path) -> None:
    """A link to a sound file outside of the root: all is right but its place."""
    target = outside / f"linked{path.suffix}"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target if draw.random() < 0.5 else os.path.relpath(target, path.parent))


def link_to_itself(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def foreign_name(path: Path, draw: random.Random, outside: Path) -> None:
    """A second file whose name is no UTF-8."""
    shutil.copy(path, os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.suffix)))


def neighbour(path: Path, draw: random.Random, outside: Path) -> None:
    """The content of another file of the set."""
    others = sorted(other for other in path.parent.parent.rglob("*") if other.is_file())
    path.write_bytes(draw.choice(others).read_bytes() if others else b"")


def other_form(path: Path, draw: random.Random, outside: Path) -> None:
    """Other capitals, a letter with an accent in either normal form, or brackets in the name."""
    forms = (path.name.upper(), path.name.title(), f"e\u0301{path.name}", f"\u00e9{path.name}")
    path.rename(path.with_name(draw.choice((*forms, f"[{path.stem}]{path.suffix}"))))


def other_folder(path: Path, draw: random.Random, outside: Path) -> None:
    """The same for the file's folder."""
    other_form(path.parent, draw, outside)


def link_folder(path: Path, draw: random.Random, outside: Path) -> None:
    """A link in place of the file's folder, to elsewhere or to a folder beside it."""
    folder = path.parent
    target = (outside if draw.random() < 0.7 else folder.parent) / f"moved {draw.randint(0, 9)}"
    folder.rename(target)
    folder.symlink_to(target if draw.random() < 0.5 else os.path.relpath(target, folder.parent))


def deeper(path: Path, draw: random.Random, outside: Path) -> None:
    """The file's folder below another one, which may be called like a split."""
    folder = path.parent
    folder.rename(folder.with_name("moving"))
    folder.mkdir()
    folder.with_name("moving").rename(folder / draw.choice(("test_site", "val", "train", "x", "images", "labels")))


def number_notation(path: Path, draw: random.Random, outside: Path) -> None:
    """A number written in another way, or a flag's word in its place."""
    text = path.read_text()
    spots = list(re.finditer(r"(?<![\w.])\d+(?![\w.])", text))
    if spots:
        spot = draw.choice(spots)
        value = int(spot[0])
        words = (
            f"{value:e}",
            f"{value}.0",
            f'"{value}"',
            f"0{value}",
            f"+{value}",
            "null",
            "Unspecified",
            "True",
            "false",
            "",
        )
        path.write_text(text[: spot.start()] + draw.choice(words) + text[spot.end() :])


def xml_encoding(path: Path, draw: random.Random, outside: Path) -> None:
    """A declared encoding, which the file is in or not, and a long comment before everything."""
    declared = draw.choice(
        ("gb2312", "gbk", "big5", "shift_jis", "utf-16", "utf-8", "latin-1", "idna", "rot13", "utf-7")
    )
    text = f'<?xml version="1.0" encoding="{declared}"?><!--{"x" * draw.choice((0, 9000))}-->' + path.read_text()
    with suppress(LookupError):
        path.write_bytes(text.replace("dog", "狗").encode(draw.choice((declared, "utf-8"))))


def list_line(path: Path, draw: random.Random, outside: Path) -> None:
    """A line of a list with an extension, as a path, or of an absent image."""
    lines = path.read_text().splitlines()
    spot = draw.randrange(len(lines))
    word = lines[spot].split()[0]
    odd = (
        f"{word}.jpg",
        f"{word}.XML 1",
        f"JPEGImages/{word}.jpg",
        f"./{word}",
        f"/data/{word}.jpg",
        f"{word} b",
        "absent",
    )
    lines[spot] = draw.choice(odd)
    path.write_text("\n".join(lines))


def json_mask(path: Path, draw: random.Random, outside: Path) -> None:
    """Masks that cover nothing, flags and ids in other notations, a root category, no categories."""
    document = json.loads(path.read_text())
    thing = draw.choice(document["annotations"])
    size = {"size": [30, 40]}
    masks: tuple[Any, ...] = ([[]], [[1, 1]], [[1, 1, 1, 1, 1, 1]], size | {"counts": [1200]}, size | {"counts": "`U1"})
    thing["segmentation"] = draw.choice(masks)
    thing["iscrowd"] = draw.choice((None, "", "0", 0.0, True, "Unspecified", 2))
    thing["category_id"] = draw.choice(
        (float(thing["category_id"]), str(thing["category_id"]), f"{thing['category_id']}e0")
    )
    if draw.random() < 0.3:
        name = draw.choice(document["categories"])["name"]
        document["categories"].append({"id": 0, "name": draw.choice((name, "all")), "supercategory": "none"})
        for category in document["categories"][: draw.choice((0, 1, -1))]:
            category["supercategory"] = document["categories"][-1]["name"]
    if draw.random() < 0.1:
        del document["categories"]
    path.write_text(json.dumps(document))


def yaml_splits(path: Path, draw: random.Random, outside: Path) -> None:
    """Splits that lead somewhere, nowhere or out, lists, key points, names that YAML would convert."""
    target = outside / SECRET
    target.write_text(f"{target}.jpg\n../{outside.name}/{SECRET}.jpg\nimages/train/1.jpg\n")
    places: tuple[str, ...] = (
        "images/train",
        "../images/train",
        "/data/images/train",
        ".",
        "..",
        "~",
        "",
        "/",
        "C:\\images",
        "list.txt",
    )
    places += (
        str(outside),
        f"../{outside.name}",
        str(target),
        f"../{outside.name}/{SECRET}",
        "[images, images/train]",
        "{a: b}",
    )
    root = path.parent
    (root / "list.txt").write_text(
        draw.choice((f"{target}.jpg", "./images/train/1.jpg\nimages/train/9.jpg", "\0", "a\nb.jpg"))
    )
    keys = {key: draw.choice(places) for key in draw.sample(("path", "train", "val", "test", "validation"), 3)}
    names = draw.choice(
        ("[no, 010, 12:30]", "\n0: cat\n1: dog\n2: cow", "{'0': a, 1.0: b, 2e0: c}", "[a, b, c]", "{0: a, 00: b}")
    )
    shape = draw.choice(("", "", "kpt_shape: [2, 2]\n", "kpt_shape: [1, 2]\n", "kpt_shape: [a]\n", "kpt_shape: 3\n"))
    path.write_text("".join(f"{key}: {place}\n" for key, place in keys.items()) + f"{shape}names: {names}\n")


def names_elsewhere(path: Path, draw: random.Random, outside: Path) -> None:
    """The description away, or with a second one or an unrelated YAML file beside it, the labels or in a folder."""
    root = path.parent
    if draw.random() < 0.5:
        path.unlink()
    place = root / draw.choice((".", "labels/train", "labels", "images/train", "sub"))
    place.mkdir(exist_ok=True)
    name, text = draw.choice(
        (
            ("classes.txt", "a\nb\nc\n"),
            ("CLASSES.TXT", "a\n"),
            ("data.yaml", "names: [a, b, c]\n"),
            ("model.yaml", "nc: 3\nbackbone: [[-1, 1, Conv, [64]]]\n"),
            ("params.yaml", "train: {epochs: 3}\n"),
            ("k8s.yml", "kind: Pod\n---\nnames: {a: b}\n"),
        )
    )
    (place / name).write_text(text)


def xml_text(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    spot = draw.choice(list(re.finditer(r">([^<>]+)<", text)) or [re.search("", text)])
    assert spot
    path.write_bytes(encoded(text[: spot.start() + 1] + nasty_text(draw, outside) + text[max(spot.end() - 1, 0) :]))


def xml_element(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    spots = list(re.finditer(r"<(\w+)>(?:(?!<\1>).)*?</\1>", text, re.S))
    if spots:
        spot = draw.choice(spots)
        instead = draw.choice(("", spot[0] * 2, f"<{spot[1]}/>", f"<part>{spot[0]}</part>"))
        path.write_text(text[: spot.start()] + instead + text[spot.end() :])


def xml_bomb(path: Path, draw: random.Random, outside: Path) -> None:
    text = path.read_text()
    (outside / SECRET).write_text("dog")
    head = draw.choice(
        (
            '<!DOCTYPE x [<!ENTITY a0 "ha">'
            + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
            + "]>",
            f'<!DOCTYPE x [<!ENTITY a11 SYSTEM "file://{outside / SECRET}">]>',
            f'<!DOCTYPE x SYSTEM "file://{outside / SECRET}">',
            '<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p;]>',
            '<?xml version="1.0" encoding="utf-7"?>',
            '<?xml version="1.0" encoding="no-such"?>',
        )
    )
    path.write_text(head + text.replace("dog", "&a11;" if "a11" in head else "dog", 1))


def xml_depth(path: Path, draw: random.Random, outside: Path) -> None:
    depth = draw.choice((100, 100, 100, 20_000))
    path.write_text(path.read_text().replace("<object>", "<a>" * depth + "</a>" * depth + "<object>", 1))


def json_node(path: Path, draw: random.Random, outside: Path) -> None:
    """Change, remove or double something somewhere; the few long lists do not hide the small ones."""
    document = json.loads(path.read_text())
    node, depth = document, draw.randint(1, 5)
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys) if keys else None
        depth -= 1
        if key is None or depth == 0 or not isinstance(node[key], dict | list):
            break
        node = node[key]
    values: tuple[Any, ...] = (None, True, "", [], {}, [[]], float("nan"), float("inf"), 1e308, -1, 0, 10**30, "1")
    values += (nasty_name(draw, outside), [1, 2], [1, 2, 3, "x"], {"size": [1, 2], "counts": "\x7f"}, [0, 0, 0, 0])
    if key is not None:
        action = draw.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, list):
            node.append(node[key])
        else:
            node[key] = draw.choice(values)
    path.write_text(json.dumps(document))


def json_depth(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_text(
        draw.choice(("[" * 100_000, '{"images":' * 50_000, "[]", "3", '{"images": [], "images": 3}', "null"))
    )


def text_field(path: Path, draw: random.Random, outside: Path) -> None:
    lines = [line.split(" ") for line in path.read_text().split("\n")]
    line = draw.choice(lines)
    line[draw.randrange(len(line))] = nasty_text(draw, outside)
    path.write_bytes(encoded("\n".join(map(" ".join, lines))))


def text_line(path: Path, draw: random.Random, outside: Path) -> None:
    lines = path.read_text().split("\n")
    spot = draw.randrange(len(lines))
    lines[spot : spot + 1] = draw.choice(
        ([], lines[spot : spot + 1] * 2, [" ".join(lines[spot].split()[:-1])], ["\ufeff"])
    )
    path.write_text(draw.choice(("\n", "\r\n", "\x85")).join(lines))


def hdf5_node(path: Path, draw: random.Random, outside: Path) -> None:
    """Remove an object, or put one of another type, size, storage or a link in its place."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = draw.choice(names)
        node = file[name]
        if isinstance(node, h5py.Dataset) and draw.random() < 0.7:
            column = node.dtype == h5py.ref_dtype
            objects = [file[other].ref for other in draw.sample(names, min(5, len(names)))] + [h5py.Reference()]
            if draw.random() < 0.6:
                shape = node.shape
                values: Any = (
                    np.array(draw.choices(objects, k=node.size), h5py.ref_dtype).reshape(shape)
                    if column
                    else np.full(shape, draw.choice((np.nan, np.inf, -1e308, 1e308, -1, 0, 300))).astype(node.dtype)
                )
                node[...] = values
                return
            del file[name]
            other: Any = draw.choice(
                (np.ones((1, 1)), np.ones(3), "text", np.ones((2, 2), np.complex64), np.zeros((0, 1)), h5py.Empty("f"))
            )
            file[name] = other
            return
        del file[name]
        file[name] = draw.choice((h5py.SoftLink("/" + name), h5py.SoftLink("/digitStruct"), h5py.SoftLink("/nowhere")))


def hdf5_outside(path: Path, draw: random.Random, outside: Path) -> None:
    """The same labels, but part of them lies in a file outside of the root."""
    target = outside / "labels.h5"
    shutil.copy(path, target)
    with h5py.File(path, "r+") as file:
        name = draw.choice(("digitStruct", "digitStruct/name", "#refs#/b0/left", "#refs#/n0", "#refs#/b1/label"))
        node = file[name]
        if isinstance(node, h5py.Dataset) and node.dtype != h5py.ref_dtype and draw.random() < 0.6:
            values, raw = node[...], outside / "values"
            raw.write_bytes(values.tobytes())
            inner = file["#refs#/b0"] if name == "#refs#/b0/left" else None
            if inner is not None and draw.random() < 0.5:
                layout = h5py.VirtualLayout(values.shape, values.dtype)
                layout[...] = h5py.VirtualSource(str(target), name, values.shape)
                del file[name]
                file.create_virtual_dataset(name, layout)
            else:
                del file[name]
                file.create_dataset(name, values.shape, values.dtype, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
            if name == "#refs#/n0":
                references = file["digitStruct/name"][...]
                references[0] = file[name].ref
                file["digitStruct/name"][...] = references
        else:
            del file[name]
            file[name] = h5py.ExternalLink(str(target), "/" + name)


def yaml_bomb(path: Path, draw: random.Random, outside: Path) -> None:
    """Lists of lists without end, Python's objects, keys and names that are none."""
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    names: tuple[str, ...] = (
        "&a [*a]",
        "!!python/object/apply:os.getcwd []",
        "{-1: a}",
        "{1e999: a}",
        "[a, a]",
        "[[a], b]",
        "{[a]: b}",
    )
    names += ("2001-99-99", "{0: ~}", "{0: 1, 1: '1'}", "3", f"[{nasty_text(draw, outside)!r}]", "[" * 1500, "*a8")
    path.write_bytes(encoded(f"a0: &a0 [x]\n{laughs}names: {draw.choice(names)}\n"))


def archive_member(path: Path, draw: random.Random, outside: Path) -> None:
    """A member that would lie or lead outside, comes twice, or says that it is larger than it is."""
    (outside / SECRET).write_bytes(huge_png())
    name = draw.choice(("a.png", "./a.png", "b/../a.png", f"{nasty_name(draw, outside)}.png"))
    target = draw.choice((str(outside / SECRET), f"../{outside.name}/{SECRET}", name, "images/a.png"))
    if path.suffix == ".zip":
        info = zipfile.ZipInfo(name)
        info.external_attr = draw.choice((0o120777, 0o100644, 0o40755)) << 16
        info.compress_type = draw.choice(
            (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        )
        with zipfile.ZipFile(path, "a") as packed:
            packed.writestr(info, draw.choice((target.encode("utf-8", "replace"), huge_png(), b"")))
        return
    link = tarfile.TarInfo(name)
    link.type = draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE))
    link.linkname = target
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)


def archive_number(path: Path, draw: random.Random, outside: Path) -> None:
    """Another number where an archive holds a size, a place, a method or a flag."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".tar":
        start = draw.choice([0, *(m.start() - 257 for m in re.finditer(rb"ustar", data))])
        sizes = (b"77777777777\0", b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11, b"00000000000\0", b"-0000000512\0")
        data[start + 124 : start + 136] = draw.choice(sizes)
        if draw.random() < 0.7:  # with a checksum that is right
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    else:
        start = draw.choice([m.start() for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", data)])
        data[start + draw.randint(4, 45)] = draw.choice((0, 1, 8, 12, 14, 99, 255))
    path.write_bytes(data)


def image_metadata(path: Path, draw: random.Random, outside: Path) -> None:
    """Turn an image by EXIF data that its format allows; behind a PNG's pixels by data that may be damaged."""
    exif = Image.Exif()
    exif[0x0112] = draw.randrange(10)
    with Image.open(path) as image:
        image.load()
    if image.format != "PNG" or draw.random() < 0.2:
        image.save(path, format=image.format, exif=exif)
        return
    body = bytearray(exif.tobytes().removeprefix(b"Exif\0\0"))
    if draw.random() < 0.3:
        body[draw.randrange(len(body))] = draw.randrange(256)
    text = b"\nexif\n%8d\n" % len(body) + body.hex().encode()
    kind, content = draw.choice(
        (
            (b"eXIf", bytes(body)),
            (b"tEXt", b"Raw profile type exif\0" + text),
            (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)[: draw.choice((None, 9))]),
        )
    )
    data = path.read_bytes()
    place = draw.choice((len(data) - 12, 33))  # before the last chunk, or behind the first
    checksum = zlib.crc32(kind + content) ^ draw.choice((0, 0, 0, 1))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    path.write_bytes(data[:place] + chunk + data[place:])


def huge_image(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(huge_png())


ANY: tuple[Mutation, ...] = (
    *(cut, empty, remove, folder_instead, link_out, link_to_itself, foreign_name, neighbour),
    *(other_form, other_folder, link_folder, deeper),
)
BY_ENDING: dict[str, tuple[Mutation, ...]] = {
    ".xml": (
        *(xml_text, xml_text, xml_text, xml_element, xml_element, xml_bomb, xml_depth, flip, stir),
        *(xml_encoding, number_notation),
    ),
    ".json": (*[json_node] * 20, *[json_mask] * 4, *[number_notation] * 2, json_depth, flip, stir),
    ".txt": (text_field, text_field, text_field, text_line, number_notation, number_notation, list_line, flip, stir),
    ".mat": (*[hdf5_node] * 5, hdf5_outside),
    ".yaml": (text_field, text_line, yaml_bomb, yaml_bomb, *[yaml_splits] * 3, names_elsewhere, flip, stir),
    **dict.fromkeys((".zip", ".tar"), (archive_member, archive_member, archive_number, archive_number, flip, stir)),
    **dict.fromkeys(EXTENSIONS, (flip, flip, stir, huge_image, image_metadata, image_metadata)),
}


def spoil(root: Path, outside: Path, seed: int, sound: Path, folders_may_be_links: bool) -> str:
    """Spoil one file of a data root, a copy of ``sound``; return what was done.

    Where folders may be links, to another disk say, none becomes one.
    """
    draw = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return "nothing left"
    # Labels decide more than pixels.
    path = draw.choices(files, [1.0 if file.suffix in EXTENSIONS else 5.0 for file in files])[0]
    mutation = draw.choice(BY_ENDING.get(path.suffix.lower(), (flip, stir)) if draw.random() < 0.75 else ANY)
    if path.parent == root and mutation in (other_folder, link_folder, deeper):
        mutation = cut
    if mutation is link_folder and folders_may_be_links:
        mutation = deeper
    first = sound / path.relative_to(root)
    if mutation in (hdf5_node, hdf5_outside) and not (first.is_file() and filecmp.cmp(path, first, shallow=False)):
        mutation = stir  # HDF5's library may crash where it changes a damaged file
    if mutation in (flip, stir) and path.suffix == ".mat" and b"GCOL" in path.read_bytes():
        # HDF5 2.0.0 never returns from some damaged heaps (H5HG__cache_heap_deserialize). Of what the reader opens,
        # only a virtual dataset, which it refuses when open, has one.
        mutation = cut
    if mutation is link_out and path.suffix in (".zip", ".tar"):
        mutation = stir  # an archive is named by its user alone
    # A file that an earlier change left is not always one that this change can take apart.
    with suppress(Exception):
        mutation(path, draw, outside)
    return f"{mutation.__name__} {path.relative_to(root)}"
