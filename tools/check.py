"""Does this machine compute what it should? One command, and a table to paste into a bug report.

    python tools/check.py                             # all GPUs that are there, or the CPU
    torchrun --nproc_per_node=8 tools/check.py        # the same, with eight processes
    python tools/check.py --device=cpu --only='("reference", "resume")'

Needs no downloads: teachers are random, the text is this repository's. A line says pass, fail or not run,
what was measured and its bound, or why. The exit code is 1 where a line says fail.
"""

from typing import Literal

processes = 0  # of runs on several; 0: torchrun's, else one a GPU, or 2 on a CPU
device: Literal["cuda", "cpu"] | None = None  # None: cuda where there is one
only: tuple = ()  # run only the lines whose names begin with one of these

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from configurator import configure

    configure(globals())

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import convert
import model as models
from configurator import need_compiler
from prepare import write_shards

GOLDEN = ROOT / "tests/golden"
TOKENIZER = ROOT / "data/quickstart/teacher"
TRAIN = ROOT / "train.py"
TIME_LIMIT = 900  # seconds for one run of train.py: the largest makes three billion random weights on a CPU


class NotRun(Exception):
    """Why a check does not apply to this machine."""


class Failed(Exception):
    """What a check measured, and the bound it missed."""


def within(what: str, measured: float, bound: float) -> str:
    if not measured <= bound:  # nor where it is not a number
        raise Failed(f"{what} {measured:.2g}, bound {bound:g}")
    return f"{what} {measured:.2g}, bound {bound:g}"


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, over the largest expected value."""
    actual = actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def difference_of_norms(actual: dict, expected: dict) -> float:
    """|actual - expected| / |expected| of the tensor in which it is largest."""
    assert actual.keys() == expected.keys()
    norms = {name: tensor.double().norm() for name, tensor in expected.items()}
    return max(((actual[name].double() - expected[name]).norm() / norms[name]).item() for name in expected)


# ---- the authors' numbers

PAPER = models.LossConfig(
    lm_weight=1.0,
    kl_weight=1.0,
    kl_temperature=40.0,
    clone_weight=0.2,
    clone_attn_out="student",
    clone_mlp_out="student",
    clone_scale="none",
    clone_skip=(),
    clone_skip_layers=(),
)


def golden(case: str, dtype=torch.float32, device="cpu"):
    """(numbers, our result after backward, clone, {reference name: (our parameter, transposed)})."""
    settings = json.loads((GOLDEN / case / "case.json").read_text())
    numbers = load_file(GOLDEN / case / "golden.safetensors")
    source = load_file(GOLDEN / "A_i" / "golden.safetensors") if case == "A_ii" else numbers
    config = convert.from_hf(settings["teacher_config"])
    lrc = settings["lrc"]
    teacher = models.Llama(config, dtype)
    teacher.load_state_dict(
        {ours: source[f"teacher.{n}"] for n, (ours, _) in convert.weight_names(config).items()}
    )
    student = models.StudentConfig(
        student_hidden_size=lrc["target_hidden_size"],
        share_qkv=False,
        share_gate_up=False,
        tie_head_projection=bool(lrc["tie_word_emb_proj"]),
        student_rms_norm_eps=lrc["target_rms_norm_eps"],
    )
    losses = dataclasses.replace(
        PAPER,
        kl_weight=24 / lrc["kl_temperature"] ** 2,  # the reference sums KL over the 24 positions, without T²
        kl_temperature=lrc["kl_temperature"],
        clone_weight=lrc["aux_loss_scale_factor"],
        clone_attn_out="teacher",
    )
    clone = models.LowRankClone(teacher.to(dtype), student, losses).to(device)
    names = {"model.target_norm.weight": (clone.norm, False)}
    names["model.zoom.weight"] = (clone.embedding_projection, True)
    if clone.head_projection is not None:
        names["zoom_down.weight"] = (clone.head_projection, True)
    for i, layer in enumerate(clone.layers):
        prefix = f"model.layers.{i}."
        p = layer.projections
        names |= {f"{prefix}self_attn.zoom_{m}.weight": (p[m], False) for m in "qkv"}
        names |= {f"{prefix}mlp.zoom_{m}.weight": (p[m], True) for m in ("gate", "up", "down")}
        names[f"{prefix}self_attn.zoom_down.weight"] = (p["o"], True)
        names[f"{prefix}target_input_layernorm.weight"] = (layer.input_norm, False)
        names[f"{prefix}target_post_attention_layernorm.weight"] = (layer.post_norm, False)
    assert {f"train.{n}" for n in names} == {n for n in numbers if n.startswith("train.")}
    assert len(names) == len(clone.trained())
    for name, (ours, transposed) in names.items():
        ours.data.copy_(numbers[f"train.{name}"].T if transposed else numbers[f"train.{name}"])
    ids = numbers["input_ids"].to(device)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    result = clone.loss(ids, labels)
    result["loss"].backward()
    result["raw_lm"] = clone.loss(ids, labels, temperature=1.0)["teacher_lm"]
    return numbers, result, clone, names


TERMS = {
    "q": "attn-q-sim", "k": "attn-k-sim", "v": "attn-v-sim", "attn_out": "attn-out-sim",
    "gate": "mlp-gate", "up": "mlp-up", "mlp_out": "mlp-out",
}  # fmt: skip


def golden_errors(case: str, dtype=torch.float32, device="cpu") -> dict[str, float]:
    """{name of a loss, gradient or logits in the reference: our largest difference from it}."""
    numbers, result, clone, names = golden(case, dtype, device)
    ours = {"loss.total": result["loss"], "loss.target_lm": result["lm"], "loss.raw_lm": result["raw_lm"]}
    ours["loss.logits_kl"] = result["kl"] * 24
    for term, by_layer in result["terms"].items():
        ours |= {f"loss.L{i}-{TERMS[term]}-loss": value for i, value in enumerate(by_layer)}
    for name, (parameter, transposed) in names.items():
        ours[f"grad.{name}"] = parameter.grad.T if transposed else parameter.grad
    ids = numbers["input_ids"].to(device)
    ours["student_logits"] = clone.logits(ids)[:, 1::2]
    ours["teacher_logits"] = clone.teacher.logits(ids)[:, 1::2]
    assert set(ours) == {n for n in numbers if n.startswith(("loss.", "grad.")) or n.endswith("_logits")}
    return {name: largest_difference(x, numbers[name].reshape(x.shape)) for name, x in ours.items()}


def reference_vectors(dtype: torch.dtype, bound: float) -> str:
    worst = {}
    for case in ("A_i", "A_ii", "B_i", "C_i"):
        for name, error in golden_errors(case, dtype, device).items():
            worst[f"{case} {name}"] = error
    name = max(worst, key=lambda name: worst[name] if worst[name] == worst[name] else np.inf)
    return within(f"{len(worst)} numbers; {name}: difference", worst[name], bound)


# ---- kernels against each other

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "head_dim": 64, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def random_teacher(dtype: torch.dtype) -> models.Llama:
    # A tenfold deviation: what a token attends to then decides what is likely after it.
    return models.Llama(convert.from_hf(SHAPE), dtype).init_weights(1, std=0.2).to(dtype)


def random_clone(dtype: torch.dtype) -> models.LowRankClone:
    student = models.StudentConfig(64, False, False, True, 1e-5)
    clone = models.LowRankClone(random_teacher(dtype), student, PAPER)
    models.init_clone(clone, 1, "random")
    for name, p in clone.trained().items():
        if "projection" in name:  # columns of about length 1, so that the student is as loud as the teacher
            p.data.mul_(1 / (0.02 * SHAPE["hidden_size"] ** 0.5))
    return clone.to(device)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def documents(kernel: str) -> str:
    """Documents in a row, kept apart by one attention, against each of them as a sequence of its own."""
    dtype = torch.float32
    layout_device = torch.device("cpu")  # there document_layout makes a mask, for PyTorch's plain attention
    if kernel != "mask":
        if device != "cuda":
            raise NotRun("no CUDA device")
        if kernel == "flash_attn" and models.flash_attn_varlen_func is None:
            raise NotRun("flash-attn is not installed")
        dtype = torch.bfloat16  # these kernels have no float32
        layout_device = torch.device("cuda")
    clone = random_clone(dtype)
    numbers = np.array([[0] * 50 + [1] * 1 + [2] * 77, [3] * 100 + [4] * 28])
    positions, mask = models.document_layout(numbers, layout_device)
    if kernel == "mask":
        mask = mask.to(device)
    layout = (positions.to(device), mask)
    tokens = torch.randint(SHAPE["vocab_size"], (2, 129), generator=torch.Generator().manual_seed(1))
    ids = tokens[:, :-1].to(device)
    labels = tokens[:, 1:].to(device)

    # One whole batch's loss is the sum of those of its documents, each a share of it.
    expected = torch.empty(ids.shape, device=device)
    for number in range(5):
        row = int(number > 2)
        columns = torch.from_numpy(np.flatnonzero(numbers[row] == number)).to(device)
        share = len(columns) / ids.numel()
        options = {"num_labels": ids.numel(), "share": share}
        losses = clone.loss(ids[row, columns][None], labels[row, columns][None], **options)
        losses["loss"].backward()
        expected[row, columns] = losses["token_lm"][0].float()
    expected_gradients = gradients(clone)
    with torch.no_grad():
        leaking = largest_difference(clone.loss(ids, labels)["token_lm"], expected)

    flash = None if kernel == "varlen_attn" else models.flash_attn_varlen_func
    with patch.object(models, "flash_attn_varlen_func", flash):
        losses = clone.loss(ids, labels, documents=layout)
        losses["loss"].backward()
    error = largest_difference(losses["token_lm"], expected)
    # float32 in another order; bfloat16 rounds to 2^-8 in each of some ten operations of two layers
    bound = 1e-4 if dtype == torch.float32 else 0.05
    text = within("losses", error, bound)
    text += "; " + within("gradients", difference_of_norms(gradients(clone), expected_gradients), bound)
    if leaking < 3 * bound:
        raise Failed(f"documents that see each other differ by {leaking:.2g} only: the check sees nothing")
    return f"{text} (documents that see each other: {leaking:.2g})"


def compiled(dtype: torch.dtype, bound: float) -> str:
    """A layer and a chunk's loss compiled as train.py does, against the same not compiled."""
    if device == "cpu" and dtype != torch.float32:
        raise NotRun("a CPU computes in float32")
    try:
        need_compiler(device)
    except ValueError as error:
        raise NotRun(error) from None
    clone = random_clone(dtype)
    tokens = torch.randint(SHAPE["vocab_size"], (2, 129), generator=torch.Generator().manual_seed(1))
    ids = tokens[:, :-1].to(device)
    labels = tokens[:, 1:].to(device)
    expected = clone.loss(ids, labels)["loss"]
    expected.backward()
    expected_gradients = gradients(clone)
    clone.run_block = torch.compile(clone.run_block)
    clone.chunk_loss = torch.compile(clone.chunk_loss)
    loss = clone.loss(ids, labels)["loss"]
    loss.backward()
    text = within("loss", largest_difference(loss, expected), bound)
    return f"{text}; " + within("gradients", difference_of_norms(gradients(clone), expected_gradients), bound)


