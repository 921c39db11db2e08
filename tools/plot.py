"""Draws the curves of one or several runs: held-out loss, KL, clone terms by layer.

    python tools/plot.py out/quickstart
    python tools/plot.py out/study/ours_1 out/study/paper_1 --out=curves.png

Reads their metrics.jsonl; needs matplotlib.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import fail, need, read_lines


def read_metrics(directory: str) -> list[dict]:
    file = Path(directory) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{directory} is no run's out_dir: it has no metrics.jsonl")
    return read_lines(file)


def labels_of(directories: list[str]) -> list[str]:
    """The directories' names; where two have the same, the directories themselves."""
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else directories


def evaluations_of(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line.get("val_lm") is not None]


def draw(runs: dict[str, list[dict]], out: str) -> None:
    """runs: {label: lines of metrics.jsonl}. Writes a PNG."""
    pyplot = need("matplotlib.pyplot", "plot.py")
    every = [line for lines in runs.values() for line in lines]
    titles = {}
    if evaluations_of(every) or any(line.get("lm") is not None for line in every):
        titles["loss"] = "loss: held out, and in training (thin); dashed: the teacher"
    if any("val_kl" in line for line in every):
        titles["kl"] = "KL(teacher ‖ student), held out"
    if any(line.get("val_terms_by_layer") for line in every):
        titles["terms"] = "clone terms at the end, mean over terms"
    if not titles:
        raise ValueError("these runs have logged no loss yet")
    size = (5.5 * len(titles), 3.75)
    figure, axes = pyplot.subplot_mosaic([[*titles]], figsize=size, layout="constrained")

    for i, (label, lines) in enumerate(runs.items()):
        style = {"color": f"C{i % 10}", "marker": "o", "markersize": 3}
        steps = [line for line in lines if line.get("lm") is not None]
        training = [line["lm"] for line in steps]
        # A line of one point is not seen; markers on thousands are a band.
        thin = {"color": style["color"], "marker": "x" if len(steps) < 20 else "", "linewidth": 0.7}
        axes["loss"].plot([line["tokens"] / 1000 for line in steps], training, alpha=0.6, **thin)
        # Without an evaluation it stands in the legend all the same.
        evaluations = evaluations_of(lines)
        tokens = [line["tokens"] / 1000 for line in evaluations]
        axes["loss"].plot(tokens, [line["val_lm"] for line in evaluations], label=label, **style)
        if not evaluations or "val_kl" not in evaluations[-1]:
            continue
        last = evaluations[-1]
        axes["kl"].plot(tokens, [line["val_kl"] for line in evaluations], **style)
        axes["loss"].axhline(last["val_teacher_lm"], color="gray", linestyle="--", linewidth=1)
        layers = list(last.get("val_terms_by_layer", {}).values())
        if layers:
            # an unweighted mean of the terms, as they are scaled
            means = [sum(values) / len(layers) for values in zip(*layers, strict=True)]
            axes["terms"].plot(means, **style)

    for name, title in titles.items():
        axes[name].set(title=title, xlabel="layer" if name == "terms" else "thousand tokens")
        axes[name].grid(alpha=0.3)
        if name != "loss":
            axes[name].set_yscale("log")
    axes["loss"].set_ylabel("nats a token")
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
        fail(str(error))
    print(f"wrote {out}")
