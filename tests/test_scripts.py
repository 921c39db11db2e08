"""The scripts end to end, through their command lines: a random two-layer teacher and generated text."""

import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BUNDLED, DOCUMENTS, ROOT, SHAPE, clone_options, launch, metrics, run, succeed
from safetensors.torch import load_file, save_file
from test_convert import call, refused, transformers_model
from test_model import plain_student, random_llama
from transformers import LlamaConfig, LlamaForCausalLM

import convert
import sample
import train
from configurator import configure
from prepare import Mixture
from sample import generate, pick


def last(out_dir):
    return convert.checkpoints(out_dir)[-1]


def half_way(run, out_dir):
    """A copy of a run without its last checkpoint."""
    shutil.copytree(run, out_dir)
    shutil.rmtree(last(out_dir))
    return out_dir


def ids_of(*shape):
    return torch.randint(1, 4096, shape, generator=torch.Generator().manual_seed(5))


def plain_options(teacher, corpus, out_dir, *more):
    shape = SHAPE | {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": False}
    return (
        "--teacher=None", f"--model_config={shape}", f"--tokenizer={teacher}", f"--data={corpus}",
        f"--out_dir={out_dir}", "--seq_len=32", "--global_batch_size=2", "--micro_batch_size=2",
        "--max_steps=4", "--save_every=2", "--log_every=1", "--eval_blocks=2", "--weight_decay=0.1",
        "--sample_prompt=def read(", *more,
    )  # fmt: skip


FREE = ("--train=weights", "--learning_rate=1e-3")
RUNS = {
    "clone": (clone_options,),
    "plain": (plain_options,),
    "muon": (
        clone_options, "--student_layers=(1,)", "--optimizer=muon", "--kl_temperature=5",
        "--learning_rate=1e-3",
    ),
    "weights": (clone_options, *FREE),
}  # fmt: skip


def train_runs(outs, teacher, corpus, *more):
    """Trains RUNS in these {name: out_dir}, each with more options; returns {name: what it printed}."""

    def train_run(name):
        options_of, *own = RUNS[name]
        return succeed("train.py", *options_of(teacher, corpus, outs[name], *own, *more)).stdout

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(outs, pool.map(train_run, outs), strict=True))


@pytest.fixture(scope="module")
def runs(work, teacher, corpus):
    """{name: out_dir} of RUNS, all trained straight to their end."""
    outs = {name: work / f"run_{name}" for name in RUNS}
    printed = train_runs(outs, teacher, corpus)
    assert "def " in printed["plain"]  # the sample at its end
    return outs


@pytest.fixture(scope="module")
def exported(work, runs):
    """The clone's checkpoint as convert.py writes it, in float32."""
    call(convert, checkpoint=runs["clone"], out=work / "student")
    return work / "student"


# ---- prepare, convert, transformers


def test_prepare_says_what_it_made(corpus):
    meta, log = json.loads((corpus / "meta.json").read_text()), corpus.with_name("corpus.log").read_text()
    assert sum(meta["documents"].values()) == len(DOCUMENTS) and meta["vocab_size"] == 4096
    for split, shards in meta["splits"].items():
        tokens = sum(shard["tokens"] for shard in shards)
        assert f"{meta['documents'][split]:,} documents, {tokens:,} tokens" in log
        assert all(np.load(corpus / shard["file"]).dtype == np.uint16 for shard in shards)


def test_convert_to_bfloat16_rounds_the_weights_once(exported, tmp_path):
    call(convert, checkpoint=exported, out=tmp_path / "half", dtype="bfloat16")
    full, half = (load_file(out / "model.safetensors") for out in (exported, tmp_path / "half"))
    assert {weight.dtype for weight in full.values()} == {torch.float32}
    rounded = {name: weight.bfloat16() for name, weight in full.items()}
    torch.testing.assert_close(half, rounded, rtol=0, atol=0)
    assert transformers_model(tmp_path / "half").dtype == torch.bfloat16


