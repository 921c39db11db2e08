"""study.py's table and plot.py's figure, from metrics.jsonl files written by hand; evaluate.py's scores."""

import json
import shutil
import statistics
import threading
from pathlib import Path

import evaluate
import plot
import pytest
import study
import torch
import transformers
from bench import kind_of
from test_convert import call, refused
from test_model import make_clone, random_llama, randomise

import convert
from prepare import load_tokenizer
from sample import generate

NOT_COMPILED = "not compiled: copies, casts, sums"


def write(directory, losses, clone=True):
    """A run of 1,000 tokens in four steps, evaluated at each."""
    directory.mkdir()
    lines = []
    for step, loss in enumerate(losses, 1):
        at = {"step": step, "tokens": 250 * step}
        lines += [at | {"loss": 9 * loss, "lm": loss}, at | {"val_lm": loss}]
        if clone:
            lines[-1] |= {"val_kl": loss - 2, "val_teacher_lm": 2.0}
            lines[-1] |= {
                "val_agreement": 1 / loss,
                "val_terms_by_layer": {"clone_q": [1.0, 0.5], "clone_v": [3.0, 1.5]},
            }
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return study.read_lines(directory / "metrics.jsonl")


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
    results["ours"][0][-1]["agreement_length"] = 12.34
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
            for row in study.table(results).splitlines()}  # fmt: skip
    assert rows["scratch"] == ["1", "6.000", "–", "–", "–", "–", "≤ 1.0k (≥ 1.0×)", "not reached"]
    # paper is at 4.2 on average in the end, and at 6.0 by its second evaluation
    assert rows["paper"][:6] == ["2", "4.200", "0.400", "2.200", "23.9%", "–"]
    assert rows["paper"][6:] == ["≤ 0.5k (≥ 2.0×)", "≤ 1.0k (≥ 1.0×)"]
    assert rows["ours"][5] == "12.3"
    assert rows["ours"][6:] == ["≤ 0.2k (≥ 4.0×)", "≤ 0.5k (≥ 2.0×)"]
    assert rows["teacher"][1] == "2.000"


