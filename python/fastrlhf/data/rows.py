"""Rows: a random-access sequence of records that know where they came from, and the errors that name that place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from ..errors import UserError


class DataError(UserError, ValueError):
    """The data is at fault; the message begins with the file and line, as in `train.jsonl:17: ...`."""


class UnusableRow(DataError):
    """The row reads well but holds no example: an empty prompt or completion, two sides of a pair that share no prompt."""


class TooLong(UnusableRow):
    """The row's example has more tokens than allowed."""


class Row(Mapping[str, Any]):
    """The fields of one record, and `where` it stands, as in `train.jsonl:17`."""

    __slots__ = ("_fields", "where")

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __repr__(self) -> str:
        return f"Row({dict(self._fields)!r}, where={self.where!r})"

    def has(self, *names: str) -> bool:
        """Whether every field is there and not null."""
        return all(self._fields.get(name) is not None for name in names)

    def field(self, name: str) -> Any:
        """A field that must be there and not be null; DataError otherwise."""
        if name not in self._fields:
            raise DataError(f"{self.where}: no field {name!r}; the row has {list(self._fields)}")
        value = self._fields[name]
        if value is None:
            raise DataError(f"{self.where}: field {name!r} is null")
        return value

    def text(self, name: str) -> str:
        """A field that must be a string; DataError otherwise."""
        return self.as_text(self.field(name), f"field {name!r}")

    def as_text(self, value: Any, what: str) -> str:
        """`value`, found in this row as `what`, if it is a string that UTF-8 can hold; DataError otherwise."""
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {what}: expected a string, got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: {what}: {error.object[error.start]!r} at {error.start} is half a character"
            ) from None
        return value


class Rows(Sequence[Row]):
    """A sequence of rows read on demand: `rows[i]` reads one record, `rows[a:b]` is a view, nothing is held in memory.

    A source implements `__len__` and `read(index)` for 0 <= index < len.
    """

    name: str = "rows"

    @abstractmethod
    def read(self, index: int) -> Row:
        """Row `index`, already checked to be in range; DataError names its line when it is broken."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return Chosen(self, chosen.__getitem__, len(chosen), self.name)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        return self.read(index % len(self))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {len(self)} rows>"

    @staticmethod
    def from_list(records: Iterable[Mapping[str, Any]], name: str = "list") -> Rows:
        """Rows of records that are in memory already; record i is `name:i+1` in errors."""
        return Listed(records, name)


class Listed(Rows):
    """Records in memory."""

    def __init__(self, records: Iterable[Mapping[str, Any]], name: str) -> None:
        self.name = name
        self._records = list(records)
        for i, record in enumerate(self._records):
            if not isinstance(record, Mapping):
                raise DataError(f"{name}:{i + 1}: expected a mapping of fields, got {type(record).__name__}")

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Row:
        return Row(self._records[index], f"{self.name}:{index + 1}")


class Chosen(Rows):
    """A view of some rows of another sequence: row i is `rows[choose(i)]`."""

    def __init__(self, rows: Rows, choose: Callable[[int], int], length: int, name: str) -> None:
        self.name = name
        self._rows, self._choose, self._length = rows, choose, length

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Row:
        return self._rows[self._choose(index)]


class Joined(Rows):
    """Several sequences one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.name = ",".join(part.name for part in parts)
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Row:
        part = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return self._parts[part][index - before]