def test_checkpoints_and_exports_are_transformers_models(work, runs, capsys):
    """Of a clone with fewer layers the export, of own weights the checkpoint itself; either is sampled."""
    call(convert, checkpoint=runs["muon"], out=work / "student_muon")
    original = convert.load_checkpoint(last(runs["muon"])).merge()
    assert len(original.layers) == 1
    pairs = [(path, convert.load_model(path)) for path in (last(runs["plain"]), last(runs["weights"]))]
    for path, ours in ((work / "student_muon", original), *pairs):
        with torch.no_grad():
            expected = transformers_model(path)(ids_of(2, 40)).logits
            torch.testing.assert_close(ours(ids_of(2, 40)), expected, rtol=0, atol=1e-4)
    for name in ("muon", "weights"):
        call(sample, model=runs[name], max_new_tokens=4, prompt="x")
        assert "x" in capsys.readouterr().out


def test_runs_go_on_from_clones_and_any_model(work, runs, corpus, teacher):
    """From a clone's checkpoint as it ended; from a model of another shape with a word on what it lacks."""
    for name, own in (("switched", FREE), ("further", ())):
        more = (*own, f"--init_from={runs['clone']}", "--max_steps=5")
        succeed("train.py", *clone_options(teacher, corpus, work / name, *more))
        assert metrics(work / name)[0]["loss"] < metrics(runs["clone"])[0]["loss"]
    # The layers that these options name are not the model's: it has another number of them.
    options = ("--train=weights", f"--init_from={runs['plain']}", "--max_steps=5", "--student_layers=(0,)")
    done = succeed("train.py", *clone_options(teacher, corpus, work / "any", *options))
    assert "clone losses left out: num_hidden_layers 2, not 1, head_dim 8, not 12" in done.stdout
    assert not [name for name in metrics(work / "any")[0] if name.startswith("clone_")]


# ---- resume, metrics


@pytest.fixture(scope="module")
def resumed(work, teacher, corpus, runs):
    """The runs as they stood half way, gone on with."""
    outs = {name: half_way(runs[name], work / f"resumed_{name}") for name in RUNS}
    train_runs(outs, teacher, corpus, "--resume=True")
    return outs


@pytest.mark.parametrize("name", RUNS)
def test_resume_repeats_the_uninterrupted_run(name, runs, resumed):
    def computed(out_dir):
        measured = ("tokens_per_second", "peak_memory_gib")
        return [{k: v for k, v in line.items() if k not in measured} for line in metrics(out_dir)]

    assert computed(resumed[name]) == computed(runs[name])
    names = [path.name for path in convert.checkpoints(runs[name])]
    assert [path.name for path in convert.checkpoints(resumed[name])] == names and len(names) == 2
    for file in ("model.safetensors", "trainer/shard-00001-model-00001-of-00001.safetensors"):
        straight, again = (load_file(out[name] / names[-1] / file) for out in (runs, resumed))
        assert straight.keys() == again.keys()
        assert [key for key in straight if not torch.equal(straight[key], again[key])] == []
    half, whole = (load_file(runs[name] / step / "model.safetensors") for step in names)
    assert [key for key in half if torch.equal(half[key], whole[key])] == []  # every tensor trains


