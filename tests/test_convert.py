"""convert.py for every family: a clone's checkpoint -> what transformers 4.51+ and 5 load right."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import from_authors
import pytest
import torch
import transformers
from check import GOLDEN, golden
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, make_clone, randomise
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import model as models
from sample import generate

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "data/quickstart/teacher"
# eps, rope_theta and head_dim are far from any default, so that one that is lost shows in the logits.
SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "rms_norm_eps": 3e-3, "rope_theta": 700.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, rope llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, arch llama": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, arch llama": {"model_type": "qwen2"},
    "qwen2, tied, arch llama": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
}


def save_teacher(path, seed=0, **changes) -> models.Llama:
    teacher = models.Llama(convert.from_hf(SHAPE | changes))
    randomise(teacher.named_parameters(), seed)
    convert.save_model(teacher, path, torch.float32, None)
    return teacher


def save_random_clone(path, teacher_path, **changes) -> models.LowRankClone:
    teacher = save_teacher(teacher_path, **changes)
    clone = make_clone(teacher, 24, student_rms_norm_eps=5e-3)
    randomise(clone.trained().items(), seed=1)
    convert.save_clone(clone, path, str(teacher_path), str(teacher_path))
    return clone


def run_convert(monkeypatch, **options):
    for name, value in options.items():
        monkeypatch.setattr(convert, name, str(value) if isinstance(value, Path) else value)
    convert.main()


def run_from_authors(monkeypatch, **options):
    """tools/from_authors.py, then convert.py on what it wrote, where `student` names a directory."""
    student = options.pop("student", None)
    for name, value in options.items():
        monkeypatch.setattr(from_authors, name, str(value))
    from_authors.main()
    if student is not None:
        run_convert(monkeypatch, checkpoint=options["out"], out=student)


def command_line(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def warned():
    """What transformers logs at WARNING and above."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def random_ids(count=40):
    return torch.randint(3, SHAPE["vocab_size"], (2, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_export(name, tmp_path, monkeypatch, warned):
    clone = save_random_clone(tmp_path / "clone", tmp_path / "teacher", **FAMILIES[name])
    out, arch = tmp_path / "student", "llama" if "arch" in name else "native"
    run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=out, arch=arch)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    family = "llama" if arch == "llama" else FAMILIES[name]["model_type"]
    assert type(theirs).__name__ == convert.ARCHITECTURES[family] and theirs.dtype == torch.float32
    tied = FAMILIES[name].get("tie_word_embeddings", False)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    ids, prompt = random_ids(), random_ids(7)[:1]
    with torch.no_grad():
        expected = clone.logits(ids)
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    greedy = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    made = theirs.generate(prompt, max_new_tokens=12, eos_token_id=None, **greedy)[0, 7:].tolist()
    assert made == [token for (token,) in generate(convert.load_model(out), prompt.tolist(), 12)]
    assert warned == []

    # A config.json without one of these is another model, or none that loads.
    config = json.loads((out / "config.json").read_text())
    for field in ("rms_norm_eps", "rope_theta", "head_dim", *(["rope_scaling"] if "llama3" in name else [])):
        lost = {key: value for key, value in config.items() if key != field}
        (out / "config.json").write_text(json.dumps(lost))
        try:
            with torch.no_grad():
                found = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
        except (RuntimeError, ValueError):
            assert field == "head_dim", field  # weights of another shape
            continue
        assert (found - expected).abs().max() > 1e-3, field  # ten times the tolerance above


def test_arch_llama_refuses_what_no_llama_computes(tmp_path, monkeypatch):
    save_random_clone(tmp_path / "qwen3", tmp_path / "teacher3", **FAMILIES["qwen3"])
    with pytest.raises(ValueError, match="arch is llama; a qwen3 normalises q and k"):
        run_convert(monkeypatch, checkpoint=tmp_path / "qwen3", out=tmp_path / "x", arch="llama")
    teacher = save_teacher(tmp_path / "teacher2", **FAMILIES["qwen2"])
    clone = make_clone(teacher, 22)
    randomise(clone.trained().items())
    convert.save_clone(clone, tmp_path / "qwen2", str(tmp_path / "teacher2"), "")
    with pytest.raises(ValueError, match="its hidden_size, 22, must be a multiple of its 4 heads"):
        run_convert(monkeypatch, checkpoint=tmp_path / "qwen2", out=tmp_path / "x", arch="llama")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_shards(tmp_path, monkeypatch):
    clone = save_random_clone(tmp_path / "clone", tmp_path / "teacher", **FAMILIES["qwen2"])
    out = tmp_path / "student"
    run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=out, max_shard_gb=3e-5)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(sum(t.nbytes for t in load_file(f).values()) <= 3e4 for f in files)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        difference = theirs.eval()(random_ids()).logits - clone.logits(random_ids())
    assert difference.abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"max_shard_gb is 0\.0; it must be above 0"):
        run_convert(monkeypatch, out=tmp_path / "x", max_shard_gb=0.0)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05; this code supports a positive number"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'"),
        ("rope_theta", -1.0, "rope_theta is -1.0"),
        ("head_dim", -2, "head_dim is -2; this code supports a positive even number"),
    ],
)
def test_config_values_that_no_model_has(field, value, words):
    with pytest.raises(ValueError, match=words):
        convert.from_hf(SHAPE | {"model_type": "llama", field: value})


