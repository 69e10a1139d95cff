"""The wall: exit codes, messages without tracebacks, signals, closed pipes, full disks; and nothing left behind."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    BN,
    bn,
    check_refused,
    child,
    contents,
    good,
    run_child,
    save,
    save_h5,
    table,
    temporaries,
    untouched,
)

from bncli import __version__, errors
from bncli.stats import record


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.npy", table())
    good("fit", "x.npy")
    return tmp_path


def test_every_error_knows_its_code() -> None:
    codes = {
        errors.UsageError: 2,
        errors.InputError: 3,
        errors.MismatchError: 4,
        errors.OutputExistsError: 5,
        errors.WriteError: 74,
        errors.BnError: 70,
    }
    assert {error: error.exit_code for error in codes} == codes


def test_codes_of_a_real_child(here: Path) -> None:
    save(here / "wide.npy", np.zeros((3, 9)))
    runs = [
        (["fit", "x.npy", "-o", "new.bn.h5"], 0),
        (["fit", "x.npy", "--batch-size", "ten"], 2),
        (["fit", "none.npy"], 3),
        (["apply", "x.bn.h5", "wide.npy", "-o", "y.npy"], 4),
        (["fit", "x.npy"], 5),
    ]
    for args, code in runs:
        result = run_child(args)
        assert result.code == code
        assert bool(result.err) == (code != 0)
        assert "Traceback" not in result.err
    assert temporaries(here) == []


def test_console_script_is_the_same_entry() -> None:
    script = Path(sys.executable).with_name("bn")
    if not script.exists():
        pytest.skip("bn is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bn {__version__}\n", "")


def test_help_and_version_end_well() -> None:
    assert good("--version").out == f"bn {__version__}\n"
    for args in ([], ["fit"], ["apply"], ["inspect"], ["ls"]):
        assert "Usage: bn" in good(*args, "--help").out
        assert good(*args, "-h").out == good(*args, "--help").out


def test_usage_errors_say_what_to_type(here: Path) -> None:
    assert bn().code == 2
    check_refused(2, ["fit"], "INPUT")
    check_refused(2, ["apply", "x.bn.h5", "x.npy"], "-o")
    check_refused(2, ["inspekt", "x.bn.h5"], "did you mean 'bn inspect'?")
    check_refused(2, ["dance"], "there are fit, apply, inspect, ")
    check_refused(2, ["fit", "x.npy", "--bach-size", "3"], "--batch-size")
    check_refused(2, ["ls", "x.npy", "y.npy"], "y.npy")
    check_refused(2, ["\x1b[31m"], "\\x1b[31m")
    check_refused(2, ["fit", "x.npy", "--\x1b[31m"], "\\x1b[31m")
    check_refused(2, ["fit", "x.npy", "--init", "\x1b[31m"], "\\x1b[31m")
    check_refused(2, ["ls", "x.npy", "\x1b[31m"], "unexpected extra argument")


def test_a_bug_is_one_line_and_how_to_report_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> record.Stats:
        raise ZeroDivisionError("in \x1b[31mthe middle")

    monkeypatch.setattr(record, "load", broken)
    check_refused(
        70,
        ["inspect", "x.bn.h5"],
        "internal error: ZeroDivisionError: in \\x1b[31mthe middle",
        "report",
        "--debug",
        lines=1,
    )
    result = bn("inspect", "x.bn.h5", "--debug")
    assert result.code == 70
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("bn: internal error")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 3, "--max-memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (errors.BnError("odd"), 70, "odd"),
        (errors.MismatchError("one\ntwo"), 4, "one\ntwo"),
    ],
)
def test_whatever_a_command_raises(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def broken(path: str) -> record.Stats:
        raise error

    monkeypatch.setattr(record, "load", broken)
    check_refused(code, ["inspect", "x.bn.h5"], words)


def test_debug_shows_the_traceback_of_an_error(here: Path) -> None:
    result = bn("fit", "--debug", "none.npy")
    assert result.code == 3
    assert "Traceback" in result.err
    assert "InputError" in result.err
    assert result.err.splitlines()[-1] == "bn: error: none.npy: no such file; did you mean x.npy?"


def test_warnings_of_other_libraries_are_not_shown(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    load = record.load

    def noisy(path: str) -> record.Stats:
        warnings.warn("numpy says something", RuntimeWarning, stacklevel=1)
        return load(path)

    monkeypatch.setattr(record, "load", noisy)
    assert good("inspect", "x.bn.h5").err == ""


# --- stdout that cannot be written to


@pytest.mark.parametrize("args", [["inspect", "big.bn.h5"], ["inspect", "big.bn.h5", "--json"], ["fit", "--help"]])
def test_reader_that_goes_away(here: Path, args: list[str]) -> None:
    save(here / "big.npy", np.ones((4, 20_000), "f4"))
    good("fit", "big.npy", "-q", "-f")
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has its lines, only sooner
    try:
        result = run_child(args, stdout=writing)
    finally:
        os.close(writing)
    assert result.code == 141
    assert result.err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_head_gets_its_lines(here: Path, unbuffered: str) -> None:
    save(here / "big.npy", np.ones((4, 20_000), "f4"))
    good("fit", "big.npy", "-q")
    first = child(["inspect", "big.bn.h5"], env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    head = subprocess.run(["head", "-n", "2"], stdin=first.stdout, capture_output=True, text=True)
    assert first.stdout is not None
    first.stdout.close()
    _, err = first.communicate()
    assert head.stdout.splitlines()[1].startswith("0\t")
    assert first.returncode == 141
    assert err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("args", [["inspect", "x.bn.h5"], ["fit", "x.npy", "-f"], ["ls", "x.npy"], ["--help"]])
def test_stdout_is_full(here: Path, args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = run_child(args, stdout=full)
    assert result.code == 74
    assert result.err == "bn: error: standard output: No space left on device\n"


# --- outputs that cannot be written


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_disk_that_fills_up_under_stdout(here: Path, unbuffered: str) -> None:
    save(here / "big.npy", np.ones((4, 200), "f4"))
    good("fit", "big.npy", "-q")
    with open("out", "wb") as out:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        result = run_child(["inspect", "big.bn.h5"], stdout=out, preexec_fn=limit_file_size, env=environment)
    assert (result.code, result.err) == (74, "bn: error: standard output: File too large\n")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))


@pytest.mark.parametrize("out", ["y.npy", "y.h5", "x.bn.h5"])
def test_disk_full_leaves_everything_as_it_was(here: Path, out: str) -> None:
    args = ["apply", "x.bn.h5", "x.npy", "-o", out]
    if out == "x.bn.h5":
        save(here / "wide.npy", np.resize([1, 2], (20, 401)).astype("f4"))
        args = ["fit", "wide.npy", "-o", out, "-f", "-q"]
    with untouched(here):
        result = run_child(args, preexec_fn=limit_file_size)
        assert result.code == 74
        assert f"{out}: cannot be written: File too large" in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_found_out_first(here: Path) -> None:
    values = table()
    values[3] = np.nan  # would be refused, if it were read
    save(here / "x.npy", values)
    (here / "locked").mkdir(mode=0o500)
    check_refused(74, ["fit", "x.npy", "-o", "locked/x.bn.h5"], "locked/x.bn.h5", "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_files(here: Path) -> None:
    (here / "x.npy").chmod(0)
    (here / "x.bn.h5").chmod(0)
    check_refused(3, ["fit", "x.npy", "-f"], "x.npy", "Permission denied")
    check_refused(3, ["inspect", "x.bn.h5"], "x.bn.h5", "Permission denied")


# --- environments


def test_names_beyond_the_terminals_encoding(here: Path) -> None:
    (here / "names").write_text("ähre\n変数\nz\n", encoding="utf-8")
    good("fit", "x.npy", "--names", "names", "-f")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = run_child(["inspect", "x.bn.h5", "--get", "name"], env=environment)
    assert (result.code, result.out) == (0, "\\xe4hre\n\\u5909\\u6570\nz\n")
    result = run_child(["inspect", "nö.h5"], env=environment)
    assert result.code == 3
    assert "no such file" in result.err


def test_large_data_file_given_as_stats_is_not_read(here: Path) -> None:
    """A data file of 1 TB, sparse, must be refused for what it is."""
    save_h5(here / "data.h5", table())
    os.truncate("data.h5", 1 << 40)
    check_refused(3, ["inspect", "data.h5"], "data.h5", "not a stats file")
    with (here / "data.npy").open("wb") as file:
        file.truncate(1 << 40)
    check_refused(3, ["inspect", "data.npy"], "data.npy", "not a readable stats file")


def test_children_do_not_need_a_shell_profile(here: Path) -> None:
    done = subprocess.run([*BN, "ls", "x.npy"], env={}, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].startswith("x.npy\t600")
    assert contents(here).keys() == {"x.npy", "x.bn.h5"}


@pytest.mark.parametrize(("closed", "code"), [(">&-", 74), ("-q >&-", 0), ("2>&-", 0)])
def test_closed_streams_are_no_bug_of_bn(tmp_path: Path, closed: str, code: int) -> None:
    """What cannot be printed is told as on a full disk; where nothing is to be printed, nothing is wrong."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((50, 2)))
    command = f"{sys.executable} -m bncli fit x.npy -f {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (code == 74)
    assert "internal error" not in done.stderr
    assert (tmp_path / "x.bn.h5").exists()


