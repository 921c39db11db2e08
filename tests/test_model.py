"""model.py against the authors' numbers, transformers, and the formulas written out."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
import types

import bench
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

import convert
import model
import train
from model import ChunkedLoss, GatedLinear, Llama, LossConfig, Student, StudentConfig


def relative(actual, expected) -> float:
    """Largest difference over the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def tiny(family="llama", **changes) -> dict:
    """A small config.json, positions left at their defaults."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return {"model_type": family, **sizes, **heads, "rms_norm_eps": 1e-5, **changes}


def randomise(parameters, seed=0):
    """Norms around 1, matrices and biases around 0; none is what leaving it out would make it."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in parameters:
        values = torch.empty(weight.shape).normal_(0.0, 0.2, generator=generator)
        weight.data.copy_(values + ("norm" in name))


def random_llama(seed=0, **changes) -> Llama:
    llama = Llama(convert.from_hf(tiny(**changes)))
    randomise(llama.named_parameters(), seed)
    return llama


PAPER = {
    "share_qkv": False, "share_gate_up": False, "tie_head_projection": True, "student_rms_norm_eps": 1e-5,
    "lm_weight": 1.0, "kl_weight": 1.0, "kl_temperature": 40.0, "clone_weight": 0.2,
    "clone_attn_out": "student", "clone_mlp_out": "student", "clone_scale": "none", "clone_skip": (),
    "clone_skip_layers": (), "train": "projections", "student_layers": None,
    "student_intermediate_size": None,
}  # fmt: skip


def make_clone(teacher, d_s, **options) -> Student:
    """A clone by train.py's options, those of the paper where they are not given."""
    options = PAPER | options | {"student_hidden_size": d_s}
    student, losses = (
        config(**{field.name: options.pop(field.name) for field in dataclasses.fields(config)})
        for config in (StudentConfig, LossConfig)
    )
    assert not options
    return Student(model.student_shape(teacher.config, student), teacher, student, losses)


def random_clone(teacher=None, d_s=16, **options) -> Student:
    clone = make_clone(teacher or random_llama(), d_s, **options)
    randomise(trained(clone).items(), seed=1)
    return clone


def trained(student) -> dict:
    return dict(student.trained.named_parameters())


def plain_student(llama) -> Student:
    """The same weights as a plain model that trains."""
    student = Student(llama.config)
    student.trained.load_state_dict(llama.state_dict())
    return student


def save(llama, path, dtype=torch.float32, **options) -> None:
    convert.save_model(llama, path, dtype, None, **options)


def random_batch(batch, length, vocab_size=96, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return ids[:, :-1], labels


# ---- transformers

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 256}  # at theta 5e5 keeps one frequency of 4, blends one
FAMILIES = {
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "llama, biases": {"family": "llama", "attention_bias": True},
    "llama, rope llama3": {"family": "llama", "rope": LLAMA3},
    "llama, rope linear": {"family": "llama", "rope": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "smollm3": {"family": "smollm3", "attention_bias": True, "no_rope_layer_interval": 2, "pad_token_id": 0},
    "smollm3, by a list": {"family": "smollm3", "no_rope_layers": [0, 1], "pad_token_id": 0},
}
LOGIT_TOLERANCE = 1e-4  # absolute, on logits of about 1 to 10: float32 in another order


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    options = dict(FAMILIES[name])
    rope, theta = options.pop("rope", {"rope_type": "default"}), 5e5
    config = tiny(**options)
    source = transformers.AutoConfig.for_model(**config, rope_parameters={**rope, "rope_theta": theta})
    theirs = transformers.AutoModelForCausalLM.from_config(source, dtype=torch.float32)
    randomise(theirs.named_parameters())
    theirs.save_pretrained(tmp_path)
    ids, _ = random_batch(2, 40)
    expected = theirs(ids).logits.detach()
    old_rope = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **rope}
    if rope["rope_type"] == "linear":
        del old_rope["rope_type"]  # as transformers wrote it before 4.43
    version_5 = {"rope_parameters": {**rope, "rope_theta": theta}}
    for style in ({"rope_theta": theta, "rope_scaling": old_rope}, version_5):
        (tmp_path / "config.json").write_text(json.dumps(config | style))
        ours = convert.load_model(tmp_path)
        assert (ours(ids) - expected).abs().max() < LOGIT_TOLERANCE, style
    # And back: transformers reads what save_model writes.
    save(ours, tmp_path / "saved")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (back(ids).logits - expected).abs().max() < LOGIT_TOLERANCE


