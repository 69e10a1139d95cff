"""What can go wrong, and with which exit code the command line ends; and bn's warnings.

    BnError (70)
    ├── UsageError (2)
    ├── InputError (3)
    ├── MismatchError (4)
    ├── OutputExistsError (5)
    │   └── ResultBesideError (5)
    └── WriteError (74)
    UserWarning
    └── BnWarning
        └── BnNote

A message says what, where (file, dataset, sample, feature), what was found and what to do, in one or two lines.
"""

from __future__ import annotations

import json


class BnError(Exception):
    """An error whose message is written for the person who typed the command."""

    exit_code = 70


class UsageError(BnError):
    """The call does not say what to do: an option, an axis, an ambiguous address, a missing extra."""

    exit_code = 2


class InputError(BnError):
    """A file or dataset is missing, unreadable or refused."""

    exit_code = 3


class MismatchError(BnError):
    """Stats and data, or the values and the output's type, do not fit each other."""

    exit_code = 4


class OutputExistsError(BnError):
    """The output exists, or is one of the inputs."""

    exit_code = 5


class ResultBesideError(OutputExistsError):
    """The output came into being during the run; the result is complete, under another name."""


class WriteError(BnError):
    """Writing failed: disk full, read-only folder, I/O error."""

    exit_code = 74


class BnWarning(UserWarning):
    """Something about the data or the fit that changes how its numbers should be read."""


class BnNote(BnWarning):
    """Something that a run does, and a person may want to know."""


def reason_of(error: object) -> str:
    """What an error of Python or of a library says about a file, less what only a programmer understands."""
    if isinstance(error, (TypeError, AttributeError)):
        return "it is not laid out as such files are"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = str(error)
    return "it holds a number of thousands of digits" if "set_int_max_str_digits" in text else text


def literal(text: str) -> str:
    """Python for a text, for a line of code in a message: in double quotes where it can be, which a shell leaves readable."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def printable(text: object) -> str:
    r"""Text from a file, safe to show: control characters and escape codes become ``\x1b`` and the like.

    >>> printable("ankle\x1b[31m")
    'ankle\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
