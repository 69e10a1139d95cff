"""bn ls."""

from __future__ import annotations

import click

from bncli.cli import options


@click.command(short_help="List the datasets of a file.")
@click.argument("file", metavar="FILE")
@options.common
def ls(file: str, quiet: bool) -> None:
    """List the arrays in FILE: address, shape, type, chunks, compression, and why one cannot be fitted.

    \b
    Example:
      bn ls train.h5
    """
    from bncli.formats.listing import listing
    from bncli.render.table import show_listing

    show_listing(listing(file))
