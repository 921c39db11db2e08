"""Token efficiency: trains variants of the quickstart on equal tokens, and tabulates their held-out losses.

    python tools/study.py                                 # runs what is missing, then the table
    python tools/study.py --run=False                     # the table of what is there
    python tools/study.py --variants='("ours",)' --seeds="(3,)"
    OMP_NUM_THREADS=2 python tools/study.py --base=config/study/smollm2.py --seeds="(1,)"

A run is `train.py BASE config/study/VARIANT.py --seed=SEED` into VARIANT_SEED of BASE's out_dir, with what
it printed in VARIANT_SEED.log beside it. A variant may have options behind it: "ours --learning_rate=1e-3".
The last checkpoint is scored by tools/evaluate.py's agreement length: for how many tokens, of 64, the student
greedily writes what its teacher would.

A run that was begun and not finished, or is of other length than BASE's, is removed and run again. Losses to
reach are those of `scratch` and `paper` at their end, where their learning rate is 0; that of a run still
under way is not, which favours the two. From scratch with the KL is not among the variants; `no_clone_random`
comes near: CE and KL without clone loss, but on random projections of the teacher's weights.
"""

# what to run
base = (
    "config/study/base.py"  # config file of all runs: data, tokens, evaluation, and out_dir for their results
)
# fmt: off
variants: tuple = (  # files of config/study, in the table's order
    "scratch", "paper", "paper_t1", "no_clone_random", "init_random",
    "scale_none", "temperature_40", "no_clone", "no_ffn", "no_attention", "rate_1e_3", "ours",
)
# fmt: on
seeds: tuple = (1, 2)  # of weights and data order; each a run
out_dir: str | None = None  # a directory for each run; None: the base config's
run = True  # train what is missing; False: only the table

if __name__ == "__main__":
    import os
    import sys
    from pathlib import Path

    os.chdir(Path(__file__).resolve().parents[1])
    sys.path.insert(0, os.getcwd())
    from configurator import configure, fail

    configure(globals())

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def read_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl file; none where there is no such file, or from where it is cut off."""
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in file.read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def read_metrics(directory: Path) -> list[dict]:
    return read_lines(Path(directory) / "metrics.jsonl")


def is_finished(directory: Path, max_steps: int, tokens_per_step: int) -> bool:
    """Whether the run ended with an evaluation, having seen the tokens it should."""
    last = (read_metrics(directory) or [{}])[-1]
    done = last.get("step"), last.get("tokens")
    return "val_lm" in last and done == (max_steps, max_steps * tokens_per_step)


def is_scored(directory: Path, teacher: str | None) -> bool:
    """Whether tools/evaluate.py has scored the run, or cannot: without a teacher, or without a checkpoint."""
    has_checkpoint = any(directory.glob("step_*"))
    return teacher is None or not has_checkpoint or (directory / "results.jsonl").is_file()


def mean_curve(runs: list[list[dict]]) -> list[tuple[int, float]]:
    """Held-out loss by tokens, the mean over runs at the evaluations that all of them have."""
    curves = [{line["tokens"]: line["val_lm"] for line in lines if "val_lm" in line} for lines in runs]
    shared = sorted(set.intersection(*map(set, curves)))
    return [(tokens, mean(curve[tokens] for curve in curves)) for tokens in shared]


def tokens_to_reach(curve: list[tuple[int, float]], loss: float) -> tuple[float, bool] | None:
    """(tokens at which the curve first has this loss, whether it had it before the first evaluation).

    Linear between evaluations; None where it never does.
    """
    for i, (tokens, value) in enumerate(curve):
        if value <= loss:
            if i == 0:
                return tokens, value < loss
            before, higher = curve[i - 1]
            return before + (tokens - before) * (higher - loss) / (higher - value), False
    return None


def table(results: dict[str, list[list[dict]]]) -> str:
    """Markdown of {variant: metrics.jsonl lines of each of its finished runs}."""
    references = [name for name in ("scratch", "paper") if results.get(name)]
    curves = {name: mean_curve(runs) for name, runs in results.items() if runs}
    head = ["variant", "seeds", "held-out CE", "max − min", "KL to teacher", "same likeliest token"]
    head.append("tokens written alike")
    head += [f"tokens to {name}'s {curves[name][-1][1]:.3f}" for name in references]
    rows, teacher = [head, ["---"] + ["---:"] * (len(head) - 1)], {}
    for name, curve in curves.items():
        ends = [lines[-1] for lines in results[name]]
        losses, is_clone = [end["val_lm"] for end in ends], "val_kl" in ends[0]
        row = [name, str(len(ends)), f"{mean(losses):.3f}"]
        row.append(f"{max(losses) - min(losses):.3f}" if len(ends) > 1 else "–")
        row.append(f"{mean(end['val_kl'] for end in ends):.3f}" if is_clone else "–")
        agreement = [end["val_agreement"] for end in ends if "val_agreement" in end]
        row.append(f"{mean(agreement):.1%}" if agreement else "–")
        alike = [end["agreement_length"] for end in ends if "agreement_length" in end]
        row.append(f"{mean(alike):.1f}" if alike else "–")
        teacher = ends[0] if is_clone else teacher
        for reference in references:
            reached, whole = tokens_to_reach(curve, curves[reference][-1][1]), curves[reference][-1][0]
            if reached is None:
                row.append("not reached")
            else:
                tokens, less, more = reached[0], *(("≤ ", "≥ ") if reached[1] else ("", ""))
                row.append(f"{less}{tokens / 1000:,.1f}k ({more}{whole / tokens:.1f}×)")
        rows.append(row)
    if teacher:
        row = ["teacher", "", f"{teacher['val_teacher_lm']:.3f}", "", "0", "100%", "64"]
        rows.append(row + [""] * len(references))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def arguments_of(variant: str) -> list[str]:
    """What a variant is to train.py: its file, and the options behind its name."""
    name, *more = variant.split() or [""]
    return [base, f"config/study/{name}.py", *more]


def options_of(variant: str) -> dict:
    """train.py's options for a variant, checked as train.py checks them (exit 2 where they are wrong)."""
    with contextlib.redirect_stdout(io.StringIO()):
        return configure({"__file__": str(ROOT / "train.py")}, arguments_of(variant))


