"""Parquet files and Hugging Face datasets: Arrow tables mapped from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import extra
from . import cache
from .rows import DataError, Row, Rows

BATCH = 256  # rows


class Parquet(Rows):
    """The rows of a Parquet file; row i is `file:i+1` in errors.

    A row of a Parquet file cannot be read without decoding its whole row group, which a shuffle would do again for
    every row. So the file is decoded once, batch by batch, into an Arrow file in the cache, and rows are read from
    that by memory map. DataError where the file is not Parquet or has no rows.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        pyarrow = extra("pyarrow")
        extra("pyarrow.parquet")
        try:
            decoded = cache.derived(path, ".arrow", lambda out: _decode(path, out))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise DataError(f"{path}: not Parquet that can be read: {error}") from None
        self._batches = pyarrow.ipc.open_file(pyarrow.memory_map(str(decoded)))
        sizes = [self._batches.get_batch(i).num_rows for i in range(self._batches.num_record_batches)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        if not sizes or not self._ends[-1]:
            raise DataError(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Row:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        inside = index - (int(self._ends[batch - 1]) if batch else 0)
        record = self._batches.get_batch(batch).slice(inside, 1).to_pylist()[0]
        return Row(record, f"{self.name}:{index + 1}")


def _decode(path: Path, out: BinaryIO) -> None:
    pyarrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    with parquet.ParquetFile(path) as file, pyarrow.ipc.new_file(out, file.schema_arrow) as writer:
        for batch in file.iter_batches(batch_size=BATCH):
            writer.write_batch(batch)


class HubDataset(Rows):
    """The rows of one split of a Hugging Face dataset, which maps its own files from disk."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self._dataset = dataset
        if not len(dataset):
            raise DataError(f"{name}: the dataset has no rows")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Row:
        return Row(self._dataset[index], f"{self.name}:{index + 1}")


def open_saved(path: Path, split: str) -> HubDataset:
    """A directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    datasets = extra("datasets", "hub")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets raises of a damaged directory
        raise DataError(f"{path}: not a dataset that can be read: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{path}: no split {split!r}; the dataset has {list(dataset)}")
        return HubDataset(dataset[split], f"{path.name}[{split}]")
    return HubDataset(dataset, path.name)


def open_hub(name: str, split: str) -> HubDataset:
    """`owner/dataset` or `owner/dataset:configuration` on the Hugging Face hub, or in its local cache."""
    datasets = extra("datasets", "hub")
    repository, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # no network, no such dataset, split or configuration: datasets says which
        raise DataError(f"hf:{name}: split {split!r} cannot be loaded: {error}") from error
    return HubDataset(dataset, f"hf:{name}[{split}]")
