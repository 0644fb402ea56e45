"""`fastrlhf init`: what it writes loads here and in transformers, and nothing is overwritten unasked."""

from __future__ import annotations

import json
import os

import pytest
import torch
from fastrlhf.data import DataError, character_tokenizer, load_tokenizer, open_rows, texts_of
from fastrlhf.models import Packed, load_decoder, read_config

from .conftest import ROWS

TINY = ("--model.hidden_size", 32, "--model.num_hidden_layers", 2, "--model.num_attention_heads", 4)
FIELDS = ("--fields", "prompt,completion")
TEXTS = [text for row in ROWS for text in row.values()]


@pytest.fixture
def init(command, data, tmp_path):
    """init(*words) -> (status, stdout, stderr, directory); a tiny model in a directory of the test's own."""

    def run(*words, output="model"):
        directory = tmp_path / output
        return *command("init", "--output", directory, "--data", data, *FIELDS, *TINY, *words), directory

    return run


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_directory_loads_here_and_in_transformers(init, family):
    transformers = pytest.importorskip("transformers")
    status, _, err, directory = init("--vocab_size", 300, "--model.model_type", family, "--model.num_key_value_heads", 2)
    assert (status, err) == (0, "")
    ours, theirs = load_decoder(directory), transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.config.model_type == family and theirs.config.num_key_value_heads == 2
    assert getattr(theirs.config, "sliding_window", None) is None  # a window of 4096 is Mistral's default there
    tokens = torch.tensor(load_tokenizer(directory).encode(TEXTS[0]))
    logits = ours.logits(ours(tokens, Packed([len(tokens)])))
    torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.01  # the weights are there


@pytest.mark.parametrize("kind", [("--vocab_size", 301), ("--character_level",)], ids=["bpe", "characters"])
def test_the_ids_of_special_tokens_agree(init, kind):
    transformers = pytest.importorskip("transformers")
    _, _, _, directory = init(*kind)
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    config, generation = (
        transformers.AutoConfig.from_pretrained(directory),
        transformers.AutoModelForCausalLM.from_pretrained(directory).generation_config,
    )
    assert ours.eos_token == "<|endoftext|>" and ours.pad_token_id != ours.eos_token_id
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        ids = {getattr(x, name) for x in (ours, theirs, config, generation)}
        assert len(ids) == 1, name
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) and theirs.decode(theirs.encode(text)) == text


