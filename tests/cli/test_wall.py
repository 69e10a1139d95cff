"""The wall: exit codes, messages without tracebacks, signals, closed pipes, full disks; and nothing left behind."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import h5py
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

from bncli import __version__, cli, errors
from bncli.cli import options
from bncli.engine.declare import GROUPS
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
    check_refused(2, ["dance"], "there are fit, inspect, apply, ")
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


def test_without_arguments_there_is_the_help() -> None:
    result = run_child([])
    assert result.code == 2
    assert "\\n" not in result.err
    assert "Usage: bn [OPTIONS] COMMAND" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit"], "missing INPUT...; see 'bn fit --help'"),
        (["apply", "s.bn.h5", "x.npy"], "missing -o/--output; see 'bn apply --help'"),
        (["nothing"], "no command 'nothing'; there are fit, inspect, "),
        (["fit", "x.npy", "--bach-size", "3"], "no option --bach-size; did you mean --batch-size?"),
        (["fit", "x.npy", "--batch-size", "many"], "--batch-size 'many' is not a whole number"),
        (["fit", "x.npy", "--init", "here"], "--init 'here' is not one of debias, zeros, unit, first, like"),
        (["fit", "x.npy", "--eps"], "option '--eps' requires an argument"),
        (["ls", "x.npy", "y.npy"], "got unexpected extra argument (y.npy); see 'bn ls --help'"),
        (["fit", "x.npy", "--shuffle", "--no-shuffle"], "give --shuffle or --no-shuffle once, not both"),
        (["--debug", "fit", "x.npy"], "--debug is an option of the commands; give it after one, as in 'bn ls --debug'"),
        (["fit", "x.npy", "--eps", "1", "--eps", "2"], "--eps is given 2 times; it takes one value"),
        (["inspect", "s.bn.h5", "--top", "0"], "--top 0: at least 1"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_an_error_of_usage_is_one_line_like_any_other(here: Path, args: list[str], words: str) -> None:
    with untouched(here):
        check_refused(2, args, f"bn: error: {words}" if not words.startswith("'") else words, lines=1)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_option_with_a_value_is_given_once(command: str) -> None:
    """In every command, whatever else is wrong; flags may be repeated."""
    context = click.Context(cli.cli)
    found = cli.cli.get_command(context, command)
    assert found is not None
    arguments = {"completion": ["bash"], "doctor": [], "fit": ["x.npy"], "merge": ["s.bn.h5"]}
    for option in (p for p in found.params if isinstance(p, click.Option) and not p.is_flag):
        value = "x" if option.name in ("output", "dataset", "names", "layer", "into", "field", "features") else None
        if value is None:
            continue
        given = [command, *arguments.get(command, ["s.bn.h5"]), option.opts[-1], value, option.opts[-1], value]
        if option.name != "output" and any(p.required for p in found.params if isinstance(p, click.Option)):
            given += ["-o", "y"]
        if command == "apply":
            given.append("x.npy")
        check_refused(2, given, f"{option.opts[-1]} is given 2 times; it takes one value", lines=1)


def test_flags_may_be_repeated(here: Path) -> None:
    save(here / "x.npy", table(40))
    good("fit", "x.npy", "-q", "-q", "--force", "-f")


def test_words_after_two_dashes_are_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--plugins` and `--debug` are options, not words anywhere in the line."""
    calls: list[None] = []
    monkeypatch.setattr(options, "without_plugins", lambda: calls.append(None))
    shutil.copy(here / "x.npy", here / "--plugins")
    good("fit", "-o", "a.bn.h5", "--", "--plugins")
    assert calls == [None]
    good("fit", "-o", "b.bn.h5", "--plugins", "x.npy")
    assert calls == [None]
    assert "Traceback" not in bn("ls", "--", "--debug").err
    assert "Traceback" in bn("ls", "none.h5", "--debug").err
    assert "Traceback" in bn("ls", "--debug", "--nonsense", "none.h5").err


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


