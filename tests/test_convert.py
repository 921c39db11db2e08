"""convert.py for every family: a clone's checkpoint -> what transformers 4.51+ and 5 load right."""

import copy
import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import from_authors
import pytest
import torch
import transformers
from check import GOLDEN, golden
from conftest import BUNDLED, run
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, make_clone, randomise
from test_prepare import sentencepiece_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import model as models
import prepare
import sample

# eps, rope_theta and head_dim are far from any default, so that one that is lost shows in the logits.
SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "rms_norm_eps": 3e-3, "rope_theta": 700.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": {},
    "llama, tied": TIED,
    "llama, rope llama3": {"rope_scaling": LLAMA3},
    "mistral": {"sliding_window": None},
    "mistral, arch llama": {"sliding_window": None},
    "qwen2": {},
    "qwen2, tied": TIED,
    "qwen2, arch llama": {},
    "qwen2, tied, arch llama": TIED,
    "qwen3": {},
    "qwen3, tied": TIED,
}


def save_teacher(path, seed=0, **changes) -> models.Llama:
    teacher = models.Llama(convert.from_hf(SHAPE | {"model_type": "llama"} | changes))
    randomise(teacher.named_parameters(), seed)
    convert.save_model(teacher, path, torch.float32, None)
    return teacher


def save_random_clone(path, teacher_path, width=24, **changes) -> models.Student:
    clone = make_clone(save_teacher(teacher_path, **changes), width, student_rms_norm_eps=5e-3)
    randomise(clone.trained.named_parameters(), seed=1)
    convert.save_clone(clone, path, str(teacher_path), str(teacher_path))
    return clone


def call(script, **options) -> None:
    """A script's main() in this process, with these options and the defaults of all others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setattr(script, name, str(value) if isinstance(value, Path) else value)
        script.main()


def refused(message, script, **options) -> None:
    with pytest.raises(ValueError, match=message):
        call(script, **options)


def transformers_model(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


def random_ids():
    return torch.randint(3, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_export(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    family = name.split(",")[0]
    clone = save_random_clone(tmp_path / "clone", tmp_path / "teacher", model_type=family, **FAMILIES[name])
    out, arch = tmp_path / "student", "llama" if "arch" in name else "native"
    call(convert, checkpoint=tmp_path / "clone", out=out, arch=arch)
    theirs = transformers_model(out)
    written = "llama" if arch == "llama" else family
    assert type(theirs).__name__ == convert.ARCHITECTURES[written] and theirs.dtype == torch.float32
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == ("tied" in name)
    ids = random_ids()
    expected = clone(ids)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-4)
    assert caplog.records == []

    # A config.json without one of these is another model, or none that loads.
    config = json.loads((out / "config.json").read_text())
    for field in ("rms_norm_eps", "rope_theta", "head_dim", *(["rope_scaling"] if "llama3" in name else [])):
        lost = {key: value for key, value in config.items() if key != field}
        (out / "config.json").write_text(json.dumps(lost))
        try:
            found = transformers_model(out)(ids).logits
        except (RuntimeError, ValueError):
            assert field == "head_dim", field  # weights of another shape
            continue
        assert (found - expected).abs().max() > 1e-3, field  # ten times the tolerance above


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 makes all of that class anew")
@pytest.mark.parametrize("arch", ["native", "llama"])
def test_a_mistrals_tokenizer_stays_what_it_is(arch, tmp_path):
    """transformers 5 takes it as the file has it, and would make a Llama's of that class anew."""
    path, out = tmp_path / "mistral", tmp_path / "out"
    sentencepiece_tokenizer(path, "llama2")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    options = {"model_type": "mistral", "vocab_size": 400, "sliding_window": None}
    convert.save_model(save_teacher(tmp_path / "x", **options), path, torch.float32, None)
    call(convert, checkpoint=path, out=out, arch=arch)
    theirs, exported = (AutoTokenizer.from_pretrained(directory) for directory in (path, out))
    for text in (" Hi", "  Hi you", "</s> Hi"):
        expected = theirs(text).input_ids
        assert exported(text).input_ids == prepare.load_tokenizer(out).encode(text).ids == expected


