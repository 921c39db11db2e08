"""Several processes and faults: torchrun over gloo on a random two-layer teacher."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clone_options, launch, metrics
from safetensors.torch import load_file
from test_scripts import half_way, last, plain_options
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as load_distributed

import convert
import train as train_script

STEADY = ("--lr_schedule=constant", "--warmup_ratio=0", "--log_every=1", "--eval_every=0", "--keep_last=9")


def train(processes, *arguments, code=0, script="train.py", meanwhile=lambda ranks: None):
    """The script by so many processes, as torchrun sets them up; what all of them printed."""
    environment = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(launch(script, *arguments, outputs=(output, output), **environment, **own))
        meanwhile(ranks)
        for process in ranks:
            process.join(200)
            if process.exitcode != 0:  # torchrun too ends the others
                break
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        text = output.read_text()
    assert (codes == [0] * processes) == (code == 0), text
    return text


def patched(file, lines):
    """A script that is train.py behind these lines."""
    begin = "import os, runpy, sys\nsys.path.insert(0, os.getcwd())\n"
    end = "sys.argv[0] = 'train.py'\nrunpy.run_path('train.py', run_name='__main__')\n"
    file.write_text(f"{begin}{lines}\n{end}")
    return str(file)


FAULT = """
import signal, model
straight, calls = model.Student.loss, [0]
def loss(self, *arguments, **options):
    losses, calls[0] = straight(self, *arguments, **options), calls[0] + 1
    if os.environ.get("RANK") == "1" and {when}:
        {fault}
    return losses
model.Student.loss = loss
"""


def last_weights(out_dir):
    return load_file(last(out_dir) / "model.safetensors")


def assert_same_run(out_dir, expected):
    """Losses within 1e-4, final trained tensors within 1e-3: float32 in another order, over 20 steps."""
    ours, theirs = ([line for line in metrics(out) if "loss" in line] for out in (out_dir, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
        assert a["clone"] == pytest.approx(b["clone"], rel=1e-4), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]  # AdamW hides its scale
    for name, weight in last_weights(expected).items():
        difference = (last_weights(out_dir)[name] - weight).double().norm()
        assert (difference / weight.double().norm()).item() < 1e-3, name


@pytest.fixture(scope="module")
def options(teacher, corpus):
    """train.py's, of a clone whose learning rate stays, for a run in a directory."""
    return lambda out, *more: clone_options(teacher, corpus, out, *STEADY, *more)


@pytest.fixture(scope="module")
def alone(work, options):
    """20 undisturbed steps of one process, saved at 10 and 20, evaluated at 20."""
    train(1, *options(work / "alone", "--eval_every=20"))
    return work / "alone"