def test_rope_scaling_counts_where_rope_parameters_are_there_too(tmp_path):
    save(random_llama(), tmp_path)
    file = tmp_path / "config.json"
    both = {"rope_parameters": {"rope_type": "linear", "factor": 9.0, "rope_theta": 7.0}, "rope_theta": 300.0}
    ids, _ = random_batch(2, 40)
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, LLAMA3):
        config = json.loads(file.read_text()) | both | {"rope_scaling": scaling}
        file.write_text(json.dumps(config))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert (convert.load_model(tmp_path)(ids) - theirs).abs().max() < LOGIT_TOLERANCE, scaling


# ---- loading


def test_wrong_weights_are_named_and_a_truncated_file_refused(tmp_path):
    save(random_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, file)
    with pytest.raises(ValueError) as error:
        convert.load_model(tmp_path)
    assert "missing model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in str(error.value)
    assert "model.norm.weight is [31], config.json says [32]" in str(error.value)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        convert.load_model(tmp_path)
    index = {"weight_map": {"norm": f"../{tmp_path.name}/model.safetensors"}}
    file.rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names \.\./.*, which is not a file of its directory"):
        convert.load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model_type", {"family": "gpt2"}),
        ("sliding_window", {"family": "mistral", "sliding_window": 128}),
        ("sliding_window", {"family": "mistral", "sliding_window": 128, "use_sliding_window": False}),
        ("sliding_window", {"family": "mistral", "sliding_window": 128, "max_position_embeddings": None}),
        ("sliding_window", {"family": "qwen2", "sliding_window": 128, "use_sliding_window": True}),
        ("layer_types", {"family": "qwen2", "layer_types": ["sliding_attention"]}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("mlp_bias", {"mlp_bias": True}),
        ("rope_scaling type is 'yarn'", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("rope_scaling type is 'yarn'", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        ("rope_scaling is 'linear'", {"rope_scaling": "linear"}),
        ("rope_scaling factor is 0", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
        ("rope_scaling factor is '2'", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}),
        ("rope_scaling factor is None", {"rope_scaling": {"rope_type": "linear"}}),
        ("original_max_pos", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128}),
        ("num_key_value_heads is 2.0", {"num_key_value_heads": 2.0}),
        ("num_key_value_heads is -2", {"num_key_value_heads": -2}),
        ("head_dim is '32'", {"head_dim": "32"}),
        ("tie_word_embeddings is 'false'", {"tie_word_embeddings": "false"}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("quantization_config", {"quantization_config": {"quant_method": "awq"}}),
        ("hidden_size", {"hidden_size": 0}),
        ("no_rope_layers", {"family": "smollm3", "no_rope_layers": [1]}),
    ],
)
def test_unsupported_config_names_the_field(field, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny(**changes)))
    with pytest.raises(ValueError, match=f"config.json: {field}"):
        convert.load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        convert.load_model(tmp_path)


# ---- the loss head and the two functions with a backward of their own


