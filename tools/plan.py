"""What a run of train.py takes, before a GPU is rented: parameters, FLOPs, memory, traffic and days.

    python tools/plan.py config/lrc_1_5b.py --gpus=8
    python tools/plan.py config/lrc_4b.py --gpus=64 --replicas=8 --micro_batch_size=1 --global_batch_size=64
    python tools/plan.py config/bench_smollm2.py --gpus=1 --device=cpu     # a process on a CPU
    python tools/plan.py config/lrc_1_5b.py --target_params=1.2e9          # shapes of a student of that size

Takes train.py's config files and options besides its own (--help of both). Needs no weights: where the
teacher's directory is not there, config/teachers/NAME.json is its config.json. Memory is not a formula: a
step of train.py runs on fake tensors (which have shapes and no data) in a fake process group of `gpus` ranks,
under PyTorch's MemTracker, which follows what each operation allocates and frees. It sees neither what is
allocated within an operation nor fragmentation, for which there is reserve_gib.
"""

gpus = 8  # processes of the run, one a GPU
memory_gib = 80.0  # of a GPU
reserve_gib = 6.0  # of it, for CUDA's context, cuBLAS, NCCL and the allocator's fragmentation
peak_tflops = 989.0  # of a GPU in bfloat16, dense (H100 SXM)
mfu = (0.3, 0.4, 0.5)  # fractions of it that a run may reach
target_params: float | None = None  # a student's size: prints the shapes that have it, and no plan

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

if __name__ == "__main__":
    from configurator import configure, fail, read_options

    own = [a for a in sys.argv[1:] if a.partition("=")[0][2:] in read_options(Path(__file__).read_text())]
    others = [a for a in sys.argv[1:] if a not in own]
    configure(globals(), own + [a for a in others if a in ("-h", "--help")])
    options = configure({"__file__": ROOT / "train.py"}, others)

import contextlib
import dataclasses
import math
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench import RandomTokens, count_flops, random_teacher
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, non_functional_collectives
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore

import convert
import model as models
import train


def config_of(path: str) -> dict:
    """The config.json of a Hugging Face directory, or that of its name in config/teachers/."""
    known = ROOT / "config/teachers" / f"{Path(path).name}.json"
    if not Path(path).is_dir() and known.is_file():
        return convert.read_json(known)
    convert.read_config(path)  # refuses what is not there
    return convert.read_json(Path(path) / "config.json")


def set_options(options: dict) -> None:
    """Makes them train.py's, a model's directory replaced by its shape."""
    shapes = {name: options[name] for name in ("teacher", "model_config")}
    if options["teacher"] is None:
        shapes["model_config"] = options["model_config"] or options["init_from"]
    shapes = {name: config_of(shape) if isinstance(shape, str) else shape for name, shape in shapes.items()}
    # Any model as a student has its own shape; else weights do not matter here.
    is_any_model = options["teacher"] is not None and options["train"] == "weights"
    start = options["init_from"] if is_any_model else None
    if start and not Path(start).exists():
        start = None  # tools/compress.py has not made it yet: of the shape that the options say
    for name, value in (options | shapes | {"init_from": start, "eval_only": False}).items():
        setattr(train, name, value)
    train.load_teacher = random_teacher


def fused_rms_norm(x, shape, weight, eps):
    """What F.rms_norm keeps and makes on a GPU, where it is one kernel; on a CPU it is six."""
    return x * weight


def fused_chunk(logits, labels, teacher_logits, temperature, weights, dtype) -> tuple:
    """What run_chunk makes on a GPU, where it is compiled: of the logits' size only their gradient; on a CPU
    that is not compiled a tensor for every operation."""
    costs = logits[:, 0] * 1.0
    return {"lm": costs, "kl": costs}, logits.to(dtype)


