"""However a model is spread over processes, it is the same model and the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastrlhf.algorithms.dpo import DPO, DPOConfig
from fastrlhf.algorithms.grpo import GroupRelative, GRPOConfig
from fastrlhf.algorithms.ppo import PPO, PPOConfig
from fastrlhf.algorithms.reward import RewardConfig, RewardTraining
from fastrlhf.algorithms.sft import SFT, SFTConfig
from fastrlhf.config import load
from fastrlhf.data import load_tokenizer
from fastrlhf.models import Decoder, Packed, load_scalar_model, save_scalar_model
from fastrlhf.models.checkpoint import named_weights
from fastrlhf.parallel.collectives import gather_last
from fastrlhf.parallel.sharding import Placement
from fastrlhf.training.metrics import to_floats
from fastrlhf.training.passes import run
from fastrlhf.training.progress import Silent
from torch import Tensor

from .processes import LAYOUTS, LLAMA, QWEN, make_data, make_model, parallel_words, spawn

pytest.importorskip("transformers")


def sft(model: str, data: dict[str, str], options: dict[str, Any], *more: str) -> SFT:
    return SFT(load(SFTConfig, None, [
        "--run.directory", "unused", "--model.path", model, "--data.path", data["sft"], "--batch_size", "7",
        "--micro_batch_tokens", "40", "--optimizer.lr", "3e-3", "--optimizer.warmup_steps", "0",
        "--optimizer.weight_decay", "0.1", "--optimizer.grad_clip", "0.5", *parallel_words(options), *more,
    ]))  # fmt: skip


class Step(NamedTuple):
    """`logits` of some sequences before two steps, by sequence, where this process has them; the gradients of the first as
    they are reduced, by the whole model's names, and where each lies; the weights after both, whole, by Hugging Face name."""

    metrics: dict[str, float]
    logits: dict[int, Tensor]
    gradients: dict[str, tuple[Tensor, Placement]]
    weights: dict[str, Tensor]


def logits_of(model: Decoder) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def last(i: int, hidden: Tensor) -> None:
        found[i] = gather_last(model.logits(hidden), model.groups.tp)

    with torch.no_grad():
        run(model, [Packed.of([s]) for s in ([5, 9, 63, 0, 31, 17, 8], [32, 2, 7], list(range(1, 12)))], last)
    return found


def two_steps(model: str, data: dict[str, str], options: dict[str, Any], *more: str) -> Step:
    training = sft(model, data, options, *more)
    logits = logits_of(training.model)
    gradients: list[dict[str, tuple[Tensor, Placement]]] = []
    reduced = training.optimizer._reduced

    def watch() -> dict[str, Tensor]:
        grads = reduced()
        gradients.append({n: (g.clone(), training.optimizer.slices[n].placement()) for n, g in grads.items()})
        return grads

    training.optimizer._reduced = watch  # type: ignore[method-assign]
    metrics = to_floats(training.step(1, Silent()))
    metrics |= {"next/" + k: v for k, v in to_floats(training.step(2, Silent())).items()}
    weights = {name: weight.clone() for name, weight in named_weights(training.model)}
    return Step(metrics, logits, gradients[0], weights)


def many_steps(rank: int, model: str, data: dict[str, str], runs: list[tuple[dict[str, Any], tuple[str, ...]]]) -> list[Step]:
    return [two_steps(model, data, options, *more) for options, more in runs]


def whole(parts: list[tuple[Tensor, Placement]]) -> Tensor:
    """The tensor whose parts these are, which must be all of it, every element once."""
    out = torch.full(parts[0][1].shape, torch.nan)
    for part, placement in parts:
        if not placement.writes:
            continue
        for chunk in placement.chunks:
            box = out
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                box = box.narrow(dim, offset, size)
            assert box.isnan().all()
            box.copy_(chunk.of(part))
    assert not out.isnan().any()
    return out


def brought_together(ranks: list[Step]) -> Step:
    """What all processes have, as one process has it. Each part that several have must be the same."""
    for step in ranks:
        assert step.metrics == pytest.approx(ranks[0].metrics, abs=1e-9)
    names = {name for step in ranks for name in step.gradients}
    grads = {name: whole([step.gradients[name] for step in ranks if name in step.gradients]) for name in names}
    gradients = {name: (grad, Placement(tuple(grad.shape), (), True)) for name, grad in grads.items()}
    logits: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for step in ranks:
        for found, all_ in ((step.logits, logits), (step.weights, weights)):
            for key, value in found.items():
                torch.testing.assert_close(value, all_.setdefault(key, value), rtol=0, atol=1e-6)
    return Step(ranks[0].metrics, logits, gradients, weights)


