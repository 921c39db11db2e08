"""What several test files share: running a script, a random two-layer teacher, generated text, its shards."""

import gzip
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread costs more than it gives
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
BUNDLED = ROOT / "data/quickstart/teacher"
SHAPE = {
    "vocab_size": 4096, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
DOCUMENTS = [
    f"def f{i}(x):\n    # {'ünï 日本 🙂 ' * (i % 3)}\n    return x ** {i} + {i * i}\n" * (1 + i % 7)
    for i in range(120)
]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As many processes as there are cores, up to four, unless told otherwise or without pytest-xdist."""
    is_worker = hasattr(config, "workerinput")
    if getattr(config.option, "numprocesses", 0) is None and not (is_worker or config.option.usepdb):
        config.option.numprocesses = min(4, os.cpu_count())
        # A file's tests share what they trained.
        config.option.dist = "loadfile"


# A script starts in a process that is forked from one which has torch: importing that anew takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["conftest", "pyarrow.parquet", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
     "transformers.models.llama.modeling_llama"]
)  # fmt: skip
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def execute(script, arguments, environment, outputs, directory):
    """What `python SCRIPT ARGUMENTS` does in a directory; outputs: files of stdout and of stderr."""
    for stream, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    sys.path[:0] = [os.path.dirname(directory / script), *environment.get("PYTHONPATH", "").split(":")]
    runpy.run_path(directory / script, run_name="__main__")


def launch(script, *arguments, outputs, directory=ROOT, **environment):
    """The script as a process that was started, with these variables in its environment."""
    arguments = [*map(str, arguments)]
    given = (str(script), arguments, os.environ | environment, outputs, directory)
    process = FORKS.Process(target=execute, args=given)
    process.start()
    return process


def run(script, *arguments, directory=ROOT):
    with tempfile.TemporaryDirectory() as work:
        outputs = [Path(work) / name for name in ("stdout", "stderr")]
        process = launch(script, *arguments, outputs=outputs, directory=directory)
        process.join()
        texts = [file.read_text() for file in outputs]
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, *texts)


def succeed(script, *arguments):
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def teacher(work):
    torch.manual_seed(0)
    # ten times the usual deviation: logits far enough apart that rounding does not decide what is likeliest
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).save_pretrained(work / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, work / "teacher")
    return work / "teacher"


@pytest.fixture(scope="session")
def text(work):
    """DOCUMENTS in order of their file names: two .txt, a .jsonl and a .jsonl.gz."""
    (work / "text").mkdir()
    lines = [json.dumps({"body": document}) + "\n" for document in DOCUMENTS]
    for i in range(2):
        (work / f"text/{i}.txt").write_text(DOCUMENTS[i], encoding="utf-8")
    (work / "text/2.jsonl").write_text("".join(lines[2:60]) + "\n")
    with gzip.open(work / "text/3.jsonl.gz", "wt") as file:
        file.write("".join(lines[60:]))
    return work / "text"


@pytest.fixture(scope="session")
def corpus(work, text, teacher):
    out = work / "corpus"
    done = succeed("prepare.py", f"--input={text}/*", f"--out={out}", f"--tokenizer={teacher}",
                   "--text_key=body", "--heldout_fraction=0.2", "--unit_bytes=6000")  # fmt: skip
    out.with_name("corpus.log").write_text(done.stdout)
    return out


def clone_options(teacher, corpus, out_dir, *more):
    return (
        f"--teacher={teacher}", f"--data={corpus}", f"--out_dir={out_dir}", "--student_hidden_size=24",
        "--seq_len=32", "--global_batch_size=4", "--micro_batch_size=2", "--max_steps=20", "--save_every=10",
        "--keep_last=2", "--log_every=5", "--eval_every=10", "--eval_blocks=3", "--sample_prompt=", *more,
    )  # fmt: skip