def test_metrics(runs):
    lines = metrics(runs["clone"])
    training, evaluations = ([line for line in lines if name in line] for name in ("loss", "val_lm"))
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    assert [line["step"] for line in evaluations] == [10, 20] and len(lines) == 6
    terms = {f"clone_{name}" for name in ("q", "k", "v", "attn_out", "gate", "up", "mlp_out")}
    for line in training:
        assert line["tokens"] == line["step"] * 4 * 32
        assert line.keys() >= {"grad_norm", "learning_rate", "tokens_per_second", *terms}
        assert line["clone"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
        # the options' defaults: weights 0.1, 1 and 0.05; T = 1
        assert line["loss"] == pytest.approx(0.1 * line["lm"] + line["kl"] + 0.05 * line["clone"], rel=1e-4)
    for line in evaluations:
        assert line.keys() >= {f"val_{name}" for name in ("lm", "kl", "clone", "teacher_lm", *terms)}
    assert training[-1]["lm"] < training[0]["lm"]
    *training, evaluation = metrics(runs["plain"])
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert all(line["loss"] == line["lm"] for line in training)
    assert evaluation.keys() == {"step", "tokens", "val_lm"}


def test_evaluations_are_of_the_saved_weights_at_temperature_1(runs, corpus):
    """Of a run that trains at T = 5: cross-entropies, KL and agreement by their definitions."""
    clone = convert.load_checkpoint(runs["muon"] / "step_00000020")
    batch = Mixture({str(corpus): None}, "heldout", 32, 0).batch(0, 3)
    labels = torch.as_tensor(batch.labels).flatten()
    kept = labels != -100
    ids = torch.as_tensor(batch.ids)
    with torch.no_grad():
        student, teacher = (
            model(ids).flatten(0, 1)[kept].double().log_softmax(-1) for model in (clone, clone.teacher)
        )
    rows = torch.arange(len(student))
    expected = {
        "val_lm": -student[rows, labels[kept]].mean(),
        "val_teacher_lm": -teacher[rows, labels[kept]].mean(),
        "val_kl": (teacher.exp() * (teacher - student)).sum(-1).mean(),
        "val_agreement": (teacher.argmax(-1) == student.argmax(-1)).double().mean(),
    }
    last = metrics(runs["muon"])[-1]
    for name, value in expected.items():
        assert last[name] == pytest.approx(value.item(), rel=1e-4), name


def test_what_would_spoil_a_run_is_refused(work, runs, teacher, corpus, monkeypatch):
    """Before it makes its directory; and a second run in the directory of one leaves that as it is."""
    other, broken = (Path(shutil.copytree(teacher, work / name)) for name in ("other", "broken"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    LlamaForCausalLM(LlamaConfig(**(SHAPE | {"vocab_size": 512}))).save_pretrained(work / "tiny")
    monkeypatch.setenv("CXX", "no-compiler")

    again = clone_options(teacher, corpus, runs["clone"])
    new = clone_options(teacher, corpus, work / "none")
    tiny = clone_options(BUNDLED, corpus, work / "none", f"--init_from={work / 'tiny'}", "--eval_only=True")
    calls = {
        "holds a run: go on with --resume=True": again,
        "has seed = 1, not 7; a resumed run must keep it": (*again, "--resume=True", "--seed=7"),
        "has calibration_tokens = ": (*again, "--resume=True", "--calibration_tokens=64"),
        "has data = ": (*again, "--resume=True", f"--data={{'{corpus}': None}}"),
        f"whose vocabulary is not {other}'s": (*new, f"--tokenizer={other}"),
        "other has another vocabulary than": (*new, "--train=weights", f"--init_from={other}"),
        "model.layers.1.mlp.up_proj.weight holds a value that is not finite": (*new, f"--teacher={broken}"),
        "tiny has 512 tokens; the teacher has 4096": tiny,
        "the model has 512": (*tiny, "--teacher=None", f"--tokenizer={teacher}"),
        "random tokens are for tools/bench.py": (*new, "--data=None"),
        "compile needs a C++ compiler": (*new, "--compile=True"),
    }
    before = (runs["clone"] / "metrics.jsonl").read_text()
    for message, options in calls.items():
        values = configure({"__file__": str(ROOT / "train.py")}, [*options])
        monkeypatch.setattr(train, "options", values, raising=False)
        refused(re.escape(message), train, **values)
    refused(r"compile needs a C\+\+ compiler", sample, model=BUNDLED, compile=True)
    assert (runs["clone"] / "metrics.jsonl").read_text() == before and not (work / "none").exists()


def test_wandb_never_stops_a_run(work, corpus, teacher, monkeypatch, capsys):
    """A stand-in for the package, which keeps what it is given and then fails; and none."""
    kept = work / "wandb.jsonl"
    (work / "wandb").mkdir()
    (work / "wandb/wandb.py").write_text(f"""
import json
class Run:
    def log(self, values, step):
        open({str(kept)!r}, "a").write(json.dumps([step, values]) + "\\n")
        raise RuntimeError("no network")
def init(project, name, tags, config):
    assert project == "low-rank-clone" and name == "trial" and tags == ("a",) and config["seed"] == 1
    return Run()
""")
    monkeypatch.setenv("PYTHONPATH", str(work / "wandb"))
    named = ("--wandb=True", "--run_name=trial", "--tags=('a',)")
    short = ("--max_steps=2", "--log_every=1", "--save_every=0")
    succeed("train.py", *clone_options(teacher, corpus, work / "logged", *named, *short))
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line for _, line in lines] == metrics(work / "logged")
    assert [step for step, _ in lines] == [1, 2, 2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(train, "wandb", True)
    train.start_wandb()(1, {})
    assert "wandb is off: " in capsys.readouterr().out


# ---- sampling


def test_rows_end_at_their_stop_ids():
    """The second row ends early, the others go on unless they meet its last token too."""
    llama, prompts = random_llama(), [(ids_of(length) % 96).tolist() for length in (11, 3, 7)]
    whole = [*zip(*generate(llama, prompts, 24), strict=True)]
    stop = whole[1][4]
    ended = [*zip(*generate(llama, prompts, 24, stop_ids=(stop,)), strict=True)]
    for row, found in zip(whole, ended, strict=True):
        expected = row[: row.index(stop)] if stop in row else row[: len(found)]
        assert tuple(token for token in found if token is not None) == expected
    assert any(stop not in row for row in whole)


def test_samples_follow_their_seed(runs, capsys):
    def sampled(name, **options):
        call(sample, model=runs[name], prompt="x", max_new_tokens=12, **options)
        return [part.partition("x")[2] for part in capsys.readouterr().out.split("--- ")]

    random = {"temperature": 1.5, "top_k": 500, "top_p": 0.99}
    _, first, again = sampled("clone", **random, num_samples=2, seed=7)
    assert first != again and len(first) > 5
    assert [again] == sampled("clone", **random, seed=8)
    greedy = sampled("plain", temperature=0.0)
    assert greedy == sampled("plain", temperature=0.7, top_k=1, seed=3)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.1, 0.5, 0.15, 0.25]),
        (1.0, 2, 1.0, [0, 2 / 3, 0, 1 / 3]),
        (1.0, 0, 0.7, [0, 2 / 3, 0, 1 / 3]),
        (1.0, 0, 0.4, [0, 1, 0, 0]),
        (0.5, 2, 1.0, [0, 0.8, 0, 0.2]),
        (0.0, 0, 1.0, [0, 1, 0, 0]),
    ],
)
def test_pick_keeps_top_k_and_top_p(temperature, top_k, top_p, expected):
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(2000, 4)
    chosen = pick(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    found = torch.bincount(chosen, minlength=4) / 2000
    # four standard deviations of a share of 2000 draws
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=0.045)
    assert [p > 0 for p in found.tolist()] == [p > 0 for p in expected]


