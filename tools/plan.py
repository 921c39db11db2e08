"""What a run of train.py takes, before a GPU is rented: parameters, FLOPs, memory, traffic and days.

    python tools/plan.py config/lrc_1_5b.py --gpus=8
    python tools/plan.py config/lrc_4b.py --gpus=64 --replicas=8 --micro_batch_size=1 --global_batch_size=64
    python tools/plan.py config/bench_smollm2.py --gpus=1 --device=cpu     # of this machine's processes instead

Takes train.py's config files and options besides its own. Needs no weights: where the teacher's directory is
not there, its config.json is config/teachers/NAME.json. Memory is not a formula: a step of train.py runs on
fake tensors (which have shapes and no data) in a fake process group of `gpus` ranks, under torch's memory
trackers, which follow what each operation allocates and frees.
"""

gpus = 8  # processes of the run, one a GPU
memory_gib = 80.0  # of a GPU
reserve_gib = 6.0  # of it, for what is not a tensor: CUDA context, cuBLAS, NCCL, the allocator's fragmentation
peak_tflops = 989.0  # of a GPU in bfloat16, dense (H100 SXM)
mfu = (0.3, 0.4, 0.5)  # fractions of it that a run may reach

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from configurator import configure, read_options

    own = [a for a in sys.argv[1:] if a.partition("=")[0][2:] in read_options(Path(__file__).read_text())]
    others = [a for a in sys.argv[1:] if a not in own]
    configure(globals(), own + [a for a in others if a in ("-h", "--help")])
    options = configure({"__file__": ROOT / "train.py"}, others)

import contextlib
import functools
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model as models
import train
from prepare import RandomTokens


def config_of(path: str) -> dict:
    """The config.json of a Hugging Face directory, or that of its name in config/teachers/."""
    known = ROOT / "config/teachers" / f"{Path(path).name}.json"
    if not Path(path).is_dir() and known.is_file():
        return models.read_json(known)
    models.read_config(path)  # refuses what is not there
    return models.read_json(Path(path) / "config.json")


def set_options(options: dict) -> None:
    """Makes them train.py's, a model's directory replaced by its shape."""
    shapes = {name: options[name] for name in ("teacher", "model_config")}
    if options["teacher"] is None:
        shapes["model_config"] = options["model_config"] or options["init_from"]
    shapes = {name: config_of(shape) if isinstance(shape, str) else shape for name, shape in shapes.items()}
    for name, value in (options | shapes | {"init_from": None, "eval_only": False}).items():
        setattr(train, name, value)


class Blocks(RandomTokens):
    """Any blocks, of chats and of documents too: memory does not depend on what is in them."""

    def rows(self, start, count):
        return np.zeros((count, self.seq_len), np.int64), np.zeros((count, self.seq_len), np.int64)

    def documents(self, start, count):
        return np.zeros((count, self.seq_len + 1), np.int64)


class FusedRMSNorm(torch.autograd.Function):
    """What F.rms_norm keeps and makes on a GPU, where it is one kernel; on a CPU it is six."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return torch.empty_like(x), None, torch.empty_like(weight) if needs[2] else None, None


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends for FSDP's collectives, by rings, in (n - 1) / n of what is whole."""

    sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        c10d, whole = torch.ops.c10d, None
        if function is c10d._allgather_base_.default:
            whole, part = args[0], args[1]
        elif function is c10d._reduce_scatter_base_.default:
            whole, part = args[1], args[0]
        elif function is c10d.allreduce_.default:
            ranks = train.replicas
            self.sent += 2 * (ranks - 1) / ranks * sum(tensor.nbytes for tensor in args[0])
        if whole is not None:
            self.sent += whole.nbytes - part.nbytes
        return function(*args, **(kwargs or {}))


class ReplicaTracker(MemTracker):
    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, False)  # the teacher's take no hooks


class Pass(torch.nn.Module):
    """Calls a function; the trackers take a model's layers in it for parts of one pass, however often they run."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)


def run_step(model, make_weights, optimizer, where) -> None:
    """The step in train.py's main(), but for schedule and logs."""
    parameters, sums = [p for p in model.parameters() if p.requires_grad], {}
    blocks = Blocks(model.config.vocab_size, train.seq_len)
    accumulation = train.global_batch_size // (train.micro_batch_size * train.WORLD_SIZE)
    weights = Pass(model)(make_weights)
    held = models.hold(weights) if accumulation > 1 or model.sharded else weights
    labels = train.global_batch_size * train.seq_len
    for _ in range(min(accumulation, 2)):  # a third takes no more than the second
        loss, values = Pass(model)(
            train.forward, model, held, blocks, 0, train.micro_batch_size, train.global_batch_size, labels,
            where,
        )  # fmt: skip
        (loss * (train.WORLD_SIZE + 0.0 * loss.detach())).backward()
        train.add(sums, values)
    if held is not weights:
        models.release(weights, held)
    del weights, held, loss
    grad_norm = train.full(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm or torch.inf))
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    optimizer.step()


def measure(ranks: int, parallel: str, activation_checkpointing: bool, gpu: bool = True) -> dict:
    """{"peak": bytes of tensors on one rank, "sent": bytes it sends in a step} of train.py's options.

    gpu: in bfloat16 with a GPU's chunks of logits and its RMSNorm; else in float32 as on a CPU.
    """
    where, dtype = torch.device("cpu"), getattr(torch, train.dtype or ("bfloat16" if gpu else "float32"))
    sharded = parallel == "fsdp" and ranks > 1

    def outside(*args, **kwargs):  # a device mesh computes with real numbers
        with unset_fake_temporarily():
            return train_mesh(*args, **kwargs)

    train_mesh, chunk = train.init_device_mesh, models.loss_chunk
    models.logit_buffers.cache_clear()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with contextlib.ExitStack() as stack:
        stack.callback(models.logit_buffers.cache_clear)
        stack.callback(dist.destroy_process_group)
        for name, value in {"WORLD_SIZE": ranks, "parallel": parallel, "init_device_mesh": outside}.items():
            stack.enter_context(patch.object(train, name, value))
        if gpu:
            stack.enter_context(patch.object(F, "rms_norm", FusedRMSNorm.apply))
            cuda = functools.partial(chunk, device=torch.device("cuda"))
            stack.enter_context(patch.object(models, "loss_chunk", lambda vocab_size, _: cuda(vocab_size)))
        with torch.device("meta"):
            model = train.build_model(dtype)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device=where)
        if activation_checkpointing:
            model.run_block = functools.partial(checkpoint, model.run_block, use_reentrant=False)
        make_weights = train.distribute(model, where, dtype) if sharded else model
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        train.adam_state(model, optimizer)
        if not sharded and ranks > 1:  # DDP's buckets, in which the gradients stay
            for p in parameters:
                p.grad = torch.zeros_like(p)
        tracker = FSDPMemTracker(model, optimizer) if sharded else ReplicaTracker()
        if not sharded:
            tracker.track_external(model, optimizer)
        traffic = stack.enter_context(Traffic())
        with tracker:
            run_step(model, make_weights, optimizer, where)
    sent = traffic.sent if sharded else 2 * (ranks - 1) / ranks * sum(p.nbytes for p in parameters)
    return {"peak": sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values()), "sent": sent}
