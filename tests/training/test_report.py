"""The report: what is there is shown, what is missing is left out."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

from fastrlhf.training.metrics import Metrics
from fastrlhf.training.report import panels, stages, write_report

PPO = {
    "reward/mean": 0.5, "reward/checker": 0.2, "reward/std": 1.0, "kl/ref": 0.01, "policy/approx_kl_k3": 0.02, "policy/clip_fraction_low": 0.1,
    "policy/entropy": 2.0, "value/explained_variance": 0.3, "length/mean": 30.0, "tokens_per_second/generate": 900.0, "policy/loss": 0.1,
    "value/loss": 0.3, "lr": 1e-5, "grad_norm": 1.0, "seconds/step": 2.0, "kl/coef": 0.1,
}  # fmt: skip


def write(directory: Path, steps: int, values: dict[str, float], phase: str | None = None) -> Metrics:
    metrics = Metrics(directory, tensorboard=False)
    for step in range(steps):
        metrics.log(step, {name: x + step / 100 for name, x in values.items()}, phase)
    return metrics


def test_each_metric_finds_its_panel():
    more = ("eval/accuracy", "eval/reward/mean", "policy/rollout_corrected_fraction", "reward/exact")
    found = {panel.title: names for panel, names in panels(dict.fromkeys((*PPO, *more)))}
    assert found == {
        "Reward": ["reward/mean", "reward/checker", "eval/reward/mean", "reward/exact"],
        "Accuracy": ["eval/accuracy"],
        "KL divergence": ["kl/ref", "policy/approx_kl_k3"],
        "Clipped tokens": ["policy/clip_fraction_low"],
        "Entropy": ["policy/entropy"],
        "Explained variance of the values": ["value/explained_variance"],
        "Length": ["length/mean"],
        "Loss": ["policy/loss", "value/loss"],
        "Throughput": ["tokens_per_second/generate"],
        "Time": ["seconds/step"],
        "Gradient norm": ["grad_norm"],
        "Learning rate": ["lr"],
    }


def test_the_report_of_a_chain_of_stages(tmp_path):
    ppo = write(tmp_path / "ppo", 40, PPO)
    write(tmp_path / "asft", 5, {"loss": 1.0}).close()
    lines = (tmp_path / "asft" / "metrics.jsonl").read_text()
    (tmp_path / "asft" / "metrics.jsonl").write_text(re.sub(r'"time": \d+', '"time": 1', lines))  # it began first
    ppo.samples(38, [{"prompt": "an earlier one", "completion": ""}])
    ppo.samples(39, [{"prompt": "<script>", "completion": "a & b", "reward": 0.123456}])
    ppo.table("Before and after", ["", "SFT", "PPO"], [["exact answers", 0.31, 0.72], ["note", None, "<b>"]])
    ppo.close()
    (tmp_path / "ppo" / "config.yaml").write_text("model: a<b\n")
    (tmp_path / "empty").mkdir()
    assert [stage.name for stage in stages(tmp_path)] == ["asft", "ppo"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_report(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.html" and (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    for part in (
        "asft: to step 4",
        "ppo: to step 39",
        "exact answers",
        "<td>0.72</td>",
        "&lt;b&gt;",
        "&lt;script&gt;",
        "a &amp; b",
        "reward 0.1235",
        "model: a&lt;b",
    ):
        assert part in text, part
    assert "an earlier one" not in text and "<script>" not in text and "data:image/png;base64," in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_partial_metrics(tmp_path):
    metrics = write(tmp_path, 3, {"loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics.log(3, {"loss": math.nan, "kl": math.nan})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"note": "a line without a step", "loss": 1}\n{"step": 4, "loss')
    (curves,) = (stage.curves() for stage in stages(tmp_path))
    assert set(curves) == {"loss"} and math.isnan(curves["loss"][1][3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_report(tmp_path).exists() and (tmp_path / "report.png").exists()


def test_nothing_to_report_yet(tmp_path):
    assert "no metrics yet" in write_report(tmp_path).read_text() and not (tmp_path / "report.png").exists()
    Metrics(tmp_path, tensorboard=False).close()
    (tmp_path / "metrics.jsonl").touch()
    assert "no steps yet" in write_report(tmp_path).read_text()
