"""`fastrlhf generate`: the completions of the model it was given, of the prompts it was given, in their order."""

from __future__ import annotations

import json
import re

import pytest
import torch
from fastrlhf.data import load_tokenizer, render_text
from fastrlhf.generation import EmbeddedEngine

from .conftest import ROWS

BLOCK = re.compile(r"^=== prompt (\d+), sample (\d+): (\d+) tokens, (stop|length)\n", re.M)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """Characters, a context of 96, nearly uniform draws."""
    return make(data, tmp_path_factory, "--character_level", "true")


@pytest.fixture(scope="module")
def chat_model(data, tmp_path_factory):
    return make(data, tmp_path_factory, "--vocab_size", "300")


def make(data, tmp_path_factory, *words):
    from fastrlhf.cli.init import main

    directory = tmp_path_factory.mktemp("generate") / "model"
    sizes = ("--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.max_position_embeddings", "96")
    assert main(["--output", str(directory), "--data", str(data), "--fields", "prompt,completion", *sizes, *words]) == 0
    return directory


@pytest.fixture
def write(command, tmp_path):
    """write(*words) -> (rows of the output file, stderr)."""

    def run(*words):
        path = tmp_path / "out.jsonl"
        status, out, err = command("generate", *words, "--output", path)
        assert status == 0 and not out, err
        return [json.loads(line) for line in path.read_text().splitlines()], err

    return run


def test_greedy_is_transformers(model, write):
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    prompts = ["tom has 7, or 12. how many?", "ann"]
    rows, _ = write("--model", model, "--prompt", prompts[0], f"--prompt={prompts[1]}", "--temperature", 0, "--max_tokens", 20)
    assert [row["prompt"] for row in rows] == prompts  # a comma does not part a prompt
    for row in rows:
        tokens = torch.tensor([tokenizer.encode(row["prompt"])])
        out = theirs.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
        assert row["completion"] == tokenizer.decode(out, skip_special_tokens=True) and row["tokens"] == len(out)


def test_rows_of_a_file_in_their_order(model, data, write):
    rows, _ = write("--model", model, "--data", data, "--n", 3, "--max_tokens", 60, "--max_sequences", 4)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(len(ROWS)) for k in range(3)]
    for row in rows:
        assert row["prompt"] == ROWS[row["index"]]["prompt"] and row["row"] == ROWS[row["index"]]
        assert row["logprob"] < 0
    assert len({row["tokens"] for row in rows}) > 3  # they end at different times, and are waited for


def test_the_end_token_ends_and_is_not_printed(model, write):
    rows, _ = write("--model", model, "--prompt", "tom", "--n", 50, "--max_tokens", 60)
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(ended) > 5 and min(row["tokens"] for row in ended) < 60
    assert all(row["tokens"] == 60 for row in rows if row["finish_reason"] == "length")
    assert not any("<|" in row["completion"].replace("<|unk|>", "") for row in rows)


def test_stop_strings(model, write):
    rows, _ = write("--model", model, "--prompt", "tom", "--n", 50, "--max_tokens", 60, "--stop", "a", "--stop", ",")
    ended = [row["completion"] for row in rows if row["finish_reason"] == "stop"]
    assert {text[-1:] for text in ended} >= {"a", ","}
    assert not any("a" in text[:-1] or "," in text[:-1] for text in ended)


def test_same_seed_same_completions(model, data, write):
    options = ("--model", model, "--data", data, "--max_tokens", 30)
    first, _ = write(*options)
    again, _ = write(*options, "--max_sequences", 2)
    few, _ = write(*options, "--limit", 5)
    other, _ = write(*options, "--seed", 1)
    assert first == again and few == first[:5] and other != first


def test_sampling_options_arrive(model, monkeypatch, command):
    seen = []
    stream = EmbeddedEngine.stream
    monkeypatch.setattr(EmbeddedEngine, "stream", lambda self, p, s, **k: seen.append(s) or stream(self, p, s, **k))
    words = ("--n", 2, "--max_tokens", 4, "--temperature", 0.5, "--top_k", 3, "--top_p", 0.9, "--min_p", 0.1, "--stop", "\n")
    assert command("generate", "--model", model, "--prompt", "a", *words)[0] == 0
    (sampling,) = seen
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.stop) == (2, 4, 0.5, ("\n",))
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (3, 0.9, 0.1)
    assert sampling.stop_tokens == (load_tokenizer(model).eos_token_id,)


