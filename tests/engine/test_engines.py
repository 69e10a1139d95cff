"""Processes, dask and MPI for real: the same bytes as threads, whoever is killed, and refusals that name the worker."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Result, bn, check_refused, child, good, run_child, save
from helpers import check_same_files, peer

KILLS = 10  # of each engine that outlives them
OPTIONS = ("--batch-size", "2", "--momentum", "0.999", "-q")
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "30",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x.npy, of 110 segments, and what threads make of it."""
    folder = tmp_path_factory.mktemp("engines")
    x = np.random.default_rng(0).normal(5, 2, (900_000, 16)).astype("f4")
    save(folder / "x.npy", x)
    with _chdir(folder):
        good("fit", "x.npy", *OPTIONS, "-j", "1", "-o", "truth.bn.h5")
        for workers in (2, 7):
            good("fit", "x.npy", *OPTIONS, "-j", workers, "-o", f"threads{workers}.bn.h5")
            check_same_files(Path("truth.bn.h5"), Path(f"threads{workers}.bn.h5"))
        good("apply", "truth.bn.h5", "x.npy", "-o", "truth.norm.npy", "-q")
    return folder


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return folder


class Cluster:
    """A dask scheduler that was started by hand, and its workers, each a process with a working folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.file = folder, folder / "scheduler.json"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("scheduler", folder, "--port", "0", "--scheduler-file", str(self.file))
        deadline = time.monotonic() + 60
        while not self.file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.address = json.loads(self.file.read_text())["address"]

    def _start(self, kind: str, folder: Path, *args: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *args, "--host", "127.0.0.1", "--no-dashboard"]
        with open(self._folder / f"{kind}-{folder.name}.log", "ab") as log:
            return subprocess.Popen(
                command, cwd=folder, env=os.environ | ENVIRONMENT | environment, stdout=log, stderr=log
            )

    def add(self, name: str, *args: str, **environment: str) -> Path:
        """Start a worker in a new folder, which is returned."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        given = ("--scheduler-file", str(self.file), "--nthreads", "1", "--local-directory", str(folder), *args)
        self.workers.append(self._start("worker", folder, *given, **environment))
        return folder

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.terminate()
        for process in [*self.workers, self.scheduler]:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.workers.clear()


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers with nannies, which replace a worker that is killed."""
    peer("distributed")
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        cluster.add("one")
        cluster.add("two")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler without workers."""
    peer("distributed")
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        cluster.close()


