"""Draws the curves of one or several runs: held-out loss, KL, effective rank, clone terms by layer.

    python tools/plot.py out/quickstart
    python tools/plot.py out/study/ours_1 out/study/paper_1 --out=curves.png

Reads their metrics.jsonl; needs matplotlib. A run of tools/study.py is labelled with its variant's name.
"""

import json
import sys
from pathlib import Path

VARIANTS = Path(__file__).resolve().parents[1] / "config/study"


def read_metrics(directory: str) -> list[dict]:
    try:
        return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise SystemExit(f"error: {directory} is no run's out_dir: {error}") from None


def label_of(directory: str) -> str:
    """The variant of a run of tools/study.py, whose directory is VARIANT_SEED; else the directory's name."""
    name = Path(directory).resolve().name
    variant = name.rpartition("_")[0]
    return variant if variant and (VARIANTS / f"{variant}.py").is_file() else name


def labels_of(directories: list[str]) -> list[str]:
    """A label for each run; where two would have the same, the directories themselves."""
    labels = [label_of(directory) for directory in directories]
    return labels if len(set(labels)) == len(labels) else directories


def draw(runs: dict[str, list[dict]], out: str) -> None:
    """runs: {label: lines of metrics.jsonl}. Writes a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: plot.py needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((loss, kl), (rank, terms)) = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    teachers = set()
    for label, lines in runs.items():
        evaluations = [line for line in lines if line.get("val_lm") is not None]
        tokens = [line["tokens"] / 1000 for line in evaluations]
        (curve,) = loss.plot(tokens, [line["val_lm"] for line in evaluations], label=label)
        color = curve.get_color()
        if evaluations and "val_kl" in evaluations[-1]:
            last = evaluations[-1]
            kl.plot(tokens, [line["val_kl"] for line in evaluations], color=color)
            rank.plot(tokens, [line["val_rank_student"][-1] for line in evaluations], color=color)
            teachers.add((last["val_teacher_lm"], last["val_rank_teacher"][-1]))
            layers = list(last.get("val_terms_by_layer", {}).values())
            if layers:  # an unweighted mean of the terms, as they are scaled
                terms.plot([sum(values) / len(layers) for values in zip(*layers, strict=True)], color=color)
    for teacher_lm, teacher_rank in teachers:
        loss.axhline(teacher_lm, color="gray", linestyle="--", linewidth=1)
        rank.axhline(teacher_rank, color="gray", linestyle="--", linewidth=1)
    loss.set(title="held-out loss (dashed: the teacher)", ylabel="nats a token", xlabel="thousand tokens")
    kl.set(
        title="KL(teacher ‖ student), held out", ylabel="nats a token", xlabel="thousand tokens", yscale="log"
    )
    rank.set(
        title="effective rank of the last layer's hidden states", xlabel="thousand tokens", ylim=(0, None)
    )
    terms.set(title="clone terms at the end, mean over terms", xlabel="layer", yscale="log")
    loss.legend(fontsize="small")
    for axes in (loss, kl, rank, terms):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    directories = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    files = [argument[6:] for argument in sys.argv[1:] if argument.startswith("--out=")]
    if not directories or len(directories) + len(files) != len(sys.argv) - 1:
        print(__doc__)
        raise SystemExit(2)
    out = files[-1] if files else "curves.png"
    runs = [read_metrics(directory) for directory in directories]
    draw(dict(zip(labels_of(directories), runs, strict=True)), out)
    print(f"wrote {out}")
