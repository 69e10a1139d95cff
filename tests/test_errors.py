"""The tree of exceptions: each crosses a process boundary as itself, and has its exit code."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Iterator

import pytest

import bncli
from bncli import errors
from bncli.errors import BnError, BnWarning


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


for module in pkgutil.walk_packages(bncli.__path__, "bncli."):  # so that all of them are defined
    if module.name not in ("bncli.__main__", "bncli.numerics._blocks"):  # the latter is no module: ctypes loads it
        importlib.import_module(module.name)


@pytest.mark.parametrize("kind", [*subclasses(BnError), *subclasses(BnWarning)])
def test_every_error_and_warning_pickles(kind: type[Exception]) -> None:
    """A worker process sends its errors through a pipe."""
    before = kind("x.npy: sample 3, feature 1 is nan; say --nan omit")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert (after.args, str(after), vars(after)) == (before.args, str(before), vars(before))
    assert getattr(after, "exit_code", None) == getattr(before, "exit_code", None)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line.strip("│├└─ ") for line in (errors.__doc__ or "").splitlines() if "─ " in line]
    defined = {
        f"{kind.__name__} ({kind.exit_code})" if issubclass(kind, BnError) else kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind is not BnError
    }
    assert set(drawn) == defined
