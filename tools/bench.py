"""Speed and memory of train.py's step, on random tokens and a random teacher: nothing is downloaded.

    python tools/bench.py config/bench_smollm2.py              # SmolLM2-135M's shape to half its width
    python tools/bench.py config/bench_tiny.py --max_steps=20
    torchrun --nproc_per_node=8 tools/bench.py config/lrc_1_5b.py --data=None --max_steps=12 \\
        --teacher=config/teachers/Llama-3.2-3B-Instruct.json

Takes train.py's options; `teacher` is the shape of one, the fields of a config.json or its file. It times
max_steps steps, reports FLOPs by part and ends with a line of JSON: among it the fraction of torch.mm's rate,
as measured between the steps, at which the arithmetic was done that a step cannot do without.
"""

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from configurator import configure

    options = configure({"__file__": ROOT / "train.py", "__doc__": __doc__})

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model as models
import train
from prepare import Batch

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def random_teacher(dtype: torch.dtype) -> models.Llama:
    """A teacher of the shape that the option gives, its weights random; in place of train.py's own."""
    teacher = models.Llama(train.base_shape(), dtype)
    return teacher.init_weights(train.seed).to(dtype)


class RandomTokens:
    """Uniformly random blocks in place of a Mixture, to measure with."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.total = 2**40
        self.tokens_per_block = seq_len

    def batch(self, first: int, count: int) -> Batch:
        tokens = np.random.default_rng(first).integers(0, self.vocab_size, (count, self.seq_len + 1))
        documents = np.zeros((count, self.seq_len), np.int64)
        return Batch(tokens[:, :-1], tokens[:, 1:], documents, np.zeros(count, np.int64))

    def count_labels(self, first: int, count: int) -> int:
        return count * self.seq_len


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of torch.mm on square matrices, the median of ten: the ceiling of a step's speed."""
    n = MATMUL_SIZE[device.type]
    a = torch.randn(n, n, device=device, dtype=dtype)
    rates = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def causal_attention(q, k, v, *_, **options) -> int:
    """The two products of causal attention [B, H, T, head_dim], of whose square half must be done."""
    batch, heads, length, head_dim = q
    return 2 * batch * heads * length * (length + 1) * head_dim


def causal_attention_backward(grad, q, k, v, *_, **options) -> int:
    return 2 * causal_attention(q, k, v)


# What torch's counter does not know, or counts in full. Functions of the arguments' shapes.
FLOPS_OF = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_attention_backward,
}


@contextlib.contextmanager
def counted_parts(counter: FlopCounterMode, parts: dict):
    """Adds up, in `parts`, what the counter sees in each part of a forward pass."""

    def counted(name: str, function):
        def run(*arguments, **options):
            part = name
            if name == "layer":
                part = "student" if torch.is_grad_enabled() else "teacher"
            before = counter.get_total_flops()
            result = function(*arguments, **options)
            parts[part] += counter.get_total_flops() - before
            return result

        return run

    with patch.multiple(
        models,
        block=counted("layer", models.block),
        clone_losses=counted("clone losses", models.clone_losses),
        head_loss=counted("head", models.head_loss),
    ):
        yield counted


def count_flops(recompute: bool = False) -> dict[str, float]:
    """Floating-point operations of an optimizer step by train.py's options, over all processes, by part.

    Counted by torch's FlopCounterMode, on tensors without data: one forward pass and its backward; matrix
    products and attention only. The head forms its gradients in its forward pass, and so do clone losses.
    """
    size, passes = train.split_batch()
    processes = train.WORLD_SIZE
    parts = defaultdict(float)
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS_OF)
    one_pass = {"WORLD_SIZE": 1, "parallel": "ddp", "global_batch_size": size, "mask_documents": False}
    replaced = patch.multiple(train, load_teacher=random_teacher, **one_pass)
    with replaced, counted_parts(counter, parts) as counted:
        with torch.device("meta"):
            model = train.build_model(torch.float32)
        model.recompute = recompute
        blocks = RandomTokens(model.config.vocab_size, train.seq_len)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            with counter:
                train.backward_step(model, counted("compose", model), blocks, 0, torch.device("cpu"))
    forward = sum(parts.values())
    # Composing goes backward once too, to the projections: as many operations as forward.
    parts["backward of the rest"] = counter.get_total_flops() - forward - parts["compose"]
    for name in parts:
        parts[name] *= 2 * processes if name == "compose" else passes * processes
    if not isinstance(model, models.LowRankClone):
        parts.pop("compose")
    return dict(parts)


def main() -> None:
    vars(train).update(options, load_teacher=random_teacher)
    if train.data is not None:
        raise ValueError("data is given, but a benchmark runs on random tokens: --data=None")
    train.split_batch()
    device = train.start_device()
    dtype = train.dtype_on(device)
    model = train.build_model(dtype)
    if isinstance(model, models.LowRankClone):
        models.init_clone(model, train.seed, "random")
    else:
        model.init_weights(train.seed)
    model = model.to(device)
    train.speed_up(model, device)
    make_weights = train.distribute(model, device)
    optimizer = train.make_optimizer(model)
    parameters = list(train.trained_parameters(model).values())
    blocks = RandomTokens(model.config.vocab_size, train.seq_len)

    seconds = []
    rates = []
    for step in tqdm(range(train.max_steps), desc="measuring", unit="step", disable=train.RANK > 0):
        start = time.perf_counter()
        train.backward_step(model, make_weights, blocks, step, device)
        train.take_step(optimizer, parameters).item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        rates.append(
            matmul_rate(device, dtype)
        )  # between the steps: what else a machine does slows them alike
    if train.RANK == 0:
        report(seconds, rates, device)
    train.barrier()


def report(seconds: list[float], rates: list[float], device: torch.device) -> None:
    tokens = train.global_batch_size * train.seq_len
    median = statistics.median(seconds[1:] or seconds)
    rate = statistics.median(rates) * train.WORLD_SIZE
    parts = count_flops()
    parts["all"] = sum(parts.values())
    print(f"first step {seconds[0]:.2f} s, then a median of {median:.3f} s")
    for name, value in parts.items():
        print(f"  {name:20}{value / tokens / 1e6:9.1f} MFLOP a token {value / 1e9:10.1f} GFLOP a step")
    numbers = {
        "tokens_per_second": tokens / median,
        "seconds_per_step": median,
        "matmul_gflops": rate,
        "matmul_fraction": parts["all"] / 1e9 / median / rate,
        "peak_memory_gib": train.peak_memory_gib(device),
    }
    print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