@pytest.mark.parametrize(
    ("name", "processes", "more"),
    [
        ("ddp", 2, ("--micro_batch_size=1",)),  # two micro-batches on each, three blocks to evaluate
        ("fsdp", 2, ("--micro_batch_size=1", "--parallel=fsdp", "--activation_checkpointing=student")),
        ("fsdp_at_once", 2, ("--parallel=fsdp",)),
        ("fsdp_4", 4, ("--micro_batch_size=1", "--parallel=fsdp")),
        ("hsdp", 4, ("--micro_batch_size=1", "--parallel=fsdp", "--replicas=2")),
    ],
)
def test_any_number_of_processes_trains_the_same(name, processes, more, work, options, alone):
    out = work / name
    output = train(processes, *options(out, "--eval_every=20", *more))
    assert_same_run(out, alone)
    for name, value in metrics(alone)[-1].items():
        if name.startswith("val_") and name != "val_terms_by_layer":
            assert metrics(out)[-1][name] == pytest.approx(value, rel=1e-3), name
    assert output.count("options that differ") == 1  # one process speaks
    clone = convert.load_clone(last(out))  # whole, without a process group
    assert clone(torch.ones((1, 4), dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(("kind", "optimizer"), [("projections", "adamw"), ("weights", "muon")])
def test_free_weights_train_the_same_on_two_processes(kind, optimizer, work, options):
    cut = (
        "--student_layers=(0,)", "--student_intermediate_size=64", f"--train={kind}", "--max_steps=8",
        "--learning_rate=1e-3", "--save_every=8", "--eval_every=8", f"--optimizer={optimizer}",
    )  # fmt: skip
    one = work / f"{kind}_alone"
    train(1, *options(one, *cut))
    for name in ("ddp", "fsdp"):
        out = work / f"{kind}_{name}"
        train(2, *options(out, *cut, "--micro_batch_size=1", f"--parallel={name}"))
        assert_same_run(out, one)


def checkpoint_tensors(path):
    """{name: tensor} of a checkpoint: what is trained, and AdamW's moments, whole."""
    tensors = load_file(path / "model.safetensors")
    reader = HuggingFaceStorageReader(str(path / "trainer"))
    moments = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    load_distributed(moments, storage_reader=reader, no_dist=True)
    return tensors | moments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["clone", "plain"])
def test_a_shard_saved_after_an_evaluation_is_whole(kind, dtype, work, teacher, corpus):
    """fsdp's checkpoint against ddp's, after an evaluation; and the run resumed from it against one that was
    not stopped. In bfloat16 the two sum rounded gradients in another order."""
    options_of = clone_options if kind == "clone" else plain_options
    shared = (
        *STEADY, "--micro_batch_size=1", f"--dtype={dtype}", "--max_steps=6", "--save_every=3",
        "--eval_every=3", "--learning_rate=1e-3",
    )  # fmt: skip
    outs = {parallel: work / f"evaluated_{kind}_{dtype}_{parallel}" for parallel in ("ddp", "fsdp")}
    for parallel, out in outs.items():
        train(2, *options_of(teacher, corpus, out, *shared, f"--parallel={parallel}"))
    ours, theirs = (checkpoint_tensors(out / "step_00000003") for out in (outs["fsdp"], outs["ddp"]))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    limit = 1e-4 if dtype == "float32" else 0.05
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - tensor).norm() <= limit * tensor.norm(), name
        assert tensor.norm() > 0, name  # moments too: every tensor has had a gradient
        if ".exp_avg" not in name:  # not rounded to what is computed in
            assert not torch.equal(ours[name], ours[name].bfloat16().float()), name

    resumed = half_way(outs["fsdp"], work / f"resumed_{kind}_{dtype}")
    train(2, *options_of(teacher, corpus, resumed, *shared, "--parallel=fsdp"), "--resume=True")
    lines, expected = (
        [[line.get(name) for name in ("step", "loss", "grad_norm", "val_lm")] for line in metrics(out)]
        for out in (resumed, outs["fsdp"])
    )
    assert lines == expected


def test_resume_on_other_processes(work, options, alone):
    """Ten steps of one process, five of two with FSDP, five of two with DDP."""
    out = half_way(alone, work / "elastic")
    resume = options(out, "--resume=True")
    train(2, *resume, "--parallel=fsdp", "--max_steps=15")
    output = train(2, *resume, "--micro_batch_size=1")
    assert "resumed from" in output and "step_00000015" in output
    assert_same_run(out, alone)
    assert "nothing to do" in train(1, *resume)


def test_a_signal_to_one_rank_saves_and_ends(work, options):
    out = work / "stopped"

    def signal_one(ranks):
        log = out / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 4:
            assert ranks[0].is_alive()
            time.sleep(0.02)
        os.kill(ranks[1].pid, signal.SIGTERM)

    output = train(2, *options(out, "--max_steps=100000", "--save_every=100000"), meanwhile=signal_one)
    (saved,) = convert.checkpoints(out)
    assert saved.name == f"step_{len(metrics(out)):08d}" and "go on with --resume=True" in output


def test_torchrun_restarts_from_the_last_checkpoint(work, options, alone):
    """One of the two kills itself in its 7th step; it has two passes in each."""
    out = work / "restarted"
    once = "calls[0] == 13 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    fault = FAULT.format(when=once, fault="os.kill(os.getpid(), signal.SIGKILL)")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1")
    command = [sys.executable, *torchrun, patched(work / "killed.py", fault)]
    command += options(out, "--micro_batch_size=1", "--save_every=2")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "step_00000006, at a learning rate" in done.stdout, done.stderr
    assert_same_run(out, alone)


