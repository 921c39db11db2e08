"""Does this machine compute what it should? One command, and a table to paste into a bug report.

    python tools/check.py                             # all GPUs that are there, or the CPU
    python tools/check.py --device=cpu --only='("reference", "resume")'

Needs no downloads: the teacher is the bundled one, the text is this repository's. A line says pass, fail or
not run, what was measured and its bound, or why. The exit code is 1 where a line says fail.
"""

from typing import Literal

processes = 0  # of runs on several; 0: one a GPU, or 2 on a CPU
device: Literal["cuda", "cpu"] | None = None  # None: cuda where there is one
only: tuple = ()  # run only the lines whose names begin with one of these

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from configurator import configure

    configure(globals())

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import torch
import torch.nn.functional as F
from from_authors import as_stored, reference_name
from safetensors.torch import load_file

import convert
import model as models
from configurator import choose_device, fail, read_json, read_lines, read_options
from prepare import encode_text, load_tokenizer, write_shards

GOLDEN = ROOT / "tests/golden"
TEACHER = ROOT / "data/quickstart/teacher"
TRAIN = ROOT / "train.py"
TIME_LIMIT = 600  # seconds for one run
POOL = ThreadPoolExecutor(4)  # of runs: on GPUs four at once, on a CPU as their lines come


class Failed(Exception):
    """What a check measured, and the bound it missed."""


