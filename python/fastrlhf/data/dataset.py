"""Examples made of rows on demand, and the stream that takes them in order and counts what it leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

from .order import Stream
from .rows import DataError, Row, Rows, TooLong, UnusableRow
from .tokenizer import Tokenizer

Example = TypeVar("Example")


class Skipped(Enum):
    """Why a row gave no example."""

    OVERLONG = "overlong"
    INVALID = "invalid"


class Dataset(ABC, Generic[Example]):
    """`dataset[i]`: the example of row i, made when asked for, or None where it is left out.

    overlong: what is done with an example of more than max_tokens tokens: "skip" leaves it out, "error" raises
        TooLong naming its line, others as the dataset says.
    invalid: what is done with a row that reads well but holds no example, for instance an empty completion:
        "error" raises UnusableRow naming its line, "skip" leaves it out. A broken line or a missing field always raises.
    """

    OVERLONG: tuple[str, ...] = ("skip", "error")

    def __init__(self, rows: Rows, tokenizer: Tokenizer, max_tokens: int, overlong: str, invalid: str) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if overlong not in self.OVERLONG:
            raise ValueError(f"overlong: expected one of {self.OVERLONG}, got {overlong!r}")
        if invalid not in ("error", "skip"):
            raise ValueError(f"invalid: expected one of ('error', 'skip'), got {invalid!r}")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an end-of-sequence token, got none (eos_token_id)")
        self.rows, self.tokenizer = rows, tokenizer
        self.max_tokens, self.overlong, self.invalid = max_tokens, overlong, invalid

    @abstractmethod
    def make(self, row: Row, index: int) -> Example:
        """The example of a row; TooLong or UnusableRow where there is none."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example | None:
        example = self.take(index)
        return None if isinstance(example, Skipped) else example

    def take(self, index: int) -> Example | Skipped:
        """The example of row `index`, or why it is left out."""
        if not -len(self.rows) <= index < len(self.rows):
            raise IndexError(f"{self.rows.name}: row {index} of {len(self.rows)}")
        index %= len(self.rows)
        row = self.rows[index]
        try:
            return self.make(row, index)
        except TooLong:
            if self.overlong == "error":
                raise
            return Skipped.OVERLONG
        except UnusableRow:
            if self.invalid == "error":
                raise
            return Skipped.INVALID

    def check_length(self, row: Row, tokens: int, what: str) -> None:
        if tokens > self.max_tokens:
            raise TooLong(f"{row.where}: {what} has {tokens} tokens, more than max_tokens {self.max_tokens}")


class ExampleStream(Generic[Example]):
    """Examples in an endless order, epoch after epoch; saves and restores where it stands.

    skipped: how many rows were left out as too long so far; invalid: how many as holding no example.
    position: how many rows were taken, those left out among them, over all shards if there are several.
    """

    def __init__(self, dataset: Dataset[Example], seed: int, shuffle: bool = True) -> None:
        self.dataset = dataset
        self.skipped = 0
        self.invalid = 0
        self._stream = Stream(dataset.rows, seed, shuffle)

    @property
    def position(self) -> int:
        return self._stream.position

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    def shard(self, rank: int, world: int) -> ExampleStream[Example]:
        """A stream of every world-th row from here on, as `Stream.shard`; its counts begin at 0."""
        shard = type(self)(self.dataset, 0)
        shard._stream = self._stream.shard(rank, world)
        return shard

    def next(self, n: int) -> list[Example]:
        """The next n examples, taking as many rows as that needs.

        Where a row is broken, DataError, and none is taken. DataError too where a whole epoch of rows gave none.
        """
        state = self.state_dict()
        examples: list[Example] = []
        enough, fruitless = 2 * len(self.dataset), 0  # that many rows hold a whole epoch wherever they begin
        try:
            while len(examples) < n:
                example = self.dataset.take(self._stream.indices(1)[0])
                if isinstance(example, Skipped):
                    fruitless += 1
                    self.skipped += example is Skipped.OVERLONG
                    self.invalid += example is Skipped.INVALID
                    if fruitless >= enough:
                        raise DataError(
                            f"{self.dataset.rows.name}: no example in a whole epoch of {len(self.dataset)} rows: so far "
                            f"{self.skipped} longer than max_tokens {self.dataset.max_tokens}, {self.invalid} invalid"
                        )
                else:
                    examples.append(example)
                    fruitless = 0
        except BaseException:
            self.load_state_dict(state)
            raise
        return examples

    def state_dict(self) -> dict[str, Any]:
        return {**self._stream.state_dict(), "skipped": self.skipped, "invalid": self.invalid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was saved. ValueError, and nothing changed, where it is of other rows or another order."""
        for key in ("skipped", "invalid"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"state of the data stream {self.dataset.rows.name}: {key} is {state.get(key)!r}")
        self._stream.load_state_dict(state)
        self.skipped, self.invalid = state["skipped"], state["invalid"]
