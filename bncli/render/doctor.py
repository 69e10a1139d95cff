"""What bn runs on: versions, the kernel, HDF5 filters and optional packages."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numpy as np

from bncli.engine.executors import available
from bncli.formats import built_in, plugged_in
from bncli.numerics import compiled
from bncli.version import __version__

# package -> (what it is for, what to install)
OPTIONAL = {
    "deflate": ("gzip in HDF5, two to four times as fast", "'bncli[fast]'"),
    "torch": ("bn export and import of .pt", "'bncli[torch]'"),
    "onnx": ("bn export and import of .onnx", "'bncli[onnx]'"),
    "safetensors": ("bn export and import of .safetensors", "'bncli[safetensors]'"),
    "scikit-learn": ("bncli.exchange.sklearn", "'bncli[sklearn]'"),
    "hdf5plugin": ("HDF5 files in blosc, zstd, lz4 and others", "hdf5plugin"),
}


def examine() -> dict[str, Any]:
    """Return all of it as plain values; nothing optional is imported but hdf5plugin."""
    return {
        "bncli": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{name: version for known in built_in() for name, version in known.versions().items()},
        "platform": f"{platform.system()} {platform.machine()}",
        "kernel": compiled.NAME,
        "kernel_note": compiled.NOTE,
        "cpus": available(),
        "filters": {name: here for known in built_in() for name, here in known.filters().items()},
        "formats": {known.name: known.versions() for known in plugged_in()},
        "plugins": os.environ.get("HDF5_PLUGIN_PRELOAD") != "::",
        "packages": {name: _version(name) for name in OPTIONAL},
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """What a person sees: part, what was found, and a note."""
    libraries = [name for known in built_in() for name in known.versions()]
    plain = [[name, str(found[name]), ""] for name in ("bncli", "python", "numpy", *libraries, "platform")]
    here = [name for name, there in found["filters"].items() if there]
    missing = [name for name, there in found["filters"].items() if not there]
    plugins = ["on", "loaded from HDF5_PLUGIN_PATH"] if found["plugins"] else ["off", "--plugins lets HDF5 load them"]
    return [
        *plain,
        ["kernel", found["kernel"], found["kernel_note"]],
        ["cpus", str(found["cpus"]), ""],
        ["filters", ", ".join(here), ""],
        *([["filters", "-", f"not here: {', '.join(missing)}"]] if missing else []),
        ["plugins", *plugins],
        *(
            [f"format {name}", ", ".join(map(" ".join, versions.items())), "of another package"]
            for name, versions in found["formats"].items()
        ),
        *(
            [
                name,
                found["packages"][name] or "-",
                purpose if found["packages"][name] else f"for {purpose}: pip install {cure}",
            ]
            for name, (purpose, cure) in OPTIONAL.items()
        ),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