def test_a_value_that_float16_cannot_hold_is_named_before_anything_is_written(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    teacher.norm.data[3] = 1e5
    convert.save_model(teacher, tmp_path / "teacher", torch.float32, None)
    export = {"checkpoint": tmp_path / "teacher", "out": tmp_path / "x"}
    refused("norm has a value that float16 cannot hold", convert, dtype="float16", **export)
    assert not list(tmp_path.glob("x*"))
    call(convert, dtype="bfloat16", **export)


def test_arch_llama_is_advised_where_it_helps_and_refused_where_no_llama_computes_it(tmp_path, capsys):
    """Other engines have no head_dim for a Qwen2: the student's is not its hidden size / heads."""
    save_random_clone(tmp_path / "qwen2", tmp_path / "teacher2", model_type="qwen2")
    save_teacher(tmp_path / "square", model_type="qwen2", head_dim=12)
    for source, arch, is_advised in (("qwen2", "native", True), ("qwen2", "llama", False),
                                     ("square", "native", False)):  # fmt: skip
        call(convert, checkpoint=tmp_path / source, out=tmp_path / f"{source}-{arch}", arch=arch)
        advice = "not its 16; for them export it with --arch=llama"
        assert (advice in capsys.readouterr().out) == is_advised

    save_random_clone(tmp_path / "qwen3", tmp_path / "teacher3", model_type="qwen3")
    save_random_clone(tmp_path / "odd", tmp_path / "teacher4", 22, model_type="qwen2")
    # Its heads do not divide its width: there is nothing to advise.
    call(convert, checkpoint=tmp_path / "odd", out=tmp_path / "odd-native")
    assert "not its 16; nor is 22 a multiple of 4, as of a Llama" in capsys.readouterr().out
    for source, words in (("qwen3", "no Llama computes what a layer of a qwen3 does"),
                          ("odd", "its hidden_size, 22, must be a multiple of its 4 heads")):  # fmt: skip
        export = {"checkpoint": tmp_path / source, "out": tmp_path / "x", "arch": "llama"}
        refused(f"arch is llama; {words}", convert, **export)
    assert not list(tmp_path.glob("x*"))


def test_shards(tmp_path):
    """No file is larger than it may be, and all that is written has the mode of the umask."""
    clone = save_random_clone(tmp_path / "clone", tmp_path / "teacher", model_type="qwen2")
    out = tmp_path / "student"
    umask = os.umask(0o027)
    try:
        call(convert, checkpoint=tmp_path / "clone", out=out, max_shard_gb=3e-5)
    finally:
        os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(sum(t.nbytes for t in load_file(f).values()) <= 3e4 for f in files)
    difference = transformers_model(out)(random_ids()).logits - clone(random_ids())
    assert difference.abs().max() < 1e-4
    refused(r"max_shard_gb is 0\.0; it must be above 0", convert, out=tmp_path / "x", max_shard_gb=0.0)


@pytest.mark.parametrize(
    "field, value",
    [("rms_norm_eps", -1e-5), ("rms_norm_eps", float("nan")), ("rms_norm_eps", "1e-5"), ("rope_theta", -1.0),
     ("head_dim", -2)],
)  # fmt: skip
def test_config_values_that_no_model_has(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}; this code supports a positive"):
        convert.from_hf(SHAPE | {"model_type": "llama", field: value})


@pytest.mark.parametrize("index", [{}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"norm": None}}])
def test_an_index_without_its_map(index, tmp_path):
    save_teacher(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"index.json has no weight_map|None does not exist, but"):
        convert.load_model(tmp_path)


