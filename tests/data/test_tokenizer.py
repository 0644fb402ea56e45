"""Tokenizers: trained ones hold any text and are the same again, loaded ones know how to stop."""

from __future__ import annotations

import json
import sys

import pytest
from fastrlhf.data import DataError, Rows, load_tokenizer, open_rows, texts_of, train_tokenizer
from fastrlhf.data.tokenizer import encode, encode_answer, encode_start
from fastrlhf.errors import MissingExtra

from .conftest import TEXTS, real

pytest.importorskip("transformers")

STRANGE = [
    "",
    " ",
    "  two  spaces ",
    "héllo wörld",
    "日本語 🙂",
    "tabs\tand\nlines\r\n",
    "\x00\x7f",
    "don't , stop !",
    "12 345",
]


def test_any_text_comes_back(tokenizer):
    for text in STRANGE:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_one_by_one(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("1234 5.67"))
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("1234567")


def test_merges_are_learned(tokenizer):
    assert len(tokenizer.encode(" quick brown fox")) < 10
    assert 256 + 4 < len(tokenizer) <= 320


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|><|pad|>")) == 4
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b"), skip_special_tokens=True) == "ab"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_same_texts_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in (*STRANGE, "<|im_start|>user\nhi<|im_end|>"):
        assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def edit_config(path, **changes):
    file = path / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_padding_with_the_end_where_there_is_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path, pad_token=None)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_load_errors(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no tokenizer can be loaded from here"):
        load_tokenizer(tmp_path / "empty")
    tokenizer.save_pretrained(tmp_path / "endless")
    edit_config(tmp_path / "endless", eos_token=None)
    with pytest.raises(ValueError, match="endless: the tokenizer has no end-of-sequence token"):
        load_tokenizer(tmp_path / "endless")


def test_train_errors(monkeypatch):
    with pytest.raises(ValueError, match="vocab_size: expected at least 260, for the bytes and special tokens, got 259"):
        train_tokenizer(TEXTS, 259)
    with pytest.raises(ValueError, match="special_tokens: expected at least the end of a sequence, got none"):
        train_tokenizer(TEXTS, 300, special_tokens=())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"tokenizers: not usable here .*pip install 'fastrlhf\[train\]'"):
        train_tokenizer(TEXTS, 300)


def test_other_specials_and_template():
    own = train_tokenizer(TEXTS, 300, special_tokens=("</s>",))
    assert own.eos_token == "</s>" and own.chat_template is None
    assert train_tokenizer(TEXTS, 300, chat_template="{{ messages[0].content }}").chat_template == "{{ messages[0].content }}"


def test_texts_of():
    rows = Rows.from_list(
        [{"q": "a", "m": [{"role": "user", "content": "b"}], "l": ["c"]}, {"q": "d", "m": [], "l": []}], "mem"
    )
    assert list(texts_of(rows, ["q", "m", "l"])) == ["a", "b", "c", "d"]
    with pytest.raises(DataError, match=r"mem:1: no field 'x'"):
        list(texts_of(rows, ["x"]))
    with pytest.raises(DataError, match=r"mem:1: field 'n': expected a string, got int"):
        list(texts_of(Rows.from_list([{"n": 1}], "mem"), ["n"]))
    with pytest.raises(DataError, match=r"mem:1: field 'm', message 1: expected a string, got NoneType"):
        list(texts_of(Rows.from_list([{"m": [{"role": "user"}]}], "mem"), ["m"]))
    with pytest.raises(TypeError, match="fields: expected a list of names, got the string 'q'"):
        list(texts_of(rows, "q"))


def test_an_answer_ends_once(tokenizer):
    eos = tokenizer.eos_token_id
    plain = encode(tokenizer, "yes")
    assert encode_answer(tokenizer, "yes") == [*plain, eos]
    assert encode_answer(tokenizer, "yes<|endoftext|>") == [*plain, eos]
    assert encode_answer(tokenizer, "yes<|endoftext|>\n") == [*plain, eos]
    assert encode_answer(tokenizer, "yes\n") == [*encode(tokenizer, "yes\n"), eos]


def test_beginning_of_sequence_only_where_the_tokenizer_sets_it(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    assert encode_start(tokenizer, "yes") == encode(tokenizer, "yes")
    tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path, bos_token="<|im_start|>")
    llama = load_tokenizer(tmp_path)
    assert encode_start(llama, "yes") == encode(llama, "yes")
    bos = llama.bos_token_id
    llama.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
    assert encode_start(llama, "yes") == [bos, *encode(llama, "yes")]
    assert encode_start(llama, "<|im_start|>yes") == [bos, *encode(llama, "yes")]
    assert encode(llama, "yes")[0] != bos


def test_trained_on_gsm8k():
    rows = open_rows(real("gsm8k"), limit=500)
    own = train_tokenizer(texts_of(rows, ["question", "answer"]), 1024)
    text = rows[3].text("answer")
    assert len(own) == 1024 and own.decode(own.encode(text)) == text
    assert len(own.encode(text)) < 0.5 * len(text)
