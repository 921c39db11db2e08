"""The closed-form start: exact where an exact student exists, and numpy's solution of each least squares."""

import inspect
import json
from pathlib import Path

import compress
import numpy as np
import pytest
import torch
from compress import fit_clone, least_squares, logit_metric
from conftest import BUNDLED, SHAPE, clone_options, metrics, run
from test_model import make_clone

import convert
import model as models
from prepare import load_tokenizer

FAMILIES = {
    "tied": {"model_type": "llama"},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "biases": {"model_type": "llama", "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
}
D_S = 32


def narrow_teacher(options: dict) -> models.Llama:
    """A random teacher 48 wide whose stream stays in D_S of its dimensions."""
    config = convert.from_hf(SHAPE | {"vocab_size": 300, "num_hidden_layers": 3} | options)
    teacher = models.Llama(config)
    models.init_random(teacher, seed=0, std=0.2)
    generator = torch.Generator().manual_seed(1)
    subspace = torch.linalg.qr(torch.randn(config.hidden_size, D_S, generator=generator)).Q
    onto = subspace @ subspace.T
    for name, weight in teacher.named_parameters():
        # The final norm stays one, since a tied head's projection cannot take it in.
        if name.endswith(("input_norm", "post_norm", "bias")):
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    teacher.embedding.data.copy_(teacher.embedding @ onto)
    for layer in teacher.layers:
        for name in {"o", "down", "o_bias"} & set(layer.keys()):
            layer[name].data.copy_(onto @ layer[name])
    return teacher.requires_grad_(False)


def started(teacher: models.Llama, ids: torch.Tensor, share: bool, tied: bool) -> models.Student:
    """Its clone by pca, every projection but the embedding's spoilt."""
    # The same epsilon for a stream of the same length in fewer dimensions.
    eps = teacher.config.rms_norm_eps * teacher.config.hidden_size / D_S
    shared = {"share_qkv": share, "share_gate_up": share, "tie_head_projection": tied}
    clone = make_clone(teacher, D_S, student_rms_norm_eps=eps, **shared)
    models.init_student(clone, 1, "pca", clone.calibrate(ids))
    generator = torch.Generator().manual_seed(2)
    for name, weight in clone.trained.named_parameters():
        if name != "embedding_projection" and weight.ndim == 2:
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return clone


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_that_lies_in_the_students_width_is_cloned_exactly(family, tied, share, monkeypatch):
    """The ridge is all but off, since it would pull to projections that the test has spoilt."""
    if tied and family == "untied":
        pytest.skip("one projection for two matrices and their own norm is exact only where they are one")
    teacher = narrow_teacher(FAMILIES[family])
    ids = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(3))
    clone = started(teacher, ids, share, tied)
    before = (clone(ids) - teacher(ids)).abs().max()
    monkeypatch.setattr(compress, "RIDGE", 1e-10)
    fit_clone(clone, ids)
    other = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(4))
    after = (clone(other) - teacher(other)).abs().max()
    assert before > 0.1
    assert after < 1e-4 * teacher(other).abs().max()


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_least_squares_is_numpys(ridge, monkeypatch):
    """The ridge as rows of its own, which pull to the start."""
    monkeypatch.setattr(compress, "RIDGE", ridge)
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 50, 7), (4, 50, 3), (7, 3)
    inputs, targets, start = (torch.randn(shape, generator=generator) for shape in shapes)
    weights = torch.rand(4, 50, generator=generator)
    found = least_squares(inputs, targets, weights, start)
    root = weights.double().flatten().sqrt()[:, None]
    left, right = root * inputs.flatten(0, 1), root * targets.flatten(0, 1)
    pull = (ridge * left.square().sum(0).mean()).sqrt()
    left = torch.cat([left, pull * torch.eye(7, dtype=torch.float64)])
    expected, *_ = np.linalg.lstsq(left, torch.cat([right, pull * start.double()]))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_metric_is_the_kl_of_a_small_error():
    """Of one error of all tokens: e^T M e / 2 is the mean KL, to second order."""
    teacher = narrow_teacher(FAMILIES["tied"])
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 40, 48, generator=generator)
    metric = logit_metric(teacher, hidden)
    head = models.head_of(teacher.weights()).double()
    log_p = (hidden.double() @ head.T).log_softmax(-1)
    for _ in range(3):
        error = 1e-3 * torch.randn(48, generator=generator, dtype=torch.float64)
        log_q = ((hidden + error) @ head.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert error @ metric @ error / 2 == pytest.approx(kl.item(), rel=0.01)


def test_the_tied_projection_and_the_final_norm_minimise_what_they_say(monkeypatch):
    """By autograd: at the solution the gradient of either is nothing beside that at the start."""
    monkeypatch.setattr(compress, "RIDGE", 0.0)
    generator = torch.Generator().manual_seed(6)
    teacher = narrow_teacher(FAMILIES["tied"])
    ids = torch.randint(0, 300, (8, 64), generator=generator)
    clone = started(teacher, ids, share=False, tied=True)
    basis = clone.trained.embedding_projection.double() + 0.1 * torch.randn(48, D_S, generator=generator)
    hidden_t = torch.randn(8, 64, 48, generator=generator)
    x_s = torch.randn(8, 64, D_S, generator=generator)
    metric = logit_metric(teacher, hidden_t)
    s = models.rms_norm(x_s, torch.ones(D_S), clone.config.rms_norm_eps).flatten(0, 1).double()
    t = hidden_t.flatten(0, 1).double()
    tokens, every = teacher.embedding[ids.flatten()].double(), teacher.embedding.double()

    def quadratic(x, metric):
        return ((x @ metric) * x).sum()

    def objective(projection, norm):
        embedded = 0.0
        for rows, share in ((tokens, 0.8), (every, 0.2)):
            embedded = embedded + share * (rows @ (projection - basis)).square().sum() / rows.square().sum()
        scale = 0.0
        for rows, share in ((tokens, 0.8), (every, 0.2)):
            scale = scale + share * (rows @ basis).square().sum() / rows.square().sum()
        head = quadratic((s * norm) @ projection.T - t, metric) / quadratic(t, metric)
        return embedded / scale + head

    def gradient(of, projection, norm):
        pair = projection.detach().requires_grad_(), norm.detach().requires_grad_()
        return torch.autograd.grad(objective(*pair), pair)[of].norm().item()

    # The norm as it comes out, for a projection; then the projection for a norm that stays.
    start = torch.ones(D_S, dtype=torch.float64)
    second, cross = compress.final_moments(hidden_t, x_s, clone.config.rms_norm_eps)
    norm = compress.final_norm(basis, start, second, cross, metric)
    assert gradient(1, basis, norm) < 1e-8 * gradient(1, basis, start)
    monkeypatch.setattr(compress, "final_norm", lambda *_: norm)
    with torch.no_grad():
        compress.fit_tied_projection(clone, ids, basis, hidden_t, x_s, metric)
    projection = clone.trained.embedding_projection.double()
    assert gradient(0, projection, norm) < 1e-4 * gradient(0, basis, norm)  # it is stored in float32
    assert torch.equal(clone.trained.norm, norm.float())


def test_a_tied_start_is_nearer_with_its_own_projection(monkeypatch):
    """On other text of the bundled teacher's kind."""
    teacher = convert.load_model(BUNDLED).requires_grad_(False)
    tokens = load_tokenizer(BUNDLED).encode(Path(inspect.__file__).read_text()).ids
    ids, other = torch.tensor(tokens[: 16 * 128]).view(2, 8, 128)
    found = []
    for part in (compress.fit_tied_projection, lambda *_: None):
        monkeypatch.setattr(compress, "fit_tied_projection", part)
        clone = make_clone(teacher, 96, kl_temperature=1.0)
        models.init_student(clone, 1, "pca", clone.calibrate(ids))
        fit_clone(clone, ids)
        found.append(clone.loss(other, other)["kl"].item())
    assert found[0] < found[1]


@pytest.mark.parametrize(
    "options", [{}, {"student_layers": (0, 2)}, {"student_intermediate_size": 40}], ids=str
)
def test_every_kind_of_student_starts_nearer_than_by_pca(options):
    """On tokens that it was not fitted to; what is cut is made up for as far as it can be."""
    config = convert.from_hf(SHAPE | {"model_type": "qwen2", "vocab_size": 300, "num_hidden_layers": 3})
    teacher = models.Llama(config)
    models.init_random(teacher, seed=0, std=0.2)
    generator = torch.Generator().manual_seed(3)
    ids, other = (torch.randint(0, 300, (n, 64), generator=generator) for n in (16, 2))
    clone = make_clone(teacher, D_S, kl_temperature=1.0, **options)
    models.init_student(clone, 1, "pca", clone.calibrate(ids))
    by_pca = clone.loss(other, other)["kl"].item()
    fit_clone(clone, ids)
    assert clone.loss(other, other)["kl"].item() < 0.8 * by_pca


def test_the_command_writes_a_start_that_train_takes(work, teacher, corpus, monkeypatch):
    """By the option init_from, which without the start names the command that makes it."""
    options = [*clone_options(teacher, corpus, work / "from_start"), f"--init_from={work / 'start'}"]
    options = [option for option in options if not option.startswith(("--max_steps", "--out_dir"))]
    train = ["train.py", *options, "--max_steps=1", f"--out_dir={work / 'from_start'}"]
    missing = run(*train)
    assert missing.returncode == 2 and "python tools/compress.py --" in missing.stderr, missing.stderr
    made = run("tools/compress.py", *options)
    assert made.returncode == 0, made.stderr
    done = run(*train, "--eval_every=1", "--learning_rate=1e-9")
    assert done.returncode == 0, done.stderr
    start = json.loads(made.stdout.splitlines()[-1])["val_kl"]
    assert metrics(work / "from_start")[-1]["val_kl"] == pytest.approx(start, rel=1e-3)
    monkeypatch.setattr(compress, "options", {"init_from": str(work / "start")}, raising=False)
    with pytest.raises(ValueError, match="exists; remove it or choose another --out"):
        compress.main()
