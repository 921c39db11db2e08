"""tools/plan.py: its memory against that of runs of train.py, and its page for a model that is not here."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter

import plan
import pytest
import torch
from conftest import ROOT, run, succeed

import convert
import train
from configurator import configure, read_options
from model import Llama

SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def options(micro_batch_size, seq_len, **more):
    return {
        "teacher": SHAPE, "student_hidden_size": 256, "data": None, "max_steps": 1, "seq_len": seq_len,
        "micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size, "device": "cpu", **more,
    }  # fmt: skip


@pytest.fixture
def measure(monkeypatch):
    """plan.measure under given options of train.py, GiB; those of other tests are left as they are."""
    defaults = {
        name: default for name, (default, _, _) in read_options((ROOT / "train.py").read_text()).items()
    }
    for name in (*defaults, "WORLD_SIZE", "load_teacher"):
        monkeypatch.setattr(train, name, getattr(train, name))

    def measured(given, *arguments):
        plan.set_options(defaults | given)
        return plan.measure(*arguments, gpu=False)[0] / 2**30

    return measured


def benchmark(given):
    """The lines that tools/bench.py prints by these options."""
    command = [sys.executable, "tools/bench.py", *(f"--{name}={value}" for name, value in given.items())]
    # freed memory goes back to the system at once, as it does on a GPU's free list: what is resident is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_memory_is_what_a_run_takes(measure):
    """The difference of a large and a small step: the interpreter is in both. fsdp on a mesh of one."""
    steps = {"ddp": options(3, 256), "fsdp": options(3, 256, parallel="fsdp"), "small": options(1, 16)}
    planned = {name: measure(step, 1, step.get("parallel", "ddp"), "none") for name, step in steps.items()}
    printed = {name: benchmark(step) for name, step in steps.items()}
    found = {name: json.loads(lines[-1]) for name, lines in printed.items()}
    for name in ("ddp", "fsdp"):
        taken = found[name]["peak_memory_gib"] - found["small"]["peak_memory_gib"]
        assert taken > 0.15
        assert planned[name] - planned["small"] == pytest.approx(taken, rel=0.15)

    # The lines above it have the FLOPs by part, of which its numbers follow.
    of_parts = [line for line in printed["ddp"] if line.endswith("GFLOP a step")]
    flops = {line[2:22].strip(): float(line.split()[-4]) for line in of_parts}
    everything = flops.pop("all")
    assert set(flops) == {"teacher", "compose", "student", "clone losses", "head", "backward of the rest"}
    assert everything == pytest.approx(sum(flops.values()), abs=0.3)  # printed to a tenth
    ddp = found["ddp"]
    assert ddp["tokens_per_second"] * ddp["seconds_per_step"] == pytest.approx(3 * 256, rel=1e-3)
    rate = everything / ddp["seconds_per_step"]
    assert ddp["matmul_fraction"] == pytest.approx(rate / ddp["matmul_gflops"], rel=0.05)
    # The products of this step take longer than anything else, and its optimizer some time too.
    parts = ddp["ms"]
    assert max(parts, key=parts.get) == "matrix products" and parts["optimizer, clipping"] > 0
    assert parts["no operator: Python, autograd"] > 0


def test_shards_and_checkpointing_take_less(measure):
    """Weights and moments of what trains, and the gradients, over four; the teacher is whole on each."""
    given = options(2, 512, global_batch_size=8, teacher=SHAPE | {"num_hidden_layers": 2})
    pairs = [("ddp", "none"), ("ddp", "student"), ("ddp", "both"), ("fsdp", "none"), ("fsdp", "both")]
    peak = {pair: measure(given, 4, *pair) for pair in pairs}
    assert peak["ddp", "both"] < peak["ddp", "student"] < peak["ddp", "none"]
    assert peak["fsdp", "both"] < peak["fsdp", "none"] < peak["ddp", "none"]
    model = train.build_model(torch.float32)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) / 2**30
    frozen = 4 * sum(p.numel() for p in model.teacher.parameters()) / 2**30
    assert frozen + trained < peak["fsdp", "none"] < peak["ddp", "none"] - trained


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_muon_sends(measure, parallel):
    """Updates in bfloat16: all gathered under ddp; under fsdp exchanged with the shards, there and back."""
    given = options(1, 16, teacher=SHAPE | {"num_hidden_layers": 2}, global_batch_size=4)
    sent = {}
    for optimizer in ("adamw", "muon"):
        measure(given | {"optimizer": optimizer}, 4, parallel, "none")
        sent[optimizer] = plan.measure(4, parallel, "none", gpu=False)[1]
    shapes = Counter(
        p.shape for name, p in train.build_model(torch.float32).named_parameters()
        if p.requires_grad and train.is_for_muon(name, p)
    )  # fmt: skip
    # A ring of four sends 3/4 of a tensor: twice of the gradients, or of gathers for forward and backward and
    # of shards of gradients; all float32 on a CPU.
    trained = sum(p.numel() for p in train.build_model(torch.float32).parameters() if p.requires_grad)
    assert sent["adamw"] == (2 if parallel == "ddp" else 3) * 3 / 4 * 4 * trained
    # The matrices of a shape are filled up to a multiple of the processes.
    padded = sum(2 * -(-count // 4) * 4 * shape.numel() for shape, count in shapes.items())
    expected = padded * 3 / 4 * (1 if parallel == "ddp" else 2 / 4)
    assert sent["muon"] - sent["adamw"] == pytest.approx(expected)


def test_muon_keeps_one_moment_and_adds_arithmetic(measure, monkeypatch):
    given = options(1, 64) | {"teacher": SHAPE | {"num_hidden_layers": 1}}
    with_adamw = measure(given, 1, "ddp", "none")
    with_muon = measure(given | {"optimizer": "muon"}, 1, "ddp", "none")
    model = train.build_model(torch.float32)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    moment = 4 * sum(p.numel() for p in matrices) / 2**30
    assert with_adamw - with_muon == pytest.approx(moment, rel=0.05)
    # Five rounds of three products, of which each matrix has its own on one process or another.
    rounds = 0
    for name, p in model.trained.named_parameters():
        if train.is_for_muon(name, p):
            m, n = sorted(p.shape)
            rounds += 5 * (4 * m * m * n + 2 * m**3)
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    monkeypatch.setattr(train, "global_batch_size", 3)
    assert plan.count_flops()["Muon"] == rounds > 0


def test_days_are_by_all_gpus(monkeypatch, capsys):
    """20,736,000 steps of 10^15 FLOP and 1,000 tokens, on four GPUs that do 200 TFLOP/s each."""
    for name, value in {"gpus": 4, "peak_tflops": 500.0, "mfu": (0.4,)}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(train, "max_steps", 20_736_000)
    plan.print_days(1000, {"none": 1e15})
    *_, row = capsys.readouterr().out.splitlines()
    # 10^15 / (4 · 2·10^14) = 1.25 s a step: 800 tokens/s, 25,920,000 s
    assert row.split() == ["40%", "none", "800", "300.0", "28,800"]


def test_page_of_a_model_that_is_not_here():
    few = ("--gpus=1", "--global_batch_size=3", "--memory_gib=45")
    output = succeed("tools/plan.py", "config/lrc_1_5b.py", *few).stdout
    for number in ("3,212,749,824", "929,650,176", "1,606,374,912", "208,000 steps"):
        assert number in output
    rows = re.findall(r"^  ddp +(\w+) +[\d.]+ +[\d.]+  (yes|no)$", output, re.MULTILINE)
    assert ("none", "no") in rows and ("student", "yes") in rows  # of 45 GiB


@pytest.fixture
def planned(measure, monkeypatch, capsys):
    """What plan.py prints, in this process."""

    def run(*arguments, **own):
        for name, value in own.items():
            monkeypatch.setattr(plan, name, value)
        given = configure({"__file__": ROOT / "train.py"}, [*arguments])
        monkeypatch.setattr(plan, "options", given, raising=False)
        plan.main()
        return capsys.readouterr().out

    return run


def test_shapes_of_a_size(planned):
    """Every row has the size that was asked for, by the parameters of a model of that shape."""
    output = planned("config/lrc_1_7b.py", target_params=1.2e9)
    rows = [line.split() for line in output.splitlines() if line.startswith("    ")][-6:]
    teacher = convert.from_hf(convert.read_json(ROOT / "config/teachers/Qwen2.5-3B-Instruct.json"))
    for width, layers, neurons, size in rows:
        cut = {"hidden_size": int(width), "num_hidden_layers": int(layers), "intermediate_size": int(neurons)}
        with torch.device("meta"):
            student = Llama(dataclasses.replace(teacher, **cut))
        count = sum(p.numel() for p in student.parameters())
        assert count == int(size.replace(",", "")) and abs(count / 1.2e9 - 1) < 0.1


def test_mistakes_are_told_in_one_line(planned, monkeypatch):
    with pytest.raises(ValueError, match="target_params is -1; it is a number above 0"):
        planned(target_params=-1)
    with pytest.raises(ValueError, match="models/none is not a directory"):
        planned("--teacher=models/none")
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        planned("--seq_len=0", target_params=None)
    for name, value in (("mfu", (0.4, 0)), ("mfu", ("a",)), ("mfu", ()), ("peak_tflops", 0.0), ("gpus", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(plan, name, value)
            with pytest.raises(ValueError, match=rf"{name} is .*; it must be above 0"):
                planned()
    done = run("tools/plan.py", "--gpu=7")
    assert done.returncode == 2 and 'unknown option "gpu"' in done.stderr
    assert len(done.stderr.splitlines()) == 1
