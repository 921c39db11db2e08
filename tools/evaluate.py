"""Scores every checkpoint of a run: by tasks, and by how long it agrees with its teacher's own words.

    python tools/evaluate.py --out_dir=out/lrc_1_5b --tasks=arc_easy,piqa,gsm8k                  # of lm-eval
    python tools/evaluate.py --out_dir=out/lrc_1_5b --tasks=gsm8k --arguments='("--limit=100",)'
    python tools/evaluate.py --out_dir=out/quickstart --tasks= --data=data/quickstart/corpus    # no download
    pip download --no-deps bigbench==1.0.0 && tar xzf bigbench-1.0.0.tar.gz
    python tools/evaluate.py --out_dir=out/smollm2_135m --tasks=phrase_relatedness,social_iqa \\
        --bigbench=bigbench-1.0.0/bigbench/benchmark_tasks

Each checkpoint (train.py keeps keep_last of them) becomes a line of results.jsonl in out_dir. One that has a
line with the same options is passed over, so that the same command goes on where it was stopped, and scores
what was saved since. For lm_eval a checkpoint is exported by convert.py for as long as that takes.

BIG-bench's tasks need no harness. Of an example's choices the likeliest behind its text counts ("accuracy"),
and the one that is likeliest per byte of it ("accuracy_per_byte": log-likelihood over length, without the
space before it). Student and teacher are scored by the same function, in float32, beside chance. The choices
are not listed in the text.

The agreement needs no task: the teacher continues held-out text by its likeliest tokens, and the student's
likeliest tokens are counted up to the first that is another. 0 is none of them, `new_tokens` all.
"""

out_dir = "out/quickstart"  # of a run; the results are appended to its results.jsonl
tasks = "arc_easy,arc_challenge,logiqa,commonsense_qa,piqa,winogrande,boolq,sciq,mmlu"  # "": none
arguments: tuple = ()  # more arguments of lm_eval, as in '("--limit=100", "--num_fewshot=5")'
bigbench: str | None = None  # directory of BIG-bench's tasks, of which `tasks` then are; None: of lm_eval
examples = 500  # of each of BIG-bench's tasks, the first so many
data: str | dict | None = None  # whose held-out text is continued, as train.py has it; None: no agreement
agreement_blocks = 64  # pieces of held-out text
prompt_tokens = 64  # of each, from its start
new_tokens = 64  # to continue it by
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
device: str | None = None  # None: cuda where there is one, or cpu

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from configurator import configure

    configure(globals())

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import convert
from configurator import choose_device, fail, read_json, read_lines, sha256
from model import Llama, Student
from prepare import Mixture, encode_text, load_tokenizer, special_ids, vocabulary_hash
from sample import generate

ROOT = Path(__file__).resolve().parents[1]
# Scores that differ with these are not the same scores.
SETTINGS = (
    "tasks", "arguments", "bigbench", "examples", "data", "agreement_blocks", "prompt_tokens", "new_tokens",
    "teacher",
)  # fmt: skip


@torch.no_grad()
def agreement_length(student: Llama, teacher: Llama, blocks: torch.Tensor, new_tokens: int = 64) -> float:
    """The mean number of tokens by which the student's greedy continuation of each block is the teacher's.

    blocks: [B, T] ids of the texts to continue. Up to its first other token the student has read what the
    teacher wrote; so one forward pass over the teacher's continuation says where that is.
    """
    steps = generate(teacher, blocks.tolist(), new_tokens)
    continuations = torch.tensor(list(steps), device=blocks.device).T  # [B, new_tokens]
    total = 0
    for block, continuation in zip(blocks, continuations, strict=True):
        ids = torch.cat([block, continuation])[None]
        # The logits at each position are for the token after it.
        likeliest = student(ids)[0, len(block) - 1 : -1].argmax(-1)
        agrees = (likeliest == continuation).int()
        total += agrees.cumprod(0).sum().item()
    return total / len(blocks)


def load_pair(checkpoint: Path, device: torch.device) -> tuple[Llama, Llama | None]:
    """(student, teacher) of a checkpoint; the teacher of one that is no clone is the option's, or None."""
    student = convert.load_checkpoint(checkpoint, teacher)
    if isinstance(student, Student):
        return student.merge().to(device), student.teacher.to(device)
    reference = convert.load_model(teacher).to(device) if teacher else None
    return student.to(device), reference


