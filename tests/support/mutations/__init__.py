"""Random damage to the files of a data set, by extension."""

import filecmp
import random
from contextlib import suppress
from pathlib import Path

from relvit_d2.data.images.folder import EXTENSIONS
from tests.support.mutations.binary import (
    archive_member,
    archive_number,
    hdf5_node,
    hdf5_outside,
    huge_image,
    image_metadata,
)
from tests.support.mutations.files import (
    cut,
    deeper,
    empty,
    flip,
    folder_instead,
    foreign_name,
    link_folder,
    link_out,
    link_to_itself,
    neighbour,
    other_folder,
    other_form,
    remove,
    stir,
)
from tests.support.mutations.labels import (
    json_depth,
    json_line,
    json_mask,
    json_node,
    list_line,
    names_elsewhere,
    number_notation,
    parquet_node,
    table_cell,
    text_field,
    text_line,
    xml_bomb,
    xml_depth,
    xml_element,
    xml_encoding,
    xml_text,
    yaml_bomb,
    yaml_splits,
)
from tests.support.mutations.values import Mutation

ANY: tuple[Mutation, ...] = (
    *(cut, empty, remove, folder_instead, link_out, link_to_itself, foreign_name, neighbour),
    *(other_form, other_folder, link_folder, deeper),
)


BY_EXTENSION: dict[str, tuple[Mutation, ...]] = {
    ".xml": (
        *(xml_text, xml_text, xml_text, xml_element, xml_element, xml_bomb, xml_depth, flip, stir),
        *(xml_encoding, number_notation),
    ),
    ".json": (*[json_node] * 20, *[json_mask] * 4, *[number_notation] * 2, json_depth, flip, stir),
    ".jsonl": (*[json_line] * 8, number_notation, json_depth, flip, stir),
    ".csv": (*[table_cell] * 5, text_line, number_notation, flip, stir),
    ".parquet": (parquet_node, parquet_node, flip, stir),
    ".txt": (text_field, text_field, text_field, text_line, number_notation, number_notation, list_line, flip, stir),
    ".mat": (*[hdf5_node] * 5, hdf5_outside),
    ".yaml": (text_field, text_line, yaml_bomb, yaml_bomb, *[yaml_splits] * 3, names_elsewhere, flip, stir),
    **dict.fromkeys((".zip", ".tar"), (archive_member, archive_member, archive_number, archive_number, flip, stir)),
    **dict.fromkeys(EXTENSIONS, (flip, flip, stir, huge_image, image_metadata, image_metadata)),
}


def spoil(root: Path, outside: Path, seed: int, original: Path, folders_may_be_links: bool) -> str:
    """Damage one file of a data root, a copy of ``original``; return a description of the change.

    If folders may be links (to another disk), no folder is replaced by one.
    """
    draw = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return "no file left"
    # Labels have more influence than pixels.
    path = draw.choices(files, [1.0 if file.suffix in EXTENSIONS else 5.0 for file in files])[0]
    mutation = draw.choice(BY_EXTENSION.get(path.suffix.lower(), (flip, stir)) if draw.random() < 0.75 else ANY)
    if path.parent == root and mutation in (other_folder, link_folder, deeper):
        mutation = cut
    if mutation is link_folder and folders_may_be_links:
        mutation = deeper
    first = original / path.relative_to(root)
    if mutation in (hdf5_node, hdf5_outside) and not (first.is_file() and filecmp.cmp(path, first, shallow=False)):
        mutation = stir  # the HDF5 library may crash when it changes a damaged file
    if mutation is link_out and path.suffix in (".zip", ".tar"):
        mutation = stir  # the path of an archive is given by the user
    # An earlier change may have made this one impossible.
    with suppress(Exception):
        mutation(path, draw, outside)
    return f"{mutation.__name__} {path.relative_to(root)}"
