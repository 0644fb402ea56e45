"""The plan's memory is what small runs take, and its layouts are exactly the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.algorithms.grpo import GroupRelative, GRPOConfig
from fastrlhf.algorithms.ppo import PPO, PPOConfig
from fastrlhf.cli.main import main
from fastrlhf.config import load
from fastrlhf.data import load_tokenizer
from fastrlhf.generation import EmbeddedEngine
from fastrlhf.models import Decoder, DecoderConfig, Packed, load_scalar_model, read_config, save_scalar_model, token_logprobs
from fastrlhf.parallel import ParallelGroups, Stages
from fastrlhf.training.batches import own_groups
from fastrlhf.training.optim import Optimizer, OptimizerConfig, trainable
from fastrlhf.training.passes import run
from fastrlhf.training.plan import GPUS, Job, Plan, cache_of, layouts, memory_of_rank, peak_of, plan, plans, weights_of_rank
from fastrlhf.training.progress import Silent
from fastrlhf.training.proof import covers_once, part, proof

from ..parallel.processes import make_model, parallel_words, spawn
from ..trainer import write
from .live import Live

SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LLAMA_3_70B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_3_405B = LLAMA_3_70B | {
    "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip
QWEN: dict[str, Any] = SMALL | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32}


def measured(rank: int, tp: int, pp: int, job: Job, config: dict[str, Any]) -> tuple[int, float]:
    """(the most bytes alive in two steps of supervised training as `algorithms.sft` does them, the plan's)."""
    groups = ParallelGroups.create(tp=tp, pp=pp)
    c = DecoderConfig.from_hf(config)
    stages = Stages(c.num_hidden_layers, pp, job.interleave if pp > 1 else 1)
    length = job.prompt_tokens + job.completion_tokens
    examples = torch.randint(c.vocab_size, (job.completions, length)).tolist()
    dtype = torch.bfloat16 if job.itemsize == 2 else torch.float32
    with Live() as live:
        model = Decoder(c, groups=groups, dtype=dtype, stages=stages, sequence_parallel=True).initialize(0)
        live.peak = live.now  # without what drawing the weights took
        model.checkpoint_activations = job.checkpointing
        optimizer = Optimizer(trainable(model), OptimizerConfig(lr=1e-3), 10, groups)
        for _ in range(2):
            members = own_groups([length] * len(examples), job.micro_batch_tokens, groups)
            inputs = [Packed.of([examples[i] for i in group]) for group in members]

            def last(i: int, hidden: torch.Tensor) -> torch.Tensor:
                tokens, pack = inputs[i]
                wanted = (pack.positions >= job.prompt_tokens).nonzero().squeeze(1)
                return -token_logprobs(model, hidden[wanted - 1], tokens[wanted]).logprobs.sum() / 1000

            run(model, inputs, last)
            optimizer.step("test")
    return live.peak, peak_of(memory_of_rank(c, stages, groups.pp.rank, tp, groups.dp.size, job))


def sft(**options: Any) -> Job:
    given: dict[str, Any] = {
        "algorithm": "sft", "completions": 16, "prompt_tokens": 64, "completion_tokens": 64, "micro_batch_tokens": 512,
        "gloo": True,
    }  # fmt: skip
    return Job(**(given | options))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("itemsize", "tokens"), [(2, 512), pytest.param(2, 2048, marks=pytest.mark.slow), (4, 2048)])
@pytest.mark.parametrize(
    "config", [SMALL, pytest.param(SMALL | {"num_key_value_heads": 4}, marks=pytest.mark.slow)], ids=["grouped", "ungrouped"]
)
def test_memory_of_one_process(config: dict[str, Any], itemsize: int, tokens: int, checkpointing: bool) -> None:
    """Activations are from a sixth of it to nearly all."""
    job = sft(itemsize=itemsize, checkpointing=checkpointing, micro_batch_tokens=tokens)
    took, planned = measured(0, 1, 1, job, config)
    assert planned == pytest.approx(took, rel=0.1), (took, planned)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_memory_of_several_processes(tp: int, pp: int, dp: int, checkpointing: bool) -> None:
    for took, planned in spawn(tp * pp * dp, measured, tp, pp, sft(checkpointing=checkpointing, completions=32), SMALL):
        assert planned == pytest.approx(took, rel=0.1), (took, planned)


def measured_rl(
    rank: int, files: dict[str, str], cases: list[tuple[Job, dict[str, Any]]]
) -> list[tuple[int, float]]:  # fmt: skip
    """As `measured`, of two steps of on-policy training with all that it holds; completions are of full length."""
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(
            EmbeddedEngine, "_ends", lambda _, sequence, __: "length" if sequence.drawn >= sequence.sampling.max_tokens else ""
        )
        return [_measured_rl(files, job, options) for job, options in cases]