def test_study_runs_what_is_missing(results, tmp_path, monkeypatch, capsys):
    """Two at once, by commands that it prints; a run that is whole stays, and one is scored once."""
    calls = []
    both = threading.Barrier(2)

    def call(directory, mode, command):
        calls.append(command[0])
        if command[0] == "train.py":
            assert mode == "a" and command[-1] == "--resume=True"  # one that was stopped goes on
            both.wait(timeout=30)
            directory.rmdir()
            write(directory, (4.0, 3.0, 2.5, 2.2))
            (step_of(directory, 4) / "trainer/state.json").write_text(json.dumps({"options": options}))
        else:
            # scored by tasks before and behind
            lines = ('{"results": {}}', '{"agreement_length": 7.5}', '{"results": {}}')
            (directory / "results.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(study, "call", call)
    monkeypatch.setattr(study, "seeds", (1, 2))
    monkeypatch.setattr(study, "at_once", 2)
    more = f"--out_dir={tmp_path} --max_steps=4 --global_batch_size=1 --seq_len=250"
    monkeypatch.setattr(study, "variants", (f"no_ffn {more}",))
    options = study.options_of(study.variants[0])
    for _ in range(2):
        study.main()
    assert sorted(calls) == ["tools/evaluate.py"] * 2 + ["train.py"] * 2
    printed = capsys.readouterr().out
    assert (
        "python train.py config/study/base.py \"--clone_skip=('gate', 'up', 'mlp_out')\" --out_dir" in printed
    )
    assert "2 of 2 runs are done" in printed and "| 2.200 |" in printed and "| 7.5 |" in printed
    # With other options it is another run; nothing is removed.
    monkeypatch.setattr(study, "variants", (f"no_ffn {more} --learning_rate=1e-9",))
    for directory in tmp_path.glob("no_ffn*"):
        name, seed = directory.name.rsplit("_", 1)
        directory.rename(directory.with_name(f"{name}_learning_rate=1e-9_{seed}"))
    with pytest.raises(ValueError, match=r"was made with learning_rate = 0.003, not 1e-09; remove it"):
        study.main()
    assert len([*tmp_path.glob("no_ffn*/step_00000004")]) == 2
    file, _ = tmp_path.glob("no_ffn*/metrics.jsonl")
    file.write_text(file.read_text()[:-20])  # killed while it wrote its last line
    assert not study.finished_lines(file.parent, study.options_of(study.variants[0]))
    with pytest.raises(ValueError, match="there is no variant 'both'; there are scratch, "):
        study.arguments_of("both --seed=1")


def test_a_row_that_fails_leaves_the_others_to_run(tmp_path, monkeypatch, capsys):
    """By the real commands: it is told with its reason, behind the table."""
    more = f"--out_dir={tmp_path} --device=cpu --seq_len=32 --max_steps=2 --global_batch_size=2"
    more += " --micro_batch_size=2 --calibration_tokens=64 --eval_every=1 --eval_blocks=1"
    variants = (f"ours --init_from=no/such {more}", f"ours --teacher=no/teacher {more}", f"ours {more}")
    monkeypatch.setattr(study, "variants", variants)
    monkeypatch.setattr(study, "seeds", (1,))
    monkeypatch.chdir(study.ROOT)
    with pytest.raises(ValueError) as failure:
        study.main()
    first, second = str(failure.value).splitlines()
    assert "ended with exit code 2: error: init_from is no/such, which does not exist" in first
    assert "no/teacher" in second
    printed = capsys.readouterr().out
    assert "1 of 3 runs are done" in printed and "| teacher | " in printed
    assert len(study.read_lines(next(tmp_path.glob("*/results.jsonl")))) == 1
    for options in ("--eval_every=0", "--max_steps=0", "--save_every=0"):
        with pytest.raises(ValueError, match=r"a run of the study needs a number above it"):
            study.options_of(f"ours {options}")


def drawn(runs, out, monkeypatch):
    """{title: its lines that have a point} of the figure that plot.draw writes; "teacher": the dashed."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    make = pyplot.subplot_mosaic
    monkeypatch.setattr(
        pyplot, "subplot_mosaic", lambda *a, **o: figures.append(make(*a, **o)) or figures[-1]
    )
    plot.draw(runs, str(out))
    assert out.read_bytes()[:4] == b"\x89PNG"
    figure, _ = figures[-1]
    panels = {}
    for axes in figure.axes:
        lines = [line for line in axes.lines if len(line.get_xdata())]
        dashed = [line for line in lines if line.get_linestyle() == "--"]
        panels.setdefault("teacher", []).extend(dashed)
        panels[axes.get_title().split(":")[0].split(",")[0]] = [line for line in lines if line not in dashed]
    return panels


KL = "KL(teacher ‖ student)"


def test_figure(results, tmp_path, monkeypatch):
    """Each panel that has data, and no other; a point is seen, and the training loss beside it."""
    out = tmp_path / "curves.png"
    terms = "clone terms at the end"
    panels = drawn({name: runs[0] for name, runs in results.items()}, out, monkeypatch)
    assert {name: len(lines) for name, lines in panels.items()} == {"loss": 6, KL: 2, terms: 2, "teacher": 2}
    training = [line for line in results["ours"][0] if "lm" in line]
    panels = drawn({"run": [*training, results["ours"][0][-1]]}, out, monkeypatch)
    assert {name: len(lines) for name, lines in panels.items()} == {"loss": 2, KL: 1, terms: 1, "teacher": 1}
    drawn_at = {name: list(panels[name][-1].get_ydata()) for name in (KL, terms, "teacher")}
    assert drawn_at == {KL: [1.0], terms: [2.0, 1.0], "teacher": [2.0, 2.0]}
    assert [list(line.get_ydata()) for line in panels["loss"]] == [[4.9, 4.1, 3.5, 3.0], [3.0]]
    assert panels["loss"][1].get_marker() == "o"
    for lines in (results["scratch"][0], training):
        panels = drawn({"run": lines}, out, monkeypatch)
        assert [name for name in panels if panels[name]] == ["loss"]
    with pytest.raises(ValueError, match="have logged no loss yet"):
        plot.draw({"run": []}, str(out))
    with pytest.raises(ValueError, match="is no run's out_dir"):
        plot.read_metrics(str(tmp_path / "none"))


# ---- tools/evaluate.py


def test_agreement_length():
    teacher = random_llama(head_dim=16)
    blocks = torch.randint(1, 96, (12, 9), generator=torch.Generator().manual_seed(4))
    assert evaluate.agreement_length(teacher, teacher, blocks, 10) == 10
    # a student whose continuations are the teacher's for a while
    student = random_llama(head_dim=16)
    noise = random_llama(seed=1, head_dim=16)
    for weight, other in zip(student.parameters(), noise.parameters(), strict=True):
        weight.data.lerp_(other, 0.06)
    lengths = []
    for block in blocks.tolist():
        theirs, ours = (list(generate(llama, [block], 10)) for llama in (teacher, student))
        lengths.append(next((i for i in range(10) if theirs[i] != ours[i]), 10))
    assert len(set(lengths)) > 3  # not all at once, and not never
    found = evaluate.agreement_length(student, teacher, blocks, 10)
    assert found == pytest.approx(sum(lengths) / len(lengths))


def step_of(out_dir, step):
    """The directory of a checkpoint, in which a run's state is."""
    path = out_dir / f"step_{step:08d}"
    (path / "trainer").mkdir(parents=True)
    (path / "trainer/state.json").write_text("{}")
    return path


@pytest.fixture
def clones(tmp_path, teacher):
    """A run of three checkpoints, the second of them cut short."""
    out_dir = tmp_path / "run"
    for step in (1, 2, 3):
        clone = make_clone(convert.load_model(teacher), 24)
        randomise(clone.trained.named_parameters(), seed=step)
        convert.save_clone(clone, step_of(out_dir, step), str(teacher), str(teacher))
    cut = out_dir / "step_00000002/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    return out_dir


def test_evaluate_passes_over_what_is_done(clones, monkeypatch, capsys):
    """A failure, or a kill, leaves the results before it; the same command measures the rest, once."""
    measured = []

    def run_lm_eval(checkpoint, device):
        measured.append(checkpoint.name)
        if measured == ["step_00000001", "step_00000003"]:
            raise ValueError("stopped")
        return {"library": {"acc,none": 0.5}}

    monkeypatch.setattr(evaluate, "run_lm_eval", run_lm_eval)
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: name)
    options = {"out_dir": clones, "device": "cpu", "arguments": ("--limit=8",)}
    refused("stopped", evaluate, tasks="library", **options)
    assert "passing over" in capsys.readouterr().err  # the one cut short
    for _ in range(2):
        call(evaluate, tasks="library", **options)
    assert measured == ["step_00000001", "step_00000003", "step_00000003"]
    lines = evaluate.read_lines(clones / "results.jsonl")
    assert [line["checkpoint"] for line in lines] == ["step_00000001", "step_00000003"]
    assert all(line["results"] == {"library": {"acc,none": 0.5}} for line in lines)
    # a checkpoint of the same name by another run, or by other options, is scored anew
    (clones / "step_00000003/trainer/state.json").write_text('{"options": {}}')
    call(evaluate, tasks="library", **options)
    assert measured.pop() == "step_00000003"
    # other tasks are other scores
    call(evaluate, tasks="library,piqa", **options)
    assert measured[3:] == ["step_00000001", "step_00000003"]


