"""The README's commands, run in a fresh copy of the repository, in the README's order.

Every command is classed here by its beginning, in RUN or in NOT_RUN: a new one fails the test until it is.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run

from configurator import configure

QUICK = ("--max_steps=2", "--eval_blocks=4", "--calibration_tokens=1024")
TEACHER = "needs a teacher that is downloaded"

# {beginning of a command: options that make it short}
RUN = {
    "pip install -r requirements.txt && python train.py": QUICK,
    # The shape of its config is the README's; a small teacher takes seconds in place of half a minute.
    "python tools/plan.py config/lrc_1_5b.py --gpus=8": (
        "--teacher=data/quickstart/teacher", "--student_hidden_size=96", "--seq_len=64",
    ),
    "python tools/check.py": ("--device=cpu", "--only=('reference',)"),
    "torchrun --nproc_per_node=2 train.py --out_dir=out/two": QUICK,
    "python convert.py --checkpoint=out/quickstart": (),
    "python sample.py --model=student --prompt=": ("--max_new_tokens=8",),
    "python train.py --init_from=student --eval_only=True": ("--eval_blocks=4",),
    "python tools/compress.py --out=out/start": ("--calibration_tokens=1024", "--eval_blocks=4"),
    "python train.py --train=weights --init_from=out/quickstart": QUICK,
    "python train.py --train=weights --init_from=student": QUICK,
    "python tools/evaluate.py --out_dir=out/quickstart": ("--agreement_blocks=2", "--new_tokens=4"),
    "python train.py --max_steps=20 --clone_skip=": QUICK,
}  # fmt: skip

# {beginning of commands: why they are not run}
NOT_RUN = {
    "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest": "it is this test run",
    "pip install huggingface_hub": "needs the network",
    "hf download ": "needs a download",
    "python prepare.py --tokenizer=models/SmolLM2-135M-Instruct": TEACHER,
    "python tools/compress.py config/smollm2_135m.py": TEACHER,
    "python train.py config/smollm2_135m.py": TEACHER,
    "python sample.py --model=out/smollm2_135m --prompt=": TEACHER,
    "python prepare.py --input='raw/": "needs data that are downloaded",
    "torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py config/": "needs GPUs",
    "sbatch config/slurm.sh": "needs Slurm",
    "python tools/evaluate.py --out_dir=out/lrc_1_5b": "needs a run on GPUs; test_lm_eval.py runs lm_eval",
    "python tools/from_authors.py": "needs a checkpoint of the authors' code",
}


def readme_commands() -> list[str]:
    """The indented lines of the README, each with the lines that a backslash joins to it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)  # the figure and the citation
    lines = re.sub(r" *\\\n +", " ", text).splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


def classes_of(command: str) -> list[str]:
    return [start for start in (*RUN, *NOT_RUN) if command.startswith(start)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a user who clones the repository gets."""
    out = tmp_path_factory.mktemp("fresh") / "repository"
    if not (ROOT / ".git").exists():  # itself a copy, in which runs may have made files
        made = ("out", "models", "raw", "student", "corpus*", "venv", "__pycache__", ".*_cache")
        return Path(shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(*made)))
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # one that is deleted and not yet committed is still listed
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, out / name)
    return out


def run_command(command: str, directory: Path) -> subprocess.CompletedProcess:
    """A command of RUN, by this Python; of `pip install … && X` only X."""
    program, *arguments = shlex.split(command.rpartition("&& ")[2], comments=True)
    arguments += RUN[classes_of(command)[0]]
    if program == "python":
        return run(*arguments, directory=directory)
    assert program == "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.run(torchrun, cwd=directory, capture_output=True, text=True, timeout=600)


def test_every_command_is_classed():
    found = readme_commands()
    for command in found:
        assert len(classes_of(command)) == 1, f"class this in RUN or NOT_RUN: {command}"
    used = [classes_of(command)[0] for command in found]
    assert {*RUN, *NOT_RUN} == {*used}, "a class whose command is no longer in the README"
    assert all(used.count(start) == 1 for start in RUN), "two commands of one class"


def test_batches_divide_by_the_processes_of_the_commands():
    """Of what needs GPUs too: 8 of torchrun's on a node, and as many on each of Slurm's."""
    slurm = (ROOT / "config/slurm.sh").read_text()
    (nodes,) = re.findall(r"--nodes=(\d+)", slurm)
    checked = 0
    for command in readme_commands():
        arguments = command.partition("#")[0].split()
        configs = [word for word in arguments if re.fullmatch(r"config/\w+\.py", word)]
        if arguments[0] not in ("torchrun", "sbatch") or not configs:
            continue
        options = [word for word in arguments if word.startswith("--") and "=" in word]
        options = [word for word in options if not word.startswith(("--nproc", "--shutdown"))]
        values = configure({"__file__": str(ROOT / "train.py")}, [*configs, *options])
        processes = 8 * (int(nodes) if arguments[0] == "sbatch" else 1)
        assert values["global_batch_size"] % processes == 0 and processes % values["replicas"] == 0, command
        checked += 1
    assert checked >= 4


def test_commands_run(fresh):
    for command in readme_commands():
        if classes_of(command)[0] in RUN:
            begun = time.perf_counter()
            done = run_command(command, fresh)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            print(f"{time.perf_counter() - begun:5.1f} s  {command}")  # shown by pytest -s -n0
    assert (fresh / "student/model.safetensors").is_file()


def test_the_studys_commands_are_understood():
    """Their rows exist and have options that train.py knows, also of what was not run."""
    page = (ROOT / "config/study/README.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^    (python tools/study\.py.*?)(?:  +#.*)?$", page, re.MULTILINE)
    commands = [command for command in commands if "'ROW'" not in command]
    assert len(commands) > 5
    for command in commands:
        done = run(*shlex.split(command)[1:], "--run=False")
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", ["README.md", "config/study/README.md", "tools/README.md"])
def test_lines_are_short_and_the_files_that_they_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 110, f"{page}:{number} has {len(line)} characters"
    for name in re.findall(r"(?:config|tools|tests)/[a-z0-9_/]+\.(?:py|sh|md|png)", text):
        assert (ROOT / name).is_file(), f"{page} names {name}"
    for name in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert ((ROOT / page).parent / name).exists(), f"{page} links to {name}"
