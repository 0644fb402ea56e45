"""Rows from files, in a stable shuffled order, as prompts, conversations and preference pairs.

rows = open_rows("train.jsonl")
dataset = PromptDataset(rows, tokenizer, max_tokens=512)
stream = PromptStream(dataset, seed=0, shuffle=True)
batch = stream.next(64)
"""

from .characters import character_tokenizer
from .conversations import Conversation, ConversationDataset, ConversationStream
from .dataset import Dataset, ExampleStream, Skipped
from .order import Order, Stream
from .packing import batches_by_tokens, micro_batches_for, pack, spread
from .preferences import Preference, PreferenceDataset, PreferenceStream
from .prompts import Prompt, PromptDataset, PromptStream
from .rows import DataError, Row, Rows, TooLong, UnusableRow
from .sources import open_rows
from .split import split
from .template import render, render_text
from .tokenizer import load_tokenizer, texts_of, train_tokenizer

__all__ = [
    "Conversation",
    "ConversationDataset",
    "ConversationStream",
    "DataError",
    "Dataset",
    "ExampleStream",
    "Order",
    "Preference",
    "PreferenceDataset",
    "PreferenceStream",
    "Prompt",
    "PromptDataset",
    "PromptStream",
    "Row",
    "Rows",
    "Skipped",
    "Stream",
    "TooLong",
    "UnusableRow",
    "batches_by_tokens",
    "character_tokenizer",
    "load_tokenizer",
    "micro_batches_for",
    "open_rows",
    "pack",
    "render",
    "render_text",
    "split",
    "spread",
    "texts_of",
    "train_tokenizer",
]
