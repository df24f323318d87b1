"""A figure as a notebook shows it: its picture, what it shows for whoever cannot see it, and a sentence below."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture with alternative text and a caption.

    Notebooks keep alternative text in the metadata of an output, which JupyterLab, GitHub and exported pages do not
    read. So the picture is shown as HTML, in which it is part of the image.

    Args:
        png: bytes of the file.
        alt: what the figure shows.
        caption: the sentence below it.
    """

    png: bytes
    alt: str
    caption: str

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode("ascii")
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(self.alt)}">'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )

    def __repr__(self) -> str:
        return f"Figure: {self.alt}\n{self.caption}"


def save(figure: Figure, path: Path) -> bytes:
    """Write a figure to `path` as PNG and return what was written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def image(figure: Figure, path: Path, alt: str, caption: str) -> Picture:
    """Write a figure to `path` as PNG and return it as a notebook shows it.

    Args:
        alt: what the figure shows, for whoever cannot see it: kind, axes, and what stands out.
        caption: one sentence that says how to read it.
    """
    return Picture(save(figure, path), alt, caption)
