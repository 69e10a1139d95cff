"""Bring docs/ up to date with the program: python docs/make.py

Writes the command reference (reference.md) and the picture of `bn inspect` (inspect.svg), and puts what the commands
print now into the console blocks of the pages. tests/test_docs.py fails where a page is not current.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import examples

from bncli.cli import cli
from bncli.cli.options import Grouped
from bncli.engine.declare import GROUPS
from bncli.stats import columns as statistics

DOCS = examples.DOCS
WIDTH = 110  # columns of the terminal in the picture
SHOWN = ["inspect", "cancer.bn.h5", "--sort", "running_sd", "--top", "8"]
HEAD = """# Command reference

% Written by docs/make.py from the program's own declarations. Change those, not this page.

Every command with its options, made from the program. The other pages explain them.
"""


def reference() -> str:
    """Markdown of every command and option."""
    context = click.Context(cli, info_name="bn")
    parts = [HEAD]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_command(command, click.Context(command, info_name=name, parent=context)))
    head = "## Columns of statistics\n\nIn `bn inspect`, its JSON and TSV, and exported .csv and .npz files.\n\n"
    return "\n".join([*parts, head + statistics.reference()])


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## bn {context.info_name}", "", "```text", usage, "```", "", _prose(command.help or "")]
    groups: dict[str, list[click.Option]] = {group: [] for group in GROUPS}
    for param in command.params:
        if isinstance(param, Grouped):
            groups[param.group].append(param)
    for group, options in groups.items():
        if not options:
            continue
        lines += ["", f"| {group} | |", "|---|---|"]
        lines += [_option(option, context) for option in options]
    if command.epilog:
        lines += ["", _prose(command.epilog)]
    return "\n".join([*lines, ""])


def _option(option: click.Option, context: click.Context) -> str:
    term, meaning = option.get_help_record(context) or ("", "")
    cells = [f"`{term}`", re.sub(r"\s+", " ", meaning)]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _prose(help: str) -> str:
    """Markdown of a help text: paragraphs, and blocks whose lines click keeps as they are."""
    import inspect

    parts = []
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        kept = paragraph.startswith("\b")
        text = paragraph.removeprefix("\b").strip("\n")
        parts.append(f"```text\n{text}\n```" if kept else text.replace("*", r"\*"))
    return "\n\n".join(parts)


def printed(folder: Path, environment: dict[str, str]) -> str:
    """What `bn inspect` prints on a terminal of WIDTH columns, with its escape codes."""
    work = folder / "work"
    fit = ["fit", "sample_data/cancer_train.h5", "--eps", "1e-8", "-q", "-f", "-o", "cancer.bn.h5"]
    subprocess.run(["bn", *fit], cwd=work, env=environment, check=True)
    terminal = {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    reader, writer = os.openpty()
    with subprocess.Popen(["bn", *SHOWN], cwd=work, env=environment | terminal, stdout=writer) as process:
        os.close(writer)
        chunks = []
        while chunk := _read(reader):
            chunks.append(chunk)
    os.close(reader)
    assert process.returncode == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def picture(text: str) -> str:
    """An SVG of a terminal."""
    import io

    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ bn {' '.join(SHOWN)}", style="bold"))
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title="bn inspect", unique_id="bn")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.S)  # a page loads nothing from elsewhere


def update(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run a page's blocks, and put what they print into it."""
    text = page.read_text(encoding="utf-8")
    now, end = "", 0
    for block in examples.blocks(page):
        now += text[end : block.start] + (examples.run(block, folder, environment) if block.runs else block.body)
        end = block.end
    now += text[end:]
    if now != text:
        page.write_text(now, encoding="utf-8")
        print(f"updated {page.relative_to(examples.ROOT)}")


def main() -> None:
    """Update everything."""
    (DOCS / "reference.md").write_text(reference(), encoding="utf-8")
    for page in examples.PAGES:
        with tempfile.TemporaryDirectory() as folder:
            update(page, Path(folder), examples.prepare(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        svg = picture(printed(Path(folder), examples.prepare(Path(folder))))
    (DOCS / "inspect.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