@pytest.mark.parametrize("args", [[], ["fit"], ["nothing"]])
def test_what_click_says_keeps_its_lines(args: list[str]) -> None:
    """Without arguments there is the help, on lines of its own."""
    result = run_child(args)
    assert result.code == 2
    assert "\\n" not in result.err
    assert len(result.err.splitlines()) > (10 if not args else 1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_that_completes(shell: str) -> None:
    result = run_child([], env=os.environ | {"_BN_COMPLETE": f"{shell}_source"})
    assert (result.code, result.err) == (0, "")
    assert "_bn_completion" in result.out
    assert "Usage" not in result.out


def test_completing_of_what_there_is_not() -> None:
    result = run_child([], env=os.environ | {"_BN_COMPLETE": "tcsh_source"})
    assert (result.code, result.out) == (2, "")
    assert "_BN_COMPLETE=tcsh_source is not one of bash_source, zsh_source, fish_source" in result.err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_what_it_has_sourced(tmp_path: Path) -> None:
    program = tmp_path / "bn"
    program.write_text("#!/bin/sh\nexec " + shlex.join(BN) + ' "$@"\n')
    program.chmod(0o755)
    words = {"bn ex": ["export"], "bn fit --pre": ["--preset"], "bn fit --preset ke": ["keras"]}
    for line, expected in words.items():
        script = (
            "source <(_BN_COMPLETE=bash_source bn); "
            f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _bn_completion bn; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected
        assert done.stderr == ""