def test_torchrun_does_not_go_on_in_a_run_of_another_call(tmp_path, options, alone):
    """Its second try is told what the first was."""
    out = Path(shutil.copytree(alone, tmp_path / "run"))
    log = (out / "metrics.jsonl").read_text()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1")
    command = [sys.executable, *torchrun, "train.py", *options(out, "--max_steps=30")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.count(f"error: {out} holds a run: go on with --resume=True") == 2
    assert (out / "metrics.jsonl").read_text() == log


def test_an_optimizers_state_that_lacks_a_part_is_refused(tmp_path, work, options):
    """A shard of one process; then all of it. Not the weights alone make a checkpoint."""
    out = tmp_path / "run"
    fsdp = options(out, "--parallel=fsdp", "--save_every=1", "--max_steps=1")
    train(2, *fsdp)
    one, other = sorted((last(out) / "trainer").glob("*.safetensors"))
    for file in (one, other):
        file.unlink()
        told = f"error: {last(out)}/trainer lacks a part of the optimizer's state"
        assert told in train(1, *fsdp, "--resume=True", "--max_steps=2", code=2)


def test_full_disk_keeps_the_older_checkpoint(work, options, alone):
    """A limit on a file's size stands for the disk: AdamW's state does not fit, the weights do."""
    out = half_way(alone, work / "full")
    limit = int(1.5 * (last(out) / "model.safetensors").stat().st_size)
    full = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    resume = options(out, "--resume=True")
    output = train(1, *resume, code=2, script=patched(work / "full.py", full))
    assert "error: " in output and "could not be written" in output and "Traceback" not in output
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["step_00000010"]
    train(1, *resume)
    assert all(torch.equal(w, last_weights(alone)[name]) for name, w in last_weights(out).items())


@pytest.mark.parametrize("file", ["model.safetensors", "trainer/state.json", "trainer/*.safetensors"])
def test_an_unreadable_checkpoint_is_passed_over(file, tmp_path, options, alone):
    out = Path(shutil.copytree(alone, tmp_path / "run"))
    (path,) = (out / "step_00000020").glob(file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    log = out / "metrics.jsonl"
    log.write_text(log.read_text()[:-9])  # as a kill can leave it
    output = train(1, *options(out, "--resume=True"))
    assert "passing over" in output and "step_00000020" in output and "Traceback" not in output
    assert [line["step"] for line in metrics(out)] == list(range(1, 21))
    assert all(torch.equal(w, last_weights(alone)[name]) for name, w in last_weights(out).items())


def test_a_run_without_a_readable_checkpoint_is_left_as_it_is(tmp_path, options, alone):
    out = Path(shutil.copytree(alone, tmp_path / "run"))
    for path in out.glob("step_*"):
        (path / "config.json").unlink()
    before = sorted(out.rglob("*")), (out / "metrics.jsonl").read_text()
    output = train(1, *options(out, "--resume=True"), code=1)
    assert f"error: no checkpoint of {out} can be read" in output
    assert (sorted(out.rglob("*")), (out / "metrics.jsonl").read_text()) == before


def test_saves_outlive_a_later_checkpoint_that_is_damaged(tmp_path, options, alone):
    out = Path(shutil.copytree(alone, tmp_path / "run"))
    (out / "step_00000020/config.json").unlink()
    train(1, *options(out, "--resume=True", "--save_every=5", "--keep_last=1", "--max_steps=15"))
    assert [path.name for path in sorted(out.glob("step_*"))] == ["step_00000015", "step_00000020"]


MUON = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
import train

train.parallel, train.replicas, train.device, train.dtype = sys.argv[1], int(sys.argv[2]), "cpu", "float32"
train.MATRICES_AT_ONCE = 2  # several stacks of each shape
device = train.start_device()
torch.manual_seed(1)
# rows that three processes, or four, do not divide, and fewer rows than processes
shapes = [(7, 5)] * 9 + [(5, 7)] * 4 + [(8, 8)] * 2 + [(2, 6)] * 3
whole = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
gradients = [[torch.randn_like(p) for p in whole] for _ in range(2)]

model = torch.nn.Module()
model.layers = torch.nn.ModuleList()
model.matrices = torch.nn.ParameterList(p.detach().clone() for p in whole)
if train.parallel == "fsdp":
    train.distribute(model, device)
ours = list(model.parameters())
groups = [{"params": ours, "weight_decay": 0.1, "rate": 1.0, "lr": 0.02}]
muon = train.Muon(groups, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True), 0.95)
expected = torch.optim.Muon(whole, 0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
for step in (0, 1, 2):
    muon.found_inf = torch.tensor(float(step == 1))
    for p, q, gradient in zip(ours, whole, gradients[step // 2], strict=True):
        if train.parallel == "fsdp":
            shards = torch.distributed.tensor.distribute_tensor(gradient, p.device_mesh, p.placements)
        q.grad, p.grad = gradient, shards if train.parallel == "fsdp" else gradient.clone()
        if step == 1:
            p.grad = p.grad * float("nan")
    muon.step()
    if step != 1:
        expected.step()
# every process asks for every matrix, and has the rest to itself
same = [torch.equal(train.unshard(p.detach()), q) for p, q in zip(ours, whole, strict=True)]
assert all(same), (train.RANK, same)
train.barrier()
train.print0("the same")
os._exit(0)
"""


@pytest.mark.parametrize(
    ("parallel", "processes", "replicas"), [("ddp", 3, 1), ("fsdp", 3, 1), ("fsdp", 4, 2), ("fsdp", 1, 1)]
)
def test_muon_is_torchs_to_the_bit_on_any_number_of_processes(parallel, processes, replicas, work):
    """Each orthogonalises its share of the matrices; a step whose gradient is not finite changes nothing."""
    (work / "muon.py").write_text(MUON)
    assert "the same" in train(processes, parallel, replicas, script=str(work / "muon.py"))


SIGNS = """
import torch
straight = torch.linalg.eigh
def eigh(matrix):
    values, vectors = straight(matrix)
    return torch.return_types.linalg_eigh((values, vectors * (-1) ** int(os.environ.get("RANK", 0))))
torch.linalg.eigh = eigh
"""


def test_ranks_whose_eigenvectors_differ_in_sign_start_from_the_same_weights(work, options, alone):
    train(2, *options(work / "signs", "--parallel=fsdp"), script=patched(work / "signs.py", SIGNS))
    assert_same_run(work / "signs", alone)


@pytest.mark.parametrize(
    ("batch", "most", "processes", "expected"),
    [(16, 16, 2, (8, 1)), (24, 3, 8, (3, 1)), (24, 8, 2, (6, 2)), (7, 4, 1, (1, 7)), (12, 5, 1, (4, 3))],
)
def test_passes_are_the_largest_that_fit(batch, most, processes, expected, monkeypatch):
    for name, value in (("global_batch_size", batch), ("micro_batch_size", most), ("WORLD_SIZE", processes)):
        monkeypatch.setattr(train_script, name, value)
    assert train_script.split_batch() == expected


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(work, options):
    output = train(2, *options(work / "odd", "--global_batch_size=5"), code=1)
    # By the rank that is first: torchrun ends the other.
    assert re.search("error( on rank 1)?: global_batch_size is 5; it must divide by 2 processes", output)
    assert not (work / "odd").exists()


def test_no_rank_takes_a_step_that_is_not_finite_on_one(work, options):
    """The second process has a loss of NaN in its 4th and 5th call (a call a step), or from the 4th on."""
    out, fault = work / "bad_some", "losses['loss'] = losses['loss'] * float('nan')"
    some, all_from_4 = (
        patched(work / f"faulty_{i}.py", FAULT.format(when=when, fault=fault))
        for i, when in enumerate(("calls[0] in (4, 5)", "calls[0] >= 4"))
    )
    more = ("--micro_batch_size=2", "--max_bad_steps=3", "--save_every=3")
    train(2, *options(out, *more), script=some)
    lines = metrics(out)
    assert [line["bad_steps"] for line in lines[:7]] == [0, 0, 0, 1, 2, 2, 2]
    assert lines[3]["loss"] is None and lines[-1]["loss"] < lines[0]["loss"]
    saved = {path.name: load_file(path / "model.safetensors") for path in convert.checkpoints(out)}
    assert all(weight.isfinite().all() for weight in saved["step_00000006"].values())

    out = work / "bad_all"
    output = train(2, *options(out, *more), code=1, script=all_from_4)
    assert "not finite in 3 steps in a row up to step 6" in output
    (kept,) = convert.checkpoints(out)
    same = load_file(kept / "model.safetensors")
    assert kept.name == "step_00000003"
    assert all(torch.equal(weight, saved["step_00000003"][name]) for name, weight in same.items())
