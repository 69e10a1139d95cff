"""Run the bn commands of README's Start with an installed bncli: python smoke.py [--kernel c] README SAMPLE_DATA

For an environment that has no checkout and no pytest, such as one in which a wheel was just installed. Prints the version,
the kernel, and a digest of the statistics and of the normalized data, which is the same for every installation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


def start_commands(readme: str) -> list[list[str]]:
    """Arguments of each `bn` in the first sh block under "## Start"."""
    section = readme[readme.index("\n## Start") :]
    block = section[section.index("\n```sh\n") :].split("```")[1]
    commands = re.findall(r"\.venv/bin/bn ([^&\n]+)", block.replace("\\\n", " "))
    assert commands, "Start runs no bn"
    return [shlex.split(command) for command in commands]


def run(folder: Path, *args: str) -> str:
    """Run the bn of this interpreter in a folder where no checkout is; a failure shows what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-I", "-m", "bncli", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bn {shlex.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", help="fail where bn computes with another one")
    parser.add_argument("readme", type=Path)
    parser.add_argument("sample_data", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, digest = Path(name), hashlib.sha256()
        (folder / "sample_data").symlink_to(options.sample_data.resolve())
        found = json.loads(run(folder, "doctor", "--json"))
        if options.kernel not in (None, found["kernel"]):
            sys.exit(f"the kernel is {found['kernel']}: {found['kernel_note']}")
        outputs = [run(folder, *args) for args in start_commands(options.readme.read_text(encoding="utf-8"))]
        assert any(text.count("\n") > 30 for text in outputs), outputs  # inspect: a line for each feature
        for path in sorted(folder.glob("*.npy")):
            digest.update(path.read_bytes())
        for path in sorted(folder.glob("*.bn.h5")):
            digest.update(json.dumps(json.loads(run(folder, "inspect", str(path), "--json"))["features"]).encode())
        assert {path.suffix for path in folder.iterdir()} == {"", ".npy", ".h5"}, list(folder.iterdir())
    print(found["bncli"], found["kernel"], digest.hexdigest())


if __name__ == "__main__":
    main()
