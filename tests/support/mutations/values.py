"""Invalid names and numbers for mutated data sets."""

import random
from collections.abc import Callable
from pathlib import Path

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
    """An invalid file name, or one that leads out of the data root."""
    ups = "../" * draw.randint(1, 8)
    return draw.choice((*NAMES, f"{ups}{outside.name}/{SECRET}", str(outside / SECRET), f"../{SECRET}"))


def nasty_text(draw: random.Random, outside: Path) -> str:
    """An invalid number or name."""
    return draw.choice(NUMBERS) if draw.random() < 0.5 else nasty_name(draw, outside)


def encoded(text: str) -> bytes:
    """UTF-8 bytes of text with lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


Mutation = Callable[[Path, random.Random, Path], None]
