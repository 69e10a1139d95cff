"""Errors, each with the exit code of the command line, and warnings.

    BnError (70)
    ├── UsageError (2)
    ├── InputError (3)
    │   └── ChangedError (3)
    ├── MismatchError (4)
    ├── OutputExistsError (5)
    │   └── ResultBesideError (5)
    └── WriteError (74)
    UserWarning
    └── BnWarning
        └── BnNote

A message says what, where (file, dataset, sample, feature), what was found and what to do, in one or two lines. Errors
hold nothing else, so that they pickle: one raised in a worker process arrives as it is.
"""

from __future__ import annotations


class BnError(Exception):
    """An error whose message is written for the person who typed the command.

    Attributes
    ----------
    exit_code : int
        Of the command line.
    """

    exit_code = 70


class UsageError(BnError):
    """The command or call is wrong or incomplete: an option, an axis, an ambiguous address, a missing extra."""

    exit_code = 2


class InputError(BnError):
    """A file or dataset is missing, unreadable or refused."""

    exit_code = 3


class ChangedError(InputError):
    """A file is another one than when the run began, or has another content."""


class MismatchError(BnError):
    """Statistics and data, or values and the output's type, do not fit each other."""

    exit_code = 4


class OutputExistsError(BnError):
    """The output exists, or is one of the inputs."""

    exit_code = 5


class ResultBesideError(OutputExistsError):
    """Another program made the output during the run; the result is complete, under another name."""


class WriteError(BnError):
    """Writing failed: disk full, read-only folder, I/O error."""

    exit_code = 74


class BnWarning(UserWarning):
    """A property of the data or the fit that affects what its numbers mean."""


class BnNote(BnWarning):
    """A default or choice that a run made and a person may want to know."""


def reason_of(error: object) -> str:
    """The message of an error of Python or a library about a file, without what only a programmer understands."""
    if isinstance(error, (TypeError, AttributeError)):
        return "its layout is not that of such files"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = str(error)
    return "it holds a number of thousands of digits" if "set_int_max_str_digits" in text else text


def literal(text: str) -> str:
    """A text as a Python literal, for code in a message: in double quotes where possible, which stay readable in a shell."""
    import json

    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def printable(text: object) -> str:
    r"""Text from a file, safe to print: control characters and escape codes become ``\x1b`` and the like.

    >>> printable("ankle\x1b[31m")
    'ankle\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
