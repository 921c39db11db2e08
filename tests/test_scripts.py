"""The scripts end to end, through their command lines: a random two-layer teacher and generated text."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import BUNDLED, DOCUMENTS, ROOT, SHAPE, clone_options, metrics, run, succeed
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import convert
import train
from prepare import Mixture
from sample import generate, pick


def in_parallel(calls):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda call: run(*call), calls))


def transformers_model(path):
    """The directory as transformers loads it, which must find every weight and nothing else."""
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def ids_of(*shape):
    return torch.randint(1, 4096, shape, generator=torch.Generator().manual_seed(5))


def read_split(corpus, split):
    shards = json.loads((corpus / "meta.json").read_text())["splits"][split]
    arrays = [np.load(corpus / shard["file"]) for shard in shards]
    assert [len(array) for array in arrays] == [shard["tokens"] for shard in shards]
    return arrays


def documents_of(corpus, split, eos=0):
    """The documents of a split as lists of ids, each without its EOS."""
    ids = np.concatenate(read_split(corpus, split))
    assert ids[-1] == eos
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]]


def plain_options(teacher, corpus, out_dir, *more):
    shape = SHAPE | {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": False}
    return (
        "--teacher=None", f"--model_config={shape}", f"--tokenizer={teacher}", f"--data={corpus}",
        f"--out_dir={out_dir}", "--seq_len=32", "--global_batch_size=2", "--micro_batch_size=2",
        "--max_steps=4", "--save_every=2", "--log_every=1", "--eval_blocks=2", "--weight_decay=0.1",
        "--sample_prompt=def read(", *more,
    )  # fmt: skip


def muon_options(*arguments):
    return clone_options(
        *arguments, "--student_layers=(1,)", "--optimizer=muon", "--kl_temperature=5", "--learning_rate=1e-3"
    )


def weights_options(*arguments):
    return clone_options(*arguments, "--train=weights", "--learning_rate=1e-3")


RUNS = {"clone": clone_options, "plain": plain_options, "muon": muon_options, "weights": weights_options}


@pytest.fixture(scope="module")
def runs(work, teacher, corpus):
    """{name: out_dir} of RUNS, all trained straight to their end."""
    outs = {name: work / f"run_{name}" for name in RUNS}
    done = in_parallel([("train.py", *RUNS[name](teacher, corpus, out)) for name, out in outs.items()])
    for name, result in zip(outs, done, strict=True):
        assert result.returncode == 0, result.stderr
        outs[name].with_name(f"{name}.log").write_text(result.stdout)
    return outs


@pytest.fixture(scope="module")
def exported(work, runs):
    """The clone's checkpoint as convert.py writes it, in float32 and in bfloat16."""
    outs = {dtype: work / f"student_{dtype}" for dtype in ("float32", "bfloat16")}
    done = in_parallel(
        [("convert.py", f"--checkpoint={runs['clone']}", f"--out={out}", f"--dtype={dtype}")
         for dtype, out in outs.items()]
    )  # fmt: skip
    for result in done:
        assert result.returncode == 0, result.stderr
    return outs


# ---- prepare


def test_prepare_keeps_every_document_once(corpus, teacher):
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    found = {split: documents_of(corpus, split) for split in ("tokens", "heldout")}
    texts = {split: [tokenizer.decode(ids[:-1]) for ids in found[split]] for split in found}
    held = set(texts["heldout"])
    assert texts["tokens"] == [document for document in DOCUMENTS if document not in held]
    assert texts["heldout"] == [document for document in DOCUMENTS if document in held]
    assert 10 <= len(held) <= 40  # 0.2 of 120, give or take four standard deviations

    meta = json.loads((corpus / "meta.json").read_text())
    assert meta["documents"] == {split: len(texts[split]) for split in texts}
    assert meta["vocab_size"] == 4096 and meta["eos_id"] == 0 and meta["bos_ids"] == []
    arrays = read_split(corpus, "tokens")
    assert all(array.dtype == np.uint16 for array in arrays)
    assert len(arrays) > 2  # a shard of each work unit
    log = corpus.with_name("corpus.log").read_text()
    for split in found:
        assert f"{len(texts[split]):,} documents, {sum(map(len, found[split])):,} tokens" in log


