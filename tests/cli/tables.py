"""Tables for the commands that fit and predict."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path


def write(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tables(folder: Path) -> Path:
    """Separable classes (``c-*.csv``, one categorical column) and a smooth target (``r-*.csv``) in ``folder``."""
    draw = random.Random(0)
    classes: list[list[object]] = []
    numbers: list[list[object]] = []
    for _ in range(120):
        a, b = draw.gauss(0, 1), draw.gauss(0, 1)
        colour = draw.choice(["red", "green"])
        label = "yes" if a + (1.5 if colour == "red" else -1.5) > 0 else "no"
        classes.append([f"{a:.4f}", "" if draw.random() < 0.1 else f"{b:.4f}", colour, label])
        numbers.append([f"{a:.4f}", f"{b:.4f}", f"{100 + 30 * math.tanh(a) + 10 * b:.4f}"])
    for name, header, rows in (
        ("c", ["a", "b", "colour", "label"], classes),
        ("r", ["a", "b", "y"], numbers),
    ):
        write(folder / f"{name}-train.csv", header, rows[:80])
        write(folder / f"{name}-test.csv", header, rows[80:])
        write(folder / f"{name}-new.csv", header[:-1], [row[:-1] for row in rows[80:]])
    return folder
