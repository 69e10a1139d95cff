"""What every command knows of the run."""

from __future__ import annotations


class Running:
    """Options that every command has; the object of Click's root context."""

    debug = False
    plugins = False
