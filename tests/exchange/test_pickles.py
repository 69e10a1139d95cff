"""PyTorch files with more than tensors: named, with a line that saves their weights, and never run."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import re
import shlex
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import check_refused, untouched
from helpers import peer

from bncli import exchange
from bncli.errors import InputError
from bncli.exchange import pickles

pytestmark = pytest.mark.peer

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        return self.bn1(self.conv(x))
"""


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, in a folder with the module `small_net`."""
    found = peer("torch")
    (tmp_path / "small_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "small_net", raising=False)
    return found


def net(torch: Any) -> Any:
    model = __import__("small_net").Net().train()
    torch.manual_seed(1)
    model(torch.randn(8, 3, 5, 5) * 3 + 2)
    return model.eval()


NAMESPACE = argparse.Namespace(lr=0.1)


def plain(model: Any) -> Any:
    """A module of PyTorch's own classes alone."""
    nn = peer("torch").nn
    return nn.Sequential(collections.OrderedDict(conv=model.conv, bn1=model.bn1))


CHECKPOINTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NumPy scalar": (lambda m: {"best": np.float64(0.9), "state_dict": m.state_dict()}, "multiarray.scalar"),
    "NumPy array": (lambda m: {"history": np.arange(3.0), "model": m.state_dict()}, "multiarray._reconstruct"),
    "Namespace": (lambda m: {"args": argparse.Namespace(lr=0.1), "state_dict": m.state_dict()}, "argparse.Namespace"),
    "Path": (lambda m: {"out": pathlib.PurePosixPath("runs"), "net": m.state_dict()}, "pathlib"),
    "defaultdict": (lambda m: {"h": collections.defaultdict(list), "model": m.state_dict()}, "collections.defaultdict"),
    "date": (lambda m: {"model_state_dict": m.state_dict(), "at": datetime.date(2020, 1, 1)}, "datetime.date"),
    "flat": (lambda m: m.state_dict() | {"args": argparse.Namespace(model="state_dict")}, "argparse.Namespace"),
    "keys that are words too": (
        lambda m: {"args": argparse.Namespace(model="model"), "name": "model", "model": dict(m.state_dict())},
        "argparse.Namespace",
    ),
    "nested": (lambda m: {"args": NAMESPACE, "model": {"state_dict": m.state_dict()}}, "argparse.Namespace"),
    "weights": (lambda m: {"args": NAMESPACE, "weights": m.state_dict(), "n": {1: None}}, "argparse.Namespace"),
    "tuple": (lambda m: (NAMESPACE, [3, m.state_dict()]), "argparse.Namespace"),
    "PyTorch's module": (lambda m: plain(m), "whole pickled module (torch.nn.modules"),
    "PyTorch's module under a key": (lambda m: {"model": plain(m)}, "whole pickled module (torch.nn.modules"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "old", "protocol 4"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_the_line_saves_what_can_be_read(torch: Any, tmp_path: Path, kind: str, form: str) -> None:
    model = net(torch)
    content, name = CHECKPOINTS[kind]
    options: dict[str, Any] = {"protocol 4": {"pickle_protocol": 4}}.get(form, {})
    torch.save(
        content(model),
        "it's $a \N{SMILING FACE WITH SUNGLASSES}.ckpt",
        _use_new_zipfile_serialization=form != "old",
        **options,
    )
    with untouched(tmp_path):
        check_refused(
            3,
            ["import", "it's $a \N{SMILING FACE WITH SUNGLASSES}.ckpt", "-o", "s.bn.h5"],
            "it's $a \N{SMILING FACE WITH SUNGLASSES}.ckpt: refused: ",
            name,
            "could run code",
            "trust",
        )
    with pytest.raises(InputError) as error:
        exchange.read("it's $a \N{SMILING FACE WITH SUNGLASSES}.ckpt")
    check_line(str(error.value), model, "it's $a \N{SMILING FACE WITH SUNGLASSES}.state_dict.pt")


class Command:
    """A pickle that makes a folder when it is rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('os').mkdir('ran')",)


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_a_module_of_somebodys_own_is_named_without_a_line(torch: Any, tmp_path: Path, form: str) -> None:
    for content in (net(torch), {"epoch": -1, "ema": None, "model": net(torch).half()}):
        torch.save(content, "x.pt", _use_new_zipfile_serialization=form == "zip")
        said = r"whole pickled module \(small_net\.Net.*save model\.state_dict\(\) where the model's code is$"
        with pytest.raises(InputError, match=said):
            exchange.read("x.pt")


@pytest.mark.parametrize(
    "name",
    [
        "commands Popen", "torch.storage _load_from_bytes", "io open", "_codecs decode", "pathlib os", "collections namedtuple",
        "torch.serialization load", "torch.nn.modules.module functools", "torch set_printoptions", "numpy load",
        "functools partial", "builtins getattr", "copyreg _reconstructor", "torch.hub load",
    ],
)  # fmt: skip
def test_a_line_only_for_what_is_known_to_be_inert(torch: Any, tmp_path: Path, name: str) -> None:
    """By whatever name it goes; `commands` is what protocol 2 calls subprocess."""
    content = b"\x80\x02}(X\x05\x00\x00\x00modelccollections\nOrderedDict\n)RX\x01\x00\x00\x00x"
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr("x/data.pkl", content + f"c{name.replace(' ', chr(10))}\n)Ru.".encode())
        archive.writestr("x/version", "3")
    with pytest.raises(InputError, match=re.escape(f"({name.replace(' ', '.')})")) as error:
        exchange.read("x.pt")
    assert "python -c" not in str(error.value)


def test_no_line_for_a_file_that_torch_reads_in_another_place(torch: Any, tmp_path: Path) -> None:
    """Two contents in one zip, and a zip behind something else."""
    torch.save({"a": argparse.Namespace(), "model": net(torch).state_dict()}, "x.pt")
    content = Path("x.pt").read_bytes()
    with zipfile.ZipFile("x.pt", "a") as archive:
        archive.writestr("x/other/data.pkl", b"N.")
    Path("y.pt").write_bytes(pickle.dumps(argparse.Namespace(), 2) + content)
    for path in ("x.pt", "y.pt"):
        with pytest.raises(InputError) as error:
            exchange.read(path)
        assert "python -c" not in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("evil", "name"), [(Command, f"{os.name}.mkdir"), (Evaluated, "eval")])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_command_is_named_and_no_line_runs_it(
    torch: Any, tmp_path: Path, evil: type, name: str, zipped: bool, protocol: int
) -> None:
    content = {"args": argparse.Namespace(), "x": evil(), "state_dict": torch.nn.BatchNorm1d(3).state_dict()}
    torch.save(content, "x.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(
        InputError, match=rf"x\.pt: refused: it holds more than tensors \(\w*\.?{name}, .*\), which could run"
    ) as error:
        exchange.read("x.pt")
    assert "python -c" not in str(error.value)
    assert not Path("ran").exists()


def test_what_cannot_be_followed(torch: Any, tmp_path: Path) -> None:
    """A pickle of many opcodes, a cut one, and a name of controls: a line each, in little memory."""
    good = pickle.dumps(argparse.Namespace(a=1), 2)
    for content in (b"(" * 2_000_000, good[:-3], b"\x80\x02c\x1b[31m\nNet\n.", b"\x80\x02h\x05.", b"\x80\x04\x93."):
        Path("x.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pt: (refused|not a readable)") as error:
            exchange.read("x.pt")
        assert "\x1b" not in str(error.value)
        assert str(error.value).count("\n") <= 1


def test_opcodes_are_kept_up_to_a_number(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights lie behind them no line is made up, and PyTorch's own word names the object."""
    assert pickles._disassemble(b"(" * pickles.OPCODES + b"0" * pickles.OPCODES + b"N.").ended == 0
    monkeypatch.setattr(pickles, "OPCODES", 100)
    torch.save({"h": list(range(1000)), "args": argparse.Namespace(), "state_dict": net(torch).state_dict()}, "x.pt")
    with pytest.raises(
        InputError, match=r"more than tensors \(argparse\.Namespace\), which could run code; give the file"
    ):
        exchange.read("x.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the scripts of PyTorch are
def test_archives_of_programs(torch: Any, tmp_path: Path) -> None:
    model = net(torch)
    torch.jit.script(model).save("scripted.pt")
    torch.jit.trace(model, torch.randn(1, 3, 5, 5)).save("traced.pt")
    for name in ("scripted", "traced"):
        with pytest.raises(InputError, match=rf"{name}\.pt: a TorchScript archive \(torch\.jit\.save\)") as error:
            exchange.read(f"{name}.pt")
        check_line(str(error.value), model, f"{name}.state_dict.pt")


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program(torch: Any, tmp_path: Path) -> None:
    model = net(torch)
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 5, 5),)), "x.pt2")
    with pytest.raises(InputError, match=r"x\.pt2: an exported program \(torch\.export\.save\)") as error:
        exchange.read("x.pt2")
    check_line(str(error.value), model, "x.state_dict.pt")