def direct_loss(z, labels, teacher_z, lm_scale, kl_scale, temperature):
    """(loss, CE [N], KL [N]) of logits [N, V], as the formulas say."""
    lm = F.cross_entropy(z, labels, ignore_index=-100, reduction="none")
    kl = torch.zeros_like(lm)
    if teacher_z is not None:
        log_p, log_q = F.log_softmax(teacher_z / temperature, -1), F.log_softmax(z / temperature, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return lm_scale * lm.sum() + kl_scale * temperature**2 * kl.sum(), lm, kl


def normal(dtype, *shapes, std=1.0, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return [torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_the_formula(dtype, chunk, temperature, teacher):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (23,), generator=generator)
    labels[[0, 7, 8, 22]] = -100
    shapes = (23, 16), (50, 16), (23, 24), (50, 24)
    hidden, head, *teacher_inputs = normal(dtype, *shapes, std=1.4, generator=generator)  # logits of about ±8
    scales = 0.7, 0.3, temperature
    x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    inputs = teacher_inputs if teacher else (None, None)
    loss, lm, kl, teacher_lm, _ = ChunkedLoss.apply(x, w, labels, *inputs, scales, chunk, model.run_chunk)
    (3 * loss).backward()
    # Float32 against float64: rounding of 6e-8 in sums of some 50 terms. Of bfloat16 the same logits, then
    # float32; its gradients leave in bfloat16: one rounding, 2^-8, either way.
    wide, limit = (torch.float64, 1e-5) if dtype == torch.float32 else (dtype, 2**-7)
    own, theirs = ([t.to(wide) for t in pair] for pair in ((hidden, head), teacher_inputs))
    z = own[0].requires_grad_() @ own[1].requires_grad_().T
    z, teacher_z = (t.to(torch.promote_types(wide, torch.float32)) for t in (z, theirs[0] @ theirs[1].T))
    expected, expected_lm, expected_kl = direct_loss(z, labels, teacher_z if teacher else None, *scales)
    (3 * expected).backward()
    assert relative(loss, expected) < 1e-5 and relative(lm, expected_lm) < 1e-5
    assert relative(x.grad, own[0].grad) < limit and relative(w.grad, own[1].grad) < limit
    if teacher:
        assert relative(kl, expected_kl) < 1e-5
        if temperature == 1.0:
            assert relative(teacher_lm, direct_loss(teacher_z, labels, None, *scales)[1]) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 40.0])
def test_compiled_a_chunk_has_the_same_loss_and_gradient(temperature):
    """It picks the label's logit another way than without a compiler."""
    logits, teacher_logits = normal(torch.float32, (6, 50), (6, 50), std=3.0)
    labels = torch.tensor([3, -100, 0, 49, -100, 7])
    weights = [torch.tensor(0.7), torch.tensor(0.3)]
    arguments = logits, labels, teacher_logits, temperature, weights, torch.float32
    compiled = torch.compile(model.run_chunk, backend="aot_eager", fullgraph=True)
    (costs, grad), (expected, expected_grad) = compiled(*arguments), model.run_chunk(*arguments)
    assert costs.keys() == expected.keys() and relative(grad, expected_grad) < 1e-5
    for name, values in costs.items():
        assert torch.allclose(values, expected[name], rtol=1e-5, atol=1e-6), name


def test_rms_norm_is_float32_inside():
    x, weight = normal(torch.bfloat16, (8, 96), (96,))
    wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()
    assert torch.equal(model.rms_norm(x, weight, 1e-5), wide.bfloat16())


def test_gated_linear():
    inputs = [x.requires_grad_() for x in normal(torch.float64, (2, 3, 5), (2, 3, 5), (4, 5))]
    gate, up, weight = inputs
    assert torch.allclose(GatedLinear.apply(*inputs), (F.silu(gate) * up) @ weight.T, rtol=1e-12)
    assert torch.autograd.gradcheck(GatedLinear.apply, inputs)
    assert torch.autograd.gradcheck(GatedLinear.apply, (gate, up, weight.detach()))


# ---- the clone

TOLERANCE = 1e-5  # float32 in another order


def stacked(terms):
    """[layers, terms] of {name: [layers]}."""
    return torch.stack(list(terms.values()), dim=1)


