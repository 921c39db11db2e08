"""tools/check.py: its table on this CPU, and that it reports what is broken and nothing else."""

import os
import re
import subprocess
import sys

import check
import pytest
import torch
from conftest import ROOT

import model as models
import train

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
LINE = re.compile(r"^(.+?)  +(pass|fail|not run) +\d+ s  (.+)$", re.MULTILINE)
ON_A_GPU = {"documents, varlen_attn", "documents, flash_attn", "bfloat16 run against float32"}
ON_A_GPU |= {"speed at LRC-1.5B's shape", "where a step's time goes", "memory against tools/plan.py"}
ON_A_GPU |= {"speed, fsdp on a mesh of one", "speed, all processes"}


def lines(output):
    """{name of a check: (result, what was measured or why not)}"""
    return {name: (result, text) for name, result, text in LINE.findall(output)}


def test_everything_passes_here():
    command = [sys.executable, "tools/check.py"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    table = lines(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"torch {torch.__version__}, CUDA ") and "; commit " in done.stdout
    assert len(table) == 16 and {name for name in table if table[name][0] == "not run"} == ON_A_GPU
    assert all("bound" in text for result, text in table.values() if result == "pass")
    assert "8 pass, 0 fail, 8 not run" in done.stdout


def test_one_device_shards_too(monkeypatch, capsys):
    """On a mesh of one, where ddp lacks a second process; what FSDP costs can miss its bound."""
    monkeypatch.setattr(check, "only", ("fsdp against", "ddp"))
    monkeypatch.setattr(check, "device", "cpu")
    monkeypatch.setattr(check, "processes", 1)
    monkeypatch.setattr(train, "LAYERS_OF_A_UNIT", 1)  # as costly as it was
    assert check.main() == 1
    table = lines(capsys.readouterr().out)
    assert table["ddp against one process"] == ("not run", "one device")
    assert table["fsdp against one process"][0] == "pass"
    assert "a mesh of one: losses" in table["fsdp against one process"][1]
    result, text = table["fsdp against a plain step"]
    assert result == "fail" and re.fullmatch(r".* measured 3 x: ratio [\d.]+, bound 1.6", text)


def test_under_torchrun_one_process_speaks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command += ["tools/check.py", "--only=('reference',)"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("; 3 processes;") == 1, done.stdout + done.stderr
    assert [result for result, _ in lines(done.stdout).values()] == ["pass", "pass"]


def wrong_loss(logits, labels, teacher_logits, temperature):
    costs = straight_loss(logits, labels, teacher_logits, temperature)
    return costs | {"lm": costs["lm"] * 1.01}


def one_document(documents, device):
    return straight_layout(documents * 0, device)


straight_loss = models.chunk_loss
straight_layout = models.document_layout


@pytest.mark.parametrize(
    ("name", "replaced", "by", "words"),
    [
        ("reference vectors, float32", "chunk_loss", wrong_loss, "bound 1e-05"),
        ("documents, by a mask", "document_layout", one_document, "bound 0.0001"),
        ("documents, by a mask", "document_layout", None, "TypeError: "),  # an error is a line too
    ],
)
def test_what_is_broken_is_a_line(name, replaced, by, words, monkeypatch, capsys):
    monkeypatch.setattr(models, replaced, by)
    monkeypatch.setattr(check, "only", ("reference vectors, float32", "documents"))
    monkeypatch.setattr(check, "device", "cpu")
    assert check.main() == 1
    table = lines(capsys.readouterr().out)
    assert [name for name in table if table[name][0] == "fail"] == [name]
    assert words in table[name][1]


FAULTY = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import model
straight = model.LowRankClone.loss
def loss(self, *arguments, **options):
    losses = straight(self, *arguments, **options)
    if os.environ.get("RANK") == "1":
        losses["loss"] = losses["loss"] * 1.1
    return losses
model.LowRankClone.loss = loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_rank_that_computes_something_else_is_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setattr(check, "TRAIN", tmp_path / "faulty.py")
    monkeypatch.setattr(check, "only", ("ddp",))
    monkeypatch.setattr(check, "device", "cpu")
    assert check.main() == 1
    (table,) = lines(capsys.readouterr().out).values()
    assert table[0] == "fail" and "bound 0.0001" in table[1]


def test_a_run_that_fails_is_a_line_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "device", "cpu")
    with pytest.raises(check.Failed, match="exit code 2: error: models/none is not a directory"):
        check.launch(1, "--teacher=models/none", f"--out_dir={tmp_path}")


def test_a_failing_line_has_the_whole_cause():
    """Of a chain the innermost; of a long one both ends; nothing where it was raised `from None`."""
    try:
        try:
            raise RuntimeError("Failed to import CACHE/x.py\nSyntaxError: here")
        except RuntimeError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        assert check.cause(error) == "RuntimeError: Failed to import CACHE/x.py\nSyntaxError: here"
    long = check.cause(ValueError("\n".join(map(str, range(100)))))
    assert long.startswith("ValueError: 0\n1") and long.endswith("98\n99") and len(long.splitlines()) == 13
    output = "\n".join(
        ["step 1", "x.SomeError: it failed", "  because", "torchrun: ChildFailedError: rank 0"]
    )
    assert check.reason(output).startswith("x.SomeError: it failed\nbecause")