def test_a_tokenizer_of_transformers_5_becomes_one_for_4_too(tmp_path):
    save_teacher(tmp_path / "teacher")
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path / "teacher")
    named = {"eos_token": "<|endoftext|>", "backend": "tokenizers"}
    theirs = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|endoftext|>"], **named}
    (tmp_path / "teacher/tokenizer_config.json").write_text(json.dumps(theirs))
    call(convert, checkpoint=tmp_path / "teacher", out=tmp_path / "student")
    assert convert.read_json(tmp_path / "student/tokenizer_config.json") == named | {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|endoftext|>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    tokenizer, before = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    for text in ("def f(x):", "a<|endoftext|>b"):
        assert tokenizer(text) == before(text)
    assert tokenizer.eos_token_id == before.eos_token_id == 0


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch, capsys):
    """One wrong weight in what was written; and a rule that reader and writer both leave out, which shows in
    transformers alone. A directory that is there already is not touched."""
    save_random_clone(tmp_path / "clone", tmp_path / "teacher")
    export = {"checkpoint": tmp_path / "clone", "out": tmp_path / "student"}
    save_model = convert.save_model

    def save_wrong(student, *arguments, **options):
        copied = copy.deepcopy(student)
        copied.layers[1]["down"][0, 0] += 1.0
        save_model(copied, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_model", save_wrong)
        patch.setitem(sys.modules, "transformers", None)
        refused(r"the logits of what was written differ by .* is not kept", convert, **export)
    with monkeypatch.context() as patch:
        patch.setattr(models, "rotate", lambda x, rope: x)
        refused(r"differ by .*transformers' of .*student within .*is not kept", convert, **export)
    assert not list(tmp_path.glob("student*"))
    call(convert, **export)
    assert "and transformers' of" in capsys.readouterr().out
    refused("student exists; remove it or choose another --out", convert, **export)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        call(convert, checkpoint=tmp_path / "clone", out=tmp_path / "alone")
    assert "by this code alone: transformers is not installed" in capsys.readouterr().out


def test_a_tokenizer_of_its_own_is_found_by_either_path_or_refused(tmp_path, monkeypatch):
    clone = save_random_clone(tmp_path / "first", tmp_path / "teacher")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    convert.save_clone(clone, tmp_path / "clone", str(tmp_path / "teacher"), "tokenizer")
    monkeypatch.chdir("teacher")
    assert convert.tokenizer_directory(tmp_path / "clone") == str(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="its tokenizer tokenizer is not there"):
        convert.tokenizer_directory(tmp_path / "clone")


@pytest.mark.parametrize(
    "options, words",
    [({"teacher": "source", "init_from": None}, "Distilled from source."),
     ({"teacher": None, "init_from": "source"}, "Made from source."),
     ({"teacher": None, "init_from": None}, "Trained from scratch.")],
)  # fmt: skip
def test_the_card_of_a_plain_model_says_what_its_run_came_from(options, words, tmp_path, monkeypatch):
    """By its run's options: what taught it, or what it began as, has its licence."""
    monkeypatch.chdir(tmp_path)
    for directory in ("source", "card", "run/step_00000020/trainer"):
        Path(directory).mkdir(parents=True)
    Path("source/LICENSE").write_text("the licence")
    state = {"step": 20, "options": options}
    Path("run/step_00000020/trainer/state.json").write_text(json.dumps(state))
    student = save_teacher(tmp_path / "student")
    convert.write_model_card(Path("card"), "student", student, Path("run/step_00000020"), None)
    assert words in Path("card/README.md").read_text()
    assert Path("card/LICENSE").exists() == ("source" in words)


def test_model_card(tmp_path):
    """Of a clone in a run, whose log goes on after the checkpoint and is cut short."""
    run, teacher, out = tmp_path / "run", tmp_path / "teacher", tmp_path / "student"
    path = run / "step_00000020"
    clone = save_random_clone(path, teacher)
    (teacher / "README.md").write_text(
        "---\nlanguage: en\nlicense:\n- other\nlicense_name: qwen-research\ntags:\n- x\n"
        "---\nlicense: not this\n"
    )
    (teacher / "LICENSE").write_text("the licence")
    (path / "trainer").mkdir()
    state = {"step": 20, "options": {"learning_rate": 0.003, "init_from": None}}
    (path / "trainer/state.json").write_text(json.dumps(state))
    lines = [
        {"step": 10, "tokens": 1000, "val_lm": 4.0, "val_teacher_lm": 2.5},
        {"step": 20, "tokens": 2000, "lm": 3.0},
        {"step": 20, "tokens": 2000, "val_lm": 3.25, "val_teacher_lm": 2.5},
        {"step": 30, "tokens": 3000, "val_lm": 1.0, "val_teacher_lm": 1.0},
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(log + '{"step": 40')
    call(convert, checkpoint=run, out=out)
    front_matter, text = (out / "README.md").read_text().split("\n---\n")
    assert front_matter.splitlines() == [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "license:", "- other",
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
    assert (out / "LICENSE").read_text() == "the licence"

    # exported again, from a directory whose own card has no licence: by its LICENSE file
    (out / "README.md").write_text("license terms: ask me\n")
    call(convert, checkpoint=out, out=tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    assert "license: other\nlicense_name: see-file\nlicense_link: LICENSE\n---" in card
    assert "Made from student." in card and "Trained" not in card and "options" not in card
    assert (tmp_path / "again/LICENSE").read_text() == "the licence"


def teacher_files(path, teacher):
    """A teacher's directory with everything that comes along."""
    convert.save_model(teacher, path, torch.float32, BUNDLED)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (path / "chat_template.jinja").write_text("{{ messages }}")


def assert_has_the_files_of(student, teacher):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (student / name).read_bytes() == (teacher / name).read_bytes()
    assert convert.read_json(student / "generation_config.json") == {"eos_token_id": [2, 7]}


@pytest.mark.parametrize("layout", ["model.safetensors", "."])
@pytest.mark.parametrize("case", ["A_i", "A_ii", "B_i", "C_i"])
def test_reference_checkpoint(case, layout, tmp_path):
    numbers, _, clone, _ = golden(case)
    teacher_files(tmp_path / "teacher", clone.teacher)
    tensors = {n.removeprefix("train."): t for n, t in numbers.items() if n.startswith("train.")}
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run/model.safetensors")
    source = tmp_path / "run" / layout
    call(from_authors, checkpoint=source, teacher=tmp_path / "teacher", out=tmp_path / "clone")
    call(convert, checkpoint=tmp_path / "clone", out=tmp_path / "student")
    theirs = transformers_model(tmp_path / "student")
    found = theirs(numbers["input_ids"]).logits[:, 1::2]  # those that are kept
    expected = numbers["student_logits"].reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert_has_the_files_of(tmp_path / "student", tmp_path / "teacher")
    assert theirs.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(
    "qkv, gate_up, tied", [(True, False, True), (False, True, False), (True, True, True)]
)
def test_reference_checkpoint_with_shared_projections(qkv, gate_up, tied, tmp_path):
    """Also one that was sharded, holds the teacher and the alignment's zoom_out, and has another eps."""
    teacher = save_teacher(tmp_path / "teacher")
    shared = {"share_qkv": qkv, "share_gate_up": gate_up, "tie_head_projection": tied}
    clone = make_clone(teacher, 24, student_rms_norm_eps=4e-3, **shared)
    randomise(clone.trained.named_parameters(), seed=1)
    own = clone.trained
    tensors = {"model.zoom": own.embedding_projection.T, "model.target_norm": own.norm}
    if not tied:
        tensors["zoom_down"] = own.head_projection.T
    for i, layer in enumerate(own.layers):
        p = layer.projections
        of_layer = {
            "target_input_layernorm": layer.input_norm, "target_post_attention_layernorm": layer.post_norm,
            "self_attn.zoom_down": p["o"].T, "mlp.zoom_down": p["down"].T,
            "mlp.zoom_out": torch.zeros(48, 24),
        }  # fmt: skip
        of_layer |= {"self_attn.zoom_up": p["qkv"]} if qkv else {f"self_attn.zoom_{m}": p[m] for m in "qkv"}
        of_layer |= (
            {"mlp.zoom_up": p["gate_up"]} if gate_up else {f"mlp.zoom_{m}": p[m].T for m in ("gate", "up")}
        )
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in of_layer.items()}
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "teacher/model.safetensors", run / "model-2.safetensors")
    tensors = {f"{name}.weight": tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, run / "model-1.safetensors")
    files = {file.name: load_file(file) for file in run.iterdir()}
    index = {"weight_map": {name: file for file, content in files.items() for name in content}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    (run / "config.json").write_text('{"model_type": "llama", "target_rms_norm_eps": 0.004}')
    call(from_authors, checkpoint=run, out=tmp_path / "clone", teacher=tmp_path / "teacher")
    student = convert.load_clone(tmp_path / "clone").merge()
    assert student.config == clone.config
    torch.testing.assert_close(student(random_ids()), clone(random_ids()), rtol=0, atol=1e-4)


def test_reference_checkpoint_errors(tmp_path):
    numbers = load_file(GOLDEN / "A_i/golden.safetensors")
    tensors = {n.removeprefix("train."): t for n, t in numbers.items() if n.startswith("train.")}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "theirs/model.safetensors"
    save_file(tensors, file)
    save_teacher(tmp_path / "narrow")
    save_teacher(tmp_path / "short", hidden_size=64)
    save_teacher(tmp_path / "right", hidden_size=64, num_hidden_layers=3)

    def is_refused(message, teacher="right"):
        options = {"checkpoint": file, "out": tmp_path / "x", "teacher": teacher and tmp_path / teacher}
        refused(message, from_authors, **options)

    is_refused("teacher is None; give its directory with --teacher=DIR", teacher=None)
    is_refused(r"has a teacher of hidden size 64; .*narrow has 48", teacher="narrow")
    is_refused(r"unexpected model\.layers\.2\.", teacher="short")
    by = r"is of the authors' code; .*tools/from_authors.py"
    refused(by, convert, checkpoint=tmp_path / "theirs", out=tmp_path / "x")
    del tensors["model.layers.1.self_attn.zoom_k.weight"]
    save_file(tensors, file)
    is_refused(r"missing model\.layers\.1\.self_attn\.zoom_k\.weight")
    file.write_bytes(file.read_bytes()[:1000])
    is_refused("truncated or not a safetensors file")
    save_file({"a": torch.zeros(2)}, file)
    is_refused(r"no tensor model\.zoom\.weight")


def test_moved_teacher_brings_its_tokenizer(tmp_path, capsys):
    recorded, moved = tmp_path / "teacher", tmp_path / "moved"
    teacher_files(recorded, convert.load_model(BUNDLED))
    clone = make_clone(convert.load_model(recorded), 96)
    randomise(clone.trained.named_parameters())
    convert.save_clone(clone, tmp_path / "clone", str(recorded), str(recorded))
    recorded.rename(moved)
    done = run("convert.py", f"--checkpoint={tmp_path}/clone", f"--out={tmp_path}/x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not there; say where with --teacher=DIR" in done.stderr
    export = {"checkpoint": tmp_path / "clone", "out": tmp_path / "student"}
    call(convert, teacher=moved, **export)
    assert_has_the_files_of(tmp_path / "student", moved)
    call(sample, model=tmp_path / "clone", teacher=moved, max_new_tokens=4)
    # Weights of its own start from what it composes with the teacher that is loaded.
    clone = convert.load_clone(tmp_path / "clone", str(moved))
    config = dataclasses.replace(clone.student_config, train="weights")
    student = models.Student(clone.config, clone.teacher, config)
    convert.load_weights(tmp_path / "clone", student)
    assert torch.equal(student(random_ids()), clone(random_ids()))
    assert "def read(" in capsys.readouterr().out

    # a tokenizer of its own stays where it was recorded
    shutil.copytree(BUNDLED, tmp_path / "own")
    convert.save_clone(clone, tmp_path / "clone", str(recorded), str(tmp_path / "own"))
    assert convert.tokenizer_directory(tmp_path / "clone", str(moved)) == str(tmp_path / "own")

    # another teacher of this size, and one of another
    other = convert.load_model(BUNDLED)
    randomise(other.named_parameters())
    convert.save_model(other, tmp_path / "other", torch.float32, BUNDLED)
    convert.save_model(clone.merge(), tmp_path / "small", torch.float32, BUNDLED)
    for wrong in ("other", "small"):
        words = f"{wrong} is not the teacher it was trained with"
        refused(words, convert, checkpoint=tmp_path / "clone", out=tmp_path / "x", teacher=tmp_path / wrong)
        refused(words, sample, model=tmp_path / "clone", teacher=tmp_path / wrong)
    assert not list(tmp_path.glob("x*"))


def assert_as_transformers_reads_it(path, out):
    logits = [transformers_model(directory)(torch.arange(64)[None]).logits for directory in (path, out)]
    assert convert.largest_difference(*logits) < 1e-6


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ties whatever is there")
@pytest.mark.parametrize("equal", [False, True])
def test_a_head_beside_a_tied_embedding(equal, tmp_path, capsys):
    save_teacher(tmp_path / "model", tie_word_embeddings=True)
    state = load_file(tmp_path / "model/model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1.0 if equal else 0.5)
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    call(convert, checkpoint=tmp_path / "model", out=tmp_path / "out")
    assert ("read as untied" in capsys.readouterr().err) == (not equal)
    assert convert.read_json(tmp_path / "out/config.json")["tie_word_embeddings"] == equal
    assert_as_transformers_reads_it(tmp_path / "model", tmp_path / "out")


def test_weights_beside_an_index(tmp_path, capsys):
    """Of the two, transformers reads the whole file."""
    save_teacher(tmp_path / "model", seed=1)
    other = save_teacher(tmp_path / "other", seed=2)
    convert.save_model(other, tmp_path / "sharded", torch.float32, None, max_shard_bytes=20_000)
    for file in (tmp_path / "sharded").glob("model*"):
        shutil.copy(file, tmp_path / "model")
    call(convert, checkpoint=tmp_path / "model", out=tmp_path / "out")
    words = "has model.safetensors and model.safetensors.index.json: the first is read"
    assert capsys.readouterr().err.count(words) == 1
    assert_as_transformers_reads_it(tmp_path / "model", tmp_path / "out")


def test_tensors_that_no_name_takes(tmp_path):
    """Leftovers of older files are let be; of what else is there, at most five are named."""
    save_teacher(tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    leftovers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    state |= {name: torch.ones(8) for name in leftovers}
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    convert.load_model(tmp_path / "model")
    state |= {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(64, 48) for i in range(2, 9)}
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    words = r"^[^;]*(unexpected model\.layers[^;]*; ){4}unexpected model\.layers[^;]* and 2 more$"
    refused(words, convert, checkpoint=tmp_path / "model", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