@pytest.mark.parametrize("index", [{}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"norm": None}}])
def test_an_index_without_its_map(index, tmp_path):
    save_teacher(tmp_path, model_type="llama")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"has no weight_map|does not exist, but"):
        convert.load_model(tmp_path)


# ---- what stands beside the weights


def test_a_tokenizer_of_transformers_5_becomes_one_for_4_too(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher", model_type="llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path / "teacher")
    file = tmp_path / "teacher/tokenizer_config.json"
    theirs = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>", "backend": "tokenizers",
              "extra_special_tokens": ["<|endoftext|>"]}  # fmt: skip
    file.write_text(json.dumps(theirs))
    run_convert(monkeypatch, checkpoint=tmp_path / "teacher", out=tmp_path / "student")
    written = convert.read_json(tmp_path / "student/tokenizer_config.json")
    assert written == {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "backend": "tokenizers",
        "additional_special_tokens": ["<|endoftext|>"], "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    before = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for text in ("def f(x):", "a<|endoftext|>b"):
        assert tokenizer(text) == before(text)
    assert tokenizer.eos_token_id == before.eos_token_id == 0


def test_all_files_of_an_export_have_one_mode(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher", model_type="llama")
    umask = os.umask(0o027)
    try:
        run_convert(monkeypatch, checkpoint=tmp_path / "teacher", out=tmp_path / "student", max_shard_gb=3e-5)
    finally:
        os.umask(umask)
    files = list((tmp_path / "student").iterdir())
    assert len(files) > 4 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    """One wrong weight in what was written; and a directory that is there already is not touched."""
    save_random_clone(tmp_path / "clone", tmp_path / "teacher", model_type="llama")
    straight = convert.save_model

    def wrong(student, *arguments, **options):
        copied = copy.deepcopy(student)
        copied.layers[1].down[0, 0] += 1.0
        straight(copied, *arguments, **options)

    monkeypatch.setattr(convert, "save_model", wrong)
    with pytest.raises(ValueError, match=r"the logits of what was written differ by .* is not kept"):
        run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=tmp_path / "student")
    assert not list(tmp_path.glob("student*"))
    monkeypatch.setattr(convert, "save_model", straight)
    (tmp_path / "student").mkdir()
    with pytest.raises(ValueError, match="student exists; remove it or choose another --out"):
        run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=tmp_path / "student")