def farthest(ours: Step, theirs: Step) -> dict[str, float]:
    """The largest difference in each of metrics, logits, gradients and weights; both must have the same ones."""
    metrics, logits, gradients, weights = zip(ours, theirs, strict=True)
    for one, other in (metrics, logits, gradients, weights):
        assert set(one) == set(other)
    return {
        "metrics": max(abs(metrics[0][k] - metrics[1][k]) for k in metrics[0]),
        "logits": max(float((logits[0][k] - logits[1][k]).abs().max()) for k in logits[0]),
        "gradients": max(float((gradients[0][k][0] - gradients[1][k][0]).abs().max()) for k in gradients[0]),
        "weights": max(float((weights[0][k].float() - weights[1][k].float()).abs().max()) for k in weights[0]),
    }


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.slow), "qwen3 tied"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    directory = tmp_path_factory.mktemp("files")
    return make_model(directory / "model", LLAMA if request.param == "llama" else QWEN), make_data(directory)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_of_sft_is_that_of_one_process(files: tuple[str, dict[str, str]], world: int) -> None:
    """In float32 to 1e-5; bfloat16 is as far from that as in one process, or four times as far."""
    model, data = files
    layouts = {name: options for name, (size, options) in LAYOUTS.items() if size == world}
    if world == 2:
        layouts["tp2 without sequence parallelism"] = {"tp": 2, "sequence_parallel": False}
    rough = ("--model.dtype", "bfloat16")
    coarse = {name: layouts[name] for name in ("tp2", "pp2", "dp2", "tp2 pp2", "tp2 dp2", "pp2 dp2") if name in layouts}
    expected = two_steps(model, data, {})
    bounds = farthest(two_steps(model, data, {}, *rough), expected)
    runs = [*((options, ()) for options in layouts.values()), *((options, rough) for options in coarse.values())]
    found = [brought_together(list(ranks)) for ranks in zip(*spawn(world, many_steps, model, data, runs), strict=True)]
    for name, step in zip([*layouts, *coarse], found, strict=True):
        exact = next(iter(step.weights.values())).dtype == torch.float32
        for what, far in farthest(step, expected).items():
            assert far < (1e-5 if exact else 4 * bounds[what]), (name, what, far, bounds)


def ppo(model: str, data: dict[str, str], options: dict[str, Any], *more: str) -> PPO:
    return PPO(load(PPOConfig, None, [
        "--run.directory", "unused", "--model.path", model, "--data.path", data["prompts"], "--data.max_prompt_tokens", "40",
        "--rewards", '[{"function": "tests.trainer:letters"}]', "--steps", "5", "--prompts_per_step", "5",
        "--completions_per_prompt", "2", "--sampling.max_tokens", "10", "--update.optimizer.lr", "1e-3",
        "--update.epochs", "2", "--update.minibatch_size", "6", "--update.micro_batch_tokens", "60",
        "--update.optimizer.eps", "1e-4", "--critic.optimizer.eps", "1e-4", "--critic.minibatch_size", "4",
        "--critic.optimizer.lr", "1e-3", "--kl.coef", "0.1", *parallel_words(options), *more,
    ]))  # fmt: skip


