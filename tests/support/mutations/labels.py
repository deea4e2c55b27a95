"""Mutations of label files in text formats: XML, JSON, YAML, lists."""

import csv
import io
import json
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.mutations.values import SECRET, encoded, nasty_name, nasty_text


def number_notation(path: Path, draw: random.Random, outside: Path) -> None:
    """A number in another notation, or the text of a flag instead."""
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
    """A declared encoding, correct or not, and a long comment."""
    declared = draw.choice(
        ("gb2312", "gbk", "big5", "shift_jis", "utf-16", "utf-8", "latin-1", "idna", "rot13", "utf-7")
    )
    text = f'<?xml version="1.0" encoding="{declared}"?><!--{"x" * draw.choice((0, 9000))}-->' + path.read_text()
    with suppress(LookupError):
        path.write_bytes(text.replace("dog", "狗").encode(draw.choice((declared, "utf-8"))))


def list_line(path: Path, draw: random.Random, outside: Path) -> None:
    """A line of a list with an extension, a path, or a missing image."""
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
    """Empty masks, flags and ids in other notations, a root category, no categories."""
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
    """Valid, missing and outside paths of splits, lists, key points, names that YAML would convert."""
    target = outside / SECRET
    target.write_text(f"{target}.jpg\n../{outside.name}/{SECRET}.jpg\nimages/train/1.jpg\n")
    paths: tuple[str, ...] = (
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
    paths += (
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
    keys = {key: draw.choice(paths) for key in draw.sample(("path", "train", "val", "test", "validation"), 3)}
    names = draw.choice(
        ("[no, 010, 12:30]", "\n0: cat\n1: dog\n2: cow", "{'0': a, 1.0: b, 2e0: c}", "[a, b, c]", "{0: a, 00: b}")
    )
    shape = draw.choice(("", "", "kpt_shape: [2, 2]\n", "kpt_shape: [1, 2]\n", "kpt_shape: [a]\n", "kpt_shape: 3\n"))
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + f"{shape}names: {names}\n")


def names_elsewhere(path: Path, draw: random.Random, outside: Path) -> None:
    """No description, a second one, or an unrelated YAML file, in several folders."""
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
    """Change, remove or duplicate a random node."""
    document = json.loads(path.read_text())
    change_node(document, draw, outside)
    path.write_text(json.dumps(document))


def json_line(path: Path, draw: random.Random, outside: Path) -> None:
    """The same in one line of a file with a JSON document on each line."""
    lines = path.read_text().splitlines()
    spot = draw.randrange(len(lines))
    document = json.loads(lines[spot])
    change_node(document, draw, outside)
    lines[spot] = json.dumps(document)
    path.write_text("\n".join(lines))


def parquet_node(path: Path, draw: random.Random, outside: Path) -> None:
    """The same in a row of a parquet file, whose column may get another type."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    rows = table.to_pylist()
    change_node(draw.choice(rows), draw, outside)
    changed = pyarrow.Table.from_pylist(rows)
    parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def table_cell(path: Path, draw: random.Random, outside: Path) -> None:
    """Another value in a cell of a table, an additional cell, or another delimiter."""
    rows = list(csv.reader(path.read_text().splitlines()))
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = nasty_text(draw, outside)
    row += draw.choice(([], [], [], ["more"]))
    text = io.StringIO()
    csv.writer(text, delimiter=draw.choice((",", ",", ",", ";", "\t"))).writerows(rows)
    path.write_bytes(encoded(text.getvalue()))


def change_node(document: Any, draw: random.Random, outside: Path) -> None:
    """Change, remove or duplicate a random node of a JSON document, in place."""
    node, depth = document, draw.randint(1, 8)
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


def yaml_bomb(path: Path, draw: random.Random, outside: Path) -> None:
    """Exponential aliases, Python objects, invalid keys and names."""
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
