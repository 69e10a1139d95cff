"""Running bn in-process, in a child, and on a terminal of a chosen width; and small data to run it on."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from bncli import cli

Array = npt.NDArray[Any]
BN = [sys.executable, "-c", "import sys; sys.argv[0] = 'bn'; from bncli.__main__ import main; main()"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def bn(*args: object) -> Result:
    """Run the console entry in this process, as a pipe would see it."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([str(a) for a in args])
    except SystemExit as done:
        code = done.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def good(*args: object) -> Result:
    """Run what must succeed."""
    result = bn(*args)
    assert result.code == 0, result
    assert "Traceback" not in result.err
    return result


def check_refused(code: int, args: Sequence[object], *words: object, lines: int = 2) -> Result:
    """Run what must fail with this code, in at most `lines` lines that hold these words, without a traceback."""
    result = bn(*args)
    assert result.code == code, result
    for word in words:
        assert str(word) in result.err, (word, result.err)
    assert "Traceback" not in result.err
    assert result.out == ""
    said = [line for line in result.err.splitlines() if not line.startswith(("Usage:", "Try '", "bn: warning:"))]
    assert 1 <= len([line for line in said if line]) <= lines, said
    assert no_controls(result.err), result.err
    return result


def child(args: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*BN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run_child(args: Sequence[object], **options: Any) -> Result:
    done = subprocess.run(
        [*BN, *map(str, args)], stdout=options.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, **options
    )
    return Result(done.returncode, (done.stdout or b"").decode(), done.stderr.decode())


def on_terminal(args: Sequence[object], columns: int = 80, **environment: str) -> Result:
    """Run bn with stdout on a pseudo-terminal of this width."""
    main, other = pty.openpty()
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "LINES")}
    variables |= {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | environment
    process = subprocess.Popen([*BN, *map(str, args)], stdout=other, stderr=subprocess.PIPE, env=variables)
    os.close(other)
    chunks = []
    with contextlib.suppress(OSError):  # EIO: the other end was closed
        while chunk := os.read(main, 1 << 16):
            chunks.append(chunk)
    os.close(main)
    _, err = process.communicate()
    return Result(process.returncode, b"".join(chunks).decode().replace("\r\n", "\n"), err.decode())


def plain(text: str) -> str:
    """Text without the styles that bn itself puts on a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def no_controls(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def table(rows: int = 600, columns: int = 3, dtype: str = "f8", seed: int = 1) -> Array:
    scale = 10.0 ** np.arange(columns)
    return (np.random.default_rng(seed).normal(size=(rows, columns)) * scale + 3 * scale).astype(dtype)


def save(path: Path, values: Array) -> Path:
    np.save(path, values)
    return path


def save_h5(path: Path, values: Array, name: str = "x", **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values, **options)
    return path


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Check that every file under a folder stays what it is, and that none is added or lost."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in sorted(folder.rglob("*"))
    }


def temporaries(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
