"""Scores every checkpoint of a run: lm-eval's tasks, and how long it agrees with its teacher's own words.

    python tools/evaluate.py --out_dir=out/lrc_1_5b --tasks=arc_easy,piqa,gsm8k
    python tools/evaluate.py --out_dir=out/lrc_1_5b --tasks=gsm8k --arguments='("--limit=100",)'
    python tools/evaluate.py --out_dir=out/quickstart --tasks= --data=data/quickstart/corpus    # no download

Each checkpoint (train.py keeps keep_last of them) is exported by convert.py for as long as lm_eval takes, and
becomes a line of results.jsonl in out_dir. One that has a line with the same options is passed over, so that
the same command goes on where it was stopped, and scores what was saved since.

The agreement needs no task: the teacher continues held-out text by its likeliest tokens, and the student's
likeliest tokens are counted up to the first that is another. 0 is none of them, `new_tokens` all.
"""

out_dir = "out/quickstart"  # of a run; the results are appended to its results.jsonl
tasks = "arc_easy,arc_challenge,logiqa,commonsense_qa,piqa,winogrande,boolq,sciq,mmlu"  # of lm_eval; "": none
arguments: tuple = ()  # more arguments of lm_eval, as in '("--limit=100", "--num_fewshot=5")'
data: str | None = None  # shard directory whose held-out text is continued; None: without the agreement
agreement_blocks = 64  # pieces of held-out text
prompt_tokens = 64  # of each, from its start
new_tokens = 64  # to continue it by
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
device: str | None = None  # None: cuda where there is one, or cpu

if __name__ == "__main__":
    import os
    import sys
    from pathlib import Path

    os.chdir(Path(__file__).resolve().parents[1])
    sys.path.insert(0, os.getcwd())
    from configurator import configure

    configure(globals())

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import convert
from configurator import choose_device, fail
from model import Llama, LowRankClone
from prepare import Mixture
from sample import generate

# Scores that differ with these are not the same scores.
SETTINGS = ("tasks", "arguments", "data", "agreement_blocks", "prompt_tokens", "new_tokens")


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
        likeliest = student.logits(ids)[0, len(block) - 1 : -1].argmax(-1)
        agrees = (likeliest == continuation).int()
        total += agrees.cumprod(0).sum().item()
    return total / len(blocks)


def measure_agreement(checkpoint: Path, device: torch.device) -> float:
    """agreement_length of a student's checkpoint and its teacher, on the first held-out blocks of `data`."""
    student = convert.load_checkpoint(checkpoint, teacher)
    if isinstance(student, LowRankClone):
        reference = student.teacher
        student = student.merge()
    elif teacher is not None:
        reference = convert.load_model(teacher)
    else:
        raise ValueError(f"{checkpoint} does not say what its teacher is: give --teacher=DIR")
    heldout = Mixture({data: None}, "heldout", prompt_tokens, seed=0)
    size = heldout.sources[0].meta["vocab_size"]
    if size > student.config.vocab_size:
        raise ValueError(f"{data} has {size} token ids; the model has {student.config.vocab_size}")
    blocks = heldout.batch(0, min(agreement_blocks, heldout.total)).ids
    ids = torch.as_tensor(blocks).to(device)
    return agreement_length(student.to(device), reference.to(device), ids, new_tokens)


def call(command: list[str]) -> None:
    """Runs a command, all its output on stderr."""
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        name = command[2] if command[1] == "-m" else command[1]
        raise ValueError(f"{name} ended with exit code {code}; what it said is above")


def run_tasks(checkpoint: Path, device: torch.device) -> dict:
    """lm_eval's scores of a checkpoint: {task: {metric: value}}."""
    with tempfile.TemporaryDirectory(prefix="export_", dir=out_dir) as directory:
        export = f"{directory}/model"
        results = f"{directory}/results"
        command = [sys.executable, "convert.py", f"--checkpoint={checkpoint}", f"--out={export}"]
        if teacher:
            command.append(f"--teacher={teacher}")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        call([*command, f"--dtype={dtype}"])
        command = [sys.executable, "-m", "lm_eval", "--model=hf", f"--tasks={tasks}", f"--device={device}"]
        command += [f"--model_args=pretrained={export},dtype={dtype}", f"--output_path={results}", *arguments]
        call(command)
        (file,) = Path(results).rglob("results_*.json")
        return convert.read_json(file)["results"]


def read_results(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} has a line that is not JSON: {error}") from None


def append_result(file: Path, line: dict) -> None:
    """Under another name first: a kill leaves the lines before."""
    lines = [*read_results(file), line]
    partial = file.with_name("results.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(file)


def check_options() -> None:
    for name in ("agreement_blocks", "prompt_tokens", "new_tokens"):
        if globals()[name] < 1:
            raise ValueError(f"{name} is {globals()[name]}; it must be at least 1")
    if not tasks and data is None:
        raise ValueError("there is nothing to measure: name lm_eval's --tasks, or --data=SHARDS, or both")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm_eval is not installed: pip install "lm-eval[hf]" (or --tasks= goes without it)')


def settings_of(checkpoint: Path) -> dict:
    settings = {name: globals()[name] for name in SETTINGS}
    if teacher and not convert.is_clone(checkpoint):  # a clone says itself what its teacher is
        settings["teacher"] = teacher
    return json.loads(json.dumps(settings))  # as they are read: a tuple is a list


def main() -> None:
    check_options()
    device_used = choose_device(device)
    checkpoints = convert.checkpoints(out_dir)
    if not checkpoints:
        raise ValueError(f"{out_dir} has no checkpoint (step_*)")
    file = Path(out_dir) / "results.jsonl"
    done = [(line["checkpoint"], line.get("settings")) for line in read_results(file)]
    for checkpoint in (bar := tqdm(checkpoints, desc="checkpoints", unit="checkpoint")):
        bar.set_postfix_str(checkpoint.name)
        if convert.newest_whole([checkpoint]) is None:
            continue
        settings = settings_of(checkpoint)
        if (checkpoint.name, settings) in done:
            bar.write(f"{checkpoint.name} is in {file}")
            continue
        line = {"checkpoint": checkpoint.name, "step": int(checkpoint.name[5:]), "settings": settings}
        if data is not None:
            line["agreement_length"] = measure_agreement(checkpoint, device_used)
        if tasks:
            line["results"] = run_tasks(checkpoint, device_used)
        append_result(file, line)
        bar.write(json.dumps({name: value for name, value in line.items() if name != "settings"}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