def test_prepare_puts_bos_first_and_splits_by_content(work, corpus, teacher):
    """A tokenizer that adds a BOS, and the documents in another order and format: the same split."""
    shutil.copytree(teacher, work / "bos_teacher")
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    bos = tokenizer.token_to_id("!")
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    tokenizer.save(str(work / "bos_teacher/tokenizer.json"))
    (work / "back.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in reversed(DOCUMENTS))
    )
    succeed("prepare.py", f"--input={work}/back.jsonl", f"--out={work}/back",
            f"--tokenizer={work}/bos_teacher", "--heldout_fraction=0.2")  # fmt: skip
    for split in ("tokens", "heldout"):
        expected = [[bos, *document] for document in reversed(documents_of(corpus, split))]
        assert documents_of(work / "back", split) == expected


# ---- clone, convert, transformers


def test_clone_converts_to_a_transformers_model(runs, exported):
    clone = convert.load_clone(runs["clone"] / "step_00000020")
    student = transformers_model(exported["float32"])
    assert student.config.hidden_size == 24 and student.config.vocab_size == 4096
    ids = ids_of(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, clone(ids), rtol=0, atol=1e-4)
    text = DOCUMENTS[4]
    ours = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(exported["float32"])(text)["input_ids"] == ours


def test_convert_to_bfloat16_rounds_the_weights_once(exported):
    full, half = (load_file(out / "model.safetensors") for out in exported.values())
    assert full.keys() == half.keys()
    for name, weight in full.items():
        assert weight.dtype == torch.float32 and half[name].dtype == torch.bfloat16
        assert torch.equal(half[name], weight.bfloat16()), name
    assert transformers_model(exported["bfloat16"]).dtype == torch.bfloat16
    assert convert.load_model(exported["bfloat16"]).config == convert.load_model(exported["float32"]).config


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_greedy_decoding_is_transformers(which, exported, teacher):
    path = exported["float32"] if which == "student" else teacher
    ours, theirs = convert.load_model(path), transformers_model(path)

    def both(prompts, new, stop):
        width = max(map(len, prompts))
        padded = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                   eos_token_id=stop, pad_token_id=stop)[:, width:].tolist()  # fmt: skip
        expected = [row[: row.index(stop)] if stop in row else row for row in expected]
        steps = list(generate(ours, prompts, new, stop_ids=(stop,)))
        return expected, [[token for token in row if token is not None] for row in zip(*steps, strict=True)]

    prompts = [ids_of(1, length)[0].tolist() for length in (11, 3, 7)]
    expected, found = both(prompts[:1], 40, 0)
    assert found == expected and len(found[0]) == 40
    expected, found = both(prompts, 24, 0)
    assert found == expected and len({tuple(row) for row in found}) == 3
    stop = found[1][4]  # the second row ends early, the others go on unless they meet it too
    expected, found = both(prompts, 24, stop)
    assert found == expected and len(found[1]) <= 4


def test_cut_students_and_those_of_own_weights_are_transformers_models(work, runs, teacher):
    """Of a clone with fewer layers the export, of own weights the checkpoint itself; either is sampled."""
    succeed("convert.py", f"--checkpoint={runs['muon']}", f"--out={work}/student_muon")
    original = convert.load_checkpoint(runs["muon"] / "step_00000020").merge()
    saved = runs["weights"] / "step_00000020"
    ids = ids_of(2, 40)
    for path, ours in ((work / "student_muon", original), (saved, convert.load_model(saved))):
        with torch.no_grad():
            expected = transformers_model(path)(ids).logits
            torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
    assert len(original.layers) == 1
    for name in ("muon", "weights"):
        assert succeed("sample.py", f"--model={runs[name]}", "--max_new_tokens=4", "--prompt=x").stdout