def test_the_models_vocabulary_is_a_multiple_of_8_that_holds_the_tokenizers(init):
    _, _, _, directory = init("--vocab_size", 301)
    tokenizer, config = load_tokenizer(directory), read_config(directory)
    assert len(tokenizer) == 301 and config.vocab_size == 304
    _, _, _, few = init("--vocab_size", 8192, output="few")  # more than the text has merges for
    tokens = len(load_tokenizer(few))
    assert 301 < tokens < 600 and read_config(few).vocab_size == -(-tokens // 8) * 8


def test_the_summary_says_what_was_written(init):
    _, out, _, directory = init("--vocab_size", 301, "--model.max_position_embeddings", 77)
    parameters = sum(p.numel() for p in load_decoder(directory).parameters())
    size = sum(p.stat().st_size for p in directory.iterdir())
    assert out == (f"{directory}: llama, {parameters:,} parameters, vocabulary 304 (301 tokens), context 77, {size:,} bytes\n")
    assert sorted(p.name for p in directory.iterdir() if p.name.startswith(".")) == []


def test_options_of_the_model(init):
    _, _, _, directory = init(
        "--character-level", "--model.intermediate_size", 48, "--model.head_dim", 10, "--model.rope_theta", 500,
        "--model.tie_word_embeddings", "false", "--model.rms_norm_eps", "1e-5", "--model.initializer_range", 0.1,
    )  # fmt: skip
    config = read_config(directory)
    assert (config.intermediate_size, config.head_dim, config.rope["rope_theta"], config.rms_norm_eps) == (48, 10, 500, 1e-5)
    assert not config.tie_word_embeddings
    assert load_decoder(directory).lm_head.weight.std().item() == pytest.approx(0.1, rel=0.1)
    _, _, _, plain = init("--character-level", output="plain")
    assert read_config(plain).intermediate_size == 96 and read_config(plain).head_dim == 8  # 8/3 · 32 = 85.3


def test_same_seed_same_model(init):
    _, _, _, a = init("--character_level")
    _, _, _, b = init("--character_level", output="b")
    _, _, _, c = init("--character_level", "--seed", 1, output="c")
    read = lambda directory: (directory / "model.safetensors").read_bytes()  # noqa: E731
    assert read(a) == read(b) != read(c)
    assert (a / "tokenizer.json").read_bytes() == (c / "tokenizer.json").read_bytes()


def test_characters_outside_the_alphabet_are_unknown(data):
    tokenizer = character_tokenizer(texts_of(open_rows(data), ["completion"]))
    alphabet = {c for row in ROWS for c in row["completion"]}
    assert len(tokenizer) == len(alphabet) + 3
    assert tokenizer.decode(tokenizer.encode("12-Z3")) == "12-<|unk|>3"
    assert tokenizer.encode("12<|endoftext|>")[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode("12<|endoftext|>"), skip_special_tokens=True) == "12"
    with pytest.raises(ValueError, match="at least one character"):
        character_tokenizer([""])


def test_nothing_is_overwritten_unasked(init):
    _, _, _, directory = init("--vocab_size", 300)
    (directory / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    assert "chat_template.jinja" in before
    status, out, err, _ = init("--character_level")
    assert status == 2 and "is not empty; --overwrite" in err and not out
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    status, *_ = init("--character_level", "--overwrite")
    assert status == 0 and (directory / "notes.txt").read_text() == "mine"
    assert load_tokenizer(directory).chat_template is None  # none of the earlier tokenizer's is left
    load_decoder(directory)


def test_a_failed_write_keeps_what_was_there(init, monkeypatch):
    _, _, _, directory = init("--vocab_size", 300)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def full(model, path, tokenizer):
        os.makedirs(path, exist_ok=True)
        open(os.path.join(path, "config.json"), "w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastrlhf.cli.init.save_decoder", full)
    status, _, err, _ = init("--character_level", "--overwrite")
    assert status == 2 and "No space left" in err
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_a_file_of_options_and_the_command_line_over_it(command, data, tmp_path):
    file = tmp_path / "init.yaml"
    options = {"data": [str(data)], "fields": ["prompt"], "character_level": True, "output": str(tmp_path / "no")}
    file.write_text(json.dumps(options | {"model": {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}}))
    status, _, err = command("init", "--config", file, "--output", tmp_path / "yes", "--model.hidden_size", 32)
    assert (status, err) == (0, "") and not (tmp_path / "no").exists()
    config = read_config(tmp_path / "yes")
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 2, 1)


def test_help_names_every_option(command):
    status, out, _ = command("init", "--help")
    assert status == 0 and out.startswith("usage: fastrlhf init")
    for name in ("--output", "--fields", "--character_level", "--model.head_dim", "--model.tie_word_embeddings"):
        assert f"  {name} " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vocab_size", 100), "vocab_size: expected at least"),
        (("--model.hidden_size", 30), "model.hidden_size: expected a multiple of model.num_attention_heads 4"),
        (("--model.num_key_value_heads", 3), "model.num_attention_heads: 4 is no multiple"),
        (("--model.head_dim", 7), "model.head_dim: expected an even number"),
        (("--model.num_layers", 3), "did you mean"),
        (("--model.model_type", "gpt2"), "model.model_type"),
        (("--fields", "promt"), "no field 'promt'"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--config",), "config: expected a file"),
    ],
)
def test_bad_input(init, words, message):
    status, out, err, directory = init(*words)
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert not directory.exists()


def test_a_broken_line_is_named(command, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    status, _, err = command("init", "--output", tmp_path / "m", "--data", path, "--fields", "text")
    assert status == 2 and "broken.jsonl:2: not JSON" in err
    assert issubclass(DataError, ValueError)


def test_output_is_a_file(command, data, tmp_path):
    (tmp_path / "file").write_text("x")
    status, _, err = command("init", "--output", tmp_path / "file", "--data", data, *FIELDS)
    assert status == 2 and "expected a directory, got the file" in err
