"""Speed and memory of train.py's step; the speeds of sample.py and prepare.py beside other libraries'.

    python tools/bench.py config/bench_smollm2.py         # a step, SmolLM2-135M's shape to half its width
    python tools/bench.py step config/bench_tiny.py --max_steps=20
    torchrun --nproc_per_node=8 tools/bench.py config/lrc_1_5b.py --data=None --max_steps=12 \\
        --teacher=config/teachers/Llama-3.2-3B-Instruct.json
    python tools/bench.py sample --model=data/quickstart/teacher --num_samples=8
    python tools/bench.py prepare --input='raw/*.parquet' --tokenizer=models/SmolLM2-135M-Instruct

Takes the options of the script that is measured. Of a step tokens and teacher are random, so that nothing is
downloaded: `teacher` is the shape of one, the fields of a config.json or its file. --parallel=fsdp shards on
one process too. It times max_steps steps, and ends with a line of JSON: among it the fraction of torch.mm's
rate, measured between the steps, at which the arithmetic was done that a step cannot do without.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = {"step": "train.py", "sample": "sample.py", "prepare": "prepare.py"}

if __name__ == "__main__":
    from configurator import configure

    arguments = sys.argv[1:]
    measured = "step"
    if arguments and arguments[0] in SCRIPTS:
        measured = arguments.pop(0)
    options = configure({"__file__": ROOT / SCRIPTS[measured], "__doc__": __doc__}, arguments)

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import convert
import model as models
import prepare
import train
from configurator import need
from sample import generate

# ---- a step, on random tokens and weights


def random_teacher(dtype: torch.dtype) -> models.Llama:
    """A teacher of the shape that the option gives, its weights not set; in place of train.py's own."""
    return models.Llama(train.base_shape()).to(dtype)