def test_free_weights_go_on_from_clones_and_any_model(work, runs, corpus, teacher):
    """From a clone's checkpoint as it ended; from a model of another shape with a word on what it lacks."""
    start = f"--init_from={runs['clone']}"
    succeed("train.py", *weights_options(teacher, corpus, work / "switched", start, "--max_steps=5"))
    assert metrics(work / "switched")[0]["loss"] < metrics(runs["clone"])[0]["loss"]
    start = f"--init_from={runs['muon']}"
    done = run("train.py", *weights_options(teacher, corpus, work / "wrong", start))
    assert done.returncode == 2
    assert "has the teacher's layers (1,)" in done.stderr.splitlines()[-1]
    # The layers that these options name are not the model's: it has another number of them.
    options = ("--train=weights", f"--init_from={runs['plain']}", "--max_steps=5", "--student_layers=(0,)")
    done = succeed("train.py", *clone_options(teacher, corpus, work / "any", *options))
    assert "clone losses left out: num_hidden_layers 2, not 1, head_dim 8, not 12" in done.stdout
    assert not [name for name in metrics(work / "any")[0] if name.startswith("clone_")]


# ---- plain models, resume, metrics


def test_plain_checkpoint_is_a_transformers_directory(runs, teacher):
    path = runs["plain"] / "step_00000004"
    ids, theirs = ids_of(2, 40), transformers_model(path)
    assert type(theirs) is LlamaForCausalLM and not theirs.config.tie_word_embeddings
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(convert.load_model(path)(ids), expected, rtol=0, atol=1e-4)
    assert (path / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    assert "def " in runs["plain"].with_name("plain.log").read_text()  # the sample at its end


@pytest.fixture(scope="module")
def resumed(work, teacher, corpus, runs):
    """The runs as they stood half way, gone on with."""
    outs = {name: work / f"resumed_{name}" for name in RUNS}
    for name, out in outs.items():
        shutil.copytree(runs[name], out)
        shutil.rmtree(convert.checkpoints(out)[-1])
    calls = [("train.py", *RUNS[name](teacher, corpus, out), "--resume=True") for name, out in outs.items()]
    for result in in_parallel(calls):
        assert result.returncode == 0, result.stderr
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
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    evaluations = [line for line in lines if "val_lm" in line]
    assert [line["step"] for line in evaluations] == [10, 20] and len(lines) == 6
    terms = {f"clone_{name}" for name in ("q", "k", "v", "attn_out", "gate", "up", "mlp_out")}
    for line in training:
        assert line["tokens"] == line["step"] * 4 * 32
        assert line.keys() >= {"loss", "lm", "kl", "clone", *terms, "grad_norm", "learning_rate",
                               "tokens_per_second"}  # fmt: skip
        assert line["clone"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
        # the options' defaults: weights 1, 1 and 0.2; T = 1
        expected = line["lm"] + line["kl"] + 0.2 * line["clone"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    for line in evaluations:
        assert line.keys() >= {f"val_{name}" for name in ("lm", "kl", "clone", "teacher_lm", *terms)}
    assert training[-1]["lm"] < training[0]["lm"]
    plain = metrics(runs["plain"])
    assert [line["step"] for line in plain if "loss" in line] == [1, 2, 3, 4]
    assert all(line["loss"] == line["lm"] for line in plain if "loss" in line)
    assert plain[-1].keys() == {"step", "tokens", "val_lm"}


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


def test_what_would_spoil_a_run_is_refused(work, runs, teacher, corpus):
    """A second run in its directory, other data or options when it goes on, another tokenizer's data."""
    other = work / "other_tokenizer"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    again = clone_options(teacher, corpus, runs["clone"])
    new = clone_options(teacher, corpus, work / "none", f"--tokenizer={other}")
    calls = {
        "holds a run: go on with --resume=True": again,
        "has seed = 1, not 7; a resumed run must keep it": (*again, "--resume=True", "--seed=7"),
        "has calibration_tokens = ": (*again, "--resume=True", "--calibration_tokens=64"),
        f"whose vocabulary is not {other}'s": new,
    }
    before = (runs["clone"] / "metrics.jsonl").read_text()
    for message, done in zip(
        calls, in_parallel([("train.py", *call) for call in calls.values()]), strict=True
    ):
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert (runs["clone"] / "metrics.jsonl").read_text() == before and not (work / "none").exists()


# ---- sampling


def test_samples_follow_their_seed(runs, teacher):
    clone, plain = f"--model={runs['clone']}", f"--model={runs['plain']}"
    options = ("--prompt=x", "--max_new_tokens=12")
    sampled = ("--temperature=1.5", "--top_k=500", "--top_p=0.99")
    two, second, greedy, first_k = in_parallel([
        ("sample.py", clone, *options, *sampled, "--num_samples=2", "--seed=7"),
        ("sample.py", clone, *options, *sampled, "--seed=8"),
        ("sample.py", plain, *options, "--temperature=0"),
        ("sample.py", plain, *options, "--temperature=0.7", "--top_k=1", "--seed=3"),
    ])  # fmt: skip
    for result in (two, second, greedy, first_k):
        assert result.returncode == 0, result.stderr
    texts = {"two": two.stdout, "second": second.stdout}
    _, first, again = (part.partition("x")[2] for part in texts["two"].split("--- "))
    assert first != again and len(first) > 5
    assert again == texts["second"].partition("x")[2]
    assert greedy.stdout == first_k.stdout


def test_pick_keeps_top_k_and_top_p():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(2000, 4)

    def share(temperature, top_k, top_p):
        chosen = pick(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
        return torch.bincount(chosen, minlength=4) / 2000

    for arguments, expected in [
        ((1.0, 0, 1.0), [0.1, 0.5, 0.15, 0.25]),
        ((1.0, 2, 1.0), [0, 2 / 3, 0, 1 / 3]),
        ((1.0, 0, 0.7), [0, 2 / 3, 0, 1 / 3]),
        ((1.0, 0, 0.4), [0, 1, 0, 0]),
        ((0.5, 2, 1.0), [0, 0.8, 0, 0.2]),
        ((0.0, 0, 1.0), [0, 1, 0, 0]),
    ]:
        found = share(*arguments)
        # four standard deviations of a share of 2000 draws
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=0.045)
        assert [p > 0 for p in found.tolist()] == [p > 0 for p in expected]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_wandb_never_stops_a_run(broken, work, corpus, teacher, monkeypatch):
    """A stand-in for the package, which fails at once or at the first line, or keeps what it is given."""
    where, kept = work / f"wandb_{broken}", work / f"wandb_{broken}.jsonl"
    where.mkdir()
    (where / "wandb.py").write_text(f"""
import json, sys
class Run:
    def log(self, values, step):
        open({str(kept)!r}, "a").write(json.dumps([step, values]) + "\\n")
        if {broken == "log"}: raise RuntimeError("no network")
def init(project, name, tags, config, resume):
    assert project == "low-rank-clone" and name == "trial" and tags == ("a",) and config["seed"] == 1
    if {broken == "init"}: raise RuntimeError("no key")
    return Run()
""")
    monkeypatch.setenv("PYTHONPATH", str(where))
    more = (
        "--wandb=True",
        "--run_name=trial",
        "--tags=('a',)",
        "--max_steps=2",
        "--log_every=1",
        "--save_every=0",
    )
    done = succeed("train.py", *clone_options(teacher, corpus, work / f"logged_{broken}", *more))
    assert len(metrics(work / f"logged_{broken}")) == 3
    if broken == "init":
        assert "wandb is off: no key" in done.stdout
    else:
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        assert [step for step, _ in lines] == [1, 2, 2] and "loss" in lines[0][1] and "val_lm" in lines[2][1]


# ---- mixtures, documents apart


def test_a_mixture_logs_each_source_and_keeps_documents_apart(work, text, teacher, corpus):
    succeed("prepare.py", f"--input={text}/2.jsonl", f"--out={work}/small", f"--tokenizer={teacher}",
            "--text_key=body", "--heldout_fraction=0.5")  # fmt: skip
    sources = {str(corpus): 1600, str(work / "small"): None}
    outs, more = (work / "mixed", work / "apart"), ("--max_steps=6", "--log_every=6", "--save_every=0")
    calls = [("train.py", *clone_options(teacher, sources, out, *more, f"--mask_documents={out == outs[1]}"))
             for out in outs]  # fmt: skip
    for result in in_parallel(calls):
        assert result.returncode == 0, result.stderr
    together, apart = (metrics(out)[0] for out in outs)
    losses = [together[f"lm/{name}"] for name in ("corpus", "small")]
    assert min(losses) < together["lm"] < max(losses)
    assert all(f"val_lm/{name}" in metrics(outs[0])[-1] for name in ("corpus", "small"))
    assert together["lm"] != apart["lm"] and abs(together["lm"] / apart["lm"] - 1) < 0.1
    refused = run("train.py", "--data=None", f"--out_dir={work}/none")
    assert refused.returncode == 2 and "random tokens are for tools/bench.py" in refused.stderr


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


def sft_options(student, chats, out_dir, *more):
    return (
        "--teacher=None", f"--init_from={student}", "--sft=True", f"--data={chats}", f"--out_dir={out_dir}",
        "--seq_len=64", "--max_steps=0", "--global_batch_size=8", "--micro_batch_size=8", "--log_every=1",
        "--sample_prompt=", "--eval_every=2", *more,
    )  # fmt: skip


def test_fine_tuning_on_answers(work, exported, chats):
    """Two epochs of SFT; eight micro-batches of one row take the same steps as one of eight rows."""
    calls = [("train.py", *sft_options(exported["float32"], chats, work / f"sft_{size}", "--epochs=2",
                                       f"--micro_batch_size={size}")) for size in (8, 1)]  # fmt: skip
    for result in in_parallel(calls):
        assert result.returncode == 0, result.stderr
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
    last = convert.checkpoints(work / "sft_8")[-1]
    assert transformers_model(last).config.hidden_size == 24


def test_evaluation_only(runs, exported, corpus, teacher):
    """A clone, and its export beside the teacher, have the losses of the run's last evaluation."""
    shared = (f"--teacher={teacher}", f"--data={corpus}", "--seq_len=32", "--global_batch_size=4",
              "--micro_batch_size=2", "--eval_blocks=3", "--eval_only=True",
              "--student_hidden_size=24")  # fmt: skip
    for path in (runs["clone"], exported["float32"], runs["weights"]):
        expected = metrics(runs["weights" if path == runs["weights"] else "clone"])[-1]
        done = succeed("train.py", *shared, f"--init_from={path}", "--out_dir=none")
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["val_lm"] == pytest.approx(expected["val_lm"], abs=2e-4)
        assert found["val_teacher_lm"] == pytest.approx(expected["val_teacher_lm"], abs=2e-4)
        assert "% of the teacher's quality" in done.stdout


def test_a_clone_goes_on_from_a_clone(work, runs, corpus, teacher):
    options = clone_options(
        teacher, corpus, work / "further", f"--init_from={runs['clone']}", "--max_steps=5"
    )
    succeed("train.py", *options)
    assert metrics(work / "further")[0]["loss"] < metrics(runs["clone"])[0]["loss"]


def test_benchmark():
    """FLOPs by part, then one line of JSON whose numbers follow from each other; no checkpoint."""
    small = ("config/bench_tiny.py", "--global_batch_size=2", "--micro_batch_size=1", "--max_steps=3")
    done = succeed("tools/bench.py", *small, "--compile=False")
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    flops = {line[2:22].strip(): float(line.split()[-4]) for line in table if line.endswith("GFLOP a step")}
    assert set(flops) == {
        "teacher", "compose", "student", "clone losses", "head", "backward of the rest", "all"
    }  # fmt: skip
    assert flops.pop("all") == pytest.approx(sum(flops.values()), abs=0.3)  # printed to a tenth
    assert found["tokens_per_second"] * found["seconds_per_step"] == pytest.approx(2 * 256, rel=1e-3)
    rate = sum(flops.values()) / found["seconds_per_step"]
    assert found["matmul_fraction"] == pytest.approx(rate / found["matmul_gflops"], rel=0.05)
    assert 0.2 < found["peak_memory_gib"] < 2


def test_compile_without_a_compiler_is_refused(work, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    calls = (
        ("train.py", "--compile=True", f"--out_dir={work}/none"),
        ("sample.py", f"--model={BUNDLED}", "--compile=True"),
    )
    for call in calls:
        refused = run(*call)
        assert refused.returncode == 2
        assert "error: compile needs a C++ compiler" in refused.stderr.splitlines()[-1]


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
        ("max_bad_steps", 0, "at least 1"),
        ("dtype", "float16", "use float32 or bfloat16"),
        ("student_hidden_size", None, "--target_params"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, value, allowed, monkeypatch):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}.*{allowed}"):
        train.check_options()


def test_a_device_that_is_not_there_and_ctrl_c_are_told_in_a_line(work):
    for name in ("gpu", "cuda"):
        done = run("train.py", f"--device={name}", f"--out_dir={work}/none")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: device is '{name}', which torch")
    command = [sys.executable, "train.py", f"--out_dir={work}/none"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # its options are read
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error == "stopped before the first step\n"


def test_a_teacher_with_a_value_that_is_not_finite_is_refused(work, teacher, corpus):
    broken = work / "broken"
    shutil.copytree(teacher, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = run("train.py", *clone_options(broken, corpus, work / "never"))
    assert done.returncode == 2
    message = "model.layers.1.mlp.up_proj.weight holds a value that is not finite"
    assert message in done.stderr.splitlines()[-1]
    assert not (work / "never").exists()


def test_a_resumed_run_says_how_its_schedule_changes(work, runs, teacher, corpus):
    out = work / "longer"
    shutil.copytree(runs["clone"], out)
    options = clone_options(teacher, corpus, out, "--resume=True")
    done = succeed("train.py", *options, "--max_steps=21", "--learning_rate=0.001", "--lm_weight=0")
    assert "lm_weight was 1.0 and is 0.0 from here on" in done.stdout
    assert "max_steps was 20 and is 21 from here on" in done.stdout
    assert "learning_rate was 0.003 and is 0.001 from here on" in done.stdout
    assert "at a learning rate of 5.00e-05" in done.stdout  # the last of 20 after the warmup
    assert "step 21 of 21: loss" in done.stdout  # stderr is no terminal
    assert "torch.distributed" not in done.stderr and "\r" not in done.stderr


def test_evaluation_of_a_model_with_another_vocabulary_is_refused(work, corpus, teacher):
    options = clone_options(
        BUNDLED, corpus, work / "none", f"--init_from={work / 'tiny'}", "--eval_only=True"
    )
    shape = LlamaConfig(**(SHAPE | {"vocab_size": 512}))
    LlamaForCausalLM(shape).save_pretrained(work / "tiny")
    done = run("train.py", *options)
    assert done.returncode == 2
    assert "tiny has 512 tokens; the teacher has 4096" in done.stderr.splitlines()[-1]
    done = run("train.py", *options, "--teacher=None", f"--tokenizer={teacher}")
    assert "the model has 512" in done.stderr.splitlines()[-1]


# ---- what contradicts itself


def test_a_teacher_of_a_billion_layers_takes_no_memory(work, teacher, corpus):
    """In 4 GiB of addresses, most of which torch takes; a tuple of the layers alone has 8."""
    (work / "tall").mkdir()
    for file in teacher.iterdir():
        shutil.copy(file, work / "tall")
    config = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": 1_000_000_000}
    (work / "tall/config.json").write_text(json.dumps(config))
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2); "
    limit += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit, "train.py", *clone_options(work / "tall", corpus, work / "none")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not (work / "none").exists(), done.stderr
    assert "num_hidden_layers is 1000000000; this code supports at most 10000" in done.stderr.splitlines()[-1]


def test_a_second_run_in_an_out_dir_is_refused_while_the_first_lives(work, teacher, corpus):
    out = work / "locked"
    options = clone_options(teacher, corpus, out, "--max_steps=100000", "--save_every=0", "--eval_every=0")
    command = [sys.executable, "train.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not first.stdout.readline().startswith("step "):
            assert first.poll() is None
        second = run("train.py", *options, "--resume=True", "--max_steps=1")
        assert second.returncode == 2 and first.poll() is None
        assert second.stderr.splitlines()[-1].startswith(f"error: another train.py is writing {out};")
        lines = (out / "metrics.jsonl").read_text()
    finally:
        first.kill()
        first.communicate()
    # A kill leaves no lock behind.
    third = succeed("train.py", *clone_options(teacher, corpus, out, "--max_steps=1", "--save_every=0"))
    assert lines and "step 1 of 1" in third.stdout


def test_a_student_of_another_tokenizer_is_refused(work, teacher, corpus):
    """As many tokens, two of them the other way round; a copy of the teacher's is a student."""
    for name in ("student_same", "student_other"):
        shutil.copytree(teacher, work / name)
    file = work / "student_other/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    for name, code in (("student_same", 0), ("student_other", 2)):
        options = clone_options(
            teacher, corpus, work / f"{name}_run", "--max_steps=1", "--student_hidden_size=48"
        )
        done = run("train.py", *options, "--train=weights", f"--init_from={work / name}")
        assert done.returncode == code, done.stderr
        assert ("has another vocabulary than" in done.stderr) == (code == 2)
    assert not (work / "student_other_run").exists()


def test_a_model_fine_tuned_on_chats_ends_its_turns(work):
    """Its base has another EOS than its template ends a turn by; generate() stops at both."""
    tokens = work / "base_tokens"
    tokens.mkdir()
    content = json.loads((BUNDLED / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, mark in enumerate(("<|im_start|>", "<|im_end|>")):
        content["added_tokens"].append({"id": 4096 + i, "content": mark, **flags})
    (tokens / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(BUNDLED / "tokenizer_config.json", tokens)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tokens / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (work / "base_chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 8)
    succeed("prepare.py", f"--input={work}/base_chats.jsonl", f"--tokenizer={tokens}", "--sft=True",
            f"--out={work}/base_rows", "--seq_len=32", "--heldout_fraction=0.0")  # fmt: skip
    for sft, ids in (("True", [0, 4097]), ("False", 0)):
        out = work / f"base_run_{sft}"
        shape = SHAPE | {"model_type": "llama", "vocab_size": 4098}
        length = 32 if sft == "True" else 8
        succeed("train.py", "--teacher=None", f"--sft={sft}", f"--data={work}/base_rows", "--max_steps=1",
                f"--tokenizer={tokens}", f"--seq_len={length}", "--global_batch_size=2", "--eval_every=0",
                "--micro_batch_size=2", f"--out_dir={out}", f"--model_config={shape}")  # fmt: skip
        succeed("convert.py", f"--checkpoint={out}", f"--out={out}_export")
        for path in (out / "step_00000001", out.with_name(f"{out.name}_export")):
            assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == ids
