"""PyTorch: the state_dict of one nn.BatchNorm1d/2d/3d, and one such layer of a model's checkpoint.

Written in float64: `load_state_dict` copies into the layer's own type, so that a float32 layer rounds once and a
float64 layer not at all. Read with `weights_only=True` alone, which runs no code of the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bncli.errors import BnError, BnWarning, InputError, UsageError, printable
from bncli.exchange import pickles, state_dict
from bncli.exchange.common import package
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.stats.record import Stats

OLDEST = (2, 6)  # weights_only=True of older versions can be made to run code (CVE-2025-32434)
FOLDER = 0x10  # attribute of a member for which torch.load gives zeros, while the zip's checksums still hold
DEEPEST = 20  # dictionaries inside dictionaries
PROGRAMS = {  # kind: a member that only it has, and Python that loads it, and that takes its state_dict
    "a TorchScript archive (torch.jit.save)": (
        "constants.pkl", 'c = torch.jit.load({}, map_location="cpu")', "c.state_dict()",
    ),
    "an exported program (torch.export.save)": (
        "models/model.json", "c = torch.export.load({})", "dict(c.state_dict)",
    ),
}  # fmt: skip
# of what `weights_only` allows, those that make as much memory as the file claims; by their line in a pickle
SWELLING = (b"\nbytearray\n", b"\n_rebuild_device_tensor_from_cpu_tensor\n")
PIECE = 1 << 20  # bytes of a file to search at a time
ROOM, VISIT = 64 << 20, 64  # bytes for the keys in them, and for each: a million of usual length


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """A state_dict that `load_state_dict(strict=True)` of nn.BatchNorm takes."""
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({key: torch.from_numpy(values) for key, values in state_dict.arrays(stats).items()}, buffer)
    return Encoded(buffer.getvalue(), state_dict.settings(stats), state_dict.load_notes(stats))


def decode(content: Content) -> Layers:
    """Layers of a state_dict, or of a checkpoint that holds one, by the prefix of their keys.

    Raises
    ------
    UsageError
        When torch is missing or older than 2.6.
    InputError
        When the file is damaged or holds Python objects beyond tensors.
    """
    torch = _torch()
    path = content.path
    with _refusing(content):
        _check_sums(path)
        _check_calls(path)
        tensors = _tensors(torch, torch.load(path, map_location="cpu", weights_only=True))
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}

        def get(key: str) -> Any:
            return _array(torch, tensors[key], key, os.path.getsize(path))

        layers = state_dict.layers(shapes, get, path, _layer)

    def read(name: str) -> Layer:
        with _refusing(content):
            return layers.read(name)

    return replace(layers, read=read)


def _layer(found: state_dict.Found) -> Layer:
    return Layer(found.columns, {"num_batches": found.tracked or 0}, tracked=found.tracked)


@contextlib.contextmanager
def _refusing(content: Content) -> Iterator[None]:
    """Turn what a damaged or hostile file makes torch raise, which can be anything, into an InputError."""
    try:
        yield
    except (BnError, BnWarning):  # a warning where the caller made it an error
        raise
    except Exception as error:
        raise _refused(content, error) from None


def _array(torch: Any, tensor: Any, key: str, size: int) -> Any:
    """Values of a plain tensor; a view that repeats its values may claim any number of them, a file of `size` bytes has fewer."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        raise ValueError(f"{key} is not a plain tensor of real numbers")
    if tensor.numel() > size:
        raise ValueError(f"{key} claims {tensor.numel()} values, more than the file has bytes")
    return (tensor.detach().double() if tensor.is_floating_point() else tensor).numpy()


def _check_sums(path: str) -> None:
    """Raise ValueError when a member of a zip (what torch.save writes since 1.6) was altered; torch.load does not look.

    Raises InputError for an archive of another kind than torch.save's.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_kind(archive.namelist(), path)
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:  # it could inflate to any size
                    raise ValueError(f"its member {info.filename} is compressed, as torch.save never does")
                if info.external_attr & FOLDER:
                    raise ValueError(f"its member {info.filename} is marked as a folder")
            if bad := archive.testzip():
                raise ValueError(f"its member {bad} does not match its checksum")


def _check_kind(members: list[str], path: str) -> None:
    """Raise InputError for archives of programs, which people give the same suffixes."""
    for kind, (mark, load, weights) in PROGRAMS.items():
        if any(f"/{mark}" in f"/{member}" for member in members):
            line = pickles.command(path, load, weights)
            raise InputError(
                f"{printable(path)}: {kind}, which holds a program and not only weights. If you trust the file, save its "
                f"tensors alone:\n  {line}"
            )


def _check_calls(path: str) -> None:
    """Raise ValueError where a pickle calls what makes memory of any size. Members of the zip are stored uncompressed, so they can be searched."""
    with open(path, "rb") as file:
        tail = b""
        while piece := file.read(PIECE):
            for name in SWELLING:
                if name in tail + piece:
                    raise ValueError(f"it calls {name.decode().strip()}, which no state_dict needs")
            tail = piece[-max(map(len, SWELLING)) :]


def _torch() -> Any:
    torch = package("torch", "torch")
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise UsageError(
            f"torch {torch.__version__} is older than 2.6, which reads no file safely; upgrade it: pip install 'bncli[torch]'"
        )
    return torch


def _refused(content: Content, error: Exception) -> InputError:
    """Say why a file was not read; torch's own message suggests to switch the safety off."""
    if "Weights only" in str(error) or "weights_only" in str(error):
        return pickles.refusal(content.name, str(error))
    return content.unreadable("PyTorch file", error)


def _tensors(torch: Any, content: Any) -> dict[str, Any]:
    """Every tensor in a dictionary and in those inside it, under its keys joined by dots.

    One dictionary may stand in many places, 10 of them in each other in 10^10, so that what is visited is limited.
    """
    found: dict[str, Any] = {}
    level, room = [("", content)], ROOM
    for _ in range(DEEPEST):
        items = (
            (prefix + key, v)
            for prefix, d in level
            if isinstance(d, dict)
            for key, v in d.items()
            if isinstance(key, str)
        )
        level = []
        for key, value in items:
            room -= len(key) + VISIT
            if room < 0:
                raise ValueError("its dictionaries are nested too deeply")
            if not isinstance(value, torch.Tensor):
                level.append((f"{key}.", value))
            elif found.setdefault(key, value) is not value:
                raise ValueError(
                    f"two tensors under the key {key}, one of them in a dictionary inside; save one state_dict alone"
                )
    return found
