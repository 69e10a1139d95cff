"""bn ls."""

from __future__ import annotations

import click

from bncli.cli import options as opt


@opt.command("ls")
@opt.argument("file", "FILE")
@opt.as_json
@opt.debug
def ls(file: str, as_json: bool) -> None:
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