class Watch(MemTracker):
    """PyTorch's memory tracker, which also counts the bytes sent in a step.

    A collective is taken for a ring: each rank sends the whole but for its own part.
    """

    def __init__(self):
        super().__init__()
        self.sent = 0.0
        self.fake_mode = active_fake_mode()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Before torch 2.12 the tracker counts the whole tensors on which DTensor finds shapes.
        if DTensor not in types and active_fake_mode() is not self.fake_mode:
            return function(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function in non_functional_collectives:
            ranks = CollectiveOp.get_process_group(function, args).size()
            size = CollectiveOp.get_comm_tensor_size(function, result, args, kwargs)
            rounds = 2 if function is torch.ops.c10d.allreduce_.default else 1
            self.sent += rounds * size * (ranks - 1) / ranks
        return result


def measure(ranks: int, parallel: str, recompute: str, gpu: bool = True) -> tuple[int, float]:
    """(most bytes of tensors at once, bytes sent in a step) of one rank, by train.py's options as now set.

    gpu: bfloat16, and a GPU's chunks of logits and RMSNorm; else float32 as on a CPU. In either case the fake
    tensors are on the CPU, since a PyTorch without CUDA cannot run backward on a GPU's.
    """
    where = torch.device("cpu")
    real_chunk = models.loss_chunk
    real_split = train.split_batch

    def split_batch() -> tuple[int, int]:
        size, passes = real_split()
        return size, min(passes, 2)  # a third pass takes no more than the second

    replaced = [
        (train, "WORLD_SIZE", ranks),
        (train, "parallel", parallel),
        (train, "dtype", train.dtype or ("bfloat16" if gpu else "float32")),
        (train, "split_batch", split_batch),
        (_sharding_prop, "detect_fake_mode", lambda: None),  # see Watch
    ]
    if gpu:
        cuda = torch.device("cuda")
        replaced += [
            (train, "mask_documents", False),  # a GPU makes no mask
            (F, "rms_norm", fused_rms_norm),
            # On a GPU these have no product in bfloat16 besides.
            (models, "product", lambda a, b: a.new_empty(len(a), b.shape[1], dtype=torch.float32)),
            (models, "accumulate_product", lambda total, a, b: None),
            (models, "loss_chunk", lambda vocab_size, device: real_chunk(vocab_size, cuda)),
        ]
    with contextlib.ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        stack.callback(dist.destroy_process_group)
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        with torch.device("meta"):
            model = train.build_model(train.dtype_on(where))
        # A device mesh computes with real numbers.
        make_weights = train.distribute(model.trained, where) if parallel == "fsdp" else model.trained
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device=where)
        model.recompute = recompute
        if gpu:
            model.run_chunk = fused_chunk
        optimizer = train.make_optimizer(model.trained)
        state = train.optimizer_state(model.trained, optimizer)  # as after a first step
        watch = Watch()
        if ranks > 1 and parallel == "ddp":
            for p in model.trained.parameters():
                p.grad = torch.zeros_like(p)  # in DDP's buckets, which stay
                watch.sent += 2 * (ranks - 1) / ranks * p.nbytes
        blocks = RandomTokens(model.config.vocab_size, train.seq_len)
        watch.track_external(model, *state.values())
        with watch:
            train.training_step(model, make_weights, optimizer, blocks, 0, 0.0, train.Metrics())
        return watch.get_tracker_snapshot("peak")[where]["Total"], watch.sent


def count_parameters(shape: models.ModelConfig) -> int:
    return sum(math.prod(size) for _, size in convert.weight_names(shape).values())