@pytest.fixture
def shell_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which `bn` is this one, and a folder with files to complete."""
    program = tmp_path / "bin" / "bn"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec " + shlex.join(BN) + ' "$@"\n')
    program.chmod(0o755)
    with h5py.File(tmp_path / "train data.h5", "w") as file:
        file["x"], file["x2"], file["group/y"] = np.ones((4, 2)), np.ones((4, 2)), np.ones((4, 2))
    shutil.copy(tmp_path / "train data.h5", tmp_path / "train.h5")
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}


LINES = {
    "bn ex": ["export"],
    "bn fit --pre": ["--preset"],
    "bn fit --preset ke": ["keras"],
    "bn fit x.npy --init z": ["zeros"],
    "bn fit train.h5::/x": ["/x", "/x2"],
    "bn fit train.h5::/g": ["/group/y"],
    "bn apply s.bn.h5 train.h5::": ["/group/y", "/x", "/x2"],
    "bn fit x.npy --target train.h5::/x2": ["/x2"],
    "bn fit broken.h5::/": [],
    "bn fit none.h5::/": [],
    "bn completion z": ["zsh"],
    "bn fit x.npy --init=z": ["zeros"],
    "bn export s.bn.h5 --to saf": ["safetensors"],
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("source", ['eval "$(bn completion bash)"', "source <(_BN_COMPLETE=bash_source bn)"])
def test_bash_completes_what_it_has_sourced(shell_path: dict[str, str], tmp_path: Path, source: str) -> None:
    """As bash calls the function: words broken at : and =, of which it replaces the last."""
    script = [source]
    for line in LINES:
        words = [w for w in re.split(r"([:=]+)|\s+", line) if w]
        script.append(
            f"COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}; COMP_WORDS=({shlex.join(words)}); "
            f'COMP_CWORD={len(words) - 1}; COMPREPLY=(); _bn_completion bn; echo "${{COMPREPLY[*]}}"'
        )
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=shell_path, capture_output=True, text=True, check=True
    )
    assert dict(zip(LINES, map(str.split, done.stdout.splitlines()), strict=True)) == LINES
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_get_whole_words(shell_path: dict[str, str], tmp_path: Path, shell: str) -> None:
    """By what their scripts ask and read."""
    for line, expected in LINES.items():
        words = line.split(" ")
        last = words[-1]
        asked = {"COMP_WORDS": line, "COMP_CWORD": last if shell == "fish" else str(len(words) - 1)}
        environment = shell_path | asked | {"_BN_COMPLETE": f"{shell}_complete"}
        done = subprocess.run(["bn"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        lines = [text for text in done.stdout.splitlines() if text]
        found = lines[1::3] if shell == "zsh" else [text.split(",", 1)[1].split("\t")[0] for text in lines]
        prefix = last.rpartition("::")[0] + "::" if "::" in last else ""
        assert found == [prefix + word for word in expected], line


def test_files_are_left_to_the_shell(shell_path: dict[str, str], tmp_path: Path) -> None:
    asked = {"COMP_WORDS": "bn fit tr", "COMP_CWORD": "2", "_BN_COMPLETE": "bash_complete"}
    done = subprocess.run(["bn"], cwd=tmp_path, env=shell_path | asked, capture_output=True, text=True, check=True)
    assert done.stdout == "file,tr\n"


def test_help_lists_options_under_their_headings() -> None:
    """Each option under the group that its declaration names, in the order of the groups."""
    text = good("fit", "--help").out
    parts = re.split(r"^(\w+):$", text, flags=re.M)
    listed = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert [h for h in listed if h in GROUPS] == [g for g in GROUPS if g in listed]
    for name, group in {
        "--rows": "Input", "--momentum": "Statistics", "--optimizer": "Learning", "--output": "Output",
        "--workers": "Running", "--allow-virtual": "Advanced",
    }.items():  # fmt: skip
        assert [h for h in listed if re.search(rf"^  (-\w, )?{name}\b", listed[h], re.M)] == [group], name
