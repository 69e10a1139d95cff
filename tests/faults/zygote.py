"""Runs of bn in children of one process that has loaded it already: a hundredth of a second each, and nothing survives.

The process forks for every run, limits or breaks what was asked for, and tells how the run ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code (negative for a signal), what it said, and whether the fault it was given came."""

    code: int
    out: str
    err: str
    hit: bool


class Zygote:
    """Starts on entering; `run` may be called any number of times."""

    def __enter__(self) -> Zygote:
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        # one thread: a process with more cannot be forked safely
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def run(self, args: Sequence[object], cwd: Path, fault: dict[str, Any] | None = None, **settings: Any) -> Outcome:
        """Run bn; `fault` is given to `inject.Injector`, `settings` are limit (bytes of a file), eager (checkpoints), careless."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"args": [str(a) for a in args], "cwd": str(cwd), "fault": fault} | settings
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    """Answer requests, a line each, until there are no more."""
    import importlib

    for name in ("engine.fit", "engine.apply", "engine.merge", "formats.hdf5.source", "exchange.npz", "exchange.csv",
                 "exchange.json", "cli.fit", "cli.apply", "cli.merge", "cli.export", "cli.import_",
                 "render.summary", "render.progress"):  # fmt: skip
        importlib.import_module(f"bncli.{name}")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as hit:
            pid = os.fork()
            if not pid:
                become(request, out.fileno(), err.fileno(), hit.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err, hit):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        answers.write(json.dumps({"code": code, "out": texts[0], "err": texts[1], "hit": bool(texts[2])}) + "\n")
        answers.flush()


def become(request: dict[str, Any], out: int, err: int, hit: int) -> None:
    """In the child: run bn as asked, and end."""
    import resource

    from faults.inject import Injector

    from bncli import cli
    from bncli.engine import checkpoint
    from bncli.numerics import layout
    from bncli.system import atomic

    os.dup2(out, 1)
    os.dup2(err, 2)
    code: Any = 99
    try:
        os.chdir(request["cwd"])
        if request.get("eager"):
            checkpoint.EVERY = checkpoint.SHARE = 0
            layout.PENDING_VALUES = request["eager"]
        if request.get("careless"):
            atomic.replacing = lambda path, **options: contextlib.nullcontext(path)  # type: ignore[assignment]
        if request.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        if request["fault"]:
            Injector(request["cwd"], hit, **request["fault"]).install()
        cli.main(request["args"])
    except SystemExit as done:
        code = done.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


if __name__ == "__main__":
    serve()
