"""How an option is declared: once, for the Python signature, the command line, the checks and the reference.

A frozen dataclass derived from `Declared` lists the options of a command as fields; `option` makes such a field.
Making an instance converts and checks every value, so Python and the command line give the same messages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from bncli.errors import UsageError

INPUT, STATISTICS, LEARNING, OUTPUT, RUNNING, ADVANCED = GROUPS = (
    "Input", "Statistics", "Learning", "Output", "Running", "Advanced",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Kind:
    """The values that an option takes.

    Attributes
    ----------
    words : str
        What a value is, after "is not".
    parse : function
        From text; raises ValueError.
    types : tuple of type
        Of values given in Python; () for any.
    text : bool
        Whether text is parsed in Python too, as on the command line.
    file : bool
        Whether text may name a file, which a shell completes.
    """

    words: str
    parse: Callable[[str], object] = str
    types: tuple[type, ...] = ()
    text: bool = False
    file: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Option:
    """An option; its name is that of the field that holds it.

    Attributes
    ----------
    help, group : str
        One line, and the heading under which the help lists it: one of GROUPS.
    kind : Kind
    metavar : str
        What stands for the value in the help; the choices where there are some.
    choices : tuple of str, or a function that returns them
    usual : str
        The default in words, where the value itself does not say it.
    check : function, optional
        What is wrong with a value; "" when nothing is.
    short : str
        A flag of one letter, such as "-j".
    """

    help: str
    group: str
    kind: Kind
    metavar: str = ""
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    usual: str = ""
    check: Callable[[Any], str] | None = None
    short: str = ""

    @property
    def allowed(self) -> Sequence[str]:
        """The choices; none where any value of the kind is taken."""
        return self.choices() if callable(self.choices) else self.choices

    def parse(self, flag: str, text: str) -> object:
        """The value that a text stands for; `flag` is what messages call the option."""
        try:
            value = self.kind.parse(text)
        except ValueError:
            raise self._wrong(flag, text) from None
        return self._checked(flag, value, text)

    def accept(self, flag: str, value: object) -> object:
        """The value in its plain form.

        Raises
        ------
        UsageError
            When the value is of the wrong type, or not one that the option takes.
        """
        types = self.kind.types
        if types and type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            value = value.item()  # type: ignore[attr-defined]  # a NumPy scalar, without importing NumPy
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is None:
            raise self._wrong(flag, value)
        return self.parse(flag, value) if isinstance(value, str) and self.kind.text else self._checked(flag, value)

    def _checked(self, flag: str, value: object, text: str | None = None) -> object:
        shown = f"{value!r:.80}" if text is None or isinstance(value, str) else text.strip()
        types = self.kind.types
        if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise self._wrong(flag, value)
        if (allowed := self.allowed) and value not in allowed:
            raise UsageError(f"{flag} {value!r} is not one of {', '.join(allowed)}")
        if self.check and (problem := self.check(value)):
            raise UsageError(f"{flag} {shown}: {problem}")
        return value

    def _wrong(self, flag: str, value: object) -> UsageError:
        return UsageError(f"{flag} {value!r:.80} is not {self.kind.words}")


class Declared:
    """Base of the dataclasses whose fields are options."""

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}  # type: ignore[arg-type]  # every child is a dataclass
        for name, declared in options_of(type(self)).items():
            value = getattr(self, name)
            if value is not defaults[name]:
                object.__setattr__(self, name, declared.accept(flag(name), value))
        self.check_together()

    def check_together(self) -> None:
        """Raise UsageError where options exclude or need each other."""


def option(default: object, help: str, group: str, kind: Kind, **more: Any) -> Any:
    """A dataclass field that holds an `Option`; `more` are its other attributes."""
    return field(default=default, metadata={"option": Option(help, group, kind, **more)})


def options_of(spec: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    return {f.name: f.metadata["option"] for f in fields(spec) if "option" in f.metadata}


def flag(name: str) -> str:
    """The flag of an option: batch_size is --batch-size."""
    return "--" + name.replace("_", "-")
