"""A run at a glance: report.png with the curves, report.html with curves, tables, samples and configuration."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import extra
from .metrics import METRICS, SAMPLES, read_lines, read_tables

PNG, HTML, CONFIG = "report.png", "report.html", "config.yaml"


@dataclass(frozen=True)
class Panel:
    """One plot: the metrics whose name matches a pattern and none of `but`."""

    title: str
    unit: str
    patterns: tuple[str, ...]
    but: tuple[str, ...] = ()
    scale: str = "linear"


PANELS = (
    Panel("Reward", "reward", ("reward", "reward/*", "rewards", "rewards/*"), but=("*std*", "*loss*", "*accuracy*")),
    Panel("Accuracy", "fraction", ("*accuracy*", "*exact*", "*correct*"), but=("*corrected*",)),
    Panel("KL divergence", "nats per token", ("kl", "kl/*", "*ref_kl*", "*approx_kl*", "*_kl"), but=("*coef*",)),
    Panel("Clipped tokens", "fraction", ("*clip_fraction*", "*clipfrac*")),
    Panel("Entropy", "nats per token", ("entropy", "entropy/*", "*/entropy")),
    Panel("Explained variance of the values", "fraction", ("*explained_variance*",)),
    Panel("Length", "tokens", ("*length*",)),
    Panel("Loss", "loss", ("loss", "loss/*", "*/loss", "*_loss"), but=("*clip*",)),
    Panel("Throughput", "tokens/s", ("tokens_per_second/*",), scale="log"),
    Panel("Time", "s per step", ("seconds/*",)),
    Panel("Gradient norm", "norm", ("*grad_norm*",), scale="log"),
    Panel("Learning rate", "learning rate", ("lr", "lr/*", "*/lr", "*learning_rate*")),
)
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
SHOWN_SAMPLES = 8


@dataclass(frozen=True)
class Stage:
    """One directory with metrics.jsonl."""

    name: str
    directory: Path
    lines: list[dict[str, Any]]

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values by metric, a phase's name before its metrics; what is not finite leaves a gap."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.lines:
            prefix = f"{line['phase']}/" if line.get("phase") else ""
            for name, value in line.items():
                if name in ("step", "time", "phase", "not_finite") or not isinstance(value, (int, float, type(None))):
                    continue
                steps, values = found.setdefault(prefix + name, ([], []))
                steps.append(line.get("step", len(steps)))
                values.append(math.nan if value is None else float(value))
        return {name: xy for name, xy in found.items() if not all(math.isnan(y) for y in xy[1])}


def stages(directory: Path) -> list[Stage]:
    """The run itself and the runs in its sub-directories, in the order in which they began."""
    places = [directory, *sorted(p for p in directory.iterdir() if p.is_dir())]
    found = [Stage(p.name, p, read_lines(p / METRICS)) for p in places if (p / METRICS).exists()]
    return sorted(found, key=lambda s: s.lines[0].get("time", math.inf) if s.lines else math.inf)


def write_report(directory: Path | str) -> Path:
    """Writes report.png and report.html into a run directory from what is there: metrics.jsonl, samples.jsonl,
    tables.json and config.yaml, each of which may be missing, of the run or of stages in its sub-directories.

    Returns:
        The path of the HTML, which needs no other file.
    """
    directory = Path(directory)
    found = stages(directory)
    png = _draw(found)
    if png:
        (directory / PNG).write_bytes(png)
    places = list(dict.fromkeys([directory, *(s.directory for s in found)]))
    parts = [f"<h1>{html.escape(directory.resolve().name)}</h1>", f'<p class="facts">{html.escape(_facts(found))}</p>']
    parts += [_table(t["title"], t["columns"], t["rows"]) for place in places for t in read_tables(place)]
    if png:
        parts.append(f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    for place in places:
        parts.append(_samples(place.name, read_lines(place / SAMPLES)))
    for place in places:
        config = place / CONFIG
        if config.exists():
            text = html.escape(config.read_text(encoding="utf-8", errors="replace"))
            parts.append(f"<details><summary>Configuration of {html.escape(place.name)}</summary><pre>{text}</pre></details>")
    path = directory / HTML
    path.write_text(_PAGE.format(title=html.escape(directory.resolve().name), body="\n".join(parts)), encoding="utf-8")
    return path


def panels(curves: dict[str, Any]) -> list[tuple[Panel, list[str]]]:
    """The panels that have a curve, with the names of theirs; a curve is in the first panel that takes it."""
    left = list(curves)
    found = []
    for panel in PANELS:
        names = [n for n in left if _matches(n, panel.patterns) and not _matches(n, panel.but)]
        left = [n for n in left if n not in names]
        if names:
            found.append((panel, names))
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), p) or fnmatchcase(name.lower().partition("/")[2], p) for p in patterns)


def _draw(found: Sequence[Stage]) -> bytes | None:
    """One block of panels for each stage, three to a row; None where there is nothing to draw."""
    blocks = [(stage, curves, panels(curves)) for stage in found for curves in [stage.curves()]]
    blocks = [block for block in blocks if block[2]]
    if not blocks:
        return None
    figures = extra("matplotlib.figure")
    agg = extra("matplotlib.backends.backend_agg")
    columns = 3
    heights = [math.ceil(len(shown) / columns) for _, _, shown in blocks]
    figure = figures.Figure(figsize=(15, 3.3 * sum(heights) + 0.5 * len(blocks)), dpi=110, layout="constrained")
    agg.FigureCanvasAgg(figure)
    parts = figure.subfigures(len(blocks), 1, height_ratios=[h * 3.3 + 0.5 for h in heights], squeeze=False)[:, 0]
    for part, (stage, curves, shown), rows in zip(parts, blocks, heights, strict=True):
        part.suptitle(stage.name, fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(rows, columns, squeeze=False).flatten()
        for axis, (panel, names) in zip(axes, shown):
            _plot(axis, panel, {name: curves[name] for name in names})
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plot(axis: Any, panel: Panel, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    for i, (name, (steps, values)) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        style = "-" if i < len(COLORS) else "--"
        few = len(steps) <= 30
        smooth = _smooth(values)
        if len(values) > 30:
            axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(
            steps, smooth if len(values) > 30 else values, style, color=color, label=_label(name), linewidth=1.6,
            marker="o" if few else None, markersize=3,
        )  # fmt: skip
    everything = [y for _, values in curves.values() for y in values if not math.isnan(y)]
    if panel.scale == "log" and min(everything) > 0 and max(everything) > 20 * min(everything):
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7.5, frameon=False, ncols=1 if len(curves) <= 5 else 2)


def _smooth(values: Sequence[float]) -> list[float]:
    """A mean over about a twentieth of the run to either side, gaps left out."""
    half = max(1, len(values) // 40)
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def _label(name: str) -> str:
    for prefix in ("tokens_per_second/", "seconds/", "clip_fraction_"):
        name = name.removeprefix(prefix)
    return name


def _facts(found: Sequence[Stage]) -> str:
    facts = []
    for stage in found:
        times = [line["time"] for line in stage.lines if "time" in line]
        took = f" in {_duration(times[-1] - times[0])}" if len(times) > 1 else ""
        last = max((line.get("step", 0) for line in stage.lines), default=None)
        facts.append(f"{stage.name}: no steps yet" if last is None else f"{stage.name}: to step {last}{took}")
    return "; ".join(facts) or "no metrics yet"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_cell(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _samples(name: str, lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return ""
    last = max(line.get("step", 0) for line in lines)
    shown = [line for line in lines if line.get("step", 0) == last][:SHOWN_SAMPLES]
    blocks = []
    for line in shown:
        numbers = ", ".join(f"{k} {_cell(v)}" for k, v in line.items() if k not in ("step", "prompt", "completion"))
        blocks.append(
            f'<div class="sample"><div class="prompt">{html.escape(str(line.get("prompt", "")))}</div>'
            f'<div class="completion">{html.escape(str(line.get("completion", "")))}</div>'
            f'<div class="numbers">{html.escape(numbers)}</div></div>'
        )
    return f"<h2>Samples of {html.escape(name)} at step {last}</h2>" + "".join(blocks)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }} .facts {{ color: #6b7280; margin-top: 0 }} img {{ max-width: 100%; margin-top: 1.5rem }}
table {{ border-collapse: collapse }} th, td {{ padding: .35rem .9rem; border-bottom: 1px solid #e5e7eb; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} th {{ border-bottom: 2px solid #9ca3af }}
.sample {{ border: 1px solid #e5e7eb; border-radius: 6px; margin: .7rem 0; padding: .6rem .9rem; white-space: pre-wrap;
overflow-wrap: anywhere }} .prompt {{ color: #6b7280 }} .numbers {{ color: #2563eb; font-size: 13px }}
pre {{ background: #f3f4f6; padding: 1rem; overflow-x: auto; font-size: 13px }} summary {{ cursor: pointer; margin-top: 1rem }}
</style></head><body>
{body}
</body></html>
"""
