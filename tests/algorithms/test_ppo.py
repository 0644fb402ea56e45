"""One PPO step against the same step in plain torch on transformers' models; cutting into micro-batches changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.algorithms.ppo import PPO, PPOConfig
from fastrlhf.config import ConfigError, load
from fastrlhf.models import save_decoder, save_scalar_model
from fastrlhf.training.policy import minibatches
from fastrlhf.training.progress import Silent

transformers = pytest.importorskip("transformers")


def ppo(words: list[str]) -> PPO:
    return PPO(load(PPOConfig, None, words))


class Plain:
    """PPO as one writes it down: padded batches, log_softmax, loops."""

    def __init__(self, algorithm: PPO, directory: Path) -> None:
        config = algorithm.config
        save_decoder(algorithm.policy.model, directory / "policy")
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(directory / "policy")
        self.reference = transformers.AutoModelForCausalLM.from_pretrained(directory / "policy")
        save_scalar_model(algorithm.critic.model, directory / "critic", tokenizer=algorithm.tokenizer)
        self.critic = transformers.AutoModelForSequenceClassification.from_pretrained(directory / "critic")
        for model in (self.policy, self.critic):  # whose embedding would not learn the padding token, which was drawn
            model.model.embed_tokens.padding_idx = None
        self.config = config
        settings = config.update.optimizer
        made = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": 0.0}
        self.policy_optimizer = torch.optim.AdamW(self.policy.parameters(), **made)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), **{**made, "lr": config.critic.optimizer.lr})

    def logprobs(self, model: Any, tokens: list[int], prompt: int) -> torch.Tensor:
        logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[prompt:])[:, None])[:, 0]

    def values(self, tokens: list[int], prompt: int) -> torch.Tensor:
        hidden = self.critic.model(torch.tensor([tokens])).last_hidden_state[0, prompt - 1 : -1]
        return self.critic.score(hidden)[:, 0]

    def step(self, rollout: Any, step: int) -> dict[str, float]:
        c = self.config
        rows = list(zip(rollout.sequences.tokens, rollout.sequences.prompt_lengths, strict=True))
        with torch.no_grad():
            old = [self.logprobs(self.policy, *r) for r in rows]
            ref = [self.logprobs(self.reference, *r) for r in rows]
            old_values = [self.values(*r) for r in rows]
        advantages, returns = [], []
        for i in range(len(rows)):
            reward = -c.kl.coef * (old[i] - ref[i])
            reward[-1] += rollout.scores[i]
            after, last = 0.0, 0.0
            a = torch.zeros_like(reward)
            for t in reversed(range(len(reward))):
                delta = reward[t] + c.gamma * after - old_values[i][t]
                last = delta + c.gamma * c.lam * last
                a[t], after = last, old_values[i][t]
            advantages.append(a)
            returns.append(a + old_values[i])
        every = torch.cat(advantages)
        mean, var = every.mean(), every.var()
        advantages = [(a - mean) / (var + 1e-8).sqrt() for a in advantages]
        policy_losses, critic_losses = [], []
        for epoch in range(c.update.epochs):
            for members in minibatches(len(rows), c.update.minibatch_size, c.run.seed, step, epoch):
                new = torch.cat([self.logprobs(self.policy, *rows[m]) for m in members])
                ratio = (new - torch.cat([old[m] for m in members])).exp()
                a = torch.cat([advantages[m] for m in members])
                loss = torch.max(-a * ratio, -a * ratio.clamp(1 - c.update.loss.clip_low, 1 + c.update.loss.clip_high)).mean()
                policy_losses.append(self.apply(loss, self.policy, self.policy_optimizer, c.update.optimizer.grad_clip))
        for epoch in range(c.critic.epochs):
            for members in minibatches(len(rows), c.critic.minibatch_size, c.run.seed, step, epoch):
                v = torch.cat([self.values(*rows[m]) for m in members])
                before, target = torch.cat([old_values[m] for m in members]), torch.cat([returns[m] for m in members])
                clipped = before + (v - before).clamp(-c.critic.clip, c.critic.clip)
                loss = 0.5 * torch.max((v - target) ** 2, (clipped - target) ** 2).mean()
                critic_losses.append(self.apply(loss, self.critic, self.critic_optimizer, c.critic.optimizer.grad_clip))
        return {"policy": sum(policy_losses) / len(policy_losses), "critic": sum(critic_losses) / len(critic_losses)}

    def apply(self, loss: torch.Tensor, model: Any, optimizer: Any, clip: float) -> float:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())


OPTIONS = [
    "--update.epochs", "2", "--update.minibatch_size", "4", "--critic.minibatch_size", "3", "--critic.epochs", "2",
    "--critic.optimizer.lr", "2e-3", "--kl.coef", "0.1", "--completions_per_prompt", "2", "--update.optimizer.eps", "1e-4",
    "--critic.optimizer.eps", "1e-4",
]  # fmt: skip


def capture(algorithm: PPO, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rollouts that the algorithm learns from."""
    seen: list[Any] = []
    learn = algorithm.learn
    monkeypatch.setattr(algorithm, "learn", lambda rollout, *rest: (seen.append(rollout), learn(rollout, *rest))[1])
    return seen