class RandomTokens:
    """Uniformly random blocks in place of a Mixture, to measure with."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    def batch(self, first: int, count: int) -> prepare.Batch:
        tokens = np.random.default_rng(first).integers(0, self.vocab_size, (count, self.seq_len + 1))
        documents = np.zeros((count, self.seq_len), np.int64)
        return prepare.Batch(tokens[:, :-1], tokens[:, 1:], documents, np.zeros(count, np.int64))

    def count_labels(self, first: int, count: int) -> int:
        return count * self.seq_len


def make_step(device: torch.device):
    """A function that takes the optimizer step of a number, as train.py does, and returns grad_norm."""
    # The random weights are made where they are used.
    with torch.device("meta"):
        model = train.build_model(train.dtype_on(device))
    model.to_empty(device=device)
    torch.manual_seed(train.seed)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name.endswith("norm") else 0.0, 0.02)
    for kept_neurons in model.buffers():
        kept_neurons.copy_(torch.arange(len(kept_neurons)))
    train.speed_up(model, device)
    make_weights = train.distribute(model.trained, device)
    optimizer = train.make_optimizer(model.trained)
    blocks = RandomTokens(model.config.vocab_size, train.seq_len)

    def step(number: int) -> torch.Tensor:
        rate = train.learning_rate
        return train.training_step(model, make_weights, optimizer, blocks, number, rate, train.Metrics())

    return step


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of torch.mm on square matrices, the median of ten: the ceiling of a step's speed."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    rates = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


# ---- its arithmetic


def causal_attention(q, *_, **options) -> int:
    """The two products of causal attention [B, H, T, head_dim], of whose square half must be done."""
    batch, heads, length, head_dim = q
    return 2 * batch * heads * length * (length + 1) * head_dim


# What torch's counter does not know, or counts in full. Functions of the arguments' shapes.
FLOPS_OF = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, *_, **options: 2 * causal_attention(q)
    ),
}


def count_flops(recompute: str = "none") -> dict[str, float]:
    """Floating-point operations of an optimizer step by train.py's options, over all processes, by part.

    Counted by torch's FlopCounterMode, on tensors without data: one forward pass and its backward; matrix
    products and attention only. The head forms its gradients in its forward pass, and so do clone losses.
    """
    size, passes = train.split_batch()
    processes = train.WORLD_SIZE
    parts = defaultdict(float)
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS_OF)

    def counted(name: str, function):
        """The function, which adds what it computes to a part."""

        def run(*arguments, **options):
            part = name
            if name == "layer":
                part = "student" if torch.is_grad_enabled() else "teacher"
            before = counter.get_total_flops()
            result = function(*arguments, **options)
            parts[part] += counter.get_total_flops() - before
            return result

        return run

    # One process that does one of its passes.
    alone = {"WORLD_SIZE": 1, "parallel": "ddp", "global_batch_size": size, "mask_documents": False}
    counted_parts = {
        "block": counted("layer", models.block),
        "clone_losses": counted("clone losses", models.clone_losses),
        "head_loss": counted("head", models.head_loss),
        # All tokens at once: nothing is computed, and small chunks would take long to count.
        "loss_chunk": lambda vocab_size, device: 2**30,
    }
    with patch.multiple(train, load_teacher=random_teacher, **alone), patch.multiple(models, **counted_parts):
        with torch.device("meta"):
            model = train.build_model(torch.float32)
        model.recompute = recompute
        blocks = RandomTokens(model.config.vocab_size, train.seq_len)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            make_weights = counted("compose", model.trained)
            optimizer = train.make_optimizer(model.trained)
            optimizer.step = counted("Muon", optimizer.step)
            with counter:
                train.training_step(model, make_weights, optimizer, blocks, 0, 0.0, train.Metrics())
    forward = sum(parts.values())
    # Composing goes backward once too, to the projections: as many operations as forward.
    parts["backward of the rest"] = counter.get_total_flops() - forward - parts["compose"]
    # Each process composes once. Those of a replica share Muon's products.
    times = {"compose": 2 * processes, "Muon": train.replicas}
    return {name: flops * times.get(name, passes * processes) for name, flops in parts.items() if flops}


# ---- its time

# Words in the name of a GPU's kernel, or of an operator on a CPU, that say what it is for; the first kind
# that has one. Compiled kernels come first, since their names say what was fused, and attention's before
# products, since both are made of cutlass. Muon's products count as products.
KINDS = {
    "communication": ("nccl", "gloo", "c10d"),
    "compiled, elementwise": ("triton", "compiled", "cpp_fused"),
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn::fusion"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk", "aten::mm", "addmm", "bmm"),
    "optimizer, clipping": ("multi_tensor_apply", "fused_adam", "_foreach", "optimizer"),
}


def kind_of(name: str) -> str:
    for kind, words in KINDS.items():
        if any(word in name.lower() for word in words):
            return kind
    return "not compiled: copies, casts, sums"


def where_time_goes(step, first: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel (on a CPU: of operator), of two steps under torch.profiler.

    Where two kernels run at once, both count. "no kernel" is what these leave of the whole.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for number in (first, first + 1):
            step(number).item()  # waits for a GPU
        elapsed = (time.perf_counter() - start) * 1e6
    microseconds = defaultdict(float)
    for event in profiler.events():
        if not on_gpu:
            microseconds[kind_of(event.name)] += event.self_cpu_time_total
        # A range that is named by hand, as the optimizer's, would count its kernels twice.
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            microseconds[kind_of(event.name)] += event.time_range.elapsed_us()
    if not microseconds:
        return {"torch.profiler sees no kernels here (CUPTI)": elapsed / 2e3}
    by_size = sorted(microseconds.items(), key=lambda item: -item[1])
    nothing = "no kernel" if on_gpu else "no operator: Python, autograd"
    uncounted = max(0.0, elapsed - sum(microseconds.values()))
    return {kind: value / 2e3 for kind, value in [*by_size, (nothing, uncounted)]}


def measure_step() -> None:
    vars(train).update(options, load_teacher=random_teacher)
    if train.data is not None:
        raise ValueError("data is given, but a benchmark runs on random tokens: --data=None")
    train.check_options(reads_files=False)
    if train.max_steps < 1:
        raise ValueError("max_steps is 0; a benchmark needs at least 1")
    device = train.start_device()
    step = make_step(device)
    seconds = []
    rates = []
    for number in tqdm(range(train.max_steps), desc="measuring", unit="step", disable=train.RANK > 0):
        start = time.perf_counter()
        step(number).item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        # Between the steps: what else a machine does slows them alike.
        rates.append(matmul_rate(device, train.dtype_on(device)))
    memory = train.peak_memory_gib(device)
    milliseconds = where_time_goes(step, train.max_steps, device)
    train.barrier()
    if train.RANK > 0:
        return

    tokens = train.global_batch_size * train.seq_len
    median = statistics.median(seconds[1:] or seconds)
    rate = statistics.median(rates) * train.WORLD_SIZE
    parts = count_flops()
    parts["all"] = sum(parts.values())
    print(f"first step {seconds[0]:.2f} s, then a median of {median:.3f} s")
    for name, value in parts.items():
        print(f"  {name:20}{value / tokens / 1e6:9.1f} MFLOP a token {value / 1e9:10.1f} GFLOP a step")
    print("where the time of a step goes, under torch.profiler")
    for name, value in milliseconds.items():
        print(f"  {name:34}{value:9.1f} ms  {value / sum(milliseconds.values()):4.0%}")
    numbers = {
        "tokens_per_second": tokens / median,
        "seconds_per_step": median,
        "matmul_gflops": rate,
        "matmul_fraction": parts["all"] / 1e9 / median / rate,
        "peak_memory_gib": memory,
    }
    numbers = {name: round(value, 4) for name, value in numbers.items()}
    print(json.dumps(numbers | {"ms": {name: round(value, 2) for name, value in milliseconds.items()}}))


# ---- the other two scripts, three times each, in turns with what they are measured by


@torch.inference_mode()
def measure_sample() -> None:
    """Decoding speed, beside transformers' generate, of num_samples random prompts: greedy, in float32."""
    ours = convert.load_model(options["model"])
    if options["compile"]:
        ours.run_block = torch.compile(ours.run_block, dynamic=True)
    transformers = need("transformers", "tools/bench.py sample")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    theirs.generation_config.eos_token_id = None  # every row runs to its end
    ids = torch.randint(ours.config.vocab_size, (options["num_samples"], 32))

    def by_sample(count: int) -> None:
        list(generate(ours, ids.tolist(), count))

    def by_transformers(count: int) -> None:
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        theirs.generate(ids, max_new_tokens=count, **settings)

    rates = {by_sample: 0.0, by_transformers: 0.0}
    for function in [*rates] * 3:
        function(4)  # compiles, and touches memory
        start = time.perf_counter()
        function(options["max_new_tokens"])
        rate = len(ids) * options["max_new_tokens"] / (time.perf_counter() - start)
        # The fastest counts: what else the machine does only slows.
        rates[function] = max(rate, rates[function])
    rate, reference = rates.values()
    print(f"sample.py {rate:.1f} tokens/s, transformers {reference:.1f}, ratio {rate / reference:.2f}")