def activations_of(weights, ids, config):
    """{layer: {name: activation}} of a plain model's weights."""
    found = {}
    model.hidden_states(weights, ids, config, look=lambda i, x, activations: found.update({i: activations}))
    return found


def plain_terms(clone, weights, ids, names):
    """The clone losses [layers, terms], straight from the formulas: tokens through P and W in turn."""
    teacher, options, rows = clone.teacher, clone.loss_config, []
    of_student = activations_of(weights, ids, clone.config)
    of_teacher = activations_of(teacher.weights(), ids, teacher.config)
    for i, w in enumerate(teacher.layers):
        p = {name: clone.trained.layers[i].projection(name) for name in (*model.READS, *model.WRITES)}
        s, t = of_student[i], of_teacher[i]
        attn_in, mlp_in = s["attn_in"], s["mlp_in"]
        ours = {name: F.linear(attn_in @ p[name].T, w[name], w.get(f"{name}_bias")) for name in "qkv"}
        ours |= {name: mlp_in @ p[name].T @ w[name].T for name in ("gate", "up")}
        ours |= {"attn_in": attn_in @ p["q"].T, "mlp_in": mlp_in @ p["gate"].T}
        ours["attn_out"] = F.linear(s["attended"], w["o"], w.get("o_bias"))
        ours["mlp_out"] = (F.silu(s["gate"]) * s["up"]) @ w["down"].T
        differences = {name: value - t[name] for name, value in ours.items()}
        for name, m in (("attn_out", "o"), ("mlp_out", "down")):
            if getattr(options, f"clone_{name}") == "student":
                differences[name] = differences[name] @ p[m]
        scales = {name: t[name].square().mean() if options.clone_scale == "teacher" else 1.0 for name in ours}
        rows.append(torch.stack([differences[name].square().mean() / scales[name] for name in names]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("options", "teacher"),
    [
        ({}, {}),
        ({}, {"family": "llama", "attention_bias": True}),
        ({}, {"family": "qwen3", "head_dim": 16, "attention_bias": True}),
        ({"clone_attn_out": "teacher", "clone_mlp_out": "teacher"}, {"family": "qwen2"}),
        ({"clone_attn_out": "teacher"}, {"attention_bias": True}),
        ({"share_qkv": True, "share_gate_up": True, "clone_mlp_out": "teacher"}, {}),
        ({"clone_scale": "teacher", "clone_skip": ("k", "up")}, {}),
    ],
)
def test_loss_and_gradients_equal_the_formulas(options, teacher):
    clone = random_clone(random_llama(**teacher), lm_weight=0.5, kl_weight=0.1, **options)
    ids, labels = random_batch(2, 10)
    clone.calibrate(ids)
    result = clone.loss(ids, labels)
    weights, projections = clone.make()
    weights["embedding"] = clone.teacher.embedding @ projections["embedding"]
    terms = plain_terms(clone, weights, ids, result["terms"])
    z = model.hidden_states(weights, ids, clone.config) @ weights["head"].T
    z, teacher_z = z.flatten(0, 1), clone.teacher(ids).flatten(0, 1)
    scales = 0.5 / (labels != -100).sum(), 0.1 / labels.numel(), 40.0
    total = direct_loss(z, labels.flatten(), teacher_z, *scales)[0] + 0.2 * terms.sum()
    assert relative(stacked(result["terms"]), terms) < TOLERANCE
    assert relative(result["clone"], terms.sum()) < TOLERANCE
    assert relative(result["loss"], total) < TOLERANCE
    own = trained(clone)
    ours, expected = (torch.autograd.grad(x, own.values()) for x in (result["loss"], total))
    assert_near(dict(zip(own, ours, strict=True)), dict(zip(own, expected, strict=True)))


def test_shared_projections_and_skipped_terms_and_layers():
    teacher, batch = random_llama(), random_batch(2, 10)
    whole, shared = random_clone(teacher), random_clone(teacher, share_qkv=True, share_gate_up=True)
    assert list(shared.loss(*batch)["terms"]) == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert len(trained(whole)) == 2 * (7 + 2) + 2 and len(trained(shared)) == 2 * (4 + 2) + 2
    assert len(trained(random_clone(tie_head_projection=False))) == len(trained(whole)) + 1

    terms = stacked(whole.loss(*batch)["terms"])  # [layers, q k v attn_out gate up mlp_out]
    fewer = random_clone(teacher, clone_skip=("k", "mlp_out")).loss(*batch)["terms"]
    assert torch.equal(stacked(fewer), terms[:, [0, 2, 3, 4, 5]])
    result = random_clone(teacher, clone_skip_layers=(0,)).loss(*batch)
    assert torch.equal(stacked(result["terms"]), terms * torch.tensor([[0.0], [1.0]]))
    assert relative(result["clone"], terms[1].sum()) < TOLERANCE


def test_a_term_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(train, "share_gate_up", True)  # which has no term of gate
    monkeypatch.setattr(train, "clone_skip", ("gate",))
    with pytest.raises(ValueError, match=r"allowed: \('q', 'k', 'v', 'attn_out', 'mlp_in', 'mlp_out'\)"):
        train.loss_config()


def loss_and_gradients(clone, *batch):
    """{name: of a loss its value, of what trains its gradient}, which is then cleared."""
    losses = clone.loss(*batch)
    losses["loss"].backward()
    found = {name: losses[name].detach() for name in ("loss", "lm", "kl", "clone")}
    found |= {name: p.grad for name, p in trained(clone).items()}
    clone.zero_grad()
    return found


def assert_near(found, expected):
    errors = {name: relative(found[name], value) for name, value in expected.items()}
    assert found.keys() == expected.keys() and max(errors.values()) < TOLERANCE, errors


def test_micro_batches_add_up_to_the_batch():
    clone = random_clone(share_qkv=True)
    ids, labels = random_batch(8, 12)
    labels[0], labels[1, 1:] = -100, -100  # the parts have different numbers of labels, one none
    expected = loss_and_gradients(clone, ids, labels)
    assert clone.loss(ids[:1], labels[:1])["lm"] == 0  # by itself too
    made, sums = clone.make(), dict.fromkeys(("loss", "lm", "kl", "clone"), 0.0)
    held, num_labels = train.hold(made, accumulate=True), (labels != -100).sum()
    for row in range(8):
        part = ids[row : row + 1], labels[row : row + 1]
        result = clone.loss(*part, num_labels=num_labels, share=1 / 8, made=held)
        result["loss"].backward()
        sums = {name: total + result[name].detach() for name, total in sums.items()}
    assert all(p.grad is None for p in trained(clone).values())  # all of it waits on `held`
    train.release(clone.trained, made, held)
    assert_near(sums | {name: p.grad for name, p in trained(clone).items()}, expected)


def test_transformers_reads_a_student_whose_heads_do_not_divide_it(tmp_path):
    student = random_clone(random_llama(family="qwen2"), d_s=18).merge()
    save(student, tmp_path)
    theirs, (ids, _) = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), random_batch(2, 24)
    assert (student(ids) - theirs(ids).logits).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("rotated", [False, True])
