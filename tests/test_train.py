"""train.py's schedule, optimizer and clipping by themselves, each against its formula."""

import traceback

import bench
import pytest
import torch
from test_model import make_clone, random_batch, random_llama, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import model as models
import train
from prepare import Batch


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {10: 1, 40: 2 / 3, 55: 1 / 2, 99: 1 / 90}),
        ("cosine", {10: 1, 40: 3 / 4, 55: 1 / 2, 70: 1 / 4}),
        ("warmup_stable_decay", {10: 1, 79: 1, 80: 1, 90: 1 / 2, 99: 1 / 20}),
        ("constant", {10: 1, 55: 1, 99: 1}),
    ],
)
def test_schedules(schedule, expected, monkeypatch):
    options = {"lr_schedule": schedule, "warmup_ratio": 0.1, "decay_ratio": 0.2, "learning_rate": 3.0}
    for name, value in options.items():
        monkeypatch.setattr(train, name, value)
    for step, share in ({0: 1 / 10, 4: 1 / 2, 9: 1} | expected).items():
        assert train.learning_rate_at(step, 100) == pytest.approx(3 * share), step


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_have_the_rate_and_the_decay_of_the_options(kind, monkeypatch):
    options = {"optimizer": kind, "learning_rate": 1e-2, "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.8}
    for name, value in (options | {"momentum": 0.6}).items():
        monkeypatch.setattr(train, name, value)
    trained = make_clone(random_llama(family="qwen2"), 16, train="weights").trained
    optimizer = train.make_optimizer(trained)
    assert getattr(optimizer, "momentum", 0.6) == 0.6
    by_muon = {p for group in getattr(optimizer, "groups", ()) for p in group["params"]}
    names = {p: name for name, p in trained.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        assert group.get("betas", (0.7, 0.8)) == (0.7, 0.8) and group["lr"] == 1e-2
        for p in group["params"]:
            name = names[p]
            seen.append(name)
            is_vector = "norm" in name or "bias" in name
            assert group["weight_decay"] == (0.0 if is_vector else 0.3), name
            is_vocabulary = name in ("embedding", "head")
            assert (p in by_muon) == (kind == "muon" and not is_vector and not is_vocabulary), name
    assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("most", [1e-3, 10.0, 0.0])
def test_a_step_clips_to_max_grad_norm_at_the_rate_it_is_given(most, monkeypatch):
    options = {"max_grad_norm": most, "global_batch_size": 2, "micro_batch_size": 2, "seq_len": 8}
    for name, value in options.items():
        monkeypatch.setattr(train, name, value)
    student = make_clone(random_llama(), 16)
    models.init_student(student, 0, "random")
    weight = student.trained.norm
    loss = student.loss(*map(torch.as_tensor, Blocks().batch(0, 2)[:2]))["loss"]
    (gradient,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=9.0, fused=True)
    metrics = train.Metrics()
    norm = train.training_step(student, student.trained, optimizer, Blocks(), 0, 0.5, metrics)
    assert norm > 1e-3 and weight.grad is None
    expected = before - 0.5 * gradient * min(1.0, (most or 1e9) / norm)
    torch.testing.assert_close(weight.detach(), expected)
    assert metrics.means()["loss"] == pytest.approx(loss.item())


def test_the_option_init_decides_how_a_clone_starts(monkeypatch):
    """Random projections are N(0, 0.02), those by pca have orthonormal columns."""
    found = {}
    for init in ("random", "pca"):
        for name, value in {"init": init, "clone_scale": "none", "seq_len": 8, "seed": 3}.items():
            monkeypatch.setattr(train, name, value)
        clone = make_clone(random_llama(), 16, tie_head_projection=False)
        train.start_weights(clone, Blocks(), None, torch.device("cpu"))
        found[init] = clone.trained.layers[0].projection("o").detach()
    assert found["random"].std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.allclose(found["pca"].T @ found["pca"], torch.eye(16), atol=1e-5)


class Blocks:
    """In place of a Mixture."""

    def batch(self, first, count):
        ids, labels = random_batch(count, 8)
        return Batch(ids.numpy(), labels.numpy(), None, None)

    def count_labels(self, first, count):
        return int((self.batch(first, count).labels != -100).sum())


class Numbers(TorchDispatchMode):
    """Notes where a number goes to a device, or comes from it: on a GPU each is a wait."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made_of_a_number = function is torch.ops.aten.lift_fresh.default and args[0].ndim == 0
        if made_of_a_number or function is torch.ops.aten._local_scalar_dense.default:
            frame = [f for f in traceback.extract_stack() if "site-packages" not in f.filename][-2]
            self.calls.append(f"{frame.filename}:{frame.lineno}: {frame.line}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_no_gpu(optimizer, monkeypatch):
    options = {"teacher": tiny(), "student_hidden_size": 16, "seq_len": 12, "optimizer": optimizer}
    options |= {"global_batch_size": 4, "micro_batch_size": 2, "load_teacher": bench.random_teacher}
    for name, value in options.items():
        monkeypatch.setattr(train, name, value)
    step = bench.make_step(torch.device("cpu"))
    with Numbers() as numbers:
        step(0)
    assert numbers.calls == []