def print_shapes(teacher: models.ModelConfig) -> None:
    """The widths, a multiple that an export can have, with which a student comes nearest to target_params."""
    step = teacher.num_attention_heads if teacher.model_type == "llama" else 8
    widths = range(step, teacher.hidden_size + 1, step)
    every = teacher.num_hidden_layers
    print(f"\nstudents of about {target_params:,.0f} parameters; the teacher is {teacher.hidden_size} wide")
    print("  student_hidden_size  student_layers  student_intermediate_size      parameters")
    for layers in (every, every * 3 // 4, every // 2):
        for neurons in (teacher.intermediate_size, teacher.intermediate_size // 2):
            cut = {"num_hidden_layers": layers, "intermediate_size": neurons}
            shapes = [dataclasses.replace(teacher, hidden_size=width, **cut) for width in widths]
            best = min(shapes, key=lambda shape: abs(count_parameters(shape) - target_params))
            size = count_parameters(best)
            if abs(size / target_params - 1) < 0.1:
                print(f"  {best.hidden_size:19}{layers:16}{neurons:27}{size:16,}")


def print_days(tokens: int, work: dict[str, float]) -> None:
    """How long a run takes. work: {activation_checkpointing: FLOPs of a step}."""
    steps, what = (train.max_steps, "the run") if train.max_steps else (1e9 / tokens, "a run of 1B tokens")
    print(
        f"\n{what}: {steps:,.0f} steps, {steps * tokens / 1e9:.2f}B tokens, at {peak_tflops:g} TFLOP/s each"
    )
    print("  MFU  activation_checkpointing   tokens/s    days   GPU-hours")
    for fraction in mfu:
        for recompute, flops in work.items():
            seconds = flops / (gpus * peak_tflops * 1e12 * fraction)  # of a step
            hours = steps * seconds / 3600
            speed = f"{tokens / seconds:10,.0f}{hours / 24:8.1f}{hours * gpus:12,.0f}"
            print(f"  {fraction:.0%}  {recompute:25}{speed}")


def main() -> None:
    for name, values in (("peak_tflops", [peak_tflops]), ("memory_gib", [memory_gib]), ("mfu", mfu)):
        if not values or not all(isinstance(value, int | float) and value > 0 for value in values):
            raise ValueError(f"{name} is {globals()[name]}; it must be above 0")
    set_options(options)
    if target_params is not None:
        if target_params <= 0 or train.teacher is None:
            raise ValueError(
                f"target_params is {target_params}; it is a number above 0, of a teacher's student"
            )
        teacher = convert.from_hf(train.teacher, "teacher")
        tied = teacher.tie_word_embeddings and train.tie_head_projection
        return print_shapes(dataclasses.replace(teacher, tie_word_embeddings=tied))
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; it must be above 0")
    train.WORLD_SIZE = gpus
    if train.replicas > 1:
        train.parallel = "fsdp"  # which alone has them; ddp is planned beside it
    train.check_options(reads_files=False)
    gpu = train.device != "cpu"
    tokens = train.global_batch_size * train.seq_len
    size, passes = train.split_batch()
    with torch.device("meta"):
        model = train.build_model(torch.float32)
    clone = model.teacher is not None
    if clone:
        print(f"\nteacher {sum(p.numel() for p in model.teacher.parameters()):15,} parameters, frozen")
    print(f"trained {sum(p.numel() for p in model.parameters() if p.requires_grad):15,}")
    print(f"{'student' if clone else 'model':8}{count_parameters(model.config):15,}")

    # The values of activation_checkpointing that differ; layers run again but for what no backward needs.
    checkpointing = ("none", "student", "both") if clone else ("none", "both")
    parts = {recompute: count_flops(recompute) for recompute in checkpointing}
    work = {recompute: sum(parts[recompute].values()) for recompute in checkpointing}
    print(f"\nGFLOP a token, of {tokens:,} tokens a step on {gpus} {'GPUs' if gpu else 'processes'}")
    for name, value in (parts["none"] | {"all": work["none"]}).items():
        print(f"  {name:20}{value / tokens / 1e9:8.2f}")
    for recompute in checkpointing[1:]:
        more = (work[recompute] - work["none"]) / tokens / 1e9
        print(f"  {recompute + ' again':20}{more:8.2f}  (besides, with activation_checkpointing={recompute})")

    batch = f"{passes} x {size} blocks of {train.seq_len} tokens"
    print(f"\none of them, with {batch} a step (fits: with {reserve_gib:g} GiB of reserve)")
    print(f"  parallel  activation_checkpointing  peak GiB  sent, GiB a step  fits {memory_gib:g} GiB")
    for parallel in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
        for recompute in work:
            peak, sent = (number / 2**30 for number in measure(gpus, parallel, recompute, gpu))
            fits = "yes" if peak + reserve_gib <= memory_gib else "no"
            print(f"  {parallel:10}{recompute:24}{peak:10.2f}{sent:18.2f}  {fits}", flush=True)

    if gpu:
        print_days(tokens, work)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
