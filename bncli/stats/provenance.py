"""Where statistics come from: versions, the command, inputs and time, as JSON in the stats file.

The command line sets COMMAND before it knows which command it runs, so this module imports nothing large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from bncli.errors import printable
from bncli.version import __version__

# set by the command line for the time of one command; empty where Python calls
COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


def provenance(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe how statistics came about.

    Parameters
    ----------
    sources : sequence of mapping
        One per input: its name, dataset, shape and so on.

    Returns
    -------
    dict
        `versions` (of bncli, NumPy and Python), `command` (a list of words, empty in Python), `sources` and `time`
        (ISO 8601, UTC, to the second).
    """
    import datetime
    import platform

    import numpy as np

    return {
        "versions": {"bncli": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "command": list(COMMAND.get()),
        "sources": list(sources),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def written_by(attributes: Mapping[str, Any]) -> str:
    """Return ", written by bn VERSION", or nothing where the attributes of a stats file do not say it."""
    import json

    try:
        return f", written by bn {printable(json.loads(attributes['provenance'])['versions']['bncli'])}"
    except (KeyError, TypeError, ValueError):
        return ""
