"""A plain folder of images, for pre-training on pictures that have no labels."""

from pathlib import Path

from relvit_d2.errors import UserError

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def list_images(folder: Path) -> list[Path]:
    """Return the images under ``folder``, sub-folders included, sorted by path.

    Hidden files and folders are left out (``._photo.jpg`` of macOS archives is no image).

    Raises:
        UserError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist: correct the path")
    images = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not images:
        raise UserError(f"the folder {folder} holds no image with one of {', '.join(sorted(EXTENSIONS))}")
    return images