# ---- mixtures, documents apart


def test_a_mixture_logs_each_source_and_keeps_documents_apart(work, text, teacher, corpus):
    succeed("prepare.py", f"--input={text}/2.jsonl", f"--out={work}/small", f"--tokenizer={teacher}",
            "--text_key=body", "--heldout_fraction=0.5")  # fmt: skip
    sources = {str(corpus): 1600, str(work / "small"): None}
    more = ("--max_steps=6", "--log_every=6", "--save_every=0")
    logs = []
    for apart in (False, True):
        out = work / f"mixed_{apart}"
        succeed("train.py", *clone_options(teacher, sources, out, *more, f"--mask_documents={apart}"))
        logs.append(metrics(out))
    (together, *_, evaluation), (apart, *_) = logs
    losses = [together[f"lm/{name}"] for name in ("corpus", "small")]
    assert min(losses) < together["lm"] < max(losses)
    assert evaluation.keys() >= {"val_lm/corpus", "val_lm/small"}
    assert together["lm"] != apart["lm"] and abs(together["lm"] / apart["lm"] - 1) < 0.1


# ---- fine-tuning and evaluation


@pytest.fixture(scope="module")
def chats(work, teacher):
    """SFT rows of 60 chats, under a template of ours: answers of very different lengths."""
    where = work / "chat_tokenizer"
    shutil.copytree(teacher, where)
    (where / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{{ eos_token }}{% endfor %}"
    )
    rows = [
        [{"role": "user", "content": f"How is {i} squared?"},
         {"role": "assistant", "content": f"return {i} ** 2\n" * (1 + i % 9)}] for i in range(60)
    ]  # fmt: skip
    (work / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    succeed("prepare.py", f"--input={work}/chats.jsonl", "--sft=True", f"--tokenizer={where}", "--seq_len=64",
            f"--out={work}/chats", "--heldout_fraction=0.2")  # fmt: skip
    return work / "chats"


def test_fine_tuning_on_answers(work, exported, chats):
    """Two epochs of SFT; eight micro-batches of one row take the same steps as one of eight rows."""
    options = (
        "--teacher=None", f"--init_from={exported}", "--sft=True", f"--data={chats}", "--seq_len=64",
        "--epochs=2", "--max_steps=0", "--global_batch_size=8", "--log_every=1", "--eval_every=2",
        "--sample_prompt=",
    )  # fmt: skip
    for size in (8, 1):
        succeed("train.py", *options, f"--out_dir={work}/sft_{size}", f"--micro_batch_size={size}")
    whole, parts = metrics(work / "sft_8"), metrics(work / "sft_1")
    meta = json.loads((chats / "meta.json").read_text())
    rows, tokens = meta["documents"]["tokens"], sum(shard["tokens"] for shard in meta["splits"]["tokens"])
    assert whole[-1]["step"] == round(2 * rows / 8)
    assert whole[-1]["tokens"] == whole[-1]["step"] * round(8 * tokens / rows)  # not the longest a row can be
    for a, b in zip(whole, parts, strict=True):
        for name in a.keys() & {"loss", "lm", "grad_norm", "val_lm"}:
            # rounding in another order, which AdamW passes on
            assert a[name] == pytest.approx(b[name], rel=1e-5 if a["step"] == 1 else 1e-3), (a["step"], name)
    losses = [line["val_lm"] for line in whole if "val_lm" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert transformers_model(last(work / "sft_8")).config.hidden_size == 24


def test_evaluation_only(runs, exported, corpus, teacher):
    """A clone, and its export beside the teacher, have the losses of the run's last evaluation."""
    for path, name in ((runs["clone"], "clone"), (exported, "clone"), (runs["weights"], "weights")):
        only = ("--eval_only=True", f"--init_from={path}")
        done = succeed("train.py", *clone_options(teacher, corpus, "none", *only))
        found = json.loads(done.stdout.splitlines()[-1])
        expected = {key: metrics(runs[name])[-1][key] for key in ("val_lm", "val_teacher_lm")}
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=2e-4)
        assert "% of the teacher's quality" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("kl_temperature", 0.0, "above 0"),
        ("max_steps", -1, "at least 0"),
        ("warmup_ratio", 5.0, "from 0 to 1"),
        ("momentum", 1.0, "from 0 to below 1"),
        ("epochs", -1.0, "above 0"),
        ("clone_weight", -0.1, "at least 0"),
        ("calibration_tokens", 0, "at least 1"),
        ("keep_last", 0, "at least 1"),
        ("max_bad_steps", 0, "at least 1"),
        ("dtype", "float16", "use float32 or bfloat16"),
        ("student_hidden_size", None, "--target_params"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, value, allowed, monkeypatch):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}.*{allowed}"):
        train.check_options()


