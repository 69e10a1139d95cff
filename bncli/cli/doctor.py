"""bn doctor."""

from __future__ import annotations

import click

from bncli.cli import options as opt


@opt.command("doctor")
@opt.as_json
@opt.plugins
@opt.debug
def doctor(as_json: bool) -> None:
    """Show environment information: versions, the kernel in use, HDF5 filters and optional packages.

    Include it in bug reports. bn runs on Linux and macOS.

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
