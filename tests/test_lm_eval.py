"""An export under lm-eval, where that is installed: as accurate as a direct computation, and as likely."""

import importlib.util
import json

import pytest
import torch
from conftest import BUNDLED, ROOT, succeed
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's only checkpoint, of a clone of the bundled teacher, as train.py saves one."""
    path = tmp_path_factory.mktemp("run") / "step_00000002"
    clone = make_clone(convert.load_model(BUNDLED), 96)
    ids = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(0))
    models.init_student(clone, 0, "pca", clone.calibrate(ids))
    convert.save_clone(clone, path, str(BUNDLED), str(BUNDLED))
    (path / "trainer").mkdir()
    (path / "trainer/state.json").write_text(json.dumps({"step": 2, "options": {}}))
    return path


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The log-likelihood of each choice of each question."""
    student = convert.load_checkpoint(checkpoint)
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


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_lm_eval_agrees_with_model(tmp_path, checkpoint, expected):
    succeed("convert.py", f"--checkpoint={checkpoint}", f"--out={tmp_path}/student")
    succeed(
        "-m", "lm_eval", "--model=hf", f"--model_args=pretrained={tmp_path}/student,dtype=float32",
        "--device=cpu", "--tasks=library", "--include_path=tests/lm_eval_task", "--log_samples",
        f"--output_path={tmp_path}/eval",
    )  # fmt: skip
    (samples,) = (tmp_path / "eval").rglob("samples_library_*.jsonl")
    theirs = {s["doc_id"]: s for s in map(json.loads, samples.read_text().splitlines())}
    for i, row in enumerate(expected):
        found = [float(response[0]) for response in theirs[i]["filtered_resps"]]
        assert found == pytest.approx(row, abs=1e-3)
    assert len(theirs) == len(QUESTIONS)
    assert sum(s["acc"] for s in theirs.values()) / len(theirs) == pytest.approx(accuracy(expected))
    assert accuracy(expected) > 1 / 4  # better than chance among four choices


def test_evaluate_goes_on_where_it_was_stopped(checkpoint, expected):
    """tools/evaluate.py appends to what is there, and does not measure a checkpoint twice."""
    run = checkpoint.parent
    arguments = (
        "tools/evaluate.py", f"--out_dir={run}", "--tasks=library", "--device=cpu",
        "--arguments=('--include_path=tests/lm_eval_task',)",
    )  # fmt: skip
    first = json.dumps({"checkpoint": "step_00000001", "step": 1}) + "\n"
    (run / "results.jsonl").write_text(first)
    succeed(*arguments)
    results = (run / "results.jsonl").read_text()
    assert results.startswith(first)
    line = json.loads(results.removeprefix(first))
    assert (line["checkpoint"], line["step"]) == ("step_00000002", 2)
    assert line["results"]["library"]["acc,none"] == pytest.approx(accuracy(expected))
    assert "step_00000002 is in" in succeed(*arguments).stdout
    assert (run / "results.jsonl").read_text() == results
    assert sorted(path.name for path in run.iterdir()) == ["results.jsonl", "step_00000002"]
