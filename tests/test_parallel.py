"""Several processes and faults: torchrun over gloo on a random two-layer teacher."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, clone_options, metrics
from safetensors.torch import load_file
from test_scripts import plain_options

import model as models
import train as train_script

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d")
STEADY = ("--lr_schedule=constant", "--warmup_ratio=0", "--log_every=1", "--eval_every=0", "--keep_last=9")


def start(processes, *arguments, torchrun=(), script="train.py", limit=None):
    """The script as a process, under torchrun where there are several; limit: bytes that a file may have."""
    launcher = (sys.executable,)
    if processes > 1:
        with socket.socket() as free:  # a port of its own
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launcher = (
            *TORCHRUN,
            f"--rdzv_endpoint=localhost:{port}",
            f"--nproc_per_node={processes}",
            *torchrun,
        )

    def limited():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [*launcher, script, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, text=True, preexec_fn=limited,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def train(processes, *arguments, code=0, **options):
    process = start(processes, *arguments, **options)
    output = process.communicate(timeout=200)[0]
    assert (process.returncode == 0) == (code == 0), output
    return output


def when_logged(process, out_dir, steps):
    """Waits until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = out_dir / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"{out_dir} did not reach step {steps}")


def ranks_of(process):
    """{rank: pid} of the processes that torchrun started."""
    found = {}
    for directory in os.listdir("/proc"):
        try:
            with open(f"/proc/{directory}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            if directory.isdigit() and os.getsid(int(directory)) and int(directory) != process.pid:
                with open(f"/proc/{directory}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
                if parent == process.pid and ranks:
                    found[ranks[0]] = int(directory)
        except (OSError, ValueError):
            continue
    return found


def last_weights(out_dir):
    return load_file(models.checkpoints(out_dir)[-1] / "model.safetensors")


def assert_same_run(out_dir, expected):
    """Losses within 1e-4, final trained tensors within 1e-3: float32 in another order, over 20 steps."""
    ours, theirs = ([line for line in metrics(out) if "loss" in line] for out in (out_dir, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
        assert a["clone"] == pytest.approx(b["clone"], rel=1e-4), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]  # AdamW hides its scale
    for name, weight in last_weights(expected).items():
        assert ((last_weights(out_dir)[name] - weight).norm() / weight.norm()).item() < 1e-3, name


@pytest.fixture(scope="module")
def alone(work, teacher, corpus):
    """20 undisturbed steps of one process, saved at 10 and 20, evaluated at 20."""
    train(1, *clone_options(teacher, corpus, work / "alone", *STEADY, "--eval_every=20"))
    return work / "alone"


@pytest.mark.parametrize(
    ("name", "processes", "options"),
    [
        ("ddp", 2, ("--micro_batch_size=1",)),  # two micro-batches on each, three blocks to evaluate
        ("fsdp", 2, ("--micro_batch_size=1", "--parallel=fsdp", "--activation_checkpointing=True")),
        ("fsdp_at_once", 2, ("--parallel=fsdp",)),
        ("fsdp_4", 4, ("--micro_batch_size=1", "--parallel=fsdp")),
        ("hsdp", 4, ("--micro_batch_size=1", "--parallel=fsdp", "--replicas=2")),
    ],
)
def test_any_number_of_processes_trains_the_same(name, processes, options, work, teacher, corpus, alone):
    out = work / name
    output = train(processes, *clone_options(teacher, corpus, out, *STEADY, "--eval_every=20", *options))
    assert_same_run(out, alone)
    for name, value in metrics(alone)[-1].items():
        if name.startswith("val_") and name != "val_terms_by_layer":
            assert metrics(out)[-1][name] == pytest.approx(value, rel=1e-3), name
    assert output.count("options that differ") == 1  # one process speaks
    clone = models.load_clone(models.checkpoints(out)[-1])  # whole, without a process group
    assert clone.logits(torch.ones((1, 4), dtype=torch.long)).isfinite().all()


def test_an_asynchronous_save_writes_the_same(work, teacher, corpus, alone):
    train(1, *clone_options(teacher, corpus, work / "async", *STEADY, "--eval_every=20", "--async_save=True"))
    for checkpoint in models.checkpoints(alone):
        for file in checkpoint.rglob("*.safetensors"):
            written, expected = load_file(work / "async" / file.relative_to(alone)), load_file(file)
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[name], expected[name]) for name in expected), file
    # the shards of one written by two processes while they trained
    out = work / "async_fsdp"
    train(2, *clone_options(teacher, corpus, out, *STEADY, "--parallel=fsdp", "--async_save=True"))
    shutil.rmtree(models.checkpoints(out)[-1])
    output = train(1, *clone_options(teacher, corpus, out, *STEADY, "--resume=True"))
    assert "resumed from" in output and "step_00000010" in output
    assert_same_run(out, alone)


def test_an_asynchronous_save_takes_copies(monkeypatch, tmp_path):
    for name, value in (("async_save", True), ("out_dir", str(tmp_path)), ("options", {})):
        monkeypatch.setattr(train_script, name, value, raising=False)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    tensors, moments, *_ = train_script.prepare_save(layer, optimizer, 1)
    expected = [tensor.clone() for tensor in (*tensors.values(), *moments.values())]
    optimizer.step()  # training goes on
    assert all(map(torch.equal, (*tensors.values(), *moments.values()), expected))
    assert not torch.equal(layer.weight, tensors["weight"])


def test_plain_models_shard(work, teacher, corpus):
    outs, steady = (work / "plain_alone", work / "plain_fsdp"), (*STEADY, "--max_grad_norm=0.5")
    train(1, *plain_options(teacher, corpus, outs[0], *steady))
    train(2, *plain_options(teacher, corpus, outs[1], *steady, "--micro_batch_size=1", "--parallel=fsdp"))
    for a, b in zip(*map(metrics, outs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for name, weight in last_weights(outs[0]).items():
        torch.testing.assert_close(last_weights(outs[1])[name], weight, rtol=1e-3, atol=1e-5)


def test_resume_on_other_processes(work, teacher, corpus, alone):
    """Ten steps of one process, five of two with FSDP, five of two with DDP."""
    out = work / "elastic"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "step_00000020")
    options = (*clone_options(teacher, corpus, out, *STEADY), "--resume=True")
    train(2, *options, "--parallel=fsdp", "--max_steps=15")
    output = train(2, *options, "--micro_batch_size=1")
    assert "resumed from" in output and "step_00000015" in output
    assert_same_run(out, alone)
    assert "nothing to do" in train(1, *options)


def test_a_signal_to_one_rank_saves_and_ends(work, teacher, corpus, alone):
    out = work / "stopped"
    options = clone_options(teacher, corpus, out, *STEADY, "--micro_batch_size=2")
    process = start(2, *options, "--max_steps=100000", "--save_every=100000")
    when_logged(process, out, 4)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    (saved,) = models.checkpoints(out)
    assert saved.name == f"step_{len(metrics(out)):08d}" and "go on with --resume=True" in output


def test_torchrun_restarts_from_the_last_checkpoint(work, teacher, corpus, alone):
    out = work / "restarted"
    options = clone_options(teacher, corpus, out, *STEADY, "--micro_batch_size=1", "--save_every=2")
    process = start(2, *options, "--max_steps=20", torchrun=("--max_restarts=1",))
    when_logged(process, out, 6)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed from" in output, output
    assert_same_run(out, alone)


def test_full_disk_keeps_the_older_checkpoint(work, teacher, corpus, alone):
    """A limit on a file's size stands for the disk: AdamW's state does not fit, the weights do."""
    out = work / "full"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "step_00000020")
    size = (out / "step_00000010/model.safetensors").stat().st_size
    options = (*clone_options(teacher, corpus, out, *STEADY), "--resume=True")
    output = train(1, *options, code=1, limit=int(1.5 * size))
    assert "error: " in output and "could not be written" in output and "Traceback" not in output
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["step_00000010"]
    train(1, *options)
    assert all(torch.equal(w, last_weights(alone)[name]) for name, w in last_weights(out).items())


@pytest.mark.parametrize("file", ["model.safetensors", "trainer/state.json", "trainer/*.safetensors"])
def test_an_unreadable_checkpoint_is_passed_over(file, work, teacher, corpus, alone):
    out = work / f"damaged_{file.count('t')}"
    shutil.copytree(alone, out)
    (path,) = (out / "step_00000020").glob(file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    log = out / "metrics.jsonl"
    log.write_text(log.read_text()[:-9])  # as a kill can leave it
    output = train(1, *clone_options(teacher, corpus, out, *STEADY), "--resume=True")
    assert "passing over" in output and "step_00000020" in output and "Traceback" not in output
    assert [line["step"] for line in metrics(out)] == list(range(1, 21))
    assert all(torch.equal(w, last_weights(alone)[name]) for name, w in last_weights(out).items())


FAULTY = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import model
straight, calls, bad = model.LowRankClone.loss, [0], range(*map(int, sys.argv.pop(1).split(",")))
def loss(self, *arguments, **options):
    losses, calls[0] = straight(self, *arguments, **options), calls[0] + 1
    if os.environ.get("RANK") == "1" and calls[0] in bad:
        losses["loss"] = losses["loss"] * float("nan")
    return losses
model.LowRankClone.loss = loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_no_rank_takes_a_step_that_is_not_finite_on_one(work, teacher, corpus):
    """The second process has a loss of NaN in its 4th and 5th call (a call a step), or from the 4th on."""
    (work / "faulty.py").write_text(FAULTY)
    out = work / "bad_some"
    options = (*STEADY, "--micro_batch_size=2", "--max_bad_steps=3", "--save_every=3")
    train(2, "4,6", *clone_options(teacher, corpus, out, *options), script=str(work / "faulty.py"))
    lines = metrics(out)
    assert [line["bad_steps"] for line in lines[:7]] == [0, 0, 0, 1, 2, 2, 2]
    assert lines[3]["loss"] is None and lines[-1]["loss"] < lines[0]["loss"]
    saved = {path.name: load_file(path / "model.safetensors") for path in models.checkpoints(out)}
    assert all(weight.isfinite().all() for weight in saved["step_00000006"].values())

    out = work / "bad_all"
    arguments = clone_options(teacher, corpus, out, *options)
    output = train(2, "4,99", *arguments, code=1, script=str(work / "faulty.py"))
    assert "not finite in 3 steps in a row up to step 6" in output
    (kept,) = models.checkpoints(out)
    same = load_file(kept / "model.safetensors")
    assert kept.name == "step_00000003"
    assert all(torch.equal(weight, saved["step_00000003"][name]) for name, weight in same.items())