def children(pid: int, *words: str) -> list[int]:
    """Processes below this one whose command line holds all words."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            if parent == pid:
                found += children(int(entry.name), *words)
                found += [int(entry.name)] * all(word in command for word in words)
    return found


def check_with_kills(args: list[str], output: Path, owners: list[int], truth: str = "truth.bn.h5") -> None:
    """Run bn until KILLS of its workers were killed at random moments; the output is always that of threads."""
    chance, kills = random.Random(5), 0
    deadline = time.monotonic() + 240
    while kills < KILLS:
        assert time.monotonic() < deadline, f"{kills} kills"
        process = child(args, env=os.environ | ENVIRONMENT)
        while process.poll() is None:
            time.sleep(chance.uniform(0.1, 0.5))
            found = [pid for owner in owners or [process.pid] for pid in children(owner, "spawn_main")]
            if found and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(found), signal.SIGKILL)
                    kills += 1
        _, err = process.communicate()
        assert process.returncode == 0, err
        check_same_files(Path(truth), output)
        output.unlink()


def test_processes(here: Path) -> None:
    good("fit", "x.npy", *OPTIONS, "--on", "processes", "-j", "2", "-o", "p.bn.h5")
    check_same_files(Path("truth.bn.h5"), Path("p.bn.h5"))


def test_processes_that_are_killed(here: Path) -> None:
    args = ["fit", "x.npy", *OPTIONS, "--on", "processes", "-j", "2", "-o", "pk.bn.h5"]
    check_with_kills(args, Path("pk.bn.h5"), [])


LONG = ["x.npy"] * 100  # inputs of a run that is stopped long before its end


def check_checkpoint_and_nothing_else(folder: Path, output: str) -> None:
    """Of a run that was stopped."""
    assert sorted(path.name for path in folder.glob(f"*{output}*")) == [f"{output}.checkpoint"]
    (folder / f"{output}.checkpoint").unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(here: Path, number: signal.Signals) -> None:
    process = child(["fit", *LONG, *OPTIONS, "--on", "processes", "-j", "2", "-o", "pe.bn.h5"])
    workers: list[int] = []
    while len(workers) < 2 and process.poll() is None:
        workers = children(process.pid, "spawn_main")
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, err
        assert (err.count(b"\n"), b"continue with --resume" in err) == (1, True), err
        check_checkpoint_and_nothing_else(here, "pe.bn.h5")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()]
    for path in here.glob(".pe.bn.h5*"):  # of the run that was killed
        path.unlink()


def test_apply_with_processes_is_stopped(here: Path) -> None:
    process = child(["apply", "truth.bn.h5", "x.npy", "-o", "stopped.norm.npy", "--on", "processes", "-j", "1"])
    while process.poll() is None and not children(process.pid, "spawn_main"):
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert b"bn: terminated; outputs are as they were" in err
    assert not list(here.glob("*stopped.norm*"))


def test_dask(here: Path, dask: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """By address, by scheduler file, and from the environment; paths are relative, and the workers are elsewhere."""
    good("fit", "x.npy", *OPTIONS, "--on", f"dask:{dask.address}", "-o", "d1.bn.h5")
    good("fit", "x.npy", *OPTIONS, "--on", f"dask:{dask.file}", "-o", "d2.bn.h5")
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", dask.address)
    good("fit", "x.npy", *OPTIONS, "--on", "dask", "-o", "d3.bn.h5")
    for i in (1, 2, 3):
        check_same_files(Path("truth.bn.h5"), Path(f"d{i}.bn.h5"))


LOCAL_CLUSTER = """
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
"""


def test_a_local_cluster(here: Path) -> None:
    peer("distributed")
    Path("cluster.py").write_text(LOCAL_CLUSTER)
    command = [sys.executable, "-W", "ignore", "cluster.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        good("fit", "x.npy", *OPTIONS, "--on", f"dask:{address}", "-o", "lc.bn.h5")
        cluster.communicate("\n", timeout=60)
    check_same_files(Path("truth.bn.h5"), Path("lc.bn.h5"))


def test_dask_workers_that_are_killed(here: Path, dask: Cluster) -> None:
    args = ["fit", "x.npy", *OPTIONS, "--on", f"dask:{dask.address}", "-o", "dk.bn.h5"]
    check_with_kills(args, Path("dk.bn.h5"), [process.pid for process in dask.workers])


def test_a_fault_of_the_data_is_the_line_that_it_is_here(here: Path, dask: Cluster) -> None:
    x = np.load("x.npy")
    x[700_000, 3] = np.nan
    save(here / "nan.npy", x)
    expected = bn("fit", "nan.npy", *OPTIONS, "-o", "n.bn.h5")
    assert (expected.code, len(expected.err.splitlines())) == (3, 1)
    for on in ("processes", f"dask:{dask.address}"):
        found = run_child(["fit", "nan.npy", *OPTIONS, "-o", "n.bn.h5", "--on", on], env=os.environ | ENVIRONMENT)
        assert (found.code, found.out, found.err) == (expected.code, expected.out, expected.err)


def test_another_kernel_is_refused_by_name(here: Path, lonely: Cluster) -> None:
    lonely.add("numpy", "--no-nanny", BN_KERNEL="numpy")
    start = time.monotonic()
    check_refused(
        4,
        ["fit", "x.npy", *OPTIONS, "--on", f"dask:{lonely.address}", "-o", "k.bn.h5"],
        "the worker tcp://",
        "has kernel numpy, this process c",
    )
    assert time.monotonic() - start < 60


def test_another_file_is_refused_by_name(here: Path, lonely: Cluster, tmp_path: Path) -> None:
    """/proc/self/cwd is another folder in every process."""
    folder = lonely.add("elsewhere", "--no-nanny")
    args = ["fit", "/proc/self/cwd/x.npy", *OPTIONS, "--on", f"dask:{lonely.address}", "-o", "o.bn.h5"]
    check_refused(4, args, "the worker tcp://", "sees another file: ", "x.npy: cannot be read any more")
    shutil.copy("x.npy", folder / "x.npy")
    check_refused(4, args, "the worker tcp://", "sees another file: ", "x.npy: changed")
    assert not Path("o.bn.h5").exists()


def test_several_runs_share_a_worker(here: Path, lonely: Cluster) -> None:
    """Of several threads: what one run has open is not closed when a task of another one comes."""
    lonely.add("shared", "--no-nanny", "--nthreads", "4")
    found: dict[int, Result] = {}

    def run(number: int) -> None:
        args = ["fit", "x.npy", *OPTIONS, "--on", f"dask:{lonely.address}", "-o", f"shared{number}.bn.h5"]
        found[number] = run_child(args, env=os.environ | ENVIRONMENT)

    runs = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(120)
    for number in range(6):
        assert found[number].code == 0, found[number]
        check_same_files(Path("truth.bn.h5"), Path(f"shared{number}.bn.h5"))


def test_no_worker_is_said_and_late_ones_are_used(here: Path, lonely: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from bncli.engine.executors import dask

    monkeypatch.setattr(dask, "PATIENCE", 1.0)
    found: list[Result] = []
    args = ["fit", "x.npy", *(o for o in OPTIONS if o != "-q"), "--on", f"dask:{lonely.address}", "-o", "late.bn.h5"]
    run = threading.Thread(target=lambda: found.append(bn(*args)))
    run.start()
    time.sleep(3)
    assert run.is_alive()
    lonely.add("late", "--no-nanny")
    run.join(60)
    assert found[0].code == 0, found
    assert "no worker at tcp://" in found[0].err
    check_same_files(Path("truth.bn.h5"), Path("late.bn.h5"))


def test_a_scheduler_that_dies_is_one_line(here: Path, lonely: Cluster) -> None:
    lonely.add("busy", "--no-nanny")
    process = child(
        ["fit", *LONG, *OPTIONS, "--on", f"dask:{lonely.address}", "-o", "sd.bn.h5"], env=os.environ | ENVIRONMENT
    )
    time.sleep(5)
    assert process.poll() is None
    lonely.scheduler.kill()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count(b"\n")) == (3, 1), err
    assert b"went away" in err or b"no dask scheduler answers" in err


def test_interrupted_while_it_waits(here: Path, lonely: Cluster) -> None:
    process = child(
        ["fit", "x.npy", *OPTIONS, "--on", f"dask:{lonely.address}", "-o", "i.bn.h5"], env=os.environ | ENVIRONMENT
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert not list(here.glob(".i.bn.h5*"))


def test_interrupted_and_resumed_with_another_engine(here: Path, dask: Cluster) -> None:
    """What dask began, threads go on with, then processes."""
    output, saved = Path("across.bn.h5"), 0
    for on in (f"dask:{dask.address}", "threads", "processes"):
        process = child(
            ["fit", "x.npy", *OPTIONS, "-o", output, "--on", on, "--resume"],
            env=os.environ | ENVIRONMENT,
        )
        time.sleep(1.2 if on.startswith("dask") else 0.6)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        saved += Path(f"{output}.checkpoint").exists()
    assert saved or output.exists()
    if not output.exists():
        good("fit", "x.npy", *OPTIONS, "-o", output, "--on", f"dask:{dask.address}", "--resume")
    check_same_files(Path("truth.bn.h5"), output)


@pytest.mark.parametrize("on", ["processes", "dask"])
def test_apply_writes_into_place(here: Path, dask: Cluster, on: str) -> None:
    where = f"dask:{dask.address}" if on == "dask" else on
    good("apply", "truth.bn.h5", "x.npy", "-o", f"{on}.norm.npy", "--on", where, "-q")
    assert Path(f"{on}.norm.npy").read_bytes() == Path("truth.norm.npy").read_bytes()
    found = bn("apply", "truth.bn.h5", "x.npy", "-o", f"{on}.norm.h5", "--on", where)
    assert (found.code, "one process writes HDF5 outputs" in found.err) == (0, True)
    import h5py

    with h5py.File(f"{on}.norm.h5") as file:
        assert (file["data"][...] == np.load("truth.norm.npy")).all()


def test_apply_counts_what_workers_saw(here: Path, dask: Cluster) -> None:
    x = np.load("x.npy")[:200_000]
    x[7, 3], x[150_000, 2] = np.inf, np.nan
    save(here / "odd.npy", x)
    expected = good("apply", "truth.bn.h5", "odd.npy", "-o", "odd.norm.npy", "--json").out
    found = good("apply", "truth.bn.h5", "odd.npy", "-o", "odd2.norm.npy", "--json", "--on", f"dask:{dask.address}").out
    assert found == expected.replace("odd.norm", "odd2.norm")
    save(here / "big.npy", x * np.float32(1e6))
    args = ["apply", "truth.bn.h5", "big.npy", "-o", "z.npy", "--dtype", "float16", "--on", f"dask:{dask.address}"]
    check_refused(4, args, "do not fit float16")
    assert not list(here.glob(".z.npy*"))


def test_what_cannot_be(here: Path) -> None:
    check_refused(2, ["fit", "x.npy", "--on", "ray"], "--on 'ray': none of threads, processes, dask, mpi")
    for on in ("threads:4", "processes:4"):
        check_refused(2, ["fit", "x.npy", "--on", on, "-o", "no.bn.h5"], f"--on {on}: ", "takes no address", "-j")
    check_refused(2, ["fit", "x.npy", "--on", "dask"], "give the scheduler's address or file")
    check_refused(3, ["fit", "x.npy", "--on", "dask:nowhere.json"], "nowhere.json: no such scheduler file")
    check_refused(2, ["fit", "x.npy", "--target", "x.npy", "--on", "processes"], "learning runs in one process")
    if importlib.util.find_spec("mpi4py"):  # in a process of its own: one that has begun MPI cannot start mpiexec
        found = run_child(["fit", "x.npy", "--on", "mpi"])
        assert (found.code, "runs under mpiexec" in found.err) == (2, True)


def test_a_file_that_is_no_scheduler_file(here: Path) -> None:
    peer("distributed")
    check_refused(3, ["fit", "x.npy", "--on", "dask:x.npy", "-o", "no.bn.h5"], "x.npy: no dask scheduler answers")


def test_a_program_without_a_main_guard_is_told(here: Path) -> None:
    Path("unguarded.py").write_text("import bncli\nbncli.fit('x.npy', on='processes')\n")
    found = subprocess.run(
        [sys.executable, "unguarded.py"], env=os.environ | ENVIRONMENT, capture_output=True, timeout=60, check=False
    )
    assert found.stderr.splitlines()[-1].startswith(b"bncli.errors.UsageError: a worker process ended as it started")
    assert b"__name__ == '__main__'" in found.stderr.splitlines()[-1]


def mpiexec(*args: str, ranks: int = 3) -> list[str]:
    peer("mpi4py")
    if not shutil.which("mpiexec"):
        if os.environ.get("BN_REQUIRE_PEERS") == "1":
            pytest.fail("there is no mpiexec")
        pytest.skip("there is no mpiexec")
    return ["mpiexec", "-n", str(ranks), sys.executable, *args]


@pytest.mark.parametrize("front", [("-m", "bncli"), ("-m", "mpi4py.futures", "-m", "bncli")])
def test_mpi(here: Path, front: tuple[str, ...]) -> None:
    command = mpiexec(*front, "fit", "x.npy", *OPTIONS, "--on", "mpi", "-f", "-o", "m.bn.h5")
    found = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    check_same_files(Path("truth.bn.h5"), Path("m.bn.h5"))


def test_mpi_applies_and_reports_faults(here: Path) -> None:
    command = mpiexec("-m", "bncli", "apply", "truth.bn.h5", "x.npy", "-o", "m.norm.npy", "-f", "-q", "--on", "mpi")
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    assert Path("m.norm.npy").read_bytes() == Path("truth.norm.npy").read_bytes()
    command = mpiexec("-m", "bncli", "fit", "nix.npy", "--on", "mpi")
    found = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert found.returncode == 3
    assert found.stderr.count(b"bn: error: nix.npy: no such file") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_mpiexec_is_stopped_itself(here: Path, number: signal.Signals) -> None:
    """It stops all ranks, and kills them when one has ended: the first has to save its checkpoint before."""
    command = mpiexec("-m", "bncli", "fit", *LONG, *OPTIONS, "--on", "mpi", "-o", "ms.bn.h5")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count(b"bn: ") == err.count(b"continue with --resume") == 1, err
    check_checkpoint_and_nothing_else(here, "ms.bn.h5")


def test_mpiexec_without_on_mpi_is_refused(here: Path) -> None:
    """Else every rank would do all of it, and race for the output."""
    found = subprocess.run(
        mpiexec("-m", "bncli", "fit", "x.npy", "-o", "all.bn.h5"), capture_output=True, timeout=60, check=False
    )
    assert found.returncode == 2
    assert b"3 processes under mpiexec would each do all the work: give --on mpi" in found.stderr
    assert not Path("all.bn.h5").exists()


def test_a_value_that_a_rank_refuses(here: Path) -> None:
    x = np.load("x.npy")[:200_000]
    x[150_000, 3] = np.inf
    save(here / "inf.npy", x)
    found = subprocess.run(
        mpiexec("-m", "bncli", "fit", "inf.npy", *OPTIONS, "--on", "mpi"), capture_output=True, timeout=120, check=False
    )
    assert found.returncode == 3
    assert found.stderr.count(b"bn: error: inf.npy: sample 150000, feature 3 is inf") == 1, found.stderr


def test_a_killed_rank_ends_all_and_resume_goes_on(here: Path) -> None:
    output, chance = Path("mk.bn.h5"), random.Random(3)
    command = mpiexec("-m", "bncli", "fit", "x.npy", *OPTIONS, "--on", "mpi", "-o", str(output))
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        ranks: list[int] = []
        while len(ranks) < 3 and process.poll() is None:
            ranks = children(process.pid, "bncli")
        time.sleep(chance.uniform(0.4, 1.2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(max(ranks), signal.SIGKILL)
        process.communicate(timeout=60)
        if process.returncode:
            break
        output.unlink()
    assert process.returncode != 0
    if not output.exists():  # else it was complete already
        good("fit", "x.npy", *OPTIONS, "-o", output, "--resume")
    check_same_files(Path("truth.bn.h5"), output)
