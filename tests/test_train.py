"""train.py's schedule, optimizer and clipping by themselves, each against its formula."""

import pytest
import torch
from test_model import make_clone, random_llama

import train


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
    options = {
        "optimizer": kind, "learning_rate": 1e-2, "free_learning_rate": 4e-3, "weight_decay": 0.3,
        "beta1": 0.7, "beta2": 0.8, "momentum": 0.6,
    }  # fmt: skip
    for name, value in options.items():
        monkeypatch.setattr(train, name, value)
    clone = make_clone(random_llama(), 16, train="both")
    optimizer = train.make_optimizer(clone)
    assert getattr(optimizer, "momentum", 0.6) == 0.6
    names = {p: name for name, p in clone.trained().items()}
    seen = []
    for group in optimizer.param_groups:
        assert group.get("betas", (0.7, 0.8)) == (0.7, 0.8)
        for p in group["params"]:
            name = names[p]
            seen.append(name)
            is_free = ".free." in name or name in ("embedding", "head")
            assert group["rate"] == pytest.approx(0.4 if is_free else 1.0), name
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
    assert sorted(seen) == sorted(names.values())

    # of a plain model every weight is its own: there is one rate
    monkeypatch.setattr(train, "teacher", None)
    assert {group["rate"] for group in train.make_optimizer(random_llama()).param_groups} == {1.0}


@pytest.mark.parametrize(("most", "expected"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (0.0, (3.0, 4.0))])
def test_gradients_are_clipped_to_max_grad_norm(most, expected, monkeypatch):
    monkeypatch.setattr(train, "max_grad_norm", most)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    norm = train.take_step(torch.optim.SGD([p], lr=1.0, fused=True), [p])
    assert norm.item() == pytest.approx(5.0) and p.grad is None
    assert p.tolist() == pytest.approx([-value for value in expected], rel=1e-4)


def test_the_option_init_decides_how_a_clone_starts(monkeypatch):
    """Random projections are N(0, 0.02), those by pca have orthonormal columns."""
    found = {}
    for init in ("random", "pca"):
        for name, value in {"init": init, "clone_scale": "none", "seq_len": 8, "seed": 3}.items():
            monkeypatch.setattr(train, name, value)
        clone = make_clone(random_llama(), 16, tie_head_projection=False)
        train.start_weights(clone, Blocks(), None, torch.device("cpu"))
        found[init] = clone.layers[0].projection("o").detach()
    assert found["random"].std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.allclose(found["pca"].T @ found["pca"], torch.eye(16), atol=1e-5)


class Blocks:
    """In place of a Mixture, for what asks it for ids alone."""

    def batch(self, first, count):
        return type("Batch", (), {"ids": torch.zeros(count, 8, dtype=torch.long).numpy()})
