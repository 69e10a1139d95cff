"""What else than tensors a PyTorch file holds, read off the opcodes of its pickle; nothing of it is ever built or run."""

from __future__ import annotations

import io
import itertools
import os
import pickletools
import re
import shlex
import tarfile
import zipfile
from typing import Any, NamedTuple

from bncli.errors import InputError, literal, printable

LARGEST = 16 << 20  # bytes of a pickle that are looked at: it holds no tensors' values, some 100 bytes per tensor
PICKLES = 5  # in a file of before PyTorch 1.6: a number, a version, the system, the content, the keys of its storages
OPCODES = 200_000  # that are looked at, of some 30 per tensor
NAMED = 3  # classes in a message
# what `weights_only=True` rebuilds
TENSORS = re.compile(
    r"torch\.([A-Z]\w*Storage|Size|device|Tensor|strided|sparse_\w+|per_(tensor|channel)_affine\w*"
    r"|(b?float|complex|u?int|qu?int|bits)\d+(x\d+)?(_e\w+)?|bool|half|float|double|long|int|short)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor|nested_tensor"
    r"|meta_tensor_no_storage|device_tensor_from_numpy|wrapper_subclass)"
    r"|torch\.(_tensor\._rebuild_from_type_v2|storage\.(Typed|Untyped)Storage|nn\.parameter\.(Parameter|Buffer)"
    r"|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|complex|bytearray)"
)
# what does no harm when it is rebuilt: exact names, since a module's other names lead anywhere (`pathlib.os`)
INERT = re.compile(
    r"numpy\.(_?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)|dtype|ndarray|dtypes\.\w+DType"
    r"|bool_?|u?int\d+|float\d+|complex\d+|str_|bytes_)"
    r"|argparse\.Namespace|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|collections\.(defaultdict|deque)"
    r"|datetime\.(date|time|datetime|timedelta|timezone)|torch\.nn\.modules\.\w+\.[A-Z]\w*"
    r"|(builtins|__builtin__)\.(frozenset|list|dict|tuple|int|float|str|bool|bytes|slice|range)"
)
# Python for the tensors in `v` at any depth, under their keys joined by dots; MODULES makes a state_dict of a module first
COLLECT = (
    'f = lambda v, p="": {p[:-1]: v} if torch.is_tensor(v) else {k: t for n, x in (v.items() if isinstance(v, dict) else '
    'enumerate(v) if isinstance(v, (list, tuple)) else ()) for k, t in f(x, f"{p}{n}.").items()}'
)
MODULES = 'g, f = f, lambda v, p="": g(v.state_dict() if isinstance(v, torch.nn.Module) else v, p)'
KEEP_WEIGHTS = "give the file of torch.save(model.state_dict(), ...)"


class Pickle(NamedTuple):
    """The classes and functions that pickles in a row refer to, in order."""

    names: list[str]
    ended: int  # pickles in a row that were followed to their end


def refusal(path: str, reason: str) -> InputError:
    """The error for a file that `torch.load` does not read with `weights_only=True`, for a reason in its own words."""
    where, (content, pickles) = printable(path), _content(path)
    found = _disassemble(content)
    strange = [name for name in found.names if not TENSORS.fullmatch(name)] or re.findall(r"GLOBAL (\S+)", reason)
    if not strange:
        return InputError(
            f"{where}: refused: it is damaged, or holds Python objects beyond tensors, which could run code; {KEEP_WEIGHTS}"
        )
    strange.sort(key=lambda name: INERT.fullmatch(name) is not None)
    module = any(name.startswith("torch.nn.modules.") for name in strange)
    holds = f"it holds {'a whole pickled module' if module else 'more than tensors'} ({_listed(strange)})"
    followed = 0 < pickles <= found.ended
    if not (followed and INERT.fullmatch(strange[0])):
        where_made = "save model.state_dict() where the model's code is" if module else KEEP_WEIGHTS
        return InputError(f"{where}: refused: {holds}, which could run code; {where_made}")
    collect = f"{COLLECT}; {MODULES}" if module else COLLECT
    line = command(path, f'{collect}; c = torch.load({{}}, map_location="cpu", weights_only=False)', "f(c)")
    return InputError(
        f"{where}: refused: {holds}, and rebuilding that could run code. If you trust the file, save its tensors "
        f"alone:\n  {line}"
    )


def command(path: str, load: str, weights: str) -> str:
    """A line for a shell that loads a file in a way of one's own and saves a plain state_dict."""
    source, target = (literal(name) for name in (path, os.path.splitext(path)[0] + ".state_dict.pt"))
    return "python -c " + shlex.quote(f"import torch; {load.replace('{}', source)}; torch.save({weights}, {target})")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(name)[:80] for name in names[:NAMED]) + more


def _content(path: str) -> tuple[bytes, int]:
    """The pickle in a zip of torch.save, else the file; and how many pickles torch.load runs, 0 where that may be others.

    A file can be several things at once, and torch.load goes by its start.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST)
    is_zip, is_tar = content.startswith(b"PK\x03\x04"), tarfile.is_tarfile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.rpartition("/")[2].lower() == "data.pkl"]
            with archive.open(members[0]) as member:
                return member.read(LARGEST), int(is_zip and not is_tar and len(members) == 1)
    except (zipfile.BadZipFile, LookupError, OSError, ValueError, RuntimeError):
        return content, 0 if is_zip or is_tar else PICKLES


def _disassemble(content: bytes) -> Pickle:
    """Every pickle in a row, as far as it can be followed.

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
    return Pickle(list(names), len(pickles) - 1)
