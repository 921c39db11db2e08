"""An export under lm-eval, where that is installed: as accurate as a direct computation, and as likely."""

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

pytest.importorskip("lm_eval")


def test_lm_eval_agrees_with_model(tmp_path):
    clone = make_clone(convert.load_model(BUNDLED), 96)
    rows = [
        json.loads(line) for line in (ROOT / "tests/lm_eval_task/questions.jsonl").read_text().splitlines()
    ]
    ids = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(0))
    models.init_clone(clone, 0, "pca", clone.calibrate(ids))
    convert.save_clone(clone, tmp_path / "clone", str(BUNDLED), str(BUNDLED))
    for command in (
        ["convert.py", f"--checkpoint={tmp_path}/clone", f"--out={tmp_path}/student"],
        ["-m", "lm_eval", "--model=hf", f"--model_args=pretrained={tmp_path}/student,dtype=float32",
         "--device=cpu", "--tasks=library", "--include_path=tests/lm_eval_task", "--log_samples",
         f"--output_path={tmp_path}/eval"],
    ):  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "eval").rglob("samples_library_*.jsonl")
    theirs = {s["doc_id"]: s for s in map(json.loads, samples.read_text().splitlines())}

    student, tokenizer = (
        convert.load_model(tmp_path / "student"),
        Tokenizer.from_file(str(BUNDLED / "tokenizer.json")),
    )
    right = 0
    for i, row in enumerate(rows):
        likelihoods = []
        start = len(tokenizer.encode(row["question"]).ids)
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer.encode(f"{row['question']} {choice}").ids])
            scores = student.logits(ids)[0, start - 1 : -1].log_softmax(-1)
            likelihoods.append(scores.gather(-1, ids[0, start:, None]).sum().item())
        found = [float(response[0]) for response in theirs[i]["filtered_resps"]]
        assert found == pytest.approx(likelihoods, abs=1e-3)
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    assert sum(s["acc"] for s in theirs.values()) == right and len(theirs) == len(rows)
    assert right > len(rows) / 4  # better than chance among four choices