def measure_prepare() -> None:
    """Tokens a second, beside encode_batch on the same documents, as the shards have them."""
    tokenizer = prepare.load_tokenizer(options["tokenizer"])
    with tempfile.TemporaryDirectory(prefix="bench_", dir=ROOT / "data") as work:
        for turn in range(3):
            shards = Path(work) / f"shards_{turn}"
            start = time.perf_counter()
            command = [sys.executable, "prepare.py", *arguments, f"--out={shards}"]
            if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
                raise ValueError("prepare.py failed; what it said is above")
            seconds = time.perf_counter() - start

            documents = []
            for file in shards.glob("*tokens_*.npy"):
                ends = np.load(str(file).replace("tokens", "ends"))
                documents += [document.tolist() for document in np.split(np.load(file), ends[:-1])]
            texts = tokenizer.decode_batch(documents)
            start = time.perf_counter()
            for first in range(0, len(texts), 256):
                tokenizer.encode_batch(texts[first : first + 256], add_special_tokens=False)
            rate = sum(map(len, documents)) / seconds
            reference = sum(map(len, documents)) / (time.perf_counter() - start)
            ratio = rate / reference
            print(f"prepare.py {rate:,.0f} tokens/s, encode_batch {reference:,.0f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    try:
        {"step": measure_step, "sample": measure_sample, "prepare": measure_prepare}[measured]()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # gloo can abort a process that takes its group down