def _measured_rl(files: dict[str, str], job: Job, options: dict[str, Any]) -> tuple[int, float]:
    rewards = [{"function": "tests.trainer:letters"}, *({"model": files["reward model"]} for _ in job.rewards)]
    pieces = [
        ("micro_batch_tokens", str(job.micro_batch_tokens)), ("minibatch_size", str(job.minibatch or job.completions)),
        ("epochs", str(job.epochs)),
    ]  # fmt: skip
    words = [
        "--run.directory", "unused", "--model.path", files["model"], "--model.dtype", "bfloat16", "--data.path", files["prompts"],
        "--data.max_prompt_tokens", "64", "--rewards", json.dumps(rewards), "--steps", "2", "--prompts_per_step", str(job.completions // 4),
        "--completions_per_prompt", "4", "--sampling.max_tokens", str(job.completion_tokens), "--kl.coef", "0.1",
        "--model.checkpoint_activations", str(job.checkpointing), *parallel_words(options | {"reshard": job.reshard}),
        *(word for name, value in pieces for word in (f"--update.{name}", value)),
    ]  # fmt: skip
    with Live() as live:
        algorithm: PPO | GroupRelative
        if job.algorithm == "ppo":
            words += [word for name, value in pieces for word in (f"--critic.{name}", value)]
            words += ["--critic.checkpoint_activations", str(job.checkpointing)]
            algorithm = PPO(load(PPOConfig, None, words))
        else:
            algorithm = GroupRelative(load(GRPOConfig, None, words))
        live.peak = live.now
        for step in (1, 2):
            algorithm.step(step, Silent())
    c, groups = algorithm.policy.model.config, algorithm.groups
    stages = Stages(c.num_hidden_layers, groups.pp.size)
    return live.peak, peak_of(memory_of_rank(c, stages, groups.pp.rank, groups.tp.size, groups.dp.size, job))


@pytest.fixture(scope="module")
def rl_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("rl")
    kind = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    model = make_model(directory / "model", kind, layers=6)
    save_scalar_model(load_scalar_model(model, seed=5), directory / "rm", tokenizer=load_tokenizer(model))
    prompts = write(directory / "prompts.jsonl", [{"prompt": "red" + " blue" * 31}] * 16)
    return {"model": model, "reward model": str(directory / "rm"), "prompts": prompts}


def rl(algorithm: str, **options: Any) -> Job:
    given: dict[str, Any] = {
        "completions": 16, "prompt_tokens": 32, "completion_tokens": 24, "micro_batch_tokens": 256, "gloo": True,
        "checkpointing": False,
    }  # fmt: skip
    return Job(algorithm, **(given | options))


@pytest.mark.slow
def test_memory_of_on_policy_training(rl_files: dict[str, str]) -> None:
    rewards = (read_config(rl_files["model"]),)
    jobs = [
        rl("ppo"),
        rl("grpo", checkpointing=True),
        rl("ppo", rewards=rewards, minibatch=2, micro_batch_tokens=1024),
    ]
    for job, (took, planned) in zip(jobs, measured_rl(0, rl_files, [(job, {}) for job in jobs]), strict=True):
        assert planned == pytest.approx(took, rel=0.1), (job, took, planned)


@pytest.mark.slow
def test_memory_of_on_policy_training_over_processes(rl_files: dict[str, str]) -> None:
    cases: list[tuple[Job, dict[str, Any]]] = [
        (rl("ppo"), {"pp": 2}), (rl("ppo", reshard=False), {"pp": 2}), (rl("grpo"), {"pp": 2}),
        (rl("grpo", reshard=False), {"pp": 2}), (rl("ppo"), {"tp": 2}), (rl("grpo"), {}),
    ]  # fmt: skip
    for found in spawn(2, measured_rl, rl_files, cases):
        for (job, options), (took, planned) in zip(cases, found, strict=True):
            assert planned == pytest.approx(took, rel=0.1), (job, options, took, planned)


@pytest.mark.parametrize("config", [SMALL, QWEN, SMALL | {"model_type": "qwen2"}], ids=["llama", "qwen3 tied", "qwen2"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 3), (1, 6)])
def test_weights_are_counted_as_they_are_made(config: dict[str, Any], tp: int, pp: int) -> None:
    c = DecoderConfig.from_hf(config)
    stages = Stages(c.num_hidden_layers, pp)
    for rank in range(pp):
        model = part(c, stages, (tp, pp, 1), (0, rank, 0))
        sizes = [p.numel() for p in model.parameters()]
        assert weights_of_rank(c, stages, rank, tp) == (sum(sizes), max(sizes))


@pytest.mark.parametrize(
    ("config", "sizes", "elements"),
    [
        (LLAMA_3_70B, (8, 4, 2), 70_553_706_496),
        pytest.param(LLAMA_3_405B, (8, 8, 8), 405_853_388_800, marks=pytest.mark.slow),
        (QWEN, (2, 3, 4), None),
        (SMALL, (1, 1, 1), None),
    ],
)
def test_all_shards_together_are_the_model(config: dict[str, Any], sizes: tuple[int, int, int], elements: int | None) -> None:
    c = DecoderConfig.from_hf(config)
    said = proof(c, *sizes, interleave=2 if sizes == (8, 4, 2) else 1)
    assert f"{elements or Plan.parameters(c):,} elements" in said