def test_templates_and_fields(model, data, write):
    rows, _ = write("--model", model, "--data", data, "--template", "{prompt}{completion}", "--limit", 2, "--max_tokens", 2)
    assert [row["prompt"] for row in rows] == [row["prompt"] + row["completion"] for row in ROWS[:2]]
    rows, _ = write("--model", model, "--data", data, "--prompt_field", "completion", "--limit", 2, "--max_tokens", 2)
    assert [row["prompt"] for row in rows] == [row["completion"] for row in ROWS[:2]]


def test_chat_is_a_users_message(model, chat_model, data, write):
    tokenizer = load_tokenizer(chat_model)
    expected = render_text([{"role": "user", "content": "tom"}], tokenizer, True)
    assert expected.startswith("<|im_start|>user\ntom")
    for directory, prompt in ((chat_model, expected), (model, "User: tom\nAssistant:")):
        rows, _ = write("--model", directory, "--prompt", "tom", "--chat", "--max_tokens", 2)
        assert rows[0]["prompt"] == prompt
    rows, _ = write("--model", chat_model, "--data", data, "--limit", 1, "--chat", "--max_tokens", 2)
    assert rows[0]["prompt"] == render_text([{"role": "user", "content": ROWS[0]["prompt"]}], tokenizer, True)


def test_printed_as_they_end(model, monkeypatch, command, capsys):
    printed = []
    stream = EmbeddedEngine.stream

    def watched(self, *args, **kwargs):
        for finished in stream(self, *args, **kwargs):
            yield finished
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(EmbeddedEngine, "stream", watched)
    status, _, err = command("generate", "--model", model, "--prompt", "tom", "--prompt", "ann", "--n", 2, "--max_tokens", 40)
    assert status == 0 and len(printed) == 4
    blocks = [BLOCK.findall(text) for text in printed]
    assert all(len(found) == 1 for found in blocks)  # each was on its way before the next ended
    assert sorted(found[0][:2] for found in blocks) == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert all(BLOCK.sub("", text).startswith(("tom", "ann")) for text in printed)
    tokens = sum(int(found[0][2]) for found in blocks)
    assert re.fullmatch(rf"4 completions, {tokens} tokens in [\d.]+ s: [\d,]+ tokens/s\n", err)


@pytest.mark.parametrize("overlong", ["error", "skip", "truncate_left"])
def test_prompts_longer_than_the_context(model, command, tmp_path, overlong):
    path = tmp_path / "out.jsonl"
    words = ("--prompt", "1" * 50 + "2" * 50, "--prompt", "tom", "--max_tokens", 10, "--overlong", overlong, "--output", path)
    status, _, err = command("generate", "--model", model, *words)
    if overlong == "error":
        assert status == 2 and "prompt:1: the prompt has 100 tokens, more than max_tokens 86" in err and not path.exists()
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert status == 0 and [row["index"] for row in rows] == ([1] if overlong == "skip" else [0, 1])
    assert ("left out 1 of 2 prompts" in err) == (overlong == "skip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "prompt, data: expected one of them, got neither"),
        (("--prompt", "a", "--data", "b.jsonl"), "got both"),
        (("--prompt",), "prompt: expected text, got no value"),
        (("--prompt", " "), "prompt:1: the prompt is empty"),
        (("--prompt", "a", "--max_tokens", 96), "max_tokens: expected less than the model's context of 96"),
        (("--prompt", "a", "--temperature", -1), "temperature"),
        (("--prompt", "a", "--model", "nowhere"), "nowhere/config.json does not exist"),
        (("--prompt", "a", "--device", "nonsense"), "device: 'nonsense' cannot be used here"),
        (("--prompt", "a", "--output", "no/such/directory/out.jsonl"), "no/such/directory"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--prompt", "a", "--tempreature", 1), "did you mean temperature?"),
    ],
)
def test_bad_input(model, command, words, message):
    status, out, err = command("generate", "--model", model, *words, *(() if "--max_tokens" in words else ("--max_tokens", 4)))
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_a_field_that_is_missing_is_named(model, data, command):
    status, _, err = command("generate", "--model", model, "--data", data, "--prompt_field", "question", "--max_tokens", 4)
    assert status == 2 and "rows.jsonl:1: no field 'question'" in err


def test_help(command):
    status, out, _ = command("generate", "--help")
    assert status == 0 and "  --temperature float >= 0  [1]\n" in out