# ---- runs of train.py


def launch(count: int, *arguments: str, script: Path | None = None) -> str:
    """What train.py, or another script, prints, alone or as `count` processes under torchrun; Failed says why
    one fails. In a session of its own, so that Ctrl-C here does not ask it to save a checkpoint."""
    command = [sys.executable]
    if count > 1:
        with socket.socket() as free:  # a port of its own
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--rdzv_backend=c10d", f"--nproc_per_node={count}"]
        command += [f"--rdzv_endpoint=localhost:{port}"]
    command += [str(script or TRAIN), f"--device={device}", *arguments]
    # A thread a process on a CPU, as torchrun has it: more of them than idle cores wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=TIME_LIMIT)[0]
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {TIME_LIMIT} s: {' '.join(command)}") from None
    finally:
        # torchrun ends its workers when it is asked to; after an exit nothing is left to be asked.
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {reason(output)}")
    return output


def reason(output: str) -> str:
    """The line of a failed run that says why: the first error, since torchrun's own report comes after it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error") or "Error: " in line]
    return (named or lines or ["no output"])[0 if named else -1]


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def prepare_runs(work: Path) -> None:
    if not (work / "teacher").exists():
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            sources = tuple(f"{ROOT}/{folder}*.py" for folder in ("", "tools/", "tests/", "config/"))
            write_shards(sources, work / "corpus", str(TOKENIZER), heldout_fraction=0.3)
        convert.save_model(random_teacher(torch.float32), work / "teacher", torch.float32, TOKENIZER)


def train(work: Path, name: str, count: int, *more: str) -> Path:
    """Six steps, evaluated and saved at 3 and 6, where they are not done yet; returns the run's directory."""
    prepare_runs(work)
    if not (work / name / "step_00000006").exists():
        launch(
            count, f"--teacher={work / 'teacher'}", f"--data={work / 'corpus'}", f"--out_dir={work / name}",
            "--student_hidden_size=64", "--seq_len=64", f"--global_batch_size={2 * processes}",
            "--micro_batch_size=1", "--max_steps=6", "--save_every=3", "--eval_every=3", "--eval_blocks=3",
            "--log_every=1", "--keep_last=2", "--sample_prompt=", "--warmup_ratio=0", "--learning_rate=1e-3",
            *more,
        )  # fmt: skip
    return work / name


