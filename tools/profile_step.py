"""Where the time of a training step goes on this CPU: by part, by kind of operation, and what is slowest.

    python tools/profile_step.py config/bench_smollm2.py
    python tools/profile_step.py config/bench_tiny.py

Not a part of the test run, and without torch.compile, whose operators are not told apart. After three steps
to warm up it times the parts of one, then every operator of another, torch.mm's rate measured right before
and after each. What no operator takes is Python's and autograd's.
"""

import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.chdir(ROOT)

import torch
from bench import RandomTokens, count_flops, matmul_rate, random_teacher
from torch.utils._python_dispatch import TorchDispatchMode

import model as models
import train
from configurator import configure, fail

PRODUCTS = ("mm", "addmm_")


def kind_of(name: str) -> str:
    if name in PRODUCTS:
        return "matrix products"
    return "attention" if "attention" in name else "softmax" if "softmax" in name else "everything else"


class Timer(TorchDispatchMode):
    """Calls and seconds of each (operator, shapes of its tensors)."""

    def __init__(self):
        super().__init__()
        self.found = defaultdict(lambda: [0, 0.0])

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        start = time.perf_counter()
        result = function(*arguments, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        entry = self.found[name, tuple(tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor))]
        entry[0] += 1
        entry[1] += time.perf_counter() - start
        return result


def products(shapes: list[tuple]) -> float:
    """Floating-point operations of a product of the last two of its shapes."""
    (rows, inner), (_, columns) = shapes[-2:]
    return 2 * rows * inner * columns


def by_part(step, model) -> None:
    """Seconds of each part of a step, and the fraction of torch.mm's rate at which its arithmetic is done."""
    seconds, block = defaultdict(float), models.block

    def timed(name: str, function):
        def run(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        return run

    def teacher_or_student(*arguments):
        return timed("student" if torch.is_grad_enabled() else "teacher", block)(*arguments)

    flops = {name: value / 1e9 for name, value in count_flops().items()}
    work = {
        "compose": flops["compose"] / 2, "teacher": flops["teacher"], "student": flops["student"],
        "clone losses": flops["clone losses"], "head": flops["head"],  # with their gradients, formed there
        "backward": flops["backward of the rest"] + flops["compose"] / 2, "clip and AdamW": 0.0,
    }  # fmt: skip
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    with patch.multiple(models, block=teacher_or_student, head_loss=timed("head", models.head_loss)):
        layers, model.run_block = model.run_block, timed("layers", models.clone_block)
        total = step(timed)
        model.run_block = layers
    rate = (rate + matmul_rate(torch.device("cpu"), torch.float32)) / 2
    seconds["clone losses"] = seconds.pop("layers") - seconds["teacher"] - seconds["student"]
    print(f"step {total:.3f} s; torch.mm {rate:.0f} GFLOP/s")
    for name, value in work.items():
        done = f"{value:6.1f} GFLOP at {100 * value / seconds[name] / rate:3.0f}%" if value else ""
        print(f"  {name:16} {seconds[name]:6.3f} s  {100 * seconds[name] / total:5.1f}%  {done}")


def main() -> None:
    vars(train).update(configure({"__file__": str(ROOT / "train.py")}), load_teacher=random_teacher)
    if not isinstance(train.teacher, dict):
        fail("teacher is no shape; give a config that has one, as config/bench_tiny.py")
    device, blocks = torch.device("cpu"), RandomTokens(train.teacher["vocab_size"], train.seq_len)
    model = models.init_clone(train.build_model(torch.float32), train.seed, "random")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, train.learning_rate, fused=True)
    count = train.global_batch_size

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(timed=lambda name, function: function) -> float:
        start = time.perf_counter()
        weights = timed("compose", model.forward)()
        loss, _ = train.forward(model, weights, blocks, 0, count, count, count * train.seq_len, device)
        del weights
        timed("backward", loss.backward)()
        timed("clip and AdamW", update)()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    by_part(step, model)
    rate, timer, start = matmul_rate(device, torch.float32), Timer(), time.perf_counter()
    with timer:
        step()
    total = time.perf_counter() - start
    rate = (rate + matmul_rate(device, torch.float32)) / 2
    kinds = defaultdict(float)
    for (name, _), (_, seconds) in timer.found.items():
        kinds[kind_of(name)] += seconds
    kinds["no operator"] = total - sum(kinds.values())
    print(f"step {total:.3f} s; torch.mm {rate:.0f} GFLOP/s")
    for name, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {name:16} {seconds:6.3f} s  {100 * seconds / total:5.1f}%")
    counted = [(shapes, *entry) for (name, shapes), entry in timer.found.items() if name in PRODUCTS]
    done = sum(products(shapes) * calls for shapes, calls, _ in counted) / 1e9
    fraction = done / kinds["matrix products"] / rate
    print(f"  the products are {done:.0f} GFLOP, done at {100 * fraction:.0f}% of torch.mm's rate")
    for (name, shapes), (calls, seconds) in sorted(timer.found.items(), key=lambda i: -i[1][1])[:16]:
        speed = f"  {products(shapes) * calls / seconds / 1e9:4.0f} GFLOP/s" if name in PRODUCTS else ""
        print(
            f"  {100 * seconds / total:5.1f}%  {calls:4} x {name[:40]} {list(map(list, shapes[-2:]))}{speed}"
        )


if __name__ == "__main__":
    main()
