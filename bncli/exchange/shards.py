"""A checkpoint that was saved in several files: whether this is one of them, and what of a layer the others hold.

Hugging Face's form: `model-00002-of-00005.safetensors` (or `.bin`), and next to them `model.safetensors.index.json`, whose
`weight_map` names the file of each tensor. No file that an index names is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from typing import NamedTuple

from bncli.errors import BnError, InputError, printable
from bncli.system import atomic

NUMBERED = re.compile(r"-(\d+)-of-(\d+)(?!\d)")
INDEX = ".index.json"
LARGEST = 4 << 20  # of an index, as some 100 bytes per tensor; JSON may take twenty times its size
NAMED = 4  # keys in a message


class Shards(NamedTuple):
    """The shards next to a file: the file of every key in the indexes there, and whether this one is a shard at all."""

    files: dict[str, str]
    numbered: bool

    def missing(self, keys: Collection[str]) -> dict[str, str]:
        """Those of a layer's keys that other files hold, or may hold where no index lists it: key -> file."""
        known = {key: self.files[key] for key in keys if key in self.files}
        return known if self.files or not self.numbered else dict.fromkeys(keys, "")

    @property
    def hint(self) -> str:
        """For a message that something is not in the file."""
        return "; it is one of several files of a checkpoint, so that it may be in another" if self.numbered else ""


def next_to(path: str) -> Shards:
    """Read the indexes next to a file. One that cannot be read is ignored, and so is a folder that cannot be listed."""
    folder, name = os.path.split(path)
    found: dict[str, str] = {}
    try:
        others = sorted(other for other in os.listdir(folder or ".") if other.endswith(INDEX))
    except OSError:
        others = []
    for other in others:
        found |= _weight_map(os.path.join(folder, other))
    number = NUMBERED.search(name)
    return Shards(found, name in found.values() or (number is not None and int(number[2][:9]) > 1))


def refusal(path: str, layer: str, missing: dict[str, str]) -> InputError:
    """The error for a layer of which some keys are in other files."""
    listed = [printable(key) + (f" is in {printable(file)}" if file else "") for key, file in missing.items()][:NAMED]
    what = ", ".join(listed) if any(missing.values()) else f"none of {', '.join(listed)}, … is in it"
    return InputError(
        f"{printable(path)}: holds only a part of layer {printable(layer)!r}: {what}; it is one of several files of a "
        "checkpoint: save the model as one file, or the layer's tensors together"
    )


def _weight_map(path: str) -> dict[str, str]:
    try:
        content = json.loads(atomic.read_bytes(path, LARGEST))["weight_map"]
        return {key: file for key, file in content.items() if isinstance(file, str)}
    except (BnError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
