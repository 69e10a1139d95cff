"""Completion in a bash that a person types in."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import save_h5

PROMPT = b"<ready>"


class Shell:
    """An interactive bash on a terminal of its own, in which `bn` prints its arguments once the line is entered."""

    def __init__(self, folder: Path) -> None:
        own, other = pty.openpty()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "PS1": PROMPT.decode(), "TERM": "dumb", "HOME": str(folder)}
        command = ["bash", "--norc", "--noprofile", "-i"]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, cwd=folder, start_new_session=True
        )
        os.close(other)
        self.terminal = own
        self.read_until(PROMPT)
        self.send(b'eval "$(bn completion bash)"; bn() { printf "[%s]" "$@"; }\n')
        self.read_until(PROMPT)

    def send(self, typed: bytes) -> None:
        os.write(self.terminal, typed)

    def read_until(self, end: bytes) -> bytes:
        found, deadline = b"", time.monotonic() + 60
        while end not in found:
            assert time.monotonic() < deadline, found
            if select.select([self.terminal], [], [], 0.1)[0]:
                found += os.read(self.terminal, 4096)
        return found

    def arguments(self, line: str) -> str:
        """What bn is called with, when the line is typed, completed and entered."""
        self.send(line.encode() + b"\t")
        self.read_until(b" " if line.endswith("=z") else line.encode())
        self.send(b"\n")
        return self.read_until(PROMPT).decode().rpartition("\n")[2].removesuffix(PROMPT.decode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_quotes_and_spaces(tmp_path: Path) -> None:
    save_h5(tmp_path / "a b.h5", np.ones((3, 2)), "x")
    save_h5(tmp_path / "n.h5", np.ones((3, 2)), "my $1 `data`")
    shell = Shell(tmp_path)
    try:
        for line in ('bn fit "a b.h5::', "bn fit 'a b.h5::/", "bn fit a\\ b.h5::"):
            assert shell.arguments(line) == "[fit][a b.h5::/x]", line
        for line in ("bn fit n.h5::/my", "bn fit 'n.h5::", 'bn fit "n.h5::/'):
            assert shell.arguments(line) == "[fit][n.h5::/my $1 `data`]", line
        assert shell.arguments('bn fit --target "n.h5::') == "[fit][--target][n.h5::/my $1 `data`]"
    finally:
        shell.close()
