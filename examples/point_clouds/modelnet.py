"""Solids of ModelNet (Wu et al., 2015), or of any folder laid out like it.

Such a folder holds one folder for each class, and in that a folder ``train`` and a folder
``test`` with files in the object file format, OFF. The data are at https://modelnet.cs.princeton.edu.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def class_names(folder: Path) -> list[str]:
    """The classes of a folder, in alphabetical order.

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    names = sorted(path.parent.name for path in folder.glob("*/train") if path.is_dir())
    if len(names) < 2:
        raise ValueError(
            f"{folder} holds {len(names)} classes, expected two or more: folders CLASS/train and "
            "CLASS/test with .off files. Unpack ModelNet40.zip and give the folder ModelNet40."
        )
    return names


def solid_files(folder: Path, name: str, part: str, most: int) -> list[Path]:
    """The first files of a class, at most so many; `part` is ``"train"`` or ``"test"``."""
    files = sorted((folder / name / part).glob("*.off"))
    if not files:
        raise ValueError(f"{folder / name / part} holds no .off files, expected one or more.")
    return files[:most]


def read_off(path: Path) -> Tensor:  # -> (triangles, 3 corners, 3)
    """Triangles of a solid; a face with more corners becomes a fan of triangles."""
    try:
        return _triangles(path.read_text())
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable OFF file: {error}") from error


def _triangles(text: str) -> Tensor:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    vertices, faces, rows = _counts(lines)
    points = np.array([row.split()[:3] for row in rows[:vertices]], dtype=np.float32)
    corners = _corners(rows[vertices : vertices + faces])
    if len(points) < vertices or not corners.size:
        raise ValueError(f"expected {vertices} vertices and {faces} faces, the file ends before.")
    return torch.from_numpy(points[corners])


def _counts(lines: list[str]) -> tuple[int, int, list[str]]:
    """Number of vertices and faces, and the lines after; some files lack the first line break."""
    if not lines or not lines[0].startswith("OFF"):
        raise ValueError("the first line must start with OFF.")
    head = lines[0][3:].split()
    rest = lines[1:] if head else lines[2:]
    vertices, faces = (head or lines[1].split())[:2]
    return int(vertices), int(faces), rest


def _corners(rows: list[str]) -> np.ndarray:  # -> (triangles, 3)
    """Vertex numbers of the triangles of some faces, each row a count and as many numbers."""
    numbers = [[int(word) for word in row.split()] for row in rows]
    fans = [(face[1], face[k], face[k + 1]) for face in numbers for k in range(2, face[0])]
    return np.array(fans, dtype=np.int64)
