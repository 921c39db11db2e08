"""An export under lm-eval, where that is installed: as accurate as a direct computation, and as likely."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import BUNDLED, ROOT
from test_model import make_clone
from tokenizers import Tokenizer

import convert
import model as models

# Not imported here: it would take tools/evaluate.py for the package `evaluate`.
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

QUESTIONS = [
    json.loads(line) for line in (ROOT / "tests/lm_eval_task/questions.jsonl").read_text().splitlines()
]


def save_checkpoint(path, seed):
    """A clone of the bundled teacher, as train.py saves one."""
    clone = make_clone(convert.load_model(BUNDLED), 96)
    ids = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(seed))
    models.init_student(clone, 0, "pca", clone.calibrate(ids))
    convert.save_clone(clone, path, str(BUNDLED), str(BUNDLED))
    (path / "trainer").mkdir()
    (path / "trainer/state.json").write_text(json.dumps({"step": 1, "options": {}}))


def succeed(tmp_path, *command):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def likelihoods(student):
    """The log-likelihood of each choice of each question."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    rows = []
    for question in QUESTIONS:
        start = len(tokenizer.encode(question["question"]).ids)
        row = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer.encode(f"{question['question']} {choice}").ids])
            scores = student(ids)[0, start - 1 : -1].log_softmax(-1)
            row.append(scores.gather(-1, ids[0, start:, None]).sum().item())
        rows.append(row)
    return rows


def accuracy(rows):
    right = [row.index(max(row)) == question["answer"] for row, question in zip(rows, QUESTIONS, strict=True)]
    return sum(right) / len(right)


def test_lm_eval_agrees_with_model(tmp_path):
    save_checkpoint(tmp_path / "clone", 0)
    succeed(tmp_path, "convert.py", f"--checkpoint={tmp_path}/clone", f"--out={tmp_path}/student")
    succeed(
        tmp_path, "-m", "lm_eval", "--model=hf", f"--model_args=pretrained={tmp_path}/student,dtype=float32",
        "--device=cpu", "--tasks=library", "--include_path=tests/lm_eval_task", "--log_samples",
        f"--output_path={tmp_path}/eval",
    )  # fmt: skip
    (samples,) = (tmp_path / "eval").rglob("samples_library_*.jsonl")
    theirs = {s["doc_id"]: s for s in map(json.loads, samples.read_text().splitlines())}
    expected = likelihoods(convert.load_model(tmp_path / "student"))
    for i, row in enumerate(expected):
        found = [float(response[0]) for response in theirs[i]["filtered_resps"]]
        assert found == pytest.approx(row, abs=1e-3)
    assert len(theirs) == len(QUESTIONS)
    assert sum(s["acc"] for s in theirs.values()) / len(theirs) == pytest.approx(accuracy(expected))
    assert accuracy(expected) > 1 / 4  # better than chance among four choices


def test_evaluate_goes_on_where_it_was_stopped(tmp_path):
    """tools/evaluate.py on a run that has one checkpoint, then two."""
    run = tmp_path / "run"
    arguments = (
        "tools/evaluate.py", f"--out_dir={run}", "--tasks=library", "--device=cpu",
        "--arguments=('--include_path=tests/lm_eval_task',)",
    )  # fmt: skip
    save_checkpoint(run / "step_00000001", 0)
    succeed(tmp_path, *arguments)
    first = (run / "results.jsonl").read_text()
    save_checkpoint(run / "step_00000002", 1)
    done = succeed(tmp_path, *arguments)
    assert "step_00000001 is in" in done.stdout
    assert (run / "results.jsonl").read_text().startswith(first)
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        expected = accuracy(likelihoods(convert.load_checkpoint(run / line["checkpoint"])))
        assert line["results"]["library"]["acc,none"] == pytest.approx(expected)
    assert sorted(path.name for path in run.iterdir()) == [
        "results.jsonl", "step_00000001", "step_00000002"
    ]  # fmt: skip