def test_two_steps_equal_plain_torch(
    on_policy: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = ppo(on_policy(*OPTIONS))
    plain = Plain(algorithm, tmp_path)
    seen = capture(algorithm, monkeypatch)
    for step in (1, 2):
        metrics = algorithm.step(step, Silent())
        expected = plain.step(seen[-1], step)
        assert abs(float(metrics["policy/loss"]) - expected["policy"]) < 1e-5
        assert abs(float(metrics["critic/loss"]) - expected["critic"]) < 1e-5
    save_decoder(algorithm.policy.model, tmp_path / "after")
    save_scalar_model(algorithm.critic.model, tmp_path / "after_critic", tokenizer=algorithm.tokenizer)
    for kind, name, model in (
        ("AutoModelForCausalLM", "after", plain.policy),
        ("AutoModelForSequenceClassification", "after_critic", plain.critic),
    ):
        ours = getattr(transformers, kind).from_pretrained(tmp_path / name)
        for (n, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-5, n
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(plain.policy.parameters(), start.parameters(), strict=True))
    assert moved > 1e-3  # it was a step


def test_micro_batches_change_no_result(on_policy: Callable[..., list[str]]) -> None:
    whole = ppo(on_policy(*OPTIONS))
    cut = ppo(on_policy(*OPTIONS, "--update.micro_batch_tokens", "50", "--critic.micro_batch_tokens", "50"))
    for step in (1, 2):
        a, b = whole.step(step, Silent()), cut.step(step, Silent())
        for name in ("policy/loss", "critic/loss", "kl", "policy/clip_fraction_high", "policy/entropy", "policy/tokens"):
            assert abs(float(a[name]) - float(b[name])) < 1e-5, name
    for p, q in zip(whole.policy.model.parameters(), cut.policy.model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5


def test_a_learning_rate_of_zero_changes_no_weight(on_policy: Callable[..., list[str]]) -> None:
    algorithm = ppo(on_policy("--update.optimizer.lr", "0", "--critic.optimizer.lr", "0"))
    before = [p.clone() for p in algorithm.policy.model.parameters()]
    metrics = algorithm.step(1, Silent())
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.policy.model.parameters(), strict=True))
    assert metrics["kl"] == 0 and metrics["policy/approx_kl_k3"] == 0


def test_critic_warm_up_moves_the_critic_only(on_policy: Callable[..., list[str]]) -> None:
    algorithm = ppo(on_policy("--critic.warmup_steps", "1", "--critic.optimizer.lr", "1e-3"))
    policy = [p.clone() for p in algorithm.policy.model.parameters()]
    critic = algorithm.critic.model.score.clone()
    assert "policy/loss" not in algorithm.step(1, Silent())
    assert all(torch.equal(a, b) for a, b in zip(policy, algorithm.policy.model.parameters(), strict=True))
    assert not torch.equal(critic, algorithm.critic.model.score)
    assert "policy/loss" in algorithm.step(2, Silent())
    assert not all(torch.equal(a, b) for a, b in zip(policy, algorithm.policy.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"critic\.warmup_steps: expected fewer than the 3 steps, got 3"):
        ppo(on_policy("--critic.warmup_steps", "3"))


def test_completions_that_did_not_end_can_be_left_out_of_the_policys_loss(
    on_policy: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = ppo(on_policy("--score.unended", "mask", "--score.unended_score", "-3", "--sampling.max_tokens", "4"))
    seen = capture(algorithm, monkeypatch)
    metrics = algorithm.step(1, Silent())
    ended = torch.tensor([c.ended for c in seen[0].completions])
    lengths = torch.tensor(seen[0].sequences.completion_lengths)
    assert not ended.all()
    assert float(metrics["policy/tokens"]) == float((lengths * ended).sum())
    assert torch.equal(seen[0].scores[~ended], torch.full((int((~ended).sum()),), -3.0))
    assert float(metrics["ended_fraction"]) == pytest.approx(float(ended.float().mean()))


def test_penalties_on_length(on_policy: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = ppo(on_policy("--score.length_penalty", "0.5", "--score.overlong_buffer", "4", "--score.overlong_penalty", "2"))
    seen = capture(algorithm, monkeypatch)
    algorithm.step(1, Silent())
    for score, total, n in zip(seen[0].scores, seen[0].scored.total, seen[0].sequences.completion_lengths, strict=True):
        assert float(score) == pytest.approx(float(total) - 0.5 * n - 2 * max(0, n - 8) / 4, abs=1e-5)


def test_the_kl_coefficient_follows_its_target(on_policy: Callable[..., list[str]]) -> None:
    algorithm = ppo(on_policy("--kl.target", "5", "--kl.horizon", "60", "--kl.coef", "0.2"))
    first = algorithm.step(1, Silent())
    assert (first["kl_coef"], algorithm.kl.coef) == (0.2, pytest.approx(0.2 * (1 - 0.2 * 6 / 60)))
    assert algorithm.step(2, Silent())["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 6 / 60))


def test_the_kl_in_the_loss(on_policy: Callable[..., list[str]]) -> None:
    words = on_policy("--kl.where", "loss", "--kl.kind", "k3", "--kl.coef", "0.5", "--update.epochs", "3")
    algorithm = ppo(words)
    metrics = algorithm.step(1, Silent())
    assert float(metrics["policy/ref_kl"]) > 0 and metrics["kl"] == 0


def test_lora_trains_against_its_own_base(on_policy: Callable[..., list[str]], tmp_path: Path) -> None:
    algorithm = ppo(on_policy("--model.lora.rank", "4", "--update.optimizer.lr", "1e-2", "--update.epochs", "2"))
    assert algorithm.policy.reference is not None and algorithm.policy.reference.copy is None
    base = {n: p.clone() for n, p in algorithm.policy.model.named_parameters() if not p.requires_grad}
    first, second = algorithm.step(1, Silent()), algorithm.step(2, Silent())
    assert first["kl"] == 0 and second["kl"] != 0
    now = dict(algorithm.policy.model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in base.items())
    algorithm.export(tmp_path / "merged")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged") is not None


def test_rollouts_are_the_trainers_to_1e_5(on_policy: Callable[..., list[str]]) -> None:
    assert 0 <= float(ppo(on_policy()).step(1, Silent())["policy/rollout_mismatch_max"]) < 1e-5