def measure_agreement(checkpoint: Path, device: torch.device) -> float:
    """agreement_length of a student's checkpoint and its teacher, on the first held-out blocks of `data`."""
    sources = {data: None} if isinstance(data, str) else dict.fromkeys(data)
    heldout = Mixture(sources, "heldout", prompt_tokens, seed=0)
    directory = convert.tokenizer_directory(checkpoint, teacher)
    vocabulary = vocabulary_hash(load_tokenizer(directory))
    for shards in heldout.sources:
        if shards.meta["vocabulary_hash"] != vocabulary:
            other = shards.meta["tokenizer"]
            raise ValueError(f"{shards.path} is by {other}, whose vocabulary is not {directory}'s")
    student, reference = load_pair(checkpoint, device)
    if reference is None:
        raise ValueError(f"{checkpoint} does not say what its teacher is: give --teacher=DIR")
    blocks = heldout.batch(0, min(agreement_blocks, heldout.total)).ids
    ids = torch.as_tensor(blocks).to(device)
    return agreement_length(student, reference, ids, new_tokens)


# ---- BIG-bench's tasks


def read_task(name: str) -> list[tuple[str, dict[str, float]]]:
    """[(what the model reads, {choice: its score})] of a task, with BIG-bench's prefixes around the input.

    The choices are not listed in it, as BIG-bench does: small models do not read such a list.
    """
    task = read_json(Path(bigbench) / name / "task.json")
    found = task.get("examples")
    if not found:
        raise ValueError(f"{bigbench}/{name}/task.json has no examples; a task of parts is named TASK/PART")
    if not all("target_scores" in example for example in found):
        raise ValueError(f"{bigbench}/{name} is no multiple choice: it has examples without target_scores")
    prefix = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    suffix = task.get("example_output_prefix", "\nA: ")
    return [(prefix + example["input"] + suffix, example["target_scores"]) for example in found[:examples]]


@torch.no_grad()
def log_likelihoods(llama: Llama, text: list[int], choices: list[list[int]]) -> list[float]:
    """log p(choice | text) of each choice, summed over its tokens; all are ids."""
    rows = [text + choice for choice in choices]
    longest = max(map(len, rows))
    # Filled up behind, where causal attention does not look.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=llama.norm.device)
    # The logits at each position are for the token after it.
    scores = llama(ids)[:, len(text) - 1 : -1].log_softmax(-1)
    return [scores[i, range(len(choice)), choice].sum().item() for i, choice in enumerate(choices)]


def score_model(llama: Llama, tokenizer_dir: str, questions: list[tuple[str, dict]], desc: str) -> dict:
    """The accuracies of a model on read_task's questions, each with its standard error."""
    tokenizer = load_tokenizer(tokenizer_dir)
    bos, _ = special_ids(tokenizer, tokenizer_dir)
    right = {"accuracy": [], "accuracy_per_byte": []}
    for text, scores in tqdm(questions, desc=desc, unit="question", leave=False):
        # White space at the text's end goes to the choices, whose first token may begin with it.
        stem = text.rstrip()
        choices = [text[len(stem) :] + choice for choice in scores]
        ids = [encode_text(tokenizer, choice, goes_on=True) for choice in choices]
        sums = log_likelihoods(llama, bos + encode_text(tokenizer, stem), ids)
        # Of the choice alone, without that white space: as lm-eval does.
        means = [value / max(1, len(choice.encode())) for value, choice in zip(sums, scores, strict=True)]
        for name, likelihoods in zip(right, (sums, means), strict=True):
            right[name].append([*scores.values()][likelihoods.index(max(likelihoods))])
    result = {}
    for name, values in right.items():
        result[name] = round(float(np.mean(values)), 4)
        if len(values) > 1:
            result[f"{name}_stderr"] = round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4)
    return result


