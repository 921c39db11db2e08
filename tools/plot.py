"""Draws the curves of one or several runs: held-out loss, KL, clone terms by layer.

    python tools/plot.py out/quickstart
    python tools/plot.py out/study/ours_1 out/study/paper_1 --out=curves.png

Reads their metrics.jsonl; needs matplotlib.
"""

import json
import sys
from pathlib import Path


def read_metrics(directory: str) -> list[dict]:
    """The lines of a run's metrics.jsonl, but for one that a kill cut short."""
    try:
        text = (Path(directory) / "metrics.jsonl").read_text()
    except OSError as error:
        raise ValueError(f"{directory} is no run's out_dir: {error}") from None
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def labels_of(directories: list[str]) -> list[str]:
    """The directories' names; where two have the same, the directories themselves."""
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else directories


def evaluations_of(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line.get("val_lm") is not None]


def panels_of(runs: dict[str, list[dict]]) -> list[str]:
    """The names of the panels that have data."""
    lines = [line for lines in runs.values() for line in lines]
    evaluations = evaluations_of(lines)
    panels = []
    if evaluations or any(line.get("lm") is not None for line in lines):
        panels.append("loss")
    if any("val_kl" in line for line in evaluations):
        panels.append("kl")
    if any(line.get("val_terms_by_layer") for line in evaluations):
        panels.append("terms")
    return panels


def draw(runs: dict[str, list[dict]], out: str) -> None:
    """runs: {label: lines of metrics.jsonl}. Writes a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot.py needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = panels_of(runs)
    if not panels:
        raise ValueError("these runs have logged no loss yet")
    # Two panels a row; an odd last one is as wide as both.
    rows = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    if len(rows) > 1 and len(rows[-1]) == 1:
        rows[-1] = rows[-1] * 2
    size = (5.5 * len(rows[0]), 3.75 * len(rows))
    figure, axes = pyplot.subplot_mosaic(rows, figsize=size, layout="constrained")

    teachers = set()
    for i, (label, lines) in enumerate(runs.items()):
        color = f"C{i % 10}"
        style = {"color": color, "marker": "o", "markersize": 3}
        steps = [line for line in lines if line.get("lm") is not None]
        evaluations = evaluations_of(lines)
        tokens = [line["tokens"] / 1000 for line in evaluations]
        if steps:
            training = [line["lm"] for line in steps]
            steps = [line["tokens"] / 1000 for line in steps]
            # A line of one point is not seen; markers on thousands are a band.
            marker = "x" if len(steps) < 20 else ""
            axes["loss"].plot(steps, training, color=color, marker=marker, linewidth=0.7, alpha=0.6)
        # Without an evaluation it stands in the legend all the same.
        axes["loss"].plot(tokens, [line["val_lm"] for line in evaluations], label=label, **style)
        if not evaluations or "val_kl" not in evaluations[-1]:
            continue
        last = evaluations[-1]
        axes["kl"].plot(tokens, [line["val_kl"] for line in evaluations], **style)
        teachers.add(last["val_teacher_lm"])
        layers = list(last.get("val_terms_by_layer", {}).values())
        if layers:
            # an unweighted mean of the terms, as they are scaled
            means = [sum(values) / len(layers) for values in zip(*layers, strict=True)]
            axes["terms"].plot(means, **style)
    for teacher_lm in teachers:
        axes["loss"].axhline(teacher_lm, color="gray", linestyle="--", linewidth=1)

    titles = {
        "loss": "loss: held out, and in training (thin); dashed: the teacher",
        "kl": "KL(teacher ‖ student), held out",
        "terms": "clone terms at the end, mean over terms",
    }
    for name in panels:
        axes[name].set(title=titles[name], xlabel="layer" if name == "terms" else "thousand tokens")
        axes[name].grid(alpha=0.3)
        if name in ("loss", "kl"):
            axes[name].set_ylabel("nats a token")
        if name in ("kl", "terms"):
            axes[name].set_yscale("log")
    axes["loss"].legend(fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    directories = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    files = [argument[6:] for argument in sys.argv[1:] if argument.startswith("--out=")]
    if not directories or len(directories) + len(files) != len(sys.argv) - 1:
        print(__doc__)
        raise SystemExit(2)
    out = files[-1] if files else "curves.png"
    try:
        runs = [read_metrics(directory) for directory in directories]
        draw(dict(zip(labels_of(directories), runs, strict=True)), out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {out}")