def test_a_tokenizer_of_its_own_is_found_by_either_path_or_refused(tmp_path, monkeypatch):
    clone = save_random_clone(tmp_path / "first", tmp_path / "teacher", model_type="llama")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    convert.save_clone(clone, tmp_path / "clone", str(tmp_path / "teacher"), "tokenizer")
    monkeypatch.chdir("teacher")
    assert convert.tokenizer_directory(tmp_path / "clone") == str(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="its tokenizer tokenizer is not there"):
        convert.tokenizer_directory(tmp_path / "clone")


def test_the_card_of_free_weights_names_their_teacher(tmp_path):
    """Its checkpoint is a plain model, whose run says what taught it and whose licence it has."""
    teacher = tmp_path / "teacher"
    step = tmp_path / "run/step_00000020"
    (step / "trainer").mkdir(parents=True)
    teacher.mkdir()
    (teacher / "LICENSE").write_text("the licence")
    student = save_teacher(tmp_path / "student", model_type="llama")
    for options, words in (
        ({"teacher": str(teacher), "init_from": None}, "Distilled from teacher."),
        ({"teacher": None, "init_from": str(teacher)}, "Made from teacher."),
        ({"teacher": None, "init_from": None}, "Trained from scratch."),
    ):
        (step / "trainer/state.json").write_text(json.dumps({"step": 20, "options": options}))
        out = tmp_path / words
        out.mkdir()
        convert.write_model_card(out, "student", student, step, None)
        assert words in (out / "README.md").read_text()
        assert (out / "LICENSE").exists() == ("teacher" in words)