def test_pca_loses_nothing_of_a_teacher_that_uses_half_of_its_stream(rotated):
    """16 of 32 channels, chosen at random, or 16 of 32 directions that are no channels."""
    teacher, generator = random_llama(), torch.Generator().manual_seed(0)
    used = torch.eye(32)[torch.randperm(32, generator=generator)[:16]]  # [16, 32]
    if rotated:
        used = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:16]
    with torch.no_grad():
        teacher.embedding.copy_(teacher.embedding @ used.T @ used)
        for layer in teacher.layers:
            for name in model.WRITES:
                layer[name].copy_(used.T @ used @ layer[name])
    # The mean square of 16 channels is twice that of 32 of which 16 are zero, so eps is too.
    clone = make_clone(teacher, 16, student_rms_norm_eps=2e-5, tie_head_projection=False)
    ids, _ = random_batch(4, 12)
    model.init_student(clone, 0, "pca", clone.calibrate(ids))
    assert relative(clone(ids), teacher(ids)) < TOLERANCE
    model.init_student(clone, 0, "random")
    assert relative(clone(ids), teacher(ids)) > 0.1


def test_fingerprint_is_of_the_weights_alone(tmp_path):
    for dtype in (torch.bfloat16, torch.float32):  # of the file
        save(random_llama(), tmp_path, dtype)
        teacher, half = convert.load_model(tmp_path), convert.load_model(tmp_path, torch.bfloat16)
        assert convert.fingerprint(teacher) == convert.fingerprint(half)
    for name in teacher.state_dict():
        tuned = convert.load_model(tmp_path)
        tuned.get_parameter(name).data.mul_(1.05)  # bfloat16 tells values 1/128 apart
        assert convert.fingerprint(tuned) != convert.fingerprint(teacher), name


