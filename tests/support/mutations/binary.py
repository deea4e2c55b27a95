"""Mutations of HDF5 files, archives and images."""

import random
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from tests.support.damaged_files import huge_png
from tests.support.mutations.values import SECRET, nasty_name


def hdf5_node(path: Path, draw: random.Random, outside: Path) -> None:
    """Remove an object, or replace it by one of another type, size or storage, or by a link."""
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
    """The same labels, partly stored in a file outside the root."""
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


def archive_member(path: Path, draw: random.Random, outside: Path) -> None:
    """A member outside the folder, a link, a duplicate, or one with a wrong size."""
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
    """Another number instead of a size, an offset, a method or a flag."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".tar":
        start = draw.choice([0, *(m.start() - 257 for m in re.finditer(rb"ustar", data))])
        sizes = (b"77777777777\0", b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11, b"00000000000\0", b"-0000000512\0")
        data[start + 124 : start + 136] = draw.choice(sizes)
        if draw.random() < 0.7:  # with a valid checksum
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    else:
        start = draw.choice([m.start() for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", data)])
        data[start + draw.randint(4, 45)] = draw.choice((0, 1, 8, 12, 14, 99, 255))
    path.write_bytes(data)


def image_metadata(path: Path, draw: random.Random, outside: Path) -> None:
    """EXIF orientation in the way of the format; in a PNG after the pixels too, possibly damaged."""
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
    place = draw.choice((len(data) - 12, 33))  # before the last chunk, or after the first
    checksum = zlib.crc32(kind + content) ^ draw.choice((0, 0, 0, 1))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    path.write_bytes(data[:place] + chunk + data[place:])


def huge_image(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(huge_png())
