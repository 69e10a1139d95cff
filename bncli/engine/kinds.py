"""Kinds of values that options take: how text is parsed and checked; without NumPy, so that --help starts fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bncli.engine.declare import Kind

SEPARATOR = "::"


def parse_rows(text: str) -> tuple[int | None, int | None]:
    """A Python slice A:B of samples.

    >>> parse_rows("100:"), parse_rows(":-10")
    ((100, None), (None, -10))
    """
    start, stop = (int(part) if part.strip() else None for part in text.split(":"))
    return start, stop


def parse_size(text: str) -> int:
    """A number of bytes with an optional unit K, M or G (of 1024).

    >>> parse_size("128M")
    134217728
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I").strip()
    number, unit = (cleaned[:-1], cleaned[-1:]) if cleaned[-1:] in ("K", "M", "G") else (cleaned, "")
    size = float(number) * units[unit]
    if not size >= 0 or math.isinf(size):
        raise ValueError
    return int(size)


def number_or_address(text: str) -> float | str:
    """A number, else the address of an array."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_number(text: str) -> float | int:
    """A number, kept as an integer when it is written as one."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_part(text: str) -> tuple[int, int]:
    """Which part of how many.

    >>> parse_part("3/64")
    (3, 64)
    """
    number, of = map(int, text.split("/"))
    return number, of


def check_part(part: Any) -> str:
    """What is wrong with a part (I, N)."""
    whole = isinstance(part, (tuple, list)) and len(part) == 2 and all(type(n) is int for n in part)
    return "" if whole and 1 <= part[0] <= part[1] else "I/N with 1 <= I <= N; a SLURM array of N jobs has --array=1-N"


def parse_momentum(text: str) -> float | str:
    """A number or "none"."""
    return text if text == "none" else float(text)


def named(text: object) -> str:
    """What is wrong with a path or address: it is empty, as from an unset variable of a shell, or names no file."""
    return no_file(text) or (
        "there is no file before the ::" if isinstance(text, str) and text.startswith(SEPARATOR) else ""
    )


def no_file(text: object) -> str:
    """What is wrong with a name that is empty."""
    return "an empty name; give a path" if isinstance(text, str) and not text else ""


def check_like(like: object) -> str:
    """What is wrong with what should be statistics or their file."""
    known = isinstance(like, str) or hasattr(like, "running_mean")
    return named(like) if known else "neither statistics nor the path of a stats file"


def check_on(on: str) -> str:
    """What is wrong with the name and address of an executor."""
    from bncli.engine.executors import EXECUTORS

    name, separator, address = on.partition(":")
    if name not in EXECUTORS:
        return f"none of {', '.join(EXECUTORS)}; dask takes an address, dask:tcp://HOST:8786"
    return "no address after the colon" if separator and not address else ""


def at_least(least: int, words: str) -> Callable[[int], str]:
    """A check that a number is not below `least`; `words` say what is wrong with one that is."""
    return lambda value: "" if value >= least else words


def check_batch_size(size: int) -> str:
    """What is wrong with a number of samples in a batch."""
    return "larger than any data" if size >= 1 << 62 else "" if size >= 1 else "a batch needs at least one sample"


WHOLE = Kind("a whole number", int, (int,))
NUMBER = Kind("a number", float, (float, int))
FLAG = Kind("True or False", types=(bool,))
CHOICE = Kind("text", types=(str,))
TEXT = Kind("text", types=(str,))
PATH = Kind("a path or address", types=(str,), file=True)  # of a file, or inside of each input
PATH_OR_DATA = Kind("a path or address", file=True)
NUMBER_OR_PATH = Kind("a number or an address", number_or_address, text=True, file=True)
MOMENTUM = Kind("a number or 'none'", parse_momentum, (float, int, str), text=True)
FILL = Kind("a number", parse_number, (float, int))
ROWS = Kind("a slice A:B of samples, such as 0:1000, 1000: or :-100", parse_rows, text=True)
PART = Kind("a part I/N, such as 3/64", parse_part, text=True)
SIZE = Kind("a size such as 128M or 1G", parse_size, (int,), text=True)