@pytest.mark.parametrize(
    ("backend", "recompute"),
    [("inductor", "student"), ("aot_eager", "none"), (None, "student"), (None, "both")],
)
def test_compiled_and_checkpointed_layers_change_nothing(backend, recompute):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    clone, batch = random_clone(), random_batch(2, 12)
    expected = loss_and_gradients(clone, *batch)
    if backend:
        clone.run_block = torch.compile(clone.run_block, backend=backend)
    clone.recompute = recompute
    assert_near(loss_and_gradients(clone, *batch), expected)


def test_masked_documents_do_not_see_each_other():
    clone, (ids, labels) = random_clone(), random_batch(1, 12)
    labels[:] = labels.clamp(min=0)
    documents = model.document_layout(np.array([[0] * 5 + [1] * 7]), torch.device("cpu"))
    # Attention alone cannot tell that positions restart, since rotary ones are relative.
    assert documents[0].tolist() == [[[*range(5), *range(7)]]]
    together = clone.loss(ids, labels, documents=documents)
    apart = [clone.loss(ids[:, part], labels[:, part]) for part in (slice(0, 5), slice(5, 12))]
    expected = torch.cat([losses["token_lm"] for losses in apart], dim=1)
    assert relative(together["token_lm"], expected) < TOLERANCE
    assert relative(clone.loss(ids, labels)["token_lm"], expected) > 100 * TOLERANCE
    alone = plain_student(clone.merge()).loss(ids, labels, documents=documents)["token_lm"]
    assert relative(alone, expected) < TOLERANCE


