"""What pyproject.toml says agrees with itself and with the workflows; sdist and wheel work where no checkout is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import peer

import bncli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, CIBUILDWHEEL = PYPROJECT["project"], PYPROJECT["tool"]["cibuildwheel"]
VERSIONS = [
    match[1]
    for c in PROJECT["classifiers"]
    if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c))
]
PLATFORMS = {"linux-x86_64", "linux-aarch64", "macos-x86_64", "macos-arm64"}


def test_versions_of_python_agree() -> None:
    first = VERSIONS[0]
    assert PROJECT["requires-python"] == f">={first}"
    assert CIBUILDWHEEL["build"].split() == [f"cp{v.replace('.', '')}-*" for v in VERSIONS]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{first.replace('.', '')}"
    assert f'"py_limited_api": "cp{first.replace(".", "")}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_files_that_are_named_exist() -> None:
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    named = re.findall(r"\{project\}/(\S+)", CIBUILDWHEEL["test-command"])
    assert named
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.peer
def test_workflows_are_valid_and_name_what_is_there() -> None:
    yaml, folder = peer("yaml"), ROOT / ".github" / "workflows"
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert found.keys() == {"ci", "wheels"}
    for workflow in found.values():
        for job in workflow["jobs"].values():
            steps = job["steps"]
            assert job["runs-on"]
            assert all(("uses" in step) != ("run" in step) for step in steps)
            python = next(step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
            assert python in VERSIONS
    assert found["ci"]["jobs"]["run"]["steps"][-1] == {"run": ".ci/run"}
    wheels = found["wheels"]["jobs"]["wheels"]
    assert {entry["name"] for entry in wheels["strategy"]["matrix"]["include"]} == PLATFORMS
    assert any("python -m cibuildwheel" in step.get("run", "") for step in wheels["steps"])


@pytest.mark.parametrize("system", ["MacOS", "POSIX :: Linux"])
def test_systems_are_named(system: str) -> None:
    assert f"Operating System :: {system}" in PROJECT["classifiers"]


def interpreters() -> dict[str, str]:
    """The supported versions of CPython on this machine, and where: the running one, those in PATH, and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for version in VERSIONS:
        named = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))]
        for path in filter(None, named):
            code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip() == version:
                found[version] = path
    found[f"{sys.version_info.major}.{sys.version_info.minor}"] = sys.executable
    return found


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command without what this test run has in its environment; what it printed is shown when it fails."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BN_", "VIRTUAL_ENV"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(python: str, folder: Path) -> Path:
    """A new virtual environment without any package; returns its Python."""
    call(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


@pytest.mark.peer
@pytest.mark.skipif(
    os.environ.get("BN_REQUIRE_PEERS") != "1", reason="needs a package index; BN_REQUIRE_PEERS=1 runs it"
)
def test_sdist_and_wheel_run_start_in_a_bare_environment(tmp_path: Path) -> None:
    """One wheel, on every CPython that is here, and the sdist: compiled, with equal results."""
    ignored = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    builder = environment(sys.executable, tmp_path / "builder")
    call(builder, "-m", "pip", "install", "-q", "build", cwd=tmp_path)
    call(builder, "-m", "build", "-q", "-o", tmp_path / "dist", tmp_path / "checkout", cwd=tmp_path)  # wheel from sdist
    shutil.rmtree(tmp_path / "checkout")
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"bncli-{bncli.__version__}-cp310-abi3-")
    printed = {}
    for name, python, archive in [
        ("sdist", sys.executable, sdist),
        *((v, p, wheel) for v, p in interpreters().items()),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        own = environment(python, folder / "venv")
        call(own, "-m", "pip", "install", "-q", archive, cwd=folder)
        smoke = [ROOT / "tests" / "smoke.py", "--kernel", "c", ROOT / "README.md", ROOT / "sample_data"]
        printed[name] = call(own, *smoke, cwd=folder)
        shutil.rmtree(folder)
    assert len(set(printed.values())) == 1, printed