def test_the_weights_of_llama_3_70b_are_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from fastrlhf.models.export import entries

    c = DecoderConfig.from_hf(LLAMA_3_70B)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_3_70B)).state_dict()
    assert {e.name: e.shape for e in entries(c, Stages(80, 4), head=True)} == {n: tuple(t.shape) for n, t in theirs.items()}


def test_covers_once_sees_gaps_and_overlaps() -> None:
    left, right = ((0, 2), (0, 3)), ((0, 2), (3, 6))
    assert covers_once((2, 6), [left, right])
    assert not covers_once((2, 6), [left])
    assert not covers_once((2, 6), [left, left])
    assert not covers_once((2, 6), [((0, 2), (0, 4)), ((0, 1), (4, 6)), ((0, 1), (3, 5))])


def test_layouts_are_those_that_divide() -> None:
    found = list(layouts(DecoderConfig.from_hf(LLAMA_3_70B), 64))
    assert (8, 4, 2) in found and (16, 2, 2) not in found  # 8 key-value heads
    assert all(tp * pp * dp == 64 for tp, pp, dp in found)


def test_a_larger_gpu_fits_more() -> None:
    c = DecoderConfig.from_hf(LLAMA_3_70B)
    fit = {name: {(p.tp, p.pp, p.dp) for p in plans(c, 64, GPUS[name], Job()) if p.fits} for name in ("h100", "h200")}
    assert fit["h100"] < fit["h200"] and (8, 4, 2) in fit["h100"]


LLAMA_3_8B: dict[str, Any] = LLAMA_3_70B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip


def test_a_step_generates_no_more_at_once_than_its_cache_holds() -> None:
    c = DecoderConfig.from_hf(LLAMA_3_8B)
    small = cache_of(c, Stages(32), 1, 8, Job())
    large = cache_of(c, Stages(32), 1, 8, Job(cache_tokens=64 * 1040))
    assert small.bytes <= 2**31 and (small.batch, large.batch) == (16, 64)
    slow, quick = (plan(c, 1, 1, 8, GPUS["h100"], job) for job in (Job(), Job(cache_tokens=64 * 1040)))
    assert slow.seconds > quick.seconds + 2 and slow.peak < quick.peak


@pytest.mark.parametrize("cache_tokens", [None, 100])
def test_the_cache_is_the_engines(cache_tokens: int | None) -> None:
    c = DecoderConfig.from_hf(SMALL)
    job = Job(completions=24, prompt_tokens=20, completion_tokens=13, itemsize=4, max_sequences=5, cache_tokens=cache_tokens)
    engine = EmbeddedEngine(Decoder(c), max_sequences=5, cache_tokens=cache_tokens)
    engine._ensure_cache(33, 24)
    assert engine._cache is not None
    made = sum(t.nbytes for layer in engine._cache.layers.values() for t in layer)
    assert (made, {None: 5, 100: 2}[cache_tokens]) == cache_of(c, Stages(6), 1, 1, job)


def test_a_plan_has_the_reward_models_the_minibatches_and_the_epochs() -> None:
    c = DecoderConfig.from_hf(LLAMA_3_8B)
    plain = plan(c, 2, 4, 1, GPUS["h200"], Job())
    rewarded = plan(c, 2, 4, 1, GPUS["h200"], Job(rewards=(c, c)))
    more = [2 * 2 * weights_of_rank(c, Stages(32, 4), r, 2, head=False).total for r in range(4)]
    assert rewarded.memory["weights"] - plain.memory["weights"] in more
    assert rewarded.seconds > plain.seconds and rewarded.bubble == plain.bubble
    often = plan(c, 2, 4, 1, GPUS["h200"], Job(minibatch=32))
    assert often.bubble == pytest.approx(3 / 7) and often.seconds > plain.seconds  # four micro-batches of 8192 tokens
    twice = plan(c, 2, 4, 1, GPUS["h200"], Job(minibatch=32, epochs=2))
    assert twice.seconds > 1.3 * often.seconds and twice.bubble == often.bubble
    other = DecoderConfig.from_hf(SMALL | {"vocab_size": 128256})  # six layers, two key-value heads
    assert {(tp, pp) for tp, pp, _ in layouts(c, 8, rewards=[other])} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["tp"], r["pp"], r["dp"]) for r in rows} == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4", "--prove", "2x1x2"]) == 0
    assert "each held once" in capsys.readouterr().out
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4", "--prove", "2x2x2"]) == 2
    assert "2 x 2 x 2 is 8, not the 4" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "nothing.json"), "--gpus", "4"]) == 2
    capsys.readouterr()
    more = ["--reward-models", "1", "--reward-model", str(tmp_path), "--minibatch-size", "64", "--epochs", "2"]
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4", *more]) == 0
    assert "tokens a step, 16 updates, 2 reward model(s)." in capsys.readouterr().out
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4", "--cache-tokens", "500"]) == 2
    assert "--cache-tokens: 500 do not hold a sequence of 1024 tokens" in capsys.readouterr().err