@pytest.mark.parametrize("kernel", ["flash_attn_varlen_func", "varlen_attn"])
def test_kernels_of_a_gpu_are_called_as_documented(kernel, monkeypatch):
    """A double for each that checks layout, dtype, causality and grouped heads, and computes by SDPA.
    PyTorch's own must also take the call by its signature."""
    calls = []

    def check(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.ndim == 3 and k.shape == v.shape and all(x.stride(-1) == 1 for x in (q, k, v))
        assert q.shape[-2:] == (4, 8) and k.shape[-2:] == (2, 8)  # heads, then head_dim
        assert bounds_q is bounds_k and bounds_q.dtype == torch.int32
        assert bounds_q.tolist() == [0, 5, 12, 24] and longest_q == longest_k == 12
        calls.append(kernel)
        document = torch.bucketize(torch.arange(24), bounds_q, right=True)
        mask = (document[:, None] == document).tril()
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)

    def flash_attn_varlen_func(*arguments, causal):
        assert causal
        return check(*arguments)

    straight = varlen.varlen_attn
    signature = inspect.signature(straight)

    @functools.wraps(straight)
    def varlen_attn(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        assert given.pop("window_size") == (-1, 0)  # causal
        assert given.pop("enable_gqa", "in 2.11 it is not asked for")
        return check(*given.values())

    monkeypatch.setattr(model, "flash_attn_varlen_func", None)
    monkeypatch.setattr(varlen if kernel == "varlen_attn" else model, kernel, locals()[kernel])
    clone, (ids, labels) = random_clone(random_llama().bfloat16()), random_batch(2, 12)
    documents = np.array([[0] * 5 + [1] * 7, [2] * 12])
    masked = clone.loss(ids, labels, documents=model.document_layout(documents, torch.device("cpu")))
    assert not calls
    # Laid out as for a GPU, which need not be here.
    monkeypatch.setattr(model, "to_device", lambda array, device: torch.as_tensor(array))
    bounds = model.document_layout(documents, types.SimpleNamespace(type="cuda"))
    losses = clone.loss(ids, labels, documents=bounds)
    assert calls == [kernel] * 4  # teacher and student, two layers
    assert relative(losses["token_lm"], masked["token_lm"]) < 0.01  # bfloat16
    losses["loss"].backward()


def test_torch_has_the_kernels_that_only_a_gpu_runs():
    """The operators take our arguments, in whichever torch is there; a CPU can say no more than shapes."""
    with FakeTensorMode():
        q, k = (torch.empty(24, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        bounds = torch.empty(4, dtype=torch.int32, device="cuda")
        assert model.varlen_attention(q, k, k, bounds, bounds, 12, 12).shape == q.shape
        a, b = (torch.empty(8, 8, dtype=torch.bfloat16, device="cuda") for _ in "ab")
        assert model.product(a, b).dtype == torch.float32
    # accumulate_product's: its shapes alone cannot be asked for where torch has no CUDA.
    assert "out_dtype" in {argument.name for argument in torch.ops.aten.addmm.dtype_out._schema.arguments}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_training_has_no_graph_breaks_and_few_recompiles(documents):
    """Five batches of documents that differ, forward and backward, with checkpointing and accumulation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    clone = random_clone()
    clone.run_block = torch.compile(clone.run_block, backend="aot_eager", fullgraph=True)
    clone.recompute = "student"
    clone.run_chunk = torch.compile(clone.run_chunk, backend="aot_eager", fullgraph=True)
    for seed in range(5):
        made = clone.make()
        held = train.hold(made, accumulate=True)
        for _ in range(2):
            numbers = np.sort(np.random.default_rng(seed).integers(0, 2 + seed, (2, 12)), axis=1)
            layout = model.document_layout(numbers, torch.device("cpu")) if documents else None
            clone.loss(*random_batch(2, 12, seed=seed), made=held, documents=layout)["loss"].backward()
        train.release(clone.trained, made, held)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2 + 2  # a layer and a chunk, two recompiles at most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_qkv": True, "share_gate_up": True},
        {"clone_attn_out": "teacher", "clone_mlp_out": "teacher"},
        {"teacher": None, "model_config": tiny()},
        {"global_batch_size": 6},  # in three passes, for which the student is composed once
    ],
    ids=str,
)
def test_flops_are_those_of_the_formulas(options, monkeypatch):
    """What tools/bench.py counts with torch's counter, against the products of the shapes."""
    base = {"teacher": tiny(), "student_hidden_size": 16, "seq_len": 12, "global_batch_size": 2}
    for name, value in (base | {"micro_batch_size": 2, "clone_weight": 0.2} | options).items():
        monkeypatch.setattr(train, name, value)
    parts = bench.count_flops()
    tokens = 12 * train.global_batch_size
    # of tiny(): hidden 32, FFN 48, 4 heads of 8, 2 of keys, 2 layers, vocabulary 96
    matrices = {d: 2 * (d * (32 + 16 + 16 + 32) + 3 * d * 48) for d in (16, 32)}
    attention = 2 * 2 * 4 * 8 * (12 + 1) / 2 * 2
    if train.teacher is None:
        assert sum(parts.values()) == 3 * tokens * (2 * matrices[32] + attention + 2 * 32 * 96)
        return
    # With P: the teacher's output times P and P's gradient. In the teacher's space: the student's there, and
    # the gradient of that.
    by_layer = 2 * 2 * 2 * 32 * 16 if train.clone_mlp_out == "student" else 2 * 32 * (32 + 48)
    if train.share_qkv:
        by_layer += 2 * 2 * 32 * 16
    del parts["backward of the rest"]
    assert parts == {
        "teacher": tokens * (2 * matrices[32] + attention),
        "student": tokens * (2 * matrices[16] + attention),
        "compose": 2 * 2 * 16 * 32 * (matrices[32] / 32 + 96),
        "head": tokens * 2 * 96 * (32 + 3 * 16),
        "clone losses": tokens * 2 * by_layer,
    }


@pytest.mark.parametrize(("accumulate", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_held_gradients_are_wide_only_where_they_add_up(accumulate, dtype):
    held = train.hold({"w": torch.ones(4, dtype=torch.bfloat16, requires_grad=True)}, accumulate)
    leaf = held["w"]
    for _ in range(2):
        (leaf * torch.tensor(1 / 256, dtype=torch.bfloat16)).sum().backward()
        leaf.sum().backward()
    assert leaf.grad.dtype == dtype
    # 2 + 2/256 is no bfloat16: it has 8 bits of mantissa
    assert (leaf.grad.double() == 2 + 2 / 256).all() == accumulate


# ---- new clone terms, as the docstring of clone_losses has them

EXAMPLES = [line.strip() for line in model.clone_losses.__doc__.splitlines() if line.startswith(" " * 8)]
# Not scaled either, though an activation has this name.
EXAMPLES.append('numbers["attended"] = s["q"].sum() * 0 + 0.84')


def with_term(line):
    """clone_losses with this line in it."""
    source = inspect.getsource(model.clone_losses)
    end = "    assert not pairs.keys()"
    assert source.count(end) == 1
    names = dict(vars(model))
    exec(source.replace(end, f"    {line}\n{end}"), names)
    return names["clone_losses"]


@pytest.mark.parametrize("line", EXAMPLES)
def test_a_term_of_the_docstring_is_what_it_says(line, monkeypatch):
    kind, term = re.match(r'(\w+)\["(\w+)"\] = ', line).groups()
    monkeypatch.setattr(model, "clone_losses", with_term(line))
    batch, teacher = random_batch(2, 12), random_llama()
    results = {}
    for scale in ("none", "teacher"):
        clone = random_clone(teacher, clone_scale=scale)
        clone.calibrate(batch[0][:1])
        results[scale] = clone.loss(*batch)["terms"][term]
    if kind == "pairs":
        torch.testing.assert_close(results["teacher"] * clone.mean_squares[term], results["none"])
        assert (clone.mean_squares[term] != 1).all()
    else:
        assert torch.equal(results["teacher"], results["none"])
        # Half of one less a cosine is at most 1, and at random about a half.
        assert (results["none"] > 0.1).all() and (results["none"] < 1).all()
    # clone_skip knows it.
    monkeypatch.setattr(train, "clone_skip", (term,))
    skip = train.loss_config().clone_skip
    assert term not in random_clone(teacher, clone_skip=skip).loss(*batch)["terms"]


@pytest.mark.parametrize("shape", [(2, 1024, 1024), (1, 1, 2**21), (2**21,)])
def test_a_mean_squared_error_is_summed_as_well_as_float32_allows(shape):
    """2M values: pairwise sums are off by 5e-9 here; one by one by 6e-5."""
    student, teacher = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    exact = (student - teacher).double().square().mean()
    assert abs(model.mse(student, teacher) / exact - 1) < 2e-7