def test_evaluate_measures_the_agreement_alone(clones, corpus, teacher, tmp_path, capsys):
    """With no lm_eval, of clones and of a run that has none."""
    options = {"out_dir": clones, "tasks": "", "data": corpus, "agreement_blocks": 3}
    options |= {"prompt_tokens": 8, "new_tokens": 4}
    call(evaluate, **options)
    assert capsys.readouterr().out.count("agreement_length") == 2
    lines = evaluate.read_lines(clones / "results.jsonl")
    assert [line["step"] for line in lines] == [1, 3]
    assert all(0 <= line["agreement_length"] <= 4 for line in lines)
    other = Path(shutil.copytree(corpus, tmp_path / "other"))
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"vocabulary_hash": "another"}))
    refused("other is by .*, whose vocabulary is not", evaluate, **options | {"data": other})
    plain = step_of(clones, 4)
    convert.save_model(convert.load_model(teacher), plain, torch.float32, teacher)
    refused(f"^{plain} does not say what its teacher is: give --teacher=DIR", evaluate, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tasks": "library"}, r'^lm_eval is not installed: pip install "lm-eval\[hf\]"'),
        ({"tasks": ""}, "^there is nothing to measure"),
        ({"tasks": "sums", "bigbench": "no/tasks"}, "^no/tasks/sums/task.json does not exist"),
        ({"tasks": "x", "bigbench": "."}, "^./x/task.json has no examples"),
        ({"tasks": "y", "bigbench": "."}, "^./y is no multiple choice"),
        ({"tasks": "", "data": "no/shards"}, "has no checkpoint"),
        ({"tasks": "", "data": "no/shards", "device": "gpu"}, "device is 'gpu'"),
        ({"new_tokens": 0}, "new_tokens is 0; it must be at least 1"),
    ],
)
def test_evaluate_refuses(options, words, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for name, task in (("x", {"subtasks": []}), ("y", {"examples": [{"input": "1", "target": "2"}]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.json").write_text(json.dumps(task))
    refused(words, evaluate, out_dir=tmp_path, **options)


TASK = {
    "task_prefix": "Choose.", "example_input_prefix": "\nask: ", "example_output_prefix": "\nsay: ",
    "examples": [
        {"input": "a + b", "target_scores": {"sum": 1, "a longer answer": 0, "def f(x):": 0}},
        {"input": "open", "target_scores": {"a file": 1, "x": 0}},
        {"input": "return", "target_scores": {"x ** 2": 0.5, "self.value": 0.5, "None": 0}},
    ],
}  # fmt: skip
WORDS = ("def", "return the", "self.name = name", "x", "is not None", "raise ValueError", "0", "for i in")
# By its score it is known which was taken: student and teacher, sum and mean, differ.
TASK["examples"] += [
    {"input": word, "target_scores": dict(zip(WORDS, range(8), strict=True))} for word in WORDS
]


def test_bigbench_is_scored_by_the_likelihoods_of_transformers(clones, teacher, tmp_path, monkeypatch):
    """Of a clone and of its teacher, which is scored once; the text is the task's own format."""
    (tmp_path / "tasks/sums").mkdir(parents=True)
    (tmp_path / "tasks/sums/task.json").write_text(json.dumps(TASK))
    monkeypatch.setattr(evaluate, "bigbench", str(tmp_path / "tasks"))
    questions = evaluate.read_task("sums")
    assert questions[1] == ("Choose.\nask: open\nsay: ", {"a file": 1, "x": 0})
    call(evaluate, out_dir=clones, tasks="sums", device="cpu")
    lines = evaluate.read_lines(clones / "results.jsonl")
    assert [line["step"] for line in lines] == [1, 3]
    merged = convert.load_checkpoint(clones / "step_00000001").merge()
    convert.save_model(merged, tmp_path / "student", torch.float32, teacher)
    seen = []
    for role, path in (("student", tmp_path / "student"), ("teacher", teacher)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
        tokenizer = load_tokenizer(path)
        right = [[], []]
        for text, scores in questions:
            start = tokenizer.encode(text[:-1]).ids
            choices = [tokenizer.encode(" " + choice).ids for choice in scores]
            expected = []
            for choice in choices:
                logits = theirs(torch.tensor([start + choice])).logits[0, len(start) - 1 : -1]
                expected.append(logits.log_softmax(-1)[range(len(choice)), choice].sum().item())
            ours = evaluate.log_likelihoods(convert.load_model(path), start, choices)
            assert ours == pytest.approx(expected, rel=1e-4)
            # per byte of the choice, without its space
            means = [value / len(choice) for value, choice in zip(expected, scores, strict=True)]
            for likelihoods, values in zip((expected, means), right, strict=True):
                values.append([*scores.values()][likelihoods.index(max(likelihoods))])
        result = lines[0]["results"]["sums"]
        assert result["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 8 * 3.5) / 11, abs=1e-4)
        for name, values in zip(("accuracy", "accuracy_per_byte"), right, strict=True):
            found = result[role][name], result[role][f"{name}_stderr"]
            wanted = statistics.mean(values), statistics.stdev(values) / 11**0.5
            assert found == pytest.approx(wanted, abs=1e-4)
            seen.append(found)
    assert len(set(seen)) == 4
    assert lines[0]["results"]["sums"]["teacher"] == lines[1]["results"]["sums"]["teacher"]


def test_kernels_are_told_apart():
    """By names that torch.profiler gave on an H100 (../shared/gpu), and on a CPU."""
    kinds = {
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)": "attention",
        "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_3": "compiled, elementwise",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native": "optimizer, clipping",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>": NOT_COMPILED,
        "Memcpy DtoD (Device -> Device)": NOT_COMPILED,
        "aten::addmm_": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::copy_": NOT_COMPILED,
    }
    assert {name: kind_of(name) for name in kinds} == kinds
