"""Pieces of the report page: tables and pictures as HTML."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Return a table whose cells are HTML already."""
    cells = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    heads = "".join(f"<th scope='col'>{name}</th>" for name in head)
    kind = " class='numbers'" if numbers else ""
    return f"<div class='scroll'><table{kind}><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>"


def figure(picture: Image.Image, caption: str) -> str:
    """Return a picture as a JPEG within the page, a fifth of the size of a PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'


def grid(charts: Sequence[str]) -> str:
    """Return charts side by side, as many as the width holds."""
    return f"<div class='charts'>{''.join(charts)}</div>"