FLOAT32 = ("--dtype=float32", "--compile=False")


def compare(run: Path, expected: Path) -> str:
    """Losses of training and evaluation, and the tensors at the end, of two runs in float32."""
    ours = metrics(run)
    theirs = metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "val_lm", "val_kl"):
            if name in b:
                value = float("nan") if a[name] is None else a[name]  # not finite: null
                errors.append(abs(value - b[name]) / abs(b[name]))
    weights, expected_weights = (
        load_file(out / "step_00000006/model.safetensors") for out in (run, expected)
    )
    # float32, summed in another order; AdamW's first steps enlarge that where a gradient is about 0
    text = within("losses", float(np.max(errors)), 1e-4)
    return f"{text}; " + within("tensors", difference_of_norms(weights, expected_weights), 1e-3)


def several_processes(work: Path, parallel: str) -> str:
    if processes == 1:
        raise NotRun("one device")
    alone = train(work, "alone", 1, *FLOAT32)
    run = train(work, parallel, processes, *FLOAT32, f"--parallel={parallel}")
    return f"{processes} processes: {compare(run, alone)}"


def resume(work: Path) -> str:
    """A run that goes on from step 3's checkpoint, written after an evaluation, against the whole run."""
    if processes == 1:
        source = train(work, "alone", 1, *FLOAT32)
    else:
        source = train(work, "fsdp", processes, *FLOAT32, "--parallel=fsdp")
    resumed = work / "resumed"
    shutil.copytree(source, resumed)
    shutil.rmtree(resumed / "step_00000006")
    train(work, "resumed", processes, *FLOAT32, "--resume=True")
    layouts = "1 process, then 1" if processes == 1 else f"fsdp x {processes}, then ddp x {processes}"
    return f"{layouts}: {compare(resumed, source)}"


