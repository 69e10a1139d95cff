"""How inputs are read: made once from the options of a command, and handed on whole."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from bncli.choices import DEFAULT_MEMORY

Rows = tuple[int | None, int | None]


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading, named as on the command line.

    Attributes
    ----------
    dataset : str or None
        The array of every input that names none.
    rows : (int or None, int or None)
        Python slice of the joined samples.
    fill_value : number or None
        What means a missing value, compared in each input's own type.
    max_memory : int
        Bytes of buffers that this reader may hold.
    share : int
        How many such readers make up the option --max-memory, for messages.
    allow_unwritten : bool
        Read what was never written as the fill value, rather than refuse it.
    allow_virtual : bool
        Read virtual datasets from their sources, rather than refuse them.
    """

    dataset: str | None = None
    rows: Rows = (None, None)
    fill_value: float | int | None = None
    max_memory: int = DEFAULT_MEMORY
    share: int = 1
    allow_unwritten: bool = False
    allow_virtual: bool = False

    @classmethod
    def of(cls, options: object) -> ReadOptions:
        """Those among the options of a command, which has attributes of the same names."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls) if f.name != "share"})

    def shared(self, readers: int) -> ReadOptions:
        """The same for one of so many readers, which share the memory."""
        return replace(self, max_memory=self.max_memory // readers, share=self.share * readers)
