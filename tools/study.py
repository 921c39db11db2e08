"""Token efficiency: trains variants of the quickstart on equal tokens, and tabulates their held-out losses.

    python tools/study.py                                 # runs what is missing, then the table
    python tools/study.py --run=False                     # the commands, and the table of what is there
    python tools/study.py --variants='("ours", "best")' --seeds="(3,)"
    OMP_NUM_THREADS=2 python tools/study.py --base=config/study/smollm2.py --variants='("weights",)'

A variant is a name in config/study/variants.py, and may have options behind it: "ours --learning_rate=1e-3".
Its run is train.py with BASE and its options; the command is printed. It goes into VARIANT_SEED of BASE's
out_dir, what it prints into VARIANT_SEED.log beside that. tools/evaluate.py then scores the last checkpoint
by its agreement length: for how many tokens, of 64, the student greedily writes what its teacher would.
A run that was begun and not finished goes on from its checkpoint, or begins anew. One that was made with
other options is an error. What failed is told in the end: the other rows are made all the same.
"""

base = "config/study/base.py"  # config file of all runs: data, tokens, evaluation, and their out_dir
variants: tuple = (  # names in config/study/variants.py, each with options behind
    "best", "no_ce", "temperature_40", "ours", "no_attention", "rate_1e_3", "no_ffn", "scale_none", "no_kl",
    "no_clone", "init_random", "paper", "scratch",
)  # fmt: skip
seeds: tuple = (1, 2)  # of weights and data order; each a run
run = True  # train what is missing; False: only the commands and the table
at_once = 1  # runs beside each other: a small model leaves most of a GPU idle

if __name__ == "__main__":
    import os
    import sys
    from pathlib import Path

    os.chdir(Path(__file__).resolve().parents[1])
    sys.path.insert(0, os.getcwd())
    from configurator import configure

    configure(globals())

import contextlib
import io
import json
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from configurator import configure, fail, read_json, read_lines

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = runpy.run_path(str(ROOT / "config/study/variants.py"))["VARIANTS"]


def arguments_of(variant: str) -> list[str]:
    """What a variant is to train.py: the base, the options by its name, and those behind it."""
    name, *more = shlex.split(variant) or [""]
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)}")
    options = [f"--{option}={value}" for option, value in VARIANTS[name].items()]
    return [base, *options, *more]


def options_of(variant: str) -> dict:
    """train.py's options for a variant, checked as train.py checks them (exit 2 where they are wrong)."""
    with contextlib.redirect_stdout(io.StringIO()):
        options = configure({"__file__": str(ROOT / "train.py")}, arguments_of(variant))
    # By these a run is known to be whole, and has what the table shows.
    for name in ("max_steps", "eval_every", "save_every"):
        if not options[name]:
            raise ValueError(f"{variant!r} has {name} = 0; a run of the study needs a number above it")
    return options


def refuse_other_options(directory: Path, options: dict) -> None:
    """ValueError where a run was made with other options than these."""
    for file in directory.glob("step_*/trainer/state.json"):
        saved = read_json(file)["options"]
        # An option of another version of train.py is no difference.
        for name in (options.keys() & saved.keys()) - {"out_dir", "seed", "resume"}:
            if saved[name] != json.loads(json.dumps(options[name])):
                was = f"{name} = {saved[name]!r}, not {options[name]!r}"
                raise ValueError(f"{directory} was made with {was}; remove it, or give another --out_dir")


def finished_lines(directory: Path, options: dict) -> list[dict]:
    """metrics.jsonl of a run that ended with an evaluation, having seen the tokens it should; else none."""
    lines = read_lines(directory / "metrics.jsonl")
    last = lines[-1] if lines else {}
    tokens = options["max_steps"] * options["global_batch_size"] * options["seq_len"]
    is_whole = (last.get("step"), last.get("tokens")) == (options["max_steps"], tokens)
    return lines if is_whole and "val_lm" in last else []


def call(directory: Path, mode: str, command: list[str]) -> None:
    """Runs a script of this repository, what it prints in a log beside the run's directory."""
    log = directory.with_name(directory.name + ".log")
    with open(log, mode) as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        reason = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{directory.name} ended with exit code {code}: {reason} (all of it: {log})")


