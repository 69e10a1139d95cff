"""What else than tensors a PyTorch file holds, read off the opcodes of its pickle; nothing of it is ever built or run."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickletools
import re
import shlex
import zipfile
from typing import Any, NamedTuple

from bncli.errors import InputError, printable

LARGEST = 16 << 20  # bytes of a pickle that are looked at: it holds no tensors' values, some 100 bytes per tensor
PICKLES = 5  # in a file of before PyTorch 1.6: a number, a version, the system, the content, the keys of its storages
OPCODES = 200_000  # that are looked at, of some 30 per tensor
NAMED = 3  # classes in a message
# what `weights_only=True` rebuilds
TENSORS = re.compile(
    r"torch\.(\w*Storage|Size|device|strided|per_\w+_affine\w*|\w*(float|int|bool|complex|bits)\w*|_utils\._rebuild_\w+|_tensor\.\w+|Tensor"
    r"|storage\.\w+|nn\.parameter\.\w+|serialization\._get_layout)|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|complex|bytearray)"
)
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "ema")
# modules of the standard library that a checkpoint has no use for, and an attack has
COMMANDS = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|runpy|importlib|pty|ctypes|webbrowser|pickle|_pickle|marshal|urllib"
    r"|asyncio|multiprocessing|timeit|pdb|bdb|cProfile)(\..*)?"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|input|breakpoint|__import__|apply)"
)
KEEP_WEIGHTS = "give the file of torch.save(model.state_dict(), ...)"


class Pickle(NamedTuple):
    """Opcodes of a pickle by name, with their arguments, and the classes and functions that it refers to, in order."""

    opcodes: list[tuple[str, Any]]
    names: list[str]


def refusal(path: str, reason: str) -> InputError:
    """The error for a file that `torch.load` does not read with `weights_only=True`, for a reason in its own words."""
    where, found = printable(path), _disassemble(_content(path))
    strange = [name for name in found.names if not TENSORS.fullmatch(name)] or re.findall(r"GLOBAL (\S+)", reason)
    if not strange:
        return InputError(
            f"{where}: refused: it is damaged, or holds Python objects beyond tensors, which could run code; {KEEP_WEIGHTS}"
        )
    commands = [name for name in strange if COMMANDS.fullmatch(name)]
    if commands:
        return InputError(
            f"{where}: refused: to load it is to call {_listed(commands)}, and could run code that does harm; {KEEP_WEIGHTS}"
        )
    module = any(name.startswith("torch.nn.modules.") for name in strange)
    holds = f"it holds {'a whole pickled module' if module else 'more than tensors'} ({_listed(strange)})"
    weights = _weights(found.opcodes, module)
    if weights is None:
        return InputError(f"{where}: refused: {holds}, which could run code; {KEEP_WEIGHTS}")
    package, _, name = strange[0].partition(".")
    needs = f"{printable(name)!r} is defined" if package == "__main__" else f"{printable(package)!r} can be imported"
    there = f", where {needs}" if module and package != "torch" else ""
    line = command(path, 'c = torch.load({}, map_location="cpu", weights_only=False)', weights)
    return InputError(
        f"{where}: refused: {holds}, and rebuilding that could run code. If you trust the file, save its tensors "
        f"alone{there}:\n  {line}"
    )


def command(path: str, load: str, weights: str) -> str:
    """A line for a shell that loads a file in a way of one's own and saves a plain state_dict."""
    source, target = (json.dumps(name) for name in (path, os.path.splitext(path)[0] + ".state_dict.pt"))
    return "python -c " + shlex.quote(f"import torch; {load.replace('{}', source)}; torch.save({weights}, {target})")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(name)[:80] for name in names[:NAMED]) + more


def _content(path: str) -> bytes:
    """The pickle in a zip of torch.save, else the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(member) as file:
                return file.read(LARGEST)
    except (zipfile.BadZipFile, StopIteration, OSError, ValueError, RuntimeError, NotImplementedError):
        with open(path, "rb") as file:
            return file.read(LARGEST)


def _disassemble(content: bytes) -> Pickle:
    """Every pickle in a row, as far as it can be followed; the opcodes are those of the content.

    An opcode that fetches what was kept before stands as what was kept, and one that takes a name from two texts before it
    stands for them: so that all protocols look alike.
    """
    stream = io.BytesIO(content)
    pickles: list[list[tuple[str, Any]]] = [[]]
    names: dict[str, None] = {}
    try:
        while len(pickles) <= PICKLES:
            memo: dict[int, tuple[str, Any]] = {}
            found, room = pickles[-1], OPCODES - sum(map(len, pickles))
            for opcode, argument, _ in itertools.islice(pickletools.genops(stream), room):
                if opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
                    memo[len(memo) if argument is None else int(argument)] = found[-1]
                    continue
                entry = (opcode.name, argument)
                if opcode.name.endswith("GET"):
                    entry = memo.get(int(argument or 0), entry)
                elif opcode.name == "STACK_GLOBAL":
                    entry = ("GLOBAL", f"{found[-2][1]} {found[-1][1]}")
                    del found[-2:]
                if entry[0] in ("GLOBAL", "INST"):
                    names[str(entry[1]).replace(" ", ".", 1)] = None
                found.append(entry)
            if not found or found[-1][0] != "STOP":
                break
            pickles.append([])
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError):  # of bytes that are no pickle
        pass
    if len(pickles) <= PICKLES - 1:
        return Pickle(pickles[0], list(names))
    old = itertools.pairwise([("", None), *pickles[3]])  # there ("module", class, ...) stands before a module
    return Pickle([op for before, op in old if before[0] != "MARK" or op[1] != "module"], list(names))


def _weights(opcodes: list[tuple[str, Any]], module: bool) -> str | None:
    """Python for the state_dict in the content, called `c`: under the first of the usual keys, or of a module; None where unknown."""
    plain = [op for op in opcodes if op[0] not in ("PROTO", "FRAME", "MARK")]
    after: dict[str, list[tuple[str, Any]]] = {}  # what follows each text
    for (name, text), following in itertools.pairwise(plain):
        if isinstance(text, str) and name != "GLOBAL":
            after.setdefault(text, []).append(following)
    for key in STATE_DICTS:
        if any(_is_dictionary(op) for op in after.get(key, [])):
            return f'c["{key}"]'
        if module and any(name == "GLOBAL" for name, _ in after.get(key, [])):
            return f'c["{key}"].state_dict()'
    if opcodes[-1:] != [("STOP", None)]:
        return None
    first = next((op for op in plain if op[0] in ("EMPTY_DICT", "GLOBAL")), ("", None))
    if _is_dictionary(first):
        return None if module else "{k: v for k, v in c.items() if torch.is_tensor(v)}"
    return "c.state_dict()" if module else None


def _is_dictionary(opcode: tuple[str, Any]) -> bool:
    return opcode[0] == "EMPTY_DICT" or opcode[1] == "collections OrderedDict"