def run_bigbench(checkpoint: Path, device: torch.device, known: dict) -> dict:
    """{task: {"examples", "chance", "student": score_model's, "teacher"}}; known: results of the same run,
    whose teacher is the same."""
    student, reference = load_pair(checkpoint, device)
    tokenizer_dir = convert.tokenizer_directory(checkpoint, teacher)
    results = {}
    for name in tasks.split(","):
        questions = read_task(name)
        chance = np.mean([np.mean([*scores.values()]) for _, scores in questions])
        result = {"examples": len(questions), "chance": round(float(chance), 4)}
        result["student"] = score_model(student, tokenizer_dir, questions, f"{name}, student")
        if name in known:
            result["teacher"] = known[name].get("teacher")
        elif reference is not None:
            result["teacher"] = score_model(reference, tokenizer_dir, questions, f"{name}, teacher")
        results[name] = result
    return results


# ---- lm-eval's tasks


def call(command: list[str]) -> None:
    """Runs a command, all its output on stderr."""
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        raise ValueError(f"{name} ended with exit code {code}; what it said is above")


def run_lm_eval(checkpoint: Path, device: torch.device) -> dict:
    """lm_eval's scores of a checkpoint: {task: {metric: value}}."""
    with tempfile.TemporaryDirectory(prefix="export_", dir=out_dir) as directory:
        export = f"{directory}/model"
        results = f"{directory}/results"
        command = [sys.executable, str(ROOT / "convert.py"), f"--checkpoint={checkpoint}", f"--out={export}"]
        if teacher:
            command.append(f"--teacher={teacher}")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        call([*command, f"--dtype={dtype}"])
        command = [sys.executable, "-m", "lm_eval", "--model=hf", f"--tasks={tasks}", f"--device={device}"]
        command += [f"--model_args=pretrained={export},dtype={dtype}", f"--output_path={results}", *arguments]
        call(command)
        (file,) = Path(results).rglob("results_*.json")
        return read_json(file)["results"]


def check_options() -> None:
    for name in ("examples", "agreement_blocks", "prompt_tokens", "new_tokens"):
        if globals()[name] < 1:
            raise ValueError(f"{name} is {globals()[name]}; it must be at least 1")
    if not tasks and data is None:
        raise ValueError("there is nothing to measure: name --tasks, or --data=SHARDS, or both")
    if tasks and bigbench:
        # Refused before a model is loaded.
        for name in tasks.split(","):
            read_task(name)
    elif tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm_eval is not installed: pip install "lm-eval[hf]" (or --tasks= goes without it)')


def main() -> None:
    check_options()
    device_used = choose_device(device)
    checkpoints = convert.checkpoints(out_dir)
    if not checkpoints:
        raise ValueError(f"{out_dir} has no checkpoint (step_*)")
    file = Path(out_dir) / "results.jsonl"
    settings = {name: globals()[name] for name in SETTINGS}
    settings = json.loads(json.dumps(settings))  # as they are read: a tuple is a list
    lines = [line for line in read_lines(file) if line.get("settings") == settings]
    done = {(line["checkpoint"], line.get("state")): line for line in lines}
    for checkpoint in (bar := tqdm(checkpoints, desc="checkpoints", unit="checkpoint")):
        bar.set_postfix_str(checkpoint.name)
        if convert.newest_whole([checkpoint]) is None:
            continue
        # Another run, or the same with other options, can have written one of the same name.
        state = sha256(checkpoint / "trainer/state.json")
        if (checkpoint.name, state) in done:
            bar.write(f"{checkpoint.name} is in {file}")
            continue
        line = {"checkpoint": checkpoint.name, "step": int(checkpoint.name[5:]), "state": state}
        line["settings"] = settings
        if data is not None:
            line["agreement_length"] = measure_agreement(checkpoint, device_used)
        if tasks and bigbench:
            known = [*done.values()][-1]["results"] if done else {}
            line["results"] = run_bigbench(checkpoint, device_used, known)
        elif tasks:
            line["results"] = run_lm_eval(checkpoint, device_used)
        done[checkpoint.name, state] = line
        # Under another name first: a kill leaves the lines before.
        partial = file.with_name("results.partial")
        before = file.read_text() if file.is_file() else ""
        partial.write_text(before + json.dumps(line) + "\n")
        partial.replace(file)
        bar.write(json.dumps({name: line[name] for name in line if name not in ("settings", "state")}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
