"""tools/study.py's table and tools/plot.py's figure, from metrics.jsonl files written by hand."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import plot
import study


def write(directory, losses, clone=True):
    """A run of 1,000 tokens in four steps, evaluated at each."""
    directory.mkdir()
    lines = []
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "tokens": 250 * step, "val_lm": loss}
        if clone:
            line |= {"val_kl": loss - 2, "val_teacher_lm": 2.0, "val_rank_student": [3.0, 4.0 + step]}
            line |= {"val_rank_teacher": [5.0, 9.0], "val_terms_by_layer": {"clone_q": [1.0, 0.5]}}
        lines += [json.dumps({"step": step, "tokens": 250 * step, "loss": loss}), json.dumps(line)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return study.read_metrics(directory)


@pytest.fixture
def results(tmp_path):
    return {
        "scratch": [write(tmp_path / "scratch_1", (8.0, 7.0, 6.5, 6.0), clone=False)],
        "paper": [
            write(tmp_path / "paper_1", (7.0, 6.0, 5.0, 4.0)),
            write(tmp_path / "paper_2", (7, 6, 5, 4.4)),
        ],
        "ours": [write(tmp_path / "ours_1", (4.9, 4.1, 3.5, 3.0))],
    }


def test_table(results):
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
            for row in study.table(results).splitlines()}  # fmt: skip
    assert rows["scratch"] == ["1", "6.000", "–", "–", "–", "1.0k (1.0×)", "not reached"]
    # paper is at 4.2 on average in the end, and passes 6.0 at its second evaluation
    assert rows["paper"][:5] == ["2", "4.200", "0.400", "2.200", "8.0"]
    assert rows["paper"][5:] == ["0.5k (2.0×)", "1.0k (1.0×)"]
    # ours passes 4.2 between 250 and 500 tokens, at 250 + 250 · 0.7 / 0.8
    assert rows["ours"][5:] == ["≤ 0.2k (≥ 4.0×)", f"{(250 + 250 * 0.7 / 0.8) / 1000:.1f}k (2.1×)"]
    assert rows["teacher"][1] == "2.000" and rows["teacher"][4] == "9.0"


def test_an_unfinished_run_is_noticed(results, tmp_path):
    assert study.is_finished(tmp_path / "ours_1", 4, 250)
    assert not study.is_finished(tmp_path / "ours_1", 5, 250)  # of another length
    assert not study.is_finished(tmp_path / "none", 4, 250)
    file = tmp_path / "ours_1/metrics.jsonl"
    file.write_text(file.read_text()[:-20])  # killed while it wrote its last line
    assert not study.is_finished(tmp_path / "ours_1", 4, 250)


def test_figure(results, tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw({name: runs[0] for name, runs in results.items()}, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="is no run's out_dir"):
        plot.read_metrics(str(tmp_path / "none"))
