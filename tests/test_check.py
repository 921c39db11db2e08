"""tools/check.py: its table on this CPU, and that it reports what is broken and nothing else."""

import re
import traceback
from pathlib import Path

import check
import pytest
import torch
from test_parallel import FAULT, patched

import model as models

LINE = re.compile(r"^(.+?)  +(pass|fail|not run) +\d+ s  (.+)$", re.MULTILINE)


@pytest.fixture
def table(monkeypatch, capsys):
    """The lines of check.py in this process: {name: (result, what was measured or why not)}."""

    def run(code, only, processes=2):
        monkeypatch.setattr(check, "device", "cpu")
        monkeypatch.setattr(check, "only", only)
        monkeypatch.setattr(check, "processes", processes)
        assert check.main() == code
        output = capsys.readouterr().out
        assert output.startswith(f"torch {torch.__version__}, CUDA ") and "; commit " in output
        return {name: (result, text) for name, result, text in LINE.findall(output)}

    return run


def test_everything_passes_here(table):
    """By runs of two processes, one of which is resumed; what needs a GPU says so."""
    found = table(0, ("reference", "documents", "ddp", "fsdp against one", "bfloat16", "resume", "speed"))
    assert len(found) == 12  # but for the compiled run, which takes a minute
    assert sum(result == "pass" and "bound" in text for result, text in found.values()) == 5
    assert all("CPU" in text for result, text in found.values() if result == "not run")


def test_one_device_shards_too(table, monkeypatch):
    """On a mesh of one, where ddp lacks a second process; what FSDP costs can miss its bound."""
    monkeypatch.setattr(check, "FSDP_BOUND", 1.0)  # which it misses on any machine
    found = table(1, ("fsdp against", "ddp"), processes=1)
    assert found["fsdp against a plain step"][0] == "fail"
    assert "measured 3 x: ratio" in found["fsdp against a plain step"][1]
    assert found["ddp against one process"] == ("not run", "one device")
    assert found["fsdp against one process"][0] == "pass"


def test_documents_are_compared():
    """A CPU's mask in bfloat16 against the same in float32 is within the bound of a GPU's kernels."""
    assert "gradient" in check.documents("mask", torch.bfloat16, 0.05)
    with pytest.raises(check.Failed, match=r"losses .*, bound 1e-05"):
        check.documents("mask", torch.bfloat16, 1e-5)


straight_loss = models.chunk_loss


def wrong_loss(*arguments):
    costs = straight_loss(*arguments)
    return costs | {"lm": costs["lm"] * 1.01}


@pytest.mark.parametrize(("by", "words"), [(wrong_loss, "bound 1e-05"), (None, "TypeError: ")])
def test_what_is_broken_is_a_line(table, by, words, monkeypatch):
    """An error too, and the others go on."""
    monkeypatch.setattr(models, "chunk_loss", by)
    found = table(1, ("reference vectors, float32", "documents"))
    assert [name for name in found if found[name][0] == "fail"] == ["reference vectors, float32"]
    assert words in found["reference vectors, float32"][1] and len(found) == 4


def test_a_rank_that_computes_something_else_is_a_line(table, tmp_path, monkeypatch):
    fault = FAULT.format(when="True", fault="losses['loss'] = losses['loss'] * 1.1")
    monkeypatch.setattr(check, "TRAIN", Path(patched(tmp_path / "faulty.py", fault)))
    ((result, text),) = table(1, ("ddp",)).values()
    assert result == "fail" and "bound 0.0001" in text


def test_a_failing_line_has_the_whole_cause(monkeypatch, tmp_path):
    """Of a run its error; of a chain the innermost."""
    monkeypatch.setattr(check, "device", "cpu")
    with pytest.raises(check.Failed, match="exit code 2: error: models/none is not a directory"):
        check.launch(1, check.TRAIN, "--teacher=models/none", f"--out_dir={tmp_path}")
    try:
        try:
            raise RuntimeError("Failed to import CACHE/x.py\nSyntaxError: here")
        except RuntimeError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        found = check.reason("".join(traceback.format_exception(error)))
    assert found.startswith("RuntimeError: Failed to import CACHE/x.py\nSyntaxError: here")
    output = "step 1\nx.SomeError: it failed\n  because\ntorchrun: ChildFailedError: rank 0"
    assert check.reason(output).startswith("x.SomeError: it failed\nbecause")