def check_line(message: str, model: Any, output: str) -> None:
    """Assert that the last line, run as a shell runs it, saves a file that bn reads."""
    python, option, code = shlex.split(message.splitlines()[-1].strip())
    assert (python, option) == ("python", "-c")
    exec(code, {})  # a process would load torch anew each time
    assert exchange.read(output).running_mean.tolist() == model.bn1.running_mean.double().tolist()


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pth.tar", ".PTH"])
def test_suffixes(torch: Any, tmp_path: Path, suffix: str) -> None:
    model = net(torch)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, f"x{suffix}")
    assert exchange.read(f"x{suffix}", layer="bn1").running_mean.tolist() == model.bn1.running_mean.double().tolist()


def test_a_zip_that_is_none_of_these(torch: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile("x.ckpt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(InputError, match=r"x\.ckpt: not a readable PyTorch file"):
        exchange.read("x.ckpt")


@pytest.mark.filterwarnings("ignore::UserWarning")  # so are its quantized tensors
def test_names_of_tensors_are_no_strange_ones(torch: Any, tmp_path: Path) -> None:
    """Everything that PyTorch itself rebuilds from a state_dict is passed over, so that what is named is the reason."""
    state = {
        "p": torch.nn.Parameter(torch.ones(2)), "half": torch.ones(2).bfloat16(), "set": {1}, "size": torch.Size([2]),
        "type": torch.float16, "int": torch.int8, "device": torch.device("cpu"), "count": collections.Counter("a"),
        "sparse": torch.ones(2).to_sparse(), "q": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    }  # fmt: skip
    torch.save(torch.nn.BatchNorm1d(3).state_dict() | state | {"x": argparse.Namespace()}, "x.pt")
    with pytest.raises(InputError) as error:
        exchange.read("x.pt")
    assert re.findall(r"more than tensors \((.*?)\)", str(error.value)) == ["argparse.Namespace"]
