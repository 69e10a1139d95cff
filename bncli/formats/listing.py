"""What a file holds, for `bn ls`."""

from __future__ import annotations

from bncli.formats import Listed, format_of
from bncli.formats.address import split


def listing(address: str) -> list[Listed]:
    """Every array of a file.

    Raises
    ------
    InputError
        When the file is missing, unreadable, or of no known format.
    """
    path, _ = split(address)
    return format_of(path).arrays(path)
