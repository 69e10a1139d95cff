"""bn doctor."""

from __future__ import annotations

import click

from bncli.cli import options


@click.command(short_help="Say what bn runs on.")
@options.as_json
@options.plugins
@options.common
def doctor(as_json: bool, quiet: bool) -> None:
    """Print versions, the kernel in use, and which HDF5 filters and optional packages there are.

    \b
    Example:
      bn doctor
    """
    from bncli.render.doctor import examine, rows
    from bncli.render.summary import json_text
    from bncli.render.table import show_rows

    found = examine()
    if as_json:
        click.echo(json_text(found))
    else:
        show_rows(["part", "found", "note"], rows(found))
