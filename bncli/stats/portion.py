"""Which segments of a whole fit a part holds (`bn fit --part`), and what joins it with the others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bncli.numerics.arrays import Array

PLACE = "state/part/"
FINGERPRINT = f"{PLACE}fingerprint"


@dataclass(frozen=True, eq=False)
class Portion:
    """A run of the segments of one fit, with the nodes of the tree that they gave (see `engine.tree`).

    Attributes
    ----------
    first, stop, total : int
        Segments `first` to `stop - 1` of `total`.
    parts : tuple of (int, int)
        The parts (I, N) that it was made of, ascending.
    fingerprint : dict
        Everything that affects the result, as plain values: it is equal in all parts of one fit.
    arrays, plain : dict
        The nodes, as `Tree.pack` gives them.
    """

    first: int
    stop: int
    total: int
    parts: tuple[tuple[int, int], ...]
    fingerprint: Mapping[str, Any]
    arrays: Mapping[str, Array]
    plain: Mapping[str, Any]

    def __str__(self) -> str:
        """In words: "part 3 of 64", "parts 2-4 of 7"."""
        return named(self.parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = [f"{number}/{of}" for number, of in self.parts]
        return {"parts": parts, "segments": [self.first, self.stop], "num_segments": self.total}

    def packed(self) -> tuple[dict[str, Array], str]:
        """The arrays, and everything else as JSON but the fingerprint."""
        plain = {name: value for name, value in vars(self).items() if name not in ("fingerprint", "arrays")}
        return {PLACE + name: array for name, array in self.arrays.items()}, json.dumps(plain, sort_keys=True)

    @classmethod
    def unpacked(cls, arrays: Mapping[str, Array], plain: str, fingerprint: Mapping[str, Any]) -> Portion:
        """What `packed` gave, from all arrays of a stats file.

        Raises
        ------
        LookupError, TypeError, ValueError
            When it is nothing that `packed` gives.
        """
        own = {name.removeprefix(PLACE): array for name, array in arrays.items() if name.startswith(PLACE)}
        held = json.loads(plain)
        parts = tuple((int(number), int(of)) for number, of in held.pop("parts"))
        portion = cls(**held, parts=parts, fingerprint=fingerprint, arrays=own)
        if not 0 <= portion.first <= portion.stop <= portion.total:
            raise ValueError("its segments are not a run of those of the whole")
        return portion


def named(parts: tuple[tuple[int, int], ...]) -> str:
    """Parts in words.

    >>> named(((3, 64),)), named(((1, 7), (2, 7), (3, 7), (6, 7))), named(((1, 2), (3, 4)))
    ('part 3 of 64', 'parts 1-3, 6 of 7', 'part 1 of 2, part 3 of 4')
    """
    texts = []
    for of, group in itertools.groupby(parts, key=lambda part: part[1]):
        numbers = [number for number, _ in group]
        runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
        ranges = [f"{r[0][1]}-{r[-1][1]}" if len(r) > 1 else str(r[0][1]) for r in runs]
        texts.append(f"part{'s' * (len(numbers) > 1)} {', '.join(ranges)} of {of}")
    return ", ".join(texts)
