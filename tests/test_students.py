"""Students of every kind: of projections or with weights of their own; cut or whole."""

import dataclasses

import pytest
import torch
from test_model import (
    TOLERANCE,
    activations_of,
    make_clone,
    plain_student,
    random_batch,
    random_clone,
    random_llama,
    randomise,
    relative,
    save,
    trained,
)

import convert
import model
import train

KINDS = {
    "projections": {},
    "untied": {"tie_head_projection": False},
    "without clone losses": {"clone_weight": 0.0},
    "weights": {"train": "weights"},
    "weights, shared": {"train": "weights", "share_qkv": True, "share_gate_up": True},
    "weights, a layer without clone losses": {"train": "weights", "clone_skip_layers": (1,)},
    "shared, inputs skipped": {
        "share_qkv": True, "share_gate_up": True, "clone_skip": ("attn_in", "mlp_in")
    },
    "fewer layers": {"student_layers": (0, 2)},
    "fewer neurons": {"student_intermediate_size": 20, "clone_mlp_out": "teacher"},
    "fewer of both": {"student_layers": (1, 2), "student_intermediate_size": 20},
    "free and fewer": {"train": "weights", "student_layers": (0, 2), "student_intermediate_size": 20},
}  # fmt: skip


def student_of(kind, family="llama", **options):
    shape = {"num_hidden_layers": 3, "tie_word_embeddings": "untied" not in kind, "no_rope_layer_interval": 2}
    teacher = random_llama(family=family, **shape)
    clone = random_clone(teacher, **KINDS[kind], **options)
    clone.calibrate(random_batch(4, 12)[0])
    return clone


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_student_is_the_one_that_trains(kind, family):
    """Beside its teacher, layer by layer, and as an ordinary model of its own shape; all of it trains."""
    clone = student_of(kind, family)
    ids, labels = random_batch(2, 10)
    losses = clone.loss(ids, labels)
    losses["loss"].backward()
    assert not {n for n, p in trained(clone).items() if p.grad is None or not p.grad.abs().max() > 0}
    assert all(p.grad is None for p in clone.teacher.parameters())
    merged = clone.merge()
    alone = plain_student(merged).loss(ids, labels)["token_lm"]
    assert relative(alone, losses["token_lm"]) < TOLERANCE
    expected = torch.nn.functional.cross_entropy(
        merged(ids).flatten(0, 1), labels.flatten(), reduction="none"
    )
    assert relative(alone.flatten(), expected) < TOLERANCE
    assert len(merged.layers) == len(KINDS[kind].get("student_layers", range(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_whole_student(kind, tmp_path):
    clone = student_of(kind)
    save(clone.teacher, tmp_path / "teacher")
    own = clone.trained.state_dict()
    convert.save_weights(clone, tmp_path / "saved", own, "tokenizer", str(tmp_path / "teacher"))
    again = make_clone(clone.teacher, 16, **KINDS[kind])
    convert.load_weights(tmp_path / "saved", again)
    for name, tensor in own.items():
        assert torch.equal(again.trained.state_dict()[name], tensor), name
    loaded = convert.load_checkpoint(tmp_path / "saved")  # as sample.py and convert.py take it
    ids, _ = random_batch(2, 10)
    assert relative(loaded(ids), clone(ids)) < TOLERANCE
    assert isinstance(loaded, model.Llama) == (not clone.composes)


def test_a_checkpoint_without_what_it_is_compared_by_is_refused(tmp_path):
    """But of a student as wide as its teacher, whose streams are compared as they are."""
    for width in (16, 32):
        student = make_clone(random_llama(), width, train="weights")
        randomise(trained(student).items())
        path = tmp_path / str(width)
        convert.save_weights(student, path, student.trained.state_dict(), None, None)
        (path / convert.PROJECTIONS_FILE).unlink()
    with pytest.raises(
        ValueError, match=r"16 lacks projections\.safetensors, by which .*layers\.0\.projections\.o"
    ):
        convert.load_weights(tmp_path / "16", make_clone(random_llama(), 16, train="weights"))
    convert.load_weights(tmp_path / "32", student)
    assert torch.equal(student.trained.layers[0].projection("o"), torch.eye(32))


def test_clone_losses_compare_the_layers_and_neurons_that_are_kept():
    """A student with all of the teacher's width, and its weights, has no clone loss but where it is cut."""
    teacher = random_llama(num_hidden_layers=3, tie_word_embeddings=False)
    shape = {"student_layers": (0, 2), "student_intermediate_size": 20}
    clone = make_clone(teacher, 32, train="weights", tie_head_projection=False, **shape)
    ids, labels = random_batch(2, 10)
    model.init_student(clone, 0, "pca", clone.calibrate(ids))
    terms = clone.loss(ids, labels)["terms"]
    for name in ("q", "k", "v", "attn_out", "gate", "up"):
        assert terms[name][0] < 1e-8, name  # the first layer is whole up to its neurons
        assert terms[name][1] > 1e-4, name  # the last reads what layers and neurons that are not there wrote
    assert terms["mlp_out"][0] > 1e-4
    activations = activations_of(teacher.weights(), ids, teacher.config)
    for k, layer in zip((0, 2), clone.trained.layers, strict=True):
        hidden = torch.nn.functional.silu(activations[k]["gate"]) * activations[k]["up"]
        energy = hidden.square().sum((0, 1)) * teacher.layers[k]["down"].square().sum(0)
        assert layer.neurons.tolist() == sorted(energy.topk(20).indices.tolist())


def test_clone_losses_are_scaled_by_the_layer_beside_which_the_student_stands():
    teacher = random_llama(num_hidden_layers=3)
    ids, labels = random_batch(2, 10)
    terms = {}
    for scale in ("none", "teacher"):
        clone = random_clone(teacher, student_layers=(1, 2), clone_scale=scale)
        clone.calibrate(ids)
        terms[scale] = clone.loss(ids, labels)["terms"]
    activations = activations_of(teacher.weights(), ids, teacher.config)
    for name, values in terms["none"].items():
        squares = torch.stack([activations[k][name].square().mean() for k in (1, 2)])
        assert relative(terms["teacher"][name], values / squares) < TOLERANCE, name


def test_a_layer_left_out_leaves_the_teacher_without_it():
    """Of three layers the first and the last have rotary embeddings."""
    teacher = random_llama(family="smollm3", num_hidden_layers=3, no_rope_layer_interval=2)
    clone = make_clone(teacher, 32, student_layers=(1, 2), tie_head_projection=False)
    ids, _ = random_batch(4, 12)
    model.init_student(clone, 0, "pca", clone.calibrate(ids))
    without = model.Llama(dataclasses.replace(teacher.config, num_hidden_layers=2, no_rope_layers=(0, 1)))
    state = {n: w for n, w in teacher.state_dict().items() if not n.startswith("layers.0.")}
    state = {n.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.1."): state[n] for n in state}
    without.load_state_dict(state)
    assert relative(clone(ids), without(ids)) < TOLERANCE


@pytest.mark.parametrize("kind", ["untied", "fewer neurons"])
def test_free_weights_start_from_a_clone(kind, tmp_path):
    """Which neurons they have is the clone's too, where nothing is calibrated."""
    clone = student_of(kind)
    save(clone.teacher, tmp_path / "teacher")
    convert.save_clone(clone, tmp_path / "clone", str(tmp_path / "teacher"), "tokenizer")
    free = make_clone(clone.teacher, 16, **KINDS[kind], train="weights")
    convert.load_weights(tmp_path / "clone", free)
    ids, labels = random_batch(2, 10)
    assert relative(free(ids), clone(ids)) < TOLERANCE
    ours, theirs = free.loss(ids, labels), clone.loss(ids, labels)
    for name, values in theirs["terms"].items():
        assert relative(ours["terms"][name], values) < TOLERANCE, name


def test_a_clone_of_another_teacher_or_of_other_layers_is_refused(tmp_path):
    clone = student_of("fewer layers")
    save(clone.teacher, tmp_path / "teacher")
    convert.save_clone(clone, tmp_path / "clone", str(tmp_path / "teacher"), "tokenizer")
    for name, own, words in (
        ("student_layers", (1, 2), r"student_layers = \(0, 2\); this run has \(1, 2\)"),
        ("student_layers", None, r"student_layers = \(0, 2\); this run has \(0, 1, 2\)"),
        ("student_rms_norm_eps", 1e-3, "student_rms_norm_eps = 1e-05; this run has 0.001"),
        ("share_qkv", True, "share_qkv = False; this run has True"),
        ("d_s", 8, "student_hidden_size = 16; this run has 8"),
    ):
        given = {"student_layers": (0, 2), "d_s": 16} | {name: own}
        with pytest.raises(ValueError, match=words):
            convert.load_weights(tmp_path / "clone", make_clone(clone.teacher, given.pop("d_s"), **given))
    with torch.no_grad():
        clone.teacher.layers[0]["q"].mul_(2)
    with pytest.raises(ValueError, match="this run's is not the teacher it was trained with"):
        convert.load_weights(tmp_path / "clone", make_clone(clone.teacher, 16, student_layers=(0, 2)))


SHAPES = {  # of any model with the vocabulary: the clone losses that it has, by where the outputs compare
    "deeper": ({"num_hidden_layers": 5}, "", ""),
    "shallower": ({"num_hidden_layers": 2, "family": "qwen2"}, "", ""),
    "fewer heads": ({"num_attention_heads": 2, "head_dim": 8}, "", ""),
    "narrower": ({"hidden_size": 16, "head_dim": 8}, "q k v gate up", "q k v attn_out gate up mlp_out"),
    "the same": ({"hidden_size": 32}, "q k v attn_out gate up mlp_out", "q k v attn_out gate up mlp_out"),
}


@pytest.mark.parametrize("space", ["student", "teacher"])
@pytest.mark.parametrize("name", SHAPES)
def test_any_model_with_the_vocabulary_is_a_student(name, space):
    teacher = random_llama(num_hidden_layers=3)
    changes, *expected = SHAPES[name]
    shape = random_llama(**{"num_hidden_layers": 3, **changes}).config
    student = model.StudentConfig(0, False, False, True, 1e-5, "weights")
    losses = make_clone(teacher, 16, clone_attn_out=space, clone_mlp_out=space).loss_config
    student, losses = train.fit_losses(teacher.config, shape, student, losses)
    clone = model.Student(shape, teacher, student, losses)
    randomise(trained(clone).items(), seed=3)
    ids, labels = random_batch(2, 10)
    result = clone.loss(ids, labels)
    assert list(result["terms"]) == expected[space == "teacher"].split()
    alone = plain_student(clone.merge()).loss(ids, labels)["token_lm"]
    assert relative(result["token_lm"], alone) < TOLERANCE
    kl = torch.nn.functional.kl_div(
        (clone(ids) / 40).log_softmax(-1), (teacher(ids) / 40).log_softmax(-1),
        reduction="none", log_target=True,
    ).sum(-1).mean()  # fmt: skip
    assert relative(result["kl"], kl) < 1e-3  # a small difference of large sums in float32 here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_s": 0}, "student_hidden_size is 0; it must be between 1 and 32"),
        ({"d_s": 33}, "student_hidden_size is 33; it must be between 1 and 32"),
        ({"d_s": 18}, "student_hidden_size is 18; .* 4 heads: 16 or 20"),
        ({"student_intermediate_size": 49}, "student_intermediate_size is 49; it must be between 1 and 48"),
        ({"student_intermediate_size": 0}, "student_intermediate_size is 0"),
        ({"student_layers": (0, 3)}, r"student_layers is \(0, 3\); it must be rising indices of layers, "),
        ({"student_layers": (1, 0)}, r"student_layers is \(1, 0\)"),
        ({"student_layers": ()}, r"student_layers is \(\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_clone(random_llama(num_hidden_layers=3), **{"d_s": 16} | options)


def test_layers_are_spread_evenly():
    assert model.spread_layers(4, 10) == (0, 3, 6, 9)
    with pytest.raises(ValueError, match="as a number it must be between 2 and 10"):
        model.spread_layers(11, 10)