def run_ppo(model: str, data: dict[str, str], options: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The metrics of some steps and the tokens that were drawn."""
    algorithm = ppo(model, data, options)
    drawn: list[Any] = []
    learn = algorithm.learn
    algorithm.learn = lambda rollout, *rest: (drawn.append(rollout), learn(rollout, *rest))[1]  # type: ignore
    out = []
    for step in range(1, steps + 1):
        metrics = to_floats(algorithm.step(step, Silent()))
        out.append({"metrics": metrics, "tokens": drawn[-1].sequences.tokens})
    return out


def run_ppos(rank: int, model: str, data: dict[str, str], layouts: list[dict[str, Any]], steps: int) -> list[Any]:
    return [run_ppo(model, data, options, steps) for options in layouts]


def test_two_steps_of_ppo_over_stages_and_shards(files: tuple[str, dict[str, str]]) -> None:
    """The matrix below in short."""
    expected = run_ppo(*files, {}, 2)
    found = spawn(4, run_ppos, *files, [LAYOUTS["tp2 pp2"][1]], 2)
    compare("tp2 pp2", [rank[0] for rank in found], expected)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_five_steps_of_ppo_are_those_of_one_process(files: tuple[str, dict[str, str]], world: int) -> None:
    model, data = files
    layouts = {name: options for name, (size, options) in LAYOUTS.items() if size == world}
    if world == 2:
        layouts["dp2 without a queue"] = {"balance": False}
        layouts["generation through the stages"] = {"pp": 2, "interleave": 2, "reshard": False}
    else:
        layouts["generation through sharded stages"] = {"tp": 2, "pp": 2, "reshard": False}
        layouts["generation through two pipelines"] = {"pp": 2, "reshard": False}
    expected = run_ppo(model, data, {}, 5)
    found = spawn(world, run_ppos, model, data, list(layouts.values()), 5)
    for i, name in enumerate(layouts):
        compare(name, [rank[i] for rank in found], expected)


def numbers(metrics: Any) -> dict[str, float]:
    """Without those of a process: its waiting, its share of the weights."""
    return {k: v for k, v in to_floats(metrics).items() if k != "generate/idle" and not k.startswith("refit/")}


def compare(name: str, found: list[Any], expected: list[dict[str, Any]]) -> None:
    for rank, steps in enumerate(found):
        for step, (ours, theirs) in enumerate(zip(steps, expected, strict=True), 1):
            assert ours["tokens"] == theirs["tokens"], (name, rank, step)
            assert numbers(ours["metrics"]) == pytest.approx(numbers(theirs["metrics"]), abs=1e-4), (name, rank, step)


def others(rank: int, model: str, data: dict[str, str], layouts: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Three steps of GRPO, with a reward model beside a function, and of reward training and DPO, and their evaluation."""
    return [[*grpo(model, data, options), *pairs(model, data, options)] for options in layouts]


def grpo(model: str, data: dict[str, str], options: dict[str, Any]) -> list[dict[str, float]]:
    source = f'[{{"function": "tests.trainer:letters"}}, {{"model": "{data["reward model"]}", "weight": 0.5}}]'
    algorithm = GroupRelative(load(GRPOConfig, None, [
        "--run.directory", "unused", "--model.path", model, "--data.path", data["prompts"], "--data.max_prompt_tokens", "40",
        "--rewards", source, "--steps", "3", "--prompts_per_step", "3", "--completions_per_prompt", "3", "--data.held_out",
        data["prompts"], "--data.held_out_limit", "5",
        "--sampling.max_tokens", "8", "--update.optimizer.lr", "1e-3", "--update.optimizer.eps", "1e-4",
        "--update.loss.reduction", "seq-mean-token-mean", "--update.loss.entropy_coef", "0.01", "--update.minibatch_size", "5",
        *parallel_words(options),
    ]))  # fmt: skip
    out = [numbers(algorithm.step(step, Silent())) for step in (1, 2, 3)]
    return [*out, numbers(algorithm.evaluate(Silent()))]


def pairs(model: str, data: dict[str, str], options: dict[str, Any]) -> list[dict[str, float]]:
    words = [
        "--run.directory", "unused", "--model.path", model, "--data.path", data["pairs"], "--batch_size", "5", "--steps", "3",
        "--optimizer.lr", "1e-3", "--optimizer.eps", "1e-4", "--optimizer.warmup_steps", "0", "--micro_batch_tokens", "60",
        "--data.held_out_share", "0.2", *parallel_words(options),
    ]  # fmt: skip
    out = []
    for algorithm in (RewardTraining(load(RewardConfig, None, words)), DPO(load(DPOConfig, None, words))):
        out += [numbers(algorithm.step(step, Silent())) for step in (1, 2, 3)]
        out.append(numbers(algorithm.evaluate(Silent())))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_grpo_reward_models_and_dpo_are_those_of_one_process(
    files: tuple[str, dict[str, str]], world: int, tmp_path: Path
) -> None:
    model, data = files
    save_scalar_model(load_scalar_model(model, seed=5), tmp_path / "rm", tokenizer=load_tokenizer(model))
    data = data | {"reward model": str(tmp_path / "rm")}
    layouts = {name: options for name, (size, options) in LAYOUTS.items() if size == world}
    expected = [*grpo(model, data, {}), *pairs(model, data, {})]
    found = spawn(world, others, model, data, list(layouts.values()))
    for i, name in enumerate(layouts):
        for rank in range(world):
            for k, (ours, theirs) in enumerate(zip(found[rank][i], expected, strict=True)):
                assert ours == pytest.approx(theirs, abs=1e-4), (name, rank, k)