def test_ctrl_c_is_told_in_a_line(work):
    command = [sys.executable, "train.py", f"--out_dir={work}/none"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # its options are read
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error == "stopped before the first step\n"


def test_a_resumed_runs_data_and_teacher_are_what_they_were(work, runs, teacher, corpus):
    """Not only their names; nor the order of several data sets."""
    named = {name: work / f"of_{name}" for name in ("data", "teacher")}
    shutil.copytree(corpus, named["data"])
    shutil.copytree(teacher, named["teacher"])
    out = work / "of_names"
    options = clone_options(named["teacher"], named["data"], out, "--train=weights", "--max_steps=1")
    succeed("train.py", *options, "--save_every=1")
    resume = (*options, "--resume=True", "--max_steps=2")
    meta = named["data"] / "meta.json"
    weights = named["teacher"] / "model.safetensors"
    for name, file in (("data", meta), ("teacher", weights)):
        whole = file.read_bytes()
        if name == "data":
            other = json.loads(whole)
            other["splits"]["tokens"][0]["sha256"]["tokens_00000.npy"] = "another"
            file.write_text(json.dumps(other))
        else:
            tensors = load_file(file)
            tensors["model.norm.weight"] *= 2
            save_file(tensors, file, metadata={"format": "pt"})
        done = run("train.py", *resume)
        told = f"error: {out}/step_00000001: its {name} is another now, of the same name; a resumed run must"
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(told), done.stderr
        file.write_bytes(whole)
    succeed("train.py", *resume)


def test_a_resumed_run_says_how_its_schedule_changes(work, runs, teacher, corpus):
    out = work / "longer"
    shutil.copytree(runs["clone"], out)
    options = clone_options(teacher, corpus, out, "--resume=True")
    done = succeed("train.py", *options, "--max_steps=21", "--learning_rate=0.001", "--lm_weight=0")
    assert "lm_weight was 0.1 and is 0.0 from here on" in done.stdout
    assert "max_steps was 20 and is 21 from here on" in done.stdout
    assert "learning_rate was 0.003 and is 0.001 from here on" in done.stdout
    assert "at a learning rate of 5.00e-05" in done.stdout  # the last of 20 after the warmup
    assert "step 21 of 21: loss" in done.stdout  # stderr is no terminal
    assert "torch.distributed" not in done.stderr and "\r" not in done.stderr


def test_a_second_run_in_an_out_dir_is_refused_while_the_first_lives(work, teacher, corpus):
    out = work / "locked"
    options = clone_options(teacher, corpus, out, "--max_steps=100000", "--save_every=0", "--eval_every=0")
    first = launch("train.py", *options, outputs=(work / "first.out", work / "first.err"))
    try:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert first.is_alive()
        second = run("train.py", *options, "--resume=True", "--max_steps=1")
        assert second.returncode == 2 and first.is_alive()
        assert second.stderr.splitlines()[-1] == f"error: another process is writing {out}"
    finally:
        first.kill()
        first.join()
    # A kill leaves no lock behind.
    third = succeed("train.py", *clone_options(teacher, corpus, out, "--max_steps=1", "--save_every=0"))
    assert "step 1 of 1" in third.stdout


@pytest.mark.parametrize(("sft", "ids"), [(True, [0, 4097]), (False, 0)])
def test_a_model_fine_tuned_on_chats_ends_its_turns(sft, ids, tmp_path, monkeypatch):
    """Its base has another EOS than its template ends a turn by; generate() stops at both."""
    tokens = Path(shutil.copytree(BUNDLED, tmp_path / "tokens"))
    content = json.loads((tokens / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, mark in enumerate(("<|im_start|>", "<|im_end|>")):
        content["added_tokens"].append({"id": 4096 + i, "content": mark, **flags})
    (tokens / "tokenizer.json").write_text(json.dumps(content))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tokens / "chat_template.jinja").write_text(template)
    for name, value in {"sft": sft, "teacher": None, "out_dir": tmp_path, "options": {}}.items():
        monkeypatch.setattr(train, name, value, raising=False)
    model = plain_student(random_llama(vocab_size=4098, eos_token_id=0))
    saved = train.save_checkpoint(model, train.make_optimizer(model.trained), 1, str(tokens), {})
    call(convert, checkpoint=saved, out=tmp_path / "exported")
    for path in (saved, tmp_path / "exported"):
        assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == ids