def bfloat16_run(work: Path) -> str:
    """A run as on a GPU by default, in bfloat16 and compiled, against float32."""
    if device == "cpu":
        raise NotRun("a CPU computes in float32")
    alone = train(work, "alone", 1, *FLOAT32)
    run = train(work, "bfloat16", processes, "--dtype=bfloat16", "--compile=True", "--parallel=fsdp")
    pairs = zip(metrics(run), metrics(alone), strict=True)
    errors = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs if "loss" in b]
    # bfloat16 rounds to 2^-8, 0.4 %, which a mean over tokens evens out; a wrong gradient shows in six steps
    return f"{processes} processes: {within('losses', float(np.max(errors)), 0.02)}"


# ---- memory and speed, on a GPU

MEDIUM = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
BENCH = ROOT / "tools/bench.py"


def as_arguments(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def measured(count: int, options: dict) -> dict:
    """The line of JSON that tools/bench.py ends with."""
    output = launch(count, *as_arguments(options), script=BENCH)
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def memory() -> str:
    if device == "cpu":
        raise NotRun("tests/test_plan.py does it on a CPU")
    import plan  # here, since it needs parts of PyTorch that are not public and may change

    from configurator import read_options

    options = {name: default for name, (default, _, _) in read_options(TRAIN.read_text()).items()}
    options |= {"data": None, "teacher": MEDIUM, "student_hidden_size": 1024, "seq_len": 1024, "max_steps": 3}
    options |= {"global_batch_size": 4, "micro_batch_size": 4}
    plan.set_options(options)
    planned = plan.measure(1, "ddp", False)[0] / 2**30
    taken = measured(1, {name: value for name, value in options.items() if name != "device"})[
        "peak_memory_gib"
    ]
    # the plan does not see cuBLAS' workspaces and what a compiled layer keeps or makes again
    what = f"planned {planned:.2f} GiB, taken {taken:.2f} GiB: difference"
    return within(what, abs(planned / taken - 1), 0.15)


def speed_options(count: int) -> dict:
    """LRC-1.5B's step, three blocks a GPU: 42 GiB by tools/plan.py, or 27 by activation checkpointing."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if gib < 34:
        raise NotRun(f"the GPU has {gib:.0f} GiB, LRC-1.5B takes 27 and some reserve")
    return {
        "data": None, "teacher": str(ROOT / "config/teachers/Llama-3.2-3B-Instruct.json"),
        "student_hidden_size": 1536, "seq_len": 2048, "kl_temperature": 40.0, "clone_attn_out": "teacher",
        "micro_batch_size": 3, "global_batch_size": 3 * count, "max_steps": 12,
        "activation_checkpointing": gib < 48,
    }  # fmt: skip


def speed(count: int) -> str:
    if device == "cpu":
        raise NotRun("a CPU; python tools/bench.py config/bench_smollm2.py measures one")
    options = speed_options(count)
    numbers = measured(count, options)
    kept = ", activation checkpointing" if options["activation_checkpointing"] else ""
    return (
        f"{count} x 3 x 2048 tokens a step{kept}: {numbers['tokens_per_second']:,.0f} tokens/s, "
        f"{numbers['matmul_fraction']:.0%} of torch.mm's {numbers['matmul_gflops'] / 1000:,.0f} TFLOP/s, "
        f"{numbers['peak_memory_gib']:.1f} GiB"
    )


def speed_of_all() -> str:
    if processes == 1:
        raise NotRun("one device")
    return speed(processes)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    # Attention first, since its kernels are made of cutlass too.
    if any(word in name for word in ("flash", "fmha", "attention")):
        return "attention"
    if any(word in name for word in ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk")):
        return "matrix products"
    if "memcpy" in name or "memset" in name:
        return "copies"
    if name.startswith("triton"):
        return "compiled, not products"
    return "other kernels"


def where_time_goes() -> str:
    """Two steps at LRC-1.5B's shape under torch.profiler, in this process: seconds by kind of kernel."""
    if device == "cpu":
        raise NotRun("a CPU; python tools/profile_step.py config/bench_smollm2.py measures one")
    import bench

    import train as script

    vars(script).update(speed_options(1), load_teacher=bench.random_teacher)
    model = models.init_clone(script.build_model(torch.bfloat16), 1, "random").to(device)
    script.speed_up(model, torch.device(device))
    optimizer = script.make_optimizer(model)
    parameters = list(script.trained_parameters(model).values())
    blocks = bench.RandomTokens(model.config.vocab_size, script.seq_len)

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            script.backward_step(model, model, blocks, step, torch.device(device))
            script.take_step(optimizer, parameters)
        torch.cuda.synchronize()

    steps(0, 3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        steps(3, 2)
        elapsed = time.perf_counter() - start
    seconds = defaultdict(float)
    # A range that a user names, as the optimizer does, would count its kernels twice.
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[kind_of(event.key)] += event.self_device_time_total / 1e6
    if not seconds:
        raise NotRun("torch.profiler sees no kernels here (CUPTI)")
    seconds["no kernel"] = max(0.0, elapsed - sum(seconds.values()))
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return f"{elapsed / 2:.3f} s: " + ", ".join(f"{name} {value / elapsed:.0%}" for name, value in parts)


# ---- the table


def header() -> list[str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    names = [platform.processor() or platform.machine()]
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    commit = "no git repository"
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or commit
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return [
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, flash-attn {version('flash-attn')}",
        f"{device}: {counted}; {processes} processes; {os.cpu_count()} cores",
        f"Python {platform.python_version()}, {platform.platform()}; commit {commit}",
    ]


def main() -> int:
    """Prints the table; returns 1 where a line says fail."""
    global device, processes
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees none; give --device=cpu")
    # LOCAL_WORLD_SIZE is what torchrun started on this node.
    several = torch.cuda.device_count() if device == "cuda" else 2
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", several))
    if device == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(f"processes is {processes}; there are {torch.cuda.device_count()} GPUs")
    # The runs below are torchrun's of their own, and this process is one alone.
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in list(os.environ):
        if name in torchrun or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_")):
            del os.environ[name]

    work = Path(tempfile.mkdtemp(prefix="lrc_check_"))
    checks = [
        # float32 in another order: 5e-6 on the CPU that was measured, the most in the KL, a small difference
        ("reference vectors, float32", reference_vectors, torch.float32, 1e-5 if device == "cpu" else 1e-4),
        # 0.026 on that CPU, in a norm's gradient, of which bfloat16 rounds every token's part
        ("reference vectors, bfloat16", reference_vectors, torch.bfloat16, 0.08),
        ("documents, by a mask", documents, "mask"),
        ("documents, varlen_attn", documents, "varlen_attn"),
        ("documents, flash_attn", documents, "flash_attn"),
        ("compiled, float32", compiled, torch.float32, 1e-4),
        # a fused kernel rounds once where eager does after each operation
        ("compiled, bfloat16", compiled, torch.bfloat16, 0.05),
        ("ddp against one process", several_processes, work, "ddp"),
        ("fsdp against one process", several_processes, work, "fsdp"),
        ("resume after an evaluation", resume, work),
        ("bfloat16 run against float32", bfloat16_run, work),
        ("memory against tools/plan.py", memory),
        ("speed at LRC-1.5B's shape", speed, 1),
        ("speed, all processes", speed_of_all),
        ("where a step's time goes", where_time_goes),
    ]
    print("\n".join(header()), end="\n\n", flush=True)
    counts = defaultdict(int)
    start = time.perf_counter()
    try:
        for name, function, *arguments in checks:
            if only and not name.startswith(only):
                continue
            result, text = "pass", ""
            began = time.perf_counter()
            try:
                text = function(*arguments)
            except NotRun as why:
                result, text = "not run", str(why)
            except Failed as why:
                result, text = "fail", str(why)
            except Exception as error:  # whatever went wrong belongs into the table, and the others go on
                lines = str(error).strip().splitlines() or [""]
                result, text = "fail", f"{type(error).__name__}: {lines[0]}"
            counts[result] += 1
            print(f"{name:29} {result:8} {time.perf_counter() - began:5.0f} s  {text}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()  # for the runs, which are processes of their own
    finally:
        shutil.rmtree(work, ignore_errors=True)
    total = ", ".join(f"{counts[result]} {result}" for result in ("pass", "fail", "not run"))
    print(f"\n{total}, in {time.perf_counter() - start:.0f} s")
    return int(counts["fail"] > 0)


if __name__ == "__main__":
    # Under torchrun rank 0 alone checks, and starts every run itself: where one fails, the others go on.
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        raise SystemExit(0)
    try:
        code = main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(code)