def call(directory: Path, mode: str, *command: str) -> None:
    """Runs a script of this repository, what it prints in a log beside the run's directory."""
    log = directory.with_name(directory.name + ".log")
    with open(log, mode) as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        reason = (log.read_text().strip().splitlines() or ["no output"])[-1]
        fail(f"{directory.name} ended with exit code {code}: {reason} (all of it: {log})")


def main() -> None:
    runs = {}  # {(variant, seed): (directory, max_steps, tokens a step)}
    given = {variant: options_of(variant) for variant in variants}
    for variant, values in given.items():
        size = values["max_steps"], values["global_batch_size"] * values["seq_len"]
        for seed in seeds:
            name = f"{variant}_{seed}".replace(" --", "_")
            runs[variant, seed] = (Path(out_dir or values["out_dir"]) / name, *size)
    teachers = {variant: values["teacher"] for variant, values in given.items()}
    missing = []
    if run:
        for (variant, seed), where in runs.items():
            if not (is_finished(*where) and is_scored(where[0], teachers[variant])):
                missing.append((variant, seed))
    for variant, seed in (bar := tqdm(missing, desc="runs", unit="run", disable=not missing)):
        where = runs[variant, seed]
        directory = where[0]
        bar.set_postfix_str(directory.name)
        if not is_finished(*where):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            more = (f"--seed={seed}", f"--out_dir={directory}")
            call(directory, "w", "train.py", *arguments_of(variant), *more)
        if not is_scored(directory, teachers[variant]):
            more = ("--tasks=", f"--out_dir={directory}", f"--data={given[variant]['data']}")
            call(directory, "a", "tools/evaluate.py", f"--teacher={teachers[variant]}", *more)
    results = {name: [] for name in variants}
    for (variant, _), where in runs.items():
        if is_finished(*where):
            lines = read_metrics(where[0])
            for score in read_lines(where[0] / "results.jsonl")[-1:]:
                lines[-1]["agreement_length"] = score["agreement_length"]
            results[variant].append(lines)
    done, least = sum(map(len, results.values())), next(iter(runs.values()), (None, 0, 0))
    print(f"{done} of {len(runs)} runs, {least[1] * least[2]:,} tokens each, {base}\n")
    print(table(results))


if __name__ == "__main__":
    main()