def within(what: str, measured: float, bound: float) -> str:
    if not measured <= bound:  # nor where it is not a number
        raise Failed(f"{what} {measured:.3g}, bound {bound:g}")
    return f"{what} {measured:.3g}, bound {bound:g}"


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, over the largest expected value."""
    actual = actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ---- the authors' numbers

TERMS = {
    "q": "attn-q-sim", "k": "attn-k-sim", "v": "attn-v-sim", "attn_out": "attn-out-sim",
    "gate": "mlp-gate", "up": "mlp-up", "mlp_out": "mlp-out",
}  # fmt: skip


def golden(case: str, dtype=torch.float32, device="cpu"):
    """(numbers, our result after backward, clone, {the authors' name: our parameter}) of a case."""
    settings = read_json(GOLDEN / case / "case.json")
    numbers = load_file(GOLDEN / case / "golden.safetensors")
    source = load_file(GOLDEN / "A_i" / "golden.safetensors") if case == "A_ii" else numbers
    config = convert.from_hf(settings["teacher_config"])
    lrc = settings["lrc"]
    teacher = models.Llama(config)
    names = convert.weight_names(config)
    teacher.load_state_dict({ours: source[f"teacher.{name}"] for name, (ours, _) in names.items()})
    tied = bool(lrc["tie_word_emb_proj"])
    student = models.StudentConfig(lrc["target_hidden_size"], False, False, tied, lrc["target_rms_norm_eps"])
    temperature = lrc["kl_temperature"]
    kl_weight = 24 / temperature**2  # the reference sums KL over the 24 positions, without T²
    clone_weight = lrc["aux_loss_scale_factor"]
    losses = models.LossConfig(
        1.0, kl_weight, temperature, clone_weight, "teacher", "student", "none", (), ()
    )
    shape = models.student_shape(config, student)
    clone = models.Student(shape, teacher.to(dtype), student, losses).to(device)
    trained = {reference_name(ours): parameter for ours, parameter in clone.trained.named_parameters()}
    assert {f"train.{name}" for name in trained} == {name for name in numbers if name.startswith("train.")}
    for name, parameter in trained.items():
        parameter.data.copy_(as_stored(numbers[f"train.{name}"], like=parameter))
    ids = numbers["input_ids"].to(device)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    result = clone.loss(ids, labels)
    result["loss"].backward()
    with torch.no_grad():
        result["raw_lm"] = clone.loss(ids, labels)["teacher_lm"]
    return numbers, result, clone, trained


def reference_vectors(dtype: torch.dtype, bound: float) -> str:
    """Each loss, gradient and logits in the reference, against ours."""
    errors = {}
    for case in ("A_i", "A_ii", "B_i", "C_i"):
        numbers, result, clone, trained = golden(case, dtype, device)
        ours = {"loss.total": result["loss"], "loss.target_lm": result["lm"], "loss.raw_lm": result["raw_lm"]}
        ours["loss.logits_kl"] = result["kl"] * 24
        for term, by_layer in result["terms"].items():
            ours |= {f"loss.L{i}-{TERMS[term]}-loss": value for i, value in enumerate(by_layer)}
        for name, parameter in trained.items():
            ours[f"grad.{name}"] = as_stored(parameter.grad, like=numbers[f"grad.{name}"])
        ids = numbers["input_ids"].to(device)
        ours["student_logits"] = clone(ids)[:, 1::2]
        ours["teacher_logits"] = clone.teacher(ids)[:, 1::2]
        assert set(ours) == {n for n in numbers if n.startswith(("loss.", "grad.")) or n.endswith("_logits")}
        for name, x in ours.items():
            errors[f"{case} {name}"] = largest_difference(x, numbers[name].reshape(x.shape))
    name = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return within(f"{len(errors)} numbers; {name}: difference", errors[name], bound)


# ---- documents


def document_losses(kernel: str, where: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each token, gradient) of the bundled teacher, on this file's text cut into documents."""
    student = models.Student(convert.read_config(TEACHER), dtype=dtype).to(where)
    convert.load_weights(Path(TEACHER), student)
    ids = torch.tensor(encode_text(load_tokenizer(TEACHER), Path(__file__).read_text())[:257], device=where)
    numbers = np.array([[0] * 50 + [1] * 1 + [2] * 77, [3] * 100 + [4] * 28])
    # On a CPU document_layout makes a mask, for PyTorch's plain attention.
    positions, layout = models.document_layout(numbers, torch.device("cpu" if kernel == "mask" else where))
    if kernel == "mask":
        layout = layout.to(where)
    flash = models.flash_attn_varlen_func if kernel == "flash_attn" else None
    with patch.object(models, "flash_attn_varlen_func", flash):
        documents = (positions.to(where), layout)
        losses = student.loss(ids[:-1].view(2, 128), ids[1:].view(2, 128), documents=documents)
        losses["loss"].backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    return losses["token_lm"].float().cpu(), gradient.cpu()


def documents(kernel: str, dtype: torch.dtype, bound: float) -> str:
    """Documents kept apart by an attention of the GPU, against a CPU's mask, which the tests have checked."""
    expected, expected_gradient = document_losses("mask", "cpu", torch.float32)
    found, gradient = document_losses(kernel, device, dtype)
    error = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
    return (
        f"{within('losses', largest_difference(found, expected), bound)}; {within('gradient', error, bound)}"
    )


# ---- runs of the scripts


def launch(count: int, script: Path, *arguments: str) -> str:
    """What a script prints, alone or as `count` processes under torchrun; Failed says why one fails."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [str(script), f"--device={device}", *arguments]
    # In a session of its own, so that Ctrl-C here does not ask a run to save a checkpoint.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=TIME_LIMIT)[0]
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {TIME_LIMIT} s: {' '.join(command)}") from None
    finally:
        process.terminate()  # torchrun ends its workers then
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {reason(output)}")
    return output


def reason(output: str) -> str:
    """Of what a failed run printed, or a traceback, the lines that say why: from the first error on, since
    torchrun's own come after it, and so do the errors that one led to."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    for i, line in enumerate(lines):
        if re.match(r"error|(\[rank\d+\]: )?[\w.]+Error: ", line):
            return "\n".join(lines[i : i + 8])
    return "\n".join(lines[-8:])


FLOAT32 = ("--dtype=float32", "--compile=False")
RUNS = {
    "alone": FLOAT32,
    "ddp": FLOAT32,
    "fsdp": (*FLOAT32, "--parallel=fsdp"),
    "resumed": (*FLOAT32, "--resume=True"),
    "compiled": ("--dtype=float32", "--compile=True", "--eval_every=0"),
    "bfloat16": ("--dtype=bfloat16", "--compile=True", "--eval_every=0", "--parallel=fsdp"),
}


@functools.cache
def begun(work: Path, name: str) -> Future:
    """A run of RUNS, which is done once, in a thread: six steps, evaluated and saved at 3 and 6."""
    corpus = work / "corpus"
    if not corpus.exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sources = tuple(f"{ROOT}/{folder}*.py" for folder in ("", "tools/", "tests/", "config/"))
            write_shards(sources, corpus, str(TEACHER), heldout_fraction=0.3)
    return POOL.submit(
        launch, 1 if name in ("alone", "compiled") else processes, TRAIN,
        f"--data={corpus}", f"--out_dir={work / name}", "--seq_len=64", "--calibration_tokens=2048",
        f"--global_batch_size={2 * processes}", "--micro_batch_size=1", "--max_steps=6", "--save_every=3",
        "--eval_every=3", "--eval_blocks=3", "--log_every=1", "--keep_last=2", "--sample_prompt=",
        "--warmup_ratio=0", "--learning_rate=1e-3", *RUNS[name],
    )  # fmt: skip


def finished(work: Path, name: str) -> Path:
    """The directory of a run, when it has ended."""
    begun(work, name).result()
    return work / name


def compare(work: Path, name: str, expected: str = "alone", bound: float = 1e-4) -> str:
    """Losses and norms of gradients of two runs, as far as the first has them, relative."""
    ours, theirs = (read_lines(finished(work, run) / "metrics.jsonl") for run in (name, expected))
    errors = []
    for kind in ("loss", "grad_norm", "val_lm", "val_kl"):
        found = {line["step"]: line[kind] for line in ours if kind in line}
        right = {line["step"]: line[kind] for line in theirs if kind in line}
        assert not found or found.keys() == right.keys()
        # What is not finite is null in a log.
        errors += [np.nan if found[i] is None else abs(found[i] - right[i]) / abs(right[i]) for i in found]
    return within("losses", float(np.max(errors)), bound)


def resume(work: Path) -> str:
    """A run of ddp that goes on from what fsdp saved at step 3, after an evaluation."""
    source = finished(work, "fsdp")
    shutil.copytree(source, work / "resumed")
    shutil.rmtree(work / "resumed/step_00000006")
    return compare(work, "resumed", "fsdp")


# ---- time and memory


@functools.cache
def speed(count: int, parallel: str = "ddp") -> str:
    """The line of JSON that tools/bench.py ends with, of LRC-1.5B's step, three blocks a GPU."""
    output = launch(
        count, ROOT / "tools/bench.py", str(ROOT / "config/lrc_1_5b.py"), "--data=None", "--max_steps=12",
        f"--teacher={ROOT / 'config/teachers/Llama-3.2-3B-Instruct.json'}", "--micro_batch_size=3",
        f"--global_batch_size={3 * count}", f"--parallel={parallel}",
    )  # fmt: skip
    return [line for line in output.splitlines() if line.startswith("{")][-1]


def fsdp_speed() -> str:
    """A step on a mesh of one against a plain one: what FSDP itself costs, nothing being sent."""
    plain, sharded = (json.loads(speed(1, parallel))["seconds_per_step"] for parallel in ("ddp", "fsdp"))
    text = within("ratio", sharded / plain, 1.05)
    return f"{1000 * plain:.0f} ms, {1000 * sharded:.0f} under fsdp: {text}"


FSDP_BOUND = 1.6  # CPU time of a step by FSDP over that of a plain one: more does not hide behind kernels
DEEP = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def fsdp_cpu_time() -> str:
    """CPU time of a step under FSDP over a plain one's, on 28 tiny layers and a mesh of one: what a GPU whose
    kernels are done sooner waits for. Medians of 20 steps in turns, on a CPU whatever the device.

    Other work on the machine adds more to the step under FSDP, 1.75 of 1.5. So what misses the bound is
    measured anew, twice at most, and the line says how often it was.
    """
    import bench

    import train

    options = {name: default for name, (default, *_) in read_options(TRAIN.read_text()).items()}
    options |= {"teacher": DEEP, "student_hidden_size": 64, "seq_len": 16, "device": "cpu", "compile": False}
    options |= {"global_batch_size": 1, "micro_batch_size": 1, "load_teacher": bench.random_teacher}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one's waiting would count
    steps = {}

    def cpu_time(parallel: str, number: int) -> float:
        with patch.multiple(train, **options | {"parallel": parallel}):
            if parallel not in steps:
                steps[parallel] = bench.make_step(train.start_device())
            start = time.process_time()
            steps[parallel](number)
            return 1000 * (time.process_time() - start)

    for attempts in (1, 2, 3):
        times = [[cpu_time(parallel, number) for parallel in ("ddp", "fsdp")] for number in range(20)]
        plain, sharded = np.median(times, axis=0)
        what = f"{plain:.0f} ms of CPU time, {sharded:.0f} under fsdp, measured {attempts} x: ratio"
        if sharded / plain <= FSDP_BOUND:
            break
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()
    return within(what, sharded / plain, FSDP_BOUND)


# ---- the table


def header() -> str:
    """The versions and devices that a bug report needs."""
    names = [platform.processor() or platform.machine()]
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    flash_attn = "not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        flash_attn = importlib.metadata.version("flash-attn")
    commit = "no git repository"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.check_output(describe, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    return (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, flash-attn {flash_attn}\n"
        f"{device}: {', '.join(names)}; {processes} processes; {os.cpu_count()} cores\n"
        f"Python {platform.python_version()}, {platform.platform()}; commit {commit}\n"
    )


def checks(work: Path) -> list[tuple]:
    """(name, why it is not run here or None, function, its arguments) of every line."""
    of_cpu = of_memory = of_one = of_flash = None
    if device == "cpu":
        of_cpu = "a CPU, on which the tests show it"
        of_memory = "a CPU, which python tools/bench.py config/bench_smollm2.py measures"
    elif torch.cuda.get_device_properties(0).total_memory < 48 * 2**30:
        of_memory = "the GPU has less than 48 GiB; LRC-1.5B takes 41 and some reserve"
    if processes == 1:
        of_one = "one device"
    if models.flash_attn_varlen_func is None:
        of_flash = "flash-attn is not installed"
    float32, narrow = torch.float32, torch.bfloat16
    return [
        # float32 in another order: 5e-6 on the CPU that was measured, the most in the KL, a small difference
        ("reference vectors, float32", None, reference_vectors, float32, 1e-5 if device == "cpu" else 1e-4),
        # 0.026 on that CPU, in a norm's gradient, of which bfloat16 rounds every token's part
        ("reference vectors, bfloat16", None, reference_vectors, narrow, 0.08),
        ("documents, by a mask", of_cpu, documents, "mask", float32, 1e-3),
        # These have no float32. bfloat16 rounds to 2^-8 in each of some ten operations of six layers.
        ("documents, varlen_attn", of_cpu, documents, "varlen_attn", narrow, 0.05),
        ("documents, flash_attn", of_cpu or of_flash, documents, "flash_attn", narrow, 0.05),
        ("ddp against one process", of_one, compare, work, "ddp"),
        ("fsdp against one process", None, compare, work, "fsdp"),
        ("compiled against not compiled", None, compare, work, "compiled"),
        # Rounding by 2^-8, 0.4 %, is evened out by a mean over tokens; a wrong gradient shows in six steps.
        ("bfloat16 run against float32", of_cpu, compare, work, "bfloat16", "alone", 0.02),
        ("resume after an evaluation", None, resume, work),
        # Its ratio of CPU times is right when no run of train.py is beside it.
        ("fsdp against a plain step", None, fsdp_cpu_time),
        ("speed at LRC-1.5B's shape", of_memory, speed, 1),
        ("speed, fsdp on a mesh of one", of_memory, fsdp_speed),
        ("speed, all processes", of_memory or of_one, speed, processes),
    ]


def main() -> int:
    """Prints the table; returns 1 where a line says fail."""
    global device, processes
    if "LOCAL_RANK" in os.environ:
        raise ValueError("check.py starts torchrun itself: run it by python, with --processes=8 for eight")
    device = choose_device(device).type
    gpus = torch.cuda.device_count()
    processes = processes or (gpus if device == "cuda" else 2)
    if device == "cuda" and processes > gpus:
        raise ValueError(f"processes is {processes}; there are {gpus} GPUs")
    print(header(), flush=True)
    counts = Counter()
    with tempfile.TemporaryDirectory(prefix="lrc_check_") as work:
        if device == "cuda" and not only:
            for name in ("alone", "fsdp", "compiled", "bfloat16"):
                begun(Path(work), name)
        for name, why_not, function, *arguments in checks(Path(work)):
            if only and not name.startswith(only):
                continue
            start = time.perf_counter()
            try:
                text = why_not or function(*arguments)
                result = "not run" if why_not else "pass"
            except Exception as error:  # whatever went wrong belongs into the table, and the others go on
                text = str(error) if isinstance(error, Failed) else reason(traceback.format_exc())
                result = "fail"
            counts[result] += 1
            text = text.replace("\n", "\n    ")
            print(f"{name:30} {result:8} {time.perf_counter() - start:5.0f} s  {text}", flush=True)
            torch.cuda.empty_cache()  # for the runs, which are processes of their own
    if not counts:
        raise ValueError(f"only is {only}; no line's name begins so")
    print("\n" + ", ".join(f"{counts[result]} {result}" for result in ("pass", "fail", "not run")))
    return int(counts["fail"] > 0)


if __name__ == "__main__":
    try:
        code = main()
    except ValueError as error:
        fail(str(error))
    raise SystemExit(code)