def test_model_card(tmp_path, monkeypatch):
    """Of a clone in a run, whose log goes on after the checkpoint and is cut short."""
    run = tmp_path / "run"
    path = run / "step_00000020"
    clone = save_random_clone(path, tmp_path / "teacher", model_type="llama")
    (tmp_path / "teacher/README.md").write_text(
        "---\nlanguage: en\nlicense: other\nlicense_name: qwen-research\n---\nlicense: not this\n"
    )
    (tmp_path / "teacher/LICENSE").write_text("the licence")
    (path / "trainer").mkdir()
    state = {"step": 20, "options": {"learning_rate": 0.003, "init_from": None}}
    (path / "trainer/state.json").write_text(json.dumps(state))
    evaluation = {"val_lm": 3.25, "val_teacher_lm": 2.5}
    lines = [
        {"step": 10, "tokens": 1000, "val_lm": 4.0, "val_teacher_lm": 2.5},
        {"step": 20, "tokens": 2000, "lm": 3.0},
        {"step": 20, "tokens": 2000, **evaluation},
        {"step": 30, "tokens": 3000, "val_lm": 1.0, "val_teacher_lm": 1.0},
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(log + '{"step": 40')
    run_convert(monkeypatch, checkpoint=run, out=tmp_path / "student")
    card = (tmp_path / "student/README.md").read_text()
    front_matter, text = card.split("\n---\n")
    assert front_matter.splitlines() == [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "license: other",
        "license_name: qwen-research",
    ]  # fmt: skip
    count = sum(weight.numel() for weight in clone.merge().parameters())
    for expected in (
        "A low-rank clone (https://arxiv.org/abs/2505.12781) of teacher.",
        f"{count:,} parameters: hidden size 24, 2 layers, 4 heads of 16, vocabulary 96.",
        "Trained for 20 steps, 2,000 tokens.",
        "Held-out loss at step 20, nats a token: 3.2500; its teacher's: 2.5000",
        'AutoModelForCausalLM.from_pretrained("student", torch_dtype="auto")',
        "    learning_rate = 0.003",
    ):
        assert expected in text
    assert (tmp_path / "student/LICENSE").read_text() == "the licence"

    # exported again, from a directory whose own card has no licence: by its LICENSE file
    (tmp_path / "student/README.md").unlink()
    run_convert(monkeypatch, checkpoint=tmp_path / "student", out=tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    assert "license: other\nlicense_name: see-file\nlicense_link: LICENSE\n---" in card
    assert "Made from student." in card and "Trained" not in card and "options" not in card
    assert (tmp_path / "again/LICENSE").read_text() == "the licence"


def test_a_qwen2_that_other_engines_would_take_wrong(tmp_path, monkeypatch, capsys):
    """They have no head_dim for it: the student's is not its hidden size / heads, the teacher's is."""
    save_random_clone(tmp_path / "clone", tmp_path / "teacher", model_type="qwen2")
    run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=tmp_path / "native")
    assert "not its 16; for them export it with --arch=llama" in capsys.readouterr().out
    run_convert(monkeypatch, checkpoint=tmp_path / "clone", out=tmp_path / "llama", arch="llama")
    assert "--arch=llama" not in capsys.readouterr().out
    save_teacher(tmp_path / "square", model_type="qwen2", head_dim=12)
    run_convert(monkeypatch, checkpoint=tmp_path / "square", out=tmp_path / "same", arch="native")
    assert "--arch=llama" not in capsys.readouterr().out


# ---- the authors' checkpoints


def teacher_files(path, teacher):
    """A teacher's directory with everything that comes along."""
    convert.save_model(teacher, path, torch.float32, BUNDLED)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (path / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("layout", ["file", "directory"])
@pytest.mark.parametrize("case", ["A_i", "A_ii", "B_i", "C_i"])
def test_reference_checkpoint(case, layout, tmp_path, monkeypatch):
    numbers, _, clone, _ = golden(case)
    teacher_files(tmp_path / "teacher", clone.teacher)
    tensors = {n.removeprefix("train."): t for n, t in numbers.items() if n.startswith("train.")}
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/model.safetensors"
    save_file(tensors, file)
    source = file if layout == "file" else file.parent
    places = {"teacher": tmp_path / "teacher", "out": tmp_path / "clone", "student": tmp_path / "student"}
    run_from_authors(monkeypatch, checkpoint=source, **places)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found = theirs.eval()(numbers["input_ids"]).logits[:, 1::2]  # those that are kept
    expected = numbers["student_logits"].reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()
    assert theirs.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(
    "qkv, gate_up, tied", [(True, False, True), (False, True, False), (True, True, True)]
)
def test_reference_checkpoint_with_shared_projections(qkv, gate_up, tied, tmp_path, monkeypatch):
    """Also one that was sharded, holds the teacher and the alignment's zoom_out, and has another eps."""
    teacher = save_teacher(tmp_path / "teacher", model_type="llama")
    clone = make_clone(teacher, 24, share_qkv=qkv, share_gate_up=gate_up, tie_head_projection=tied,
                                student_rms_norm_eps=4e-3)  # fmt: skip
    randomise(clone.trained().items(), seed=1)
    tensors = {"model.zoom.weight": clone.embedding_projection.T, "model.target_norm.weight": clone.norm}
    if not tied:
        tensors["zoom_down.weight"] = clone.head_projection.T
    for i, layer in enumerate(clone.layers):
        at, p = f"model.layers.{i}.", layer.projections
        tensors[f"{at}target_input_layernorm.weight"] = layer.input_norm
        tensors[f"{at}target_post_attention_layernorm.weight"] = layer.post_norm
        tensors[f"{at}self_attn.zoom_down.weight"], tensors[f"{at}mlp.zoom_down.weight"] = (
            p["o"].T,
            p["down"].T,
        )
        tensors[f"{at}mlp.zoom_out.weight"] = torch.zeros(48, 24)
        if qkv:
            tensors[f"{at}self_attn.zoom_up.weight"] = p["qkv"]
        else:
            tensors |= {f"{at}self_attn.zoom_{m}.weight": p[m] for m in "qkv"}
        if gate_up:
            tensors[f"{at}mlp.zoom_up.weight"] = p["gate_up"]
        else:
            tensors |= {f"{at}mlp.zoom_{m}.weight": p[m].T for m in ("gate", "up")}
    run = tmp_path / "run"
    run.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    files = {
        "model-1.safetensors": tensors,
        "model-2.safetensors": load_file(tmp_path / "teacher/model.safetensors"),
    }
    for file, content in files.items():
        save_file(content, run / file)
    index = {"weight_map": {name: file for file, content in files.items() for name in content}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "config.json").write_text('{"model_type": "llama", "target_rms_norm_eps": 0.004}')
    run_from_authors(monkeypatch, checkpoint=run, out=tmp_path / "clone", teacher=tmp_path / "teacher",
                     student=tmp_path / "student")  # fmt: skip
    student = convert.load_model(tmp_path / "student")
    assert student.config == clone.config
    torch.testing.assert_close(student.logits(random_ids()), clone.logits(random_ids()), rtol=0, atol=1e-4)


def test_reference_checkpoint_errors(tmp_path, monkeypatch):
    numbers = load_file(GOLDEN / "A_i/golden.safetensors")
    tensors = {n.removeprefix("train."): t for n, t in numbers.items() if n.startswith("train.")}
    file = tmp_path / "run.safetensors"
    save_file(tensors, file)
    with pytest.raises(ValueError, match="teacher is None; give its directory with --teacher=DIR"):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x")
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    (tmp_path / "theirs/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"is of the authors' code; .*tools/from_authors.py"):
        run_convert(monkeypatch, checkpoint=tmp_path / "theirs", out=tmp_path / "x")
    save_teacher(tmp_path / "narrow", model_type="llama")
    with pytest.raises(ValueError, match=r"has a teacher of hidden size 64; .*narrow has 48"):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x", teacher=tmp_path / "narrow")
    save_teacher(tmp_path / "short", model_type="llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.2\."):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x", teacher=tmp_path / "short")
    del tensors["model.layers.1.self_attn.zoom_k.weight"]
    save_file(tensors, file)
    save_teacher(tmp_path / "right", model_type="llama", hidden_size=64, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.zoom_k\.weight"):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x", teacher=tmp_path / "right")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x", teacher=tmp_path / "right")
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"no tensor model\.zoom\.weight"):
        run_from_authors(monkeypatch, checkpoint=file, out=tmp_path / "x", teacher=tmp_path / "right")


# ---- a teacher that has moved, or is another


def test_moved_teacher_brings_its_tokenizer(tmp_path):
    teacher_files(tmp_path / "teacher", convert.load_model(BUNDLED))
    clone = make_clone(convert.load_model(tmp_path / "teacher"), 96)
    randomise(clone.trained().items())
    recorded = str(tmp_path / "teacher")
    convert.save_clone(clone, tmp_path / "clone", recorded, recorded)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    checkpoint, moved = f"--checkpoint={tmp_path}/clone", f"--teacher={tmp_path}/moved"
    refused = command_line("convert.py", checkpoint, f"--out={tmp_path}/x")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "is not there; say where with --teacher=DIR" in refused.stderr
    done = command_line("convert.py", checkpoint, moved, f"--out={tmp_path}/student")
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()
    generation = convert.read_json(tmp_path / "student/generation_config.json")
    assert generation == {"eos_token_id": [2, 7]}
    sampled = command_line("sample.py", f"--model={tmp_path}/clone", moved, "--max_new_tokens=4")
    assert sampled.returncode == 0 and "def read(" in sampled.stdout, sampled.stderr

    # a tokenizer of its own stays where it was recorded
    shutil.copytree(BUNDLED, tmp_path / "own")
    convert.save_clone(clone, tmp_path / "clone", recorded, str(tmp_path / "own"))
    own = convert.tokenizer_directory(tmp_path / "clone", str(tmp_path / "moved"))
    assert own == str(tmp_path / "own")

    # another teacher of this size, and one of another
    other = convert.load_model(BUNDLED)
    randomise(other.named_parameters())
    convert.save_model(other, tmp_path / "other", torch.float32, BUNDLED)
    convert.save_model(clone.merge(), tmp_path / "small", torch.float32, BUNDLED)
    for script, source in (("convert.py", checkpoint), ("sample.py", f"--model={tmp_path}/clone")):
        for wrong in ("other", "small"):
            out = [f"--out={tmp_path}/x"] if script == "convert.py" else []
            refused = command_line(script, source, f"--teacher={tmp_path}/{wrong}", *out)
            assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
            error = refused.stderr.splitlines()[-1]
            assert f"{wrong} is not the teacher it was trained with" in error
    assert not (tmp_path / "x").exists()


# ---- directories that contradict themselves


def transformers_differ(path, other) -> float:
    ids = torch.arange(64)[None]
    theirs = [
        AutoModelForCausalLM.from_pretrained(directory).float()(ids).logits for directory in (path, other)
    ]
    return convert.largest_difference(*theirs)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ties whatever is there")
@pytest.mark.parametrize("equal", [False, True])
def test_a_head_beside_a_tied_embedding(equal, tmp_path):
    save_teacher(tmp_path / "model", model_type="llama", tie_word_embeddings=True)
    state = load_file(tmp_path / "model/model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1.0 if equal else 0.5)
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    done = convert_by_command(tmp_path / "model", tmp_path / "out")
    assert ("read as untied" in done.stderr) == (not equal)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == equal
    assert transformers_differ(tmp_path / "model", tmp_path / "out") < 1e-6


def convert_by_command(source, out, code=0, **environment):
    command = [sys.executable, "convert.py", f"--checkpoint={source}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_weights_beside_an_index(tmp_path):
    """Of the two, transformers reads the whole file."""
    save_teacher(tmp_path / "model", seed=1, model_type="llama")
    other = save_teacher(tmp_path / "other", seed=2, model_type="llama")
    convert.save_model(other, tmp_path / "sharded", torch.float32, None, max_shard_bytes=20_000)
    for file in (tmp_path / "sharded").glob("model*"):
        shutil.copy(file, tmp_path / "model")
    done = convert_by_command(tmp_path / "model", tmp_path / "out")
    assert "has model.safetensors and model.safetensors.index.json: the first is read" in done.stderr
    assert transformers_differ(tmp_path / "model", tmp_path / "out") < 1e-6


def test_tensors_that_no_name_takes(tmp_path):
    """Leftovers of older files are let be; of what else is there, at most five are named."""
    save_teacher(tmp_path / "model", model_type="llama")
    state = load_file(tmp_path / "model/model.safetensors")
    leftovers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    state |= {name: torch.ones(8) for name in leftovers}
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    convert.load_model(tmp_path / "model")
    state |= {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(64, 48) for i in range(2, 9)}
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    done = convert_by_command(tmp_path / "model", tmp_path / "out", code=2)
    assert done.stderr.count("unexpected model.layers.") == 5 and "and 2 more" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "out").exists()


def test_an_export_is_compared_with_transformers_where_it_is_installed(tmp_path, monkeypatch, capsys):
    """A rule of a family that reader and writer both leave out shows there alone."""
    save_teacher(tmp_path / "model", model_type="llama")
    for name, value in (("checkpoint", str(tmp_path / "model")), ("dtype", "float32"), ("arch", "native")):
        monkeypatch.setattr(convert, name, value)
    monkeypatch.setattr(convert, "out", str(tmp_path / "right"))
    convert.main()
    assert "and transformers' of" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(convert, "out", str(tmp_path / "wrong"))
        patch.setattr(models, "rotate", lambda x, rope: x)
        with pytest.raises(ValueError, match=r"differ by .*transformers' of .*wrong within .*is not kept"):
            convert.main()
    assert not list(tmp_path.glob("wrong*"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        patch.setattr(convert, "out", str(tmp_path / "alone"))
        convert.main()
    assert "by this code alone: transformers is not installed" in capsys.readouterr().out
