"""The fields that .npz and .csv files keep under their own names: an array or column for each."""

from __future__ import annotations

from typing import Any

from bncli.errors import InputError
from bncli.exchange.contract import Content

NAMES = "name"


def use_notes(use: str) -> list[str]:
    """What the fields do not say themselves."""
    return [] if use == "running" else ["running_mean and running_var hold the population statistics, as asked for"]


def check_there(found: Any, content: Content) -> None:
    """Raise InputError when a field that cannot be done without is missing."""
    for name in ("running_mean", "running_var"):
        if name not in found:
            raise InputError(f"{content}: holds no {name}; it takes running_mean and running_var to import")
