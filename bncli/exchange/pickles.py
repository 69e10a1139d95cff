"""What else than tensors a PyTorch file holds, read off the opcodes of its pickle; nothing of it is ever built or run."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickletools
import re
import shlex
import tarfile
import zipfile
from typing import Any, NamedTuple

from bncli.errors import InputError, printable

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
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "ema")
KEEP_WEIGHTS = "give the file of torch.save(model.state_dict(), ...)"


class Pickle(NamedTuple):
    """Opcodes of a pickle by name, with their arguments, and the classes and functions that it refers to, in order."""

    opcodes: list[tuple[str, Any]]
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
    weights = _weights(found.opcodes, module) if followed and INERT.fullmatch(strange[0]) else None
    if weights is None:
        where_made = "save model.state_dict() where the model's code is" if module else KEEP_WEIGHTS
        return InputError(f"{where}: refused: {holds}, which could run code; {where_made}")
    line = command(path, 'c = torch.load({}, map_location="cpu", weights_only=False)', weights)
    return InputError(
        f"{where}: refused: {holds}, and rebuilding that could run code. If you trust the file, save its tensors "
        f"alone:\n  {line}"
    )


def command(path: str, load: str, weights: str) -> str:
    """A line for a shell that loads a file in a way of one's own and saves a plain state_dict."""
    source, target = (json.dumps(name) for name in (path, os.path.splitext(path)[0] + ".state_dict.pt"))
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
    except (zipfile.BadZipFile, LookupError, OSError, ValueError, RuntimeError, NotImplementedError):
        return content, 0 if is_zip or is_tar else PICKLES


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
        return Pickle(pickles[0], list(names), len(pickles) - 1)
    old = itertools.pairwise([("", None), *pickles[3]])  # there ("module", class, ...) stands before a module
    return Pickle([op for before, op in old if before[0] != "MARK" or op[1] != "module"], list(names), len(pickles) - 1)


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
