"""bn ls."""

from __future__ import annotations

import click

from bncli.cli import options


@click.command(short_help="List the datasets of a file.")
@click.argument("file", callback=options.named, metavar="FILE")
@options.as_json
@options.common
def ls(file: str, as_json: bool, quiet: bool) -> None:
    """List the arrays in FILE: address, shape, type, chunks, compression, and why one cannot be fitted.

    \b
    Example:
      bn ls train.h5
    """
    from bncli.formats.listing import listing
    from bncli.render.summary import json_text
    from bncli.render.table import show_listing

    if as_json:
        click.echo(json_text([array.as_dict() for array in listing(file)]))
    else:
        show_listing(listing(file))
