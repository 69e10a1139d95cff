"""Run the examples of the README and of docs/, in a folder with sample data; used by make.py and tests/test_docs.py.

Blocks of a page run in order in one folder. A `sh` block has to succeed. A `console` block holds commands behind "$ "
and what they print, where "..." stands for anything. A `python` block runs as a script. A comment in the line before
a block changes that: `<!-- needs torch -->` names packages without which it is left out, and
`<!-- not run: reason -->` marks one that cannot run.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "sample_data" / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
GENERATED = {DOCS / "reference.md"}

FENCE = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>[^\n]+)|needs (?P<needs>[\w, ]+)) -->\n)?"
    r"```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.S | re.M,
)
RUN = ("sh", "console", "python")
PROGRESS = re.compile(r"^bn (fit|apply): .* left\n", re.M)  # of what takes more than a second
DATA = """
import json, numpy as np, h5py
rng = np.random.default_rng(0)
table = (rng.standard_normal((1000, 4)) * [1, 2, 5, 10] + [0, 10, -3, 100]).astype(np.float32)
labels = (table[:, 0] + table[:, 1] / 10 > 1).astype(np.int64)
names = ["height", "weight", "age", "income"]
with h5py.File("train.h5", "w") as file:
    file["x"], file["y"] = table, labels
    file["x"].attrs["feature_names"] = names
np.save("train.npy", table)
np.save("new.npy", table[:300] * 1.5 + 1)
for i, part in enumerate(np.split(table, 4), 1):
    np.save(f"part-{i}.npy", part)
np.save("sorted.npy", np.arange(10.0).repeat(1000).reshape(-1, 1))
np.save("monday.npy", rng.standard_normal((512, 3)))
np.save("tuesday.npy", rng.standard_normal((88, 3)) + 0.1)
with h5py.File("scanner.h5", "w") as file:
    file["layer1.0.conv1"] = rng.standard_normal((200, 64, 4, 4)).astype(np.float32)
np.savez("conv.npz", **{"conv1.weight": rng.standard_normal((3, 4, 3, 3)), "conv1.bias": np.zeros(3)})
"""
MODEL = """
import torch
torch.manual_seed(0)
layer = torch.nn.BatchNorm2d(64)
for _ in range(10):
    layer(torch.randn(16, 64, 4, 4) * 2 + 1)
torch.save({"layer1.0.bn1." + key: value for key, value in layer.state_dict().items()}, "model.pt")
"""


@dataclass
class Block:
    """A fenced block of a page, and where its text begins and ends there."""

    page: Path
    line: int
    language: str
    body: str
    start: int
    end: int
    reason: str | None
    needs: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)} line {self.line}:\n{self.body}"

    @property
    def runs(self) -> bool:
        """Whether it can run here: with REQUIRE_PEERS, a missing package fails instead."""
        required = os.environ.get("BN_REQUIRE_PEERS") == "1"
        return (
            self.language in RUN
            and not self.reason
            and (required or all(importlib.util.find_spec(name) for name in self.needs))
        )


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body"))
        needs = [name.strip() for name in (match["needs"] or "").split(",") if name.strip()]
        span = match.span("body")
        yield Block(page, line, match["language"], match["body"], *span, match["reason"], needs)


def prepare(folder: Path) -> dict[str, str]:
    """Make the files that the examples use; returns an environment in which `bn` and `python` are those of this run."""
    (folder / "bin").mkdir()
    for name, command in (("bn", f'"{sys.executable}" -m bncli'), ("python", f'"{sys.executable}"')):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("BN_KERNEL", "COLUMNS", "FORCE_COLOR"))}
    environment = keep | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }
    (folder / "work").mkdir()
    (folder / "work" / "sample_data").symlink_to(ROOT / "sample_data")
    made = DATA + (MODEL if importlib.util.find_spec("torch") else "")
    subprocess.run([sys.executable, "-c", made], cwd=folder / "work", env=environment, check=True)
    return environment


def commands(body: str) -> Iterator[tuple[str, str]]:
    """(command, what the page shows that it prints) of a console block."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """Run a block; returns its text with what was printed now, which is the same text where the page is current."""

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        where = folder / "work"
        done = subprocess.run(
            args, cwd=where, env=environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done

    if block.language != "console":
        args = ["bash", "-e", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        done = call(*args, block.body)
        assert done.returncode == 0, f"{block}\nexit code {done.returncode}: {done.stdout}"
        return block.body
    text = ""
    for command, shown in commands(block.body):
        done = call("bash", "-c", command)
        done.stdout = PROGRESS.sub("", done.stdout)
        refused = "bn: error: " in done.stdout
        assert refused == bool(done.returncode), f"{block}\n{command}: exit code {done.returncode}: {done.stdout}"
        same = doctest.OutputChecker().check_output(shown.strip() + "\n", done.stdout.strip() + "\n", doctest.ELLIPSIS)
        space = "\n" if shown.endswith("\n\n") else ""
        text += f"$ {command}\n" + (shown if same else done.stdout + space)
    return text