def complete(directory: Path, command: list[str], options: dict) -> None:
    """Trains a run by the command, and scores it, as far as that has not been done."""
    refuse_other_options(directory, options)
    if not finished_lines(directory, options):
        directory.mkdir(parents=True, exist_ok=True)
        call(directory, "a", command)
    if not finished_lines(directory, options):
        raise ValueError(f"{directory.name} was stopped; the same command goes on")
    # Without a teacher there is nothing to agree with.
    if options["teacher"] and not scores_of(directory):
        command = ["tools/evaluate.py", "--tasks=", f"--out_dir={directory}", f"--data={options['data']}"]
        call(directory, "a", [*command, f"--teacher={options['teacher']}"])


def scores_of(directory: Path) -> list[dict]:
    """The lines of results.jsonl that have an agreement length; others have tasks."""
    return [line for line in read_lines(directory / "results.jsonl") if "agreement_length" in line]


def mean_curve(runs: list[list[dict]]) -> list[tuple[int, float]]:
    """Held-out loss by tokens, the mean over runs at the evaluations that all of them have."""
    curves = [{line["tokens"]: line["val_lm"] for line in lines if "val_lm" in line} for lines in runs]
    shared = sorted(set.intersection(*map(set, curves)))
    return [(tokens, mean(curve[tokens] for curve in curves)) for tokens in shared]


def describe_reach(curve: list[tuple[int, float]], reference: list[tuple[int, float]]) -> str:
    """By which evaluation a curve is where the reference ends, and how many times fewer tokens that took."""
    whole, loss = reference[-1]
    for tokens, value in curve:
        if value <= loss:
            return f"≤ {tokens / 1000:,.1f}k (≥ {whole / tokens:.1f}×)"
    return "not reached"


def describe_mean(ends: list[dict], name: str, form: str) -> str:
    values = [end[name] for end in ends if name in end]
    return format(mean(values), form) if values else "–"


def table(results: dict[str, list[list[dict]]]) -> str:
    """Markdown of {variant: metrics.jsonl lines of each of its finished runs}."""
    curves = {name: mean_curve(runs) for name, runs in results.items() if runs}
    references = [name for name in ("scratch", "paper") if name in curves]
    head = ["variant", "seeds", "held-out CE", "max − min", "KL", "same likeliest token", "written alike"]
    head += [f"tokens to {name}'s {curves[name][-1][1]:.3f}" for name in references]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    teacher = None
    for name, curve in curves.items():
        ends = [lines[-1] for lines in results[name]]
        losses = [end["val_lm"] for end in ends]
        row = [name, str(len(ends)), f"{mean(losses):.3f}"]
        row.append(f"{max(losses) - min(losses):.3f}" if len(ends) > 1 else "–")
        row.append(describe_mean(ends, "val_kl", ".3f"))
        row.append(describe_mean(ends, "val_agreement", ".1%"))
        row.append(describe_mean(ends, "agreement_length", ".1f"))
        row += [describe_reach(curve, curves[reference]) for reference in references]
        rows.append(row)
        teacher = ends[0].get("val_teacher_lm", teacher)
    if teacher:
        rows.append(["teacher", "", f"{teacher:.3f}", "", "0", "100%", "64"] + [""] * len(references))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_all(jobs: list[tuple]) -> list[str]:
    """Completes runs, at_once of them beside each other; returns what went wrong, a line a run."""

    def attempt(job: tuple) -> str | None:
        try:
            complete(*job)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            return [failure for failure in pool.map(attempt, jobs) if failure]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; it must be at least 1")
    jobs = {}  # {(variant, seed): what `complete` takes}
    for variant in variants:
        options = options_of(variant)
        for seed in seeds:
            name = "_".join([*variant.split(), str(seed)]).replace("_--", "_").replace("/", "-")
            directory = Path(options["out_dir"]) / name
            own = [f"--seed={seed}", f"--out_dir={directory}", "--resume=True"]
            command = ["train.py", *arguments_of(variant), *own]
            words = [json.dumps(word) if "'" in word else word for word in command]
            print("python", *words, flush=True)
            jobs[variant, seed] = directory, command, options
    failures = []
    if run:
        failures = run_all([*jobs.values()])
    results = {}
    for (variant, _), (directory, _, options) in jobs.items():
        runs = results.setdefault(variant, [])
        if lines := finished_lines(directory, options):
            for score in scores_of(directory)[-1:]:
                lines[-1]["agreement_length"] = score["agreement_length"]
            runs.append(lines)
    done = sum(map(len, results.values()))
    print(f"\n{done} of {len(jobs)} runs are done, {base}\n")
    print(table(results))
    if failures:
        raise ValueError("\n".join(failures))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
