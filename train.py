"""Clones a teacher into a smaller student (Low-Rank Clone), or trains or fine-tunes a plain language model.

    python train.py                               # quickstart: clones the bundled teacher on any CPU
    python train.py config/smollm2_135m.py        # a real clone that a laptop can run
    python train.py config/lrc_1_5b.py            # one GPU
    torchrun --nproc_per_node=8 train.py config/lrc_1_5b.py                 # eight, each with the whole model
    torchrun --nproc_per_node=8 train.py config/lrc_4b.py --parallel=fsdp   # eight, each with its shard
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py config/lrc_4b.py --parallel=fsdp --replicas=2     # shards within a node, replicas across
    python train.py config/sft_1_5b.py --init_from=student         # fine-tunes on chats
    python train.py config/quickstart_teacher.py  # a plain LM, as the bundled teacher was trained
    python train.py config/X.py --resume=True     # goes on from the last checkpoint in out_dir
    python train.py config/X.py --init_from=out/X --eval_only=True            # held-out loss of a model
    python train.py config/X.py --train=weights --init_from=out/X --out_dir=out/Y   # on with its own weights

The options come first, then what differs between one process and many, then the pieces of a step, then
`main`: what can be refused, device, model, data, optimizer, the loop. tools/bench.py measures the step.
"""

from typing import Literal

# what to train
teacher: str | dict | None = "data/quickstart/teacher"  # Hugging Face directory to clone; None: a plain LM
train: Literal["projections", "weights"] = "projections"  # of the student: P of its W P, or W of its own
student_hidden_size: int | None = 96  # d_S, width of the student's residual stream (tools/plan.py finds one)
student_layers: int | tuple | None = None  # which of the teacher's to keep: indices, or how many; None: all
student_intermediate_size: int | None = None  # FFN neurons to keep, those that add most; None: all
model_config: dict | str | None = None  # shape of a plain LM: config.json's fields, or its directory
init_from: str | None = None  # start: a clone's checkpoint; with train=weights or no teacher also any model
tokenizer: str | None = None  # directory whose tokenizer goes into the checkpoints; None: the teacher's
calibration_tokens = 16384  # tokens on which the teacher is looked at before training
init: Literal["random", "pca"] = "pca"  # start; paper: random. A better one: tools/compress.py
share_qkv = False  # one projection for q, k and v, and one clone loss on their input in place of three
share_gate_up = False  # one projection for gate and up, likewise
tie_head_projection = True  # one projection for embedding and LM head
student_rms_norm_eps = 1e-5  # epsilon of the student's RMSNorms
# loss: lm_weight · CE + kl_weight · T² · KL + clone_weight · Σ clone terms
lm_weight = 0.1  # next-token cross entropy (paper: 1); config/study/README.md has what it gives
kl_weight = 1.0  # KL(teacher ‖ student) at kl_temperature, per token and times T²
kl_temperature = 1.0  # T of the KL term (paper: 40)
clone_weight = 0.05  # the sum of all clone losses (paper: alpha, 0.2 or 0.5); 0 leaves them out
clone_attn_out: Literal["student", "teacher"] = "student"  # compared in whose space (authors' code: teacher)
clone_mlp_out: Literal["student", "teacher"] = "student"  # likewise, for the FFN's output
clone_scale: Literal["none", "teacher"] = "teacher"  # teacher: each term over its activation's mean square
clone_skip: tuple = ()  # clone terms to leave out, by the names that the log has (another one lists them)
clone_skip_layers: tuple = ()  # layers without clone losses, by index
# data
data: str | dict | None = "data/quickstart/corpus"  # shard directory, or {directory: token budget or None}
seq_len = 256  # tokens in a block
global_batch_size = 16  # blocks a step, over all devices and micro-batches
micro_batch_size = 16  # most blocks of one forward pass on each device; the rest of a step is accumulated
mask_documents = False  # attention and positions restart where a document ends
sft = False  # fine-tune a plain LM on prepare.py's SFT rows: loss on the assistant's tokens only
seed = 1  # of the initial weights and the order of the data
# optimizer
optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of the layers' and projections' matrices; AdamW else
max_steps = 100  # optimizer steps of the run; 0: as many as `epochs` takes
epochs = 1.0  # passes over the data, where max_steps is 0
learning_rate = 3e-3  # peak
lr_schedule: Literal["linear", "cosine", "warmup_stable_decay", "constant"] = "linear"  # after the warmup
warmup_ratio = 0.05  # of max_steps, linear from 0
decay_ratio = 0.1  # of max_steps, the last part of warmup_stable_decay
beta1 = 0.9  # AdamW
beta2 = 0.999  # AdamW
momentum = 0.95  # Muon
weight_decay = 0.0  # on matrices, not on norms
max_grad_norm = 1.0  # gradients are scaled down to this norm; 0 does not
max_bad_steps = 10  # steps in a row, with a loss or gradient that is not finite, that end the run
# run
out_dir = "out/quickstart"  # checkpoints and metrics.jsonl; must be new, or resumed
resume = False  # go on from the last checkpoint in out_dir, if there is one
save_every = 1000  # steps between checkpoints, besides the one at the end; 0: none at all
keep_last = 2  # checkpoints to keep
log_every = 10  # steps between lines of metrics.jsonl
eval_every = 500  # steps between evaluations on held-out blocks, besides the one at the end; 0: none at all
eval_blocks = 128  # held-out blocks of an evaluation
eval_only = False  # evaluate the model of init_from, and the teacher where there is one, and end
sample_prompt: str | None = None  # continued at the end; None: the quickstart's own, and none elsewhere
wandb = False  # log to Weights & Biases too, where installed; what goes wrong there never stops the run
wandb_project = "low-rank-clone"  # there
run_name: str | None = None  # there; None: out_dir
tags: tuple = ()  # there
compile: bool | None = None  # torch.compile of a layer (one, used for all) and of the loss; None: on cuda
activation_checkpointing: Literal["none", "student", "both"] = "none"  # layers of which run again in backward
parallel: Literal["ddp", "fsdp"] = "ddp"  # processes have replicas of what trains, or shards of it (FSDP2)
replicas = 1  # of the shards, for fsdp: number of nodes to shard within each and replicate across (HSDP)
device: str | None = None  # None: cuda where there is one, or cpu
dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16 on cuda, float32 on cpu

if __name__ == "__main__":
    import signal
    import sys

    from configurator import configure

    # Until training takes Ctrl-C for the order to save, it ends the script with one line.
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped before the first step"))
    # stdout is for the numbers of an evaluation
    options = configure(globals(), log=sys.stderr if "--eval_only=True" in sys.argv else None)

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import convert
import model as models
from configurator import choose_device, lock, need_compiler, read_lines, show
from prepare import Mixture, encode_text, load_tokenizer, special_ids, vocabulary_hash, write_shards
from sample import generate, turn_end_ids

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
QUICKSTART = "data/quickstart"
LAYERS_OF_A_UNIT = 8  # that FSDP gathers at once: each unit costs CPU time, and larger ones memory


def print0(text: str) -> None:
    """On one process, above a bar where there is one."""
    if RANK == 0:
        tqdm.write(text)


# ---- one process or many, a CPU or GPUs


def start_device() -> torch.device:
    """This process's device, its process group begun under torchrun."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        index = chosen.index or int(os.environ.get("LOCAL_RANK", 0))
        gpus = torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(
                f"process {index} here has no GPU of its own, there are {gpus}: see --nproc_per_node"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if WORLD_SIZE == 1 and parallel == "ddp":
        return chosen
    # gloo beside nccl: what is decided on the CPU (stop? failed?) need not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    rendezvous = {}
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD_SIZE)
    if "WORLD_SIZE" not in os.environ:  # without torchrun: a process group of one, which shards too
        rendezvous = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store still has the addresses from before a restart, which ranks would wait for
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        rendezvous = {"store": store, "rank": RANK, "world_size": WORLD_SIZE}
    dist.init_process_group(backend, **rendezvous)
    return chosen


def dtype_on(device: torch.device) -> torch.dtype:
    return getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")  # getrusage also counts the process that started this one
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) / 2**20
    unit = 2**30 if os.uname().sysname == "Darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def launch_id() -> str:
    """What one call of torchrun says of itself, also where it starts its processes anew."""
    # On one node the id can be a default that all calls have.
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD_SIZE)
    agent = f" {os.uname().nodename} {os.getppid()}" if one_node else ""
    return os.environ.get("TORCHELASTIC_RUN_ID", "") + agent


def over_ranks(values: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(values, operation)
    return values


def on_any_rank(flag: bool) -> bool:
    return bool(over_ranks(torch.tensor(int(flag)), dist.ReduceOp.MAX).item())


def barrier() -> None:
    on_any_rank(False)


def from_rank_0(tensors: list[torch.Tensor]) -> None:
    """Writes rank 0's values into those of the others: two machines may differ in an eigenvector's sign."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def distribute(trained: models.StudentWeights, device: torch.device):
    """What trains as it makes the student's weights, once a step: wrapped in DDP, sharded by FSDP2, or as it
    is.

    The frozen teacher stays whole on every device. Sharding that too would send four times as much and take
    more time on the CPU than a step has, for the few GiB that tools/plan.py tells.
    """
    if parallel == "ddp":
        return trained if WORLD_SIZE == 1 else DistributedDataParallel(trained, gradient_as_bucket_view=True)
    # These take half a second to import, and only this needs them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if replicas > 1:
        sizes = (replicas, WORLD_SIZE // replicas)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (WORLD_SIZE,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(dtype_on(device), torch.float32, cast_forward_inputs=False)
    # The root too frees what it has gathered: named_parameters() then always gives the shards.
    shared = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    for first in range(0, len(trained.layers), LAYERS_OF_A_UNIT):
        fully_shard([*trained.layers[first : first + LAYERS_OF_A_UNIT]], **shared)
    return fully_shard(trained, **shared)


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that this rank has: all of them but under FSDP."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- model, data, schedule


def load_teacher(compute_dtype: torch.dtype) -> models.Llama:
    """Replaced where a teacher is random, in tools/."""
    return convert.load_model(teacher, compute_dtype)


def options_of(config: type) -> dict:
    """The options that are fields of a dataclass."""
    return {field.name: globals()[field.name] for field in dataclasses.fields(config)}


def loss_config() -> models.LossConfig:
    """The loss that the options describe; ValueError names one with a term or layer that there is not."""
    losses = models.LossConfig(**options_of(models.LossConfig))
    if clone_skip:
        terms = models.clone_terms(models.StudentConfig(**options_of(models.StudentConfig)), losses)
        if not set(clone_skip) <= set(terms):
            raise ValueError(f"clone_skip is {clone_skip}; allowed: {terms}")
    return losses


def student_config(teacher_layers: int) -> models.StudentConfig:
    student = models.StudentConfig(**options_of(models.StudentConfig))
    if isinstance(student_layers, int):
        layers = models.spread_layers(student_layers, teacher_layers)
        student = dataclasses.replace(student, student_layers=layers)
    return student


def build_model(compute_dtype: torch.dtype, checkpoint: Path | None = None) -> models.Student:
    """The student that the options describe, its weights not yet set: one of three kinds.

    checkpoint: the one that is resumed, by which its kind is known, or else by init_from.
    """
    base = base_shape()
    # A plain language model, without a teacher.
    if teacher is None:
        return models.Student(base, dtype=compute_dtype)

    # A clone of the teacher, or what a run made of one: the teacher's layers, of another width.
    losses = loss_config()
    student = student_config(base.num_hidden_layers)
    source = checkpoint or (convert.resolve(init_from) if init_from else None)
    if source is None or convert.is_clone(source) or (convert.has_projections(source) and not eval_only):
        shape = models.student_shape(base, student)
    elif not eval_only and train == "projections":
        raise ValueError(f"{source} is a plain model; this run trains a clone (train=projections)")
    # Any model with the teacher's vocabulary. Where layers and heads are the teacher's, so are clone losses.
    else:
        shape = any_students_shape(source, base.vocab_size)
        student = dataclasses.replace(
            student, train="weights", share_qkv=False, share_gate_up=False, student_intermediate_size=None
        )
        student, losses = fit_losses(base, shape, student, losses)

    if not set(clone_skip_layers) <= set(range(shape.num_hidden_layers)):
        raise ValueError(
            f"clone_skip_layers is {clone_skip_layers}; the student has {shape.num_hidden_layers}"
        )
    # What does not fit was refused before the teacher is loaded.
    return models.Student(shape, load_teacher(compute_dtype), student, losses)


def any_students_shape(source: Path, vocab_size: int) -> models.ModelConfig:
    """The shape of a model that is no clone; ValueError where its vocabulary is not the teacher's."""
    shape = convert.read_config(source)
    refuse_another_tokenizer(source)
    if shape.vocab_size != vocab_size:
        sizes = f"{shape.vocab_size} tokens; the teacher has {vocab_size}"
        raise ValueError(f"{source} has {sizes}: a student needs the teacher's vocabulary")
    return shape


def fit_losses(
    base: models.ModelConfig, shape: models.ModelConfig, student: models.StudentConfig, losses
) -> tuple[models.StudentConfig, models.LossConfig]:
    """Without the clone losses that a student of this shape cannot have beside the teacher; it says why."""
    layers = student.student_layers or range(base.num_hidden_layers)
    sizes = {"num_hidden_layers": len(layers)}
    for field in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        sizes[field] = getattr(base, field)
    sizes = {name: size for name, size in sizes.items() if getattr(shape, name) != size}
    other = [f"{name} {getattr(shape, name)}, not {size}" for name, size in sizes.items()]
    if other:
        student = dataclasses.replace(student, student_layers=None)
        losses = dataclasses.replace(losses, clone_weight=0.0)
    elif shape.hidden_size != base.hidden_size:
        # Two terms need projections in the student's space, which only a run with clone losses leaves.
        outputs = [name for name in ("attn_out", "mlp_out") if getattr(losses, f"clone_{name}") == "student"]
        losses = dataclasses.replace(losses, clone_skip=(*clone_skip, *outputs))
        other = [f"{name} (hidden_size {shape.hidden_size}, not {base.hidden_size})" for name in outputs]
    if other and clone_weight and not eval_only:
        print0(f"clone losses left out: {', '.join(other)}")
    return student, losses


def refuse_another_tokenizer(source: Path) -> None:
    """ValueError where a student's own tokenizer maps other strings to ids than the teacher's does."""
    theirs = tokenizer or teacher
    if all((Path(path) / "tokenizer.json").is_file() for path in (source, theirs)):
        hashes = {vocabulary_hash(load_tokenizer(path)) for path in (source, theirs)}
        if len(hashes) > 1:
            raise ValueError(f"{source} has another vocabulary than {theirs}: a student needs its teacher's")


def base_shape() -> models.ModelConfig:
    """The teacher's, or the plain model's where there is no teacher; by a directory or a config.json."""
    shape = teacher or model_config or (convert.resolve(init_from) if init_from else None)
    if shape is None:
        raise ValueError(
            "teacher is None, so a plain LM is trained: give model_config, its shape, or init_from"
        )
    if str(shape).endswith(".json"):
        shape = convert.read_json(Path(shape))
    if isinstance(shape, dict):
        return convert.from_hf(shape, "teacher" if teacher else "model_config")
    return convert.read_config(shape)


def tokenizer_directory() -> str | None:
    """Where the tokenizer of the model that is trained, or evaluated, is."""
    if eval_only and tokenizer is None:
        source = convert.resolve(init_from)
        if (source / "tokenizer.json").is_file():
            return str(source)
    return tokenizer or teacher or (init_from and str(convert.resolve(init_from)))


def turn_ends(tokenizer_dir: str | None) -> tuple[int, ...]:
    """With sft, the tokens at which generate() is to stop, by the chat template of the tokenizer."""
    if not (sft and tokenizer_dir):
        return ()
    try:
        return turn_end_ids(load_tokenizer(tokenizer_dir), tokenizer_dir)
    except ValueError as error:
        print0(f"generation_config.json has no end of turn: {error}")
        return ()


def open_data(vocab_size: int, tokenizer_dir: str | None) -> tuple[Mixture, Mixture | None]:
    """(training blocks, held-out blocks or None), which must fit the model and its tokenizer."""
    if data == f"{QUICKSTART}/corpus" and not Path(data).exists():
        if RANK == 0:
            write_shards("stdlib", data, f"{QUICKSTART}/teacher")
        barrier()
    sources = {data: None} if isinstance(data, str) else data
    train_data = Mixture(sources, "tokens", seq_len, seed, sft)
    vocabulary = vocabulary_hash(load_tokenizer(tokenizer_dir)) if tokenizer_dir else None
    for shards in train_data.sources:
        size = shards.meta["vocab_size"]
        name = shards.meta["tokenizer"]
        if size > vocab_size:
            raise ValueError(f"{shards.path} has {size} token ids (of {name}); the model has {vocab_size}")
        if vocabulary and shards.meta["vocabulary_hash"] != vocabulary:
            raise ValueError(f"{shards.path} is by {name}, whose vocabulary is not {tokenizer_dir}'s")
        longest = shards.meta["settings"]["seq_len"]
        if sft and longest > seq_len:
            raise ValueError(
                f"{shards.path} has rows of up to {longest} tokens, more than seq_len, {seq_len}: train with "
                f"--seq_len={longest}, or prepare the data anew with --seq_len={seq_len}"
            )
    if not (eval_every or eval_only):
        return train_data, None
    return train_data, Mixture(dict.fromkeys(sources), "heldout", seq_len, 0, sft)


def calibration_ids(train_data: Mixture, device: torch.device) -> torch.Tensor:
    """The first blocks [N, seq_len]: the same on any number of processes, and when resumed."""
    return models.to_device(train_data.batch(0, max(1, calibration_tokens // seq_len)).ids, device)


def start_weights(model, train_data: Mixture, checkpoint_path: Path | None, device: torch.device) -> None:
    """Calibrates a student with a teacher, and sets its weights: from a checkpoint, or by init and seed."""
    covariance = None
    scales = clone_scale == "teacher" and model.loss_config and model.loss_config.clone_weight
    begins = checkpoint_path is None and (init != "random" or student_intermediate_size is not None)
    if model.teacher and (scales or begins):
        ids = calibration_ids(train_data, device)
        covariance = model.calibrate(show(ids, desc="calibrating", unit="block"))
    if checkpoint_path is not None:
        convert.load_weights(checkpoint_path, model)
    else:
        models.init_student(model, seed, init, covariance)
    from_rank_0([*model.trained.state_dict().values(), *model.mean_squares.values()])


def speed_up(model, device: torch.device) -> None:
    """Compiles and checkpoints the parts of the model that the options say."""
    if compiles(device):
        model.run_block = torch.compile(model.run_block)
        model.run_chunk = torch.compile(model.run_chunk)
    model.recompute = activation_checkpointing


def compiles(device: torch.device) -> bool:
    return device.type == "cuda" if compile is None else compile


MATRICES_AT_ONCE = 32  # of one shape, that Muon stacks for its products on a device


class Muon:
    """Muon for the matrices of `groups` and AdamW for all else, used as one optimizer.

    A matrix is stepped as torch.optim.Muon does it (Nesterov, match_rms_adamw), in less time: those of one
    shape are stacked, and each process orthogonalises its share of them.
    """

    def __init__(self, groups: list[dict], adamw: torch.optim.AdamW, momentum: float):
        self.adamw = adamw
        self.momentum = momentum
        self.groups = groups
        self.param_groups = [*groups, *adamw.param_groups]
        self.state = adamw.state  # one dict has the state of every parameter
        self.found_inf = None  # set by training_step
        self.run_nesterov = nesterov
        if compiles(groups[0]["params"][0].device):
            self.run_nesterov = torch.compile(nesterov)
        for p in (p for group in groups for p in group["params"]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.detach())

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        skips = self.found_inf.bool()
        for group in self.groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            decay = torch.where(skips, 1.0, 1 - group["lr"] * group["weight_decay"])
            for shape, parameters in by_shape.items():
                scale = -0.2 * max(shape) ** 0.5 * group["lr"]
                at_once = MATRICES_AT_ONCE * WORLD_SIZE // replicas
                for first in range(0, len(parameters), at_once):
                    some = parameters[first : first + at_once]
                    steps = orthogonalise_together(self.updates(some, skips), some[0])
                    shards = [local_shard(p) for p in some]
                    if group["weight_decay"]:
                        torch._foreach_mul_(shards, decay)
                    torch._foreach_add_(shards, [*steps], alpha=scale)

    def updates(self, parameters: list, skips: torch.Tensor) -> torch.Tensor:
        """What is to be orthogonalised of matrices of one shape, stacked [n, rows here, columns]."""
        stacks = []
        for first in range(0, len(parameters), MATRICES_AT_ONCE):  # compiled, 256 at once take a minute
            some = parameters[first : first + MATRICES_AT_ONCE]
            gradients = [local_shard(p.grad) for p in some]
            buffers = [local_shard(self.state[p]["momentum_buffer"]) for p in some]
            stacks.append(self.run_nesterov(gradients, buffers, skips, self.momentum))
        return torch.cat(stacks)

    def zero_grad(self, set_to_none: bool) -> None:
        self.adamw.zero_grad(set_to_none)
        for p in (p for group in self.groups for p in group["params"]):
            p.grad = None


def nesterov(gradients: list, buffers: list, skips: torch.Tensor, momentum: float) -> torch.Tensor:
    """Adds gradients to their momentum buffers, in place; returns what is to be orthogonalised, stacked.

    In bfloat16, in which torch.optim.Muon begins too. Where the step is skipped, the momentum stands in for
    the gradient, and so stays what it is.
    """
    gradients = [torch.where(skips, *pair) for pair in zip(buffers, gradients, strict=True)]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, buffers, momentum)
    return torch.stack([update.bfloat16() for update in updates]) * ~skips


def orthogonalise_together(stack: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Orthogonalises matrices of the shape of p, every process its share; stack [n, rows here, columns].

    Under ddp every process has the whole matrices, and gets the results of all. Under fsdp it has some rows
    of each: it sends those of a matrix to the process whose share that is, and gets its rows of the result.
    """
    if WORLD_SIZE == 1:
        return orthogonalise(stack)
    group = p.device_mesh.get_group("shard") if parallel == "fsdp" else dist.group.WORLD
    processes = group.size()
    count, rows_here, columns = stack.shape
    share = -(-count // processes)  # rounded up
    if parallel == "ddp":
        mine = orthogonalise(stack[RANK * share :][:share])
        mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))
        every = stack.new_empty(processes * share, rows_here, columns)
        # torch 2.13 gave it the shorter name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(every, mine, group)
        return every[:count]
    # As FSDP cuts a matrix, the last shards can have fewer rows: all are filled up to the first one's.
    rows = -(-p.shape[0] // processes)
    shards = F.pad(stack, (0, 0, 0, rows - rows_here, 0, processes * share - count))
    mine = torch.empty_like(shards)  # [process, matrix, row, column]
    dist.all_to_all_single(mine, shards, group=group)
    whole = mine.unflatten(0, (processes, share)).transpose(0, 1).flatten(1, 2)
    whole = orthogonalise(whole[:, : p.shape[0]])
    whole = F.pad(whole, (0, 0, 0, processes * rows - p.shape[0]))
    mine = whole.unflatten(1, (processes, rows)).transpose(0, 1).contiguous()
    dist.all_to_all_single(shards, mine.flatten(0, 1), group=group)
    return shards[:count, :rows_here]


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of matrices U S V^T [n, rows, columns]: five Newton-Schulz iterations (Keller Jordan)."""
    tall = x.shape[1] > x.shape[2]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # By the shorter side: bit for bit what x.mT gives, without copies of a transposed view.
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factors = (x, gram) if tall else (gram, x)
        x = torch.baddbmm(x, *factors, beta=3.4445)
    return x


def is_for_muon(name: str, p: torch.Tensor) -> bool:
    """Whether Muon steps a parameter: a matrix, but no vocabulary, whose rows are vectors by themselves."""
    return optimizer == "muon" and p.ndim == 2 and name not in ("embedding", "head")


def make_optimizer(trained: torch.nn.Module) -> torch.optim.AdamW | Muon:
    """The optimizer that the options say; norms and biases do not decay."""
    groups = {}
    for name, p in trained.named_parameters():
        key = is_for_muon(name, p), p.ndim > 1
        group = {"params": [], "weight_decay": weight_decay if p.ndim > 1 else 0.0, "lr": learning_rate}
        groups.setdefault(key, group)["params"].append(p)
    by_muon = [group for (muon, _), group in groups.items() if muon]
    others = [group for (muon, _), group in groups.items() if not muon]
    adamw = torch.optim.AdamW(others, learning_rate, (beta1, beta2), fused=True)
    return Muon(by_muon, adamw, momentum) if by_muon else adamw


def learning_rate_at(step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`."""
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if lr_schedule == "linear":
        return learning_rate * (1 - progress)
    if lr_schedule == "cosine":
        return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if lr_schedule == "warmup_stable_decay":
        return learning_rate * min(1.0, (steps - step) / max(1, round(decay_ratio * steps)))
    return learning_rate


# ---- a step


def split_batch() -> tuple[int, int]:
    """(blocks of a forward pass on each process, forward passes of a step): the largest passes that have
    equal size and at most micro_batch_size blocks."""
    share, remainder = divmod(global_batch_size, WORLD_SIZE)
    if remainder or not share:
        raise ValueError(
            f"global_batch_size is {global_batch_size}; it must divide by {WORLD_SIZE} processes"
        )
    size = max(n for n in range(1, min(micro_batch_size, share) + 1) if share % n == 0)
    return size, share // size


class Metrics:
    """Sums over passes, and of what each is a mean over: steps for a loss, tokens for that of a source."""

    def __init__(self):
        self.sums = {}  # {name: [sum, a tensor of one value or of one a layer; over]}

    def add(self, name: str, values: torch.Tensor, over) -> None:
        """values: their sum over `over` (a number or a tensor) of what the mean is over."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + values.detach().double()
        entry[1] = entry[1] + over

    def means(self) -> dict[str, float | dict]:
        """Over all ranks, without those over nothing; "terms_by_layer": {name: [layers]} of some."""
        flat = []
        for values, over in self.sums.values():
            flat += [values.flatten(), values.new_zeros(1) + over]
        totals = over_ranks(torch.cat(flat)).split([len(part) for part in flat])
        means = {}
        by_layer = {}
        for i, (name, (values, _)) in enumerate(self.sums.items()):
            sums = totals[2 * i].tolist()
            over = totals[2 * i + 1].item()
            if over:
                means[name] = sum(sums) / over
            if over and values.ndim:
                by_layer[name] = [value / over for value in sums]
        return means | ({"terms_by_layer": by_layer} if by_layer else {})


def run_pass(model, made, blocks, first: int, count: int, whole: int, labels: int, metrics: Metrics):
    """Samples first, first + 1, … through the model: a part of a batch of `whole` blocks, `labels` labels.

    made: the student's weights and projections. Returns the loss, a share of the batch's as those that are
    added to the metrics; nothing here waits for a GPU.
    """
    device = model.device
    batch = blocks.batch(first, count)
    ids = models.to_device(batch.ids, device)
    targets = models.to_device(batch.labels, device)
    documents = models.document_layout(batch.documents, device) if mask_documents else None
    share = count / whole
    losses = model.loss(ids, targets, made, labels, share, documents)
    for name in ("loss", "lm", "kl", "clone", "teacher_lm", "agreement"):
        if name in losses:
            metrics.add(name, losses[name], share)
    for name, values in losses.get("terms", {}).items():
        metrics.add(f"clone_{name}", values, share)
    sources = getattr(blocks, "sources", ())
    if len(sources) > 1:
        source_of = models.to_device(batch.source, device)[:, None]
        for index, name in enumerate(blocks.names):
            counted = (source_of == index) & (targets != -100)
            metrics.add(f"lm/{name}", (losses["token_lm"] * counted).sum(), counted.sum())
    return losses["loss"]


def training_step(model, make_weights, optimizer, blocks, step: int, lr: float, metrics: Metrics):
    """One step of the optimizer, on the blocks of batch `step`; returns the gradient's norm before clipping.

    make_weights: distribute's result. Losses go to the metrics. A step whose gradient is not finite changes
    nothing.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr

    # The student's weights are made once. Where several passes share them, and under FSDP, gradients gather
    # on a held copy of them and are synchronised once, when that is released.
    made = make_weights(model.teacher, model.dtype)
    size, passes = split_batch()
    holds = passes > 1 or parallel == "fsdp"
    shared = hold(made, accumulate=passes > 1) if holds else made

    begin = step * global_batch_size
    labels = blocks.count_labels(begin, global_batch_size)
    for i in range(passes):
        first = begin + (i * WORLD_SIZE + RANK) * size
        loss = run_pass(model, shared, blocks, first, size, global_batch_size, labels, metrics)
        # DDP and FSDP average over the ranks; a loss that is not finite makes every gradient so.
        (loss * (WORLD_SIZE + 0.0 * loss.detach())).backward()
    if holds:
        release(model.trained, made, shared)
    # Freed before the optimizer takes memory of its own.
    del made, shared

    parameters = [*model.trained.parameters()]
    grad_norm = unshard(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    # As GradScaler does it: where found_inf is 1, the optimizer changes nothing.
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def hold(made: tuple[dict, dict], accumulate: bool) -> tuple[dict, dict]:
    """The same weights and projections as leaves of their own. accumulate: gradients of several batches add
    up on them, in float32 at least; else they keep the weights' dtype, to which they are cast in the end."""

    def leaf(weight: torch.Tensor) -> torch.Tensor:
        held = weight.detach().requires_grad_(weight.requires_grad)
        if held.requires_grad and accumulate:
            held.grad_dtype = torch.promote_types(weight.dtype, torch.float32)
        return held

    return tree_map(leaf, made)


def release(trained: models.StudentWeights, made: tuple[dict, dict], held: tuple[dict, dict]) -> None:
    """Takes the gradients gathered on `held` back to what trains, the layers from the last to the first.

    A unit of layers at a time: a gradient is freed once taken, and under FSDP the gradients of one unit are
    sent while those of the next are computed. Both trees are used up.
    """

    def take_layers(trees: tuple[dict, dict], first: int) -> list[torch.Tensor]:
        """The tensors of the layers from `first` on, which the trees then lack; with layer 0 all others."""
        taken = [[tree["layers"].pop() for _ in range(len(tree["layers"]) - first)] for tree in trees]
        return tree_leaves((taken, trees if first == 0 else ()))

    for first in reversed(range(0, len(trained.layers), LAYERS_OF_A_UNIT)):
        parts = take_layers(made, first)
        leaves = take_layers(held, first)
        pairs = [pair for pair in zip(parts, leaves, strict=True) if pair[1].grad is not None]
        parts = [part for part, _ in pairs]
        gradients = [leaf.grad.to(part.dtype) for part, leaf in pairs]
        for leaf in leaves:
            leaf.grad = None
        if parallel == "fsdp":
            # Before the last one, FSDP must not wait for what it still sends, nor forget what it gathers.
            trained.set_is_last_backward(first == 0)
        torch.autograd.backward(parts, gradients)


# ---- evaluation


@torch.no_grad()
def evaluate(model, heldout: Mixture) -> dict:
    """Means over the first eval_blocks held-out blocks, shared among the ranks; losses at T = 1."""
    made = model.make()
    metrics = Metrics()
    blocks = min(eval_blocks, heldout.total)
    labels = heldout.count_labels(0, blocks)
    size, _ = split_batch()
    starts = range(RANK * size, blocks, size * WORLD_SIZE)
    for first in show(starts or [0], desc="evaluating", unit="pass"):
        run_pass(model, made, heldout, first, min(size, blocks - first), blocks, labels, metrics)
    if not starts:
        # With more ranks than blocks this one only ran along, to have the sums that the others have.
        metrics.sums = {name: [0 * values, 0 * over] for name, (values, over) in metrics.sums.items()}
    means = metrics.means()
    return {f"val_{name}": value for name, value in means.items() if name != "loss"}


def summary(values: dict) -> str:
    """The scalars of an evaluation in one line, but for the clone terms."""
    scalars = {name.removeprefix("val_"): value for name, value in values.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value:.4f}" for name, value in scalars.items() if "clone_" not in name)


def report_evaluation(model, heldout: Mixture) -> None:
    """Evaluates the model, beside its teacher where there is one; prints one line of JSON."""
    values = evaluate(model, heldout)
    values["val_perplexity"] = math.exp(values["val_lm"])
    if "val_teacher_lm" in values:
        values["val_teacher_perplexity"] = math.exp(values["val_teacher_lm"])
        percent = 100 * values["val_teacher_perplexity"] / values["val_perplexity"]
        print0(f"the student has {percent:.1f}% of the teacher's quality, as the ratio of their perplexities")
    print0(json.dumps({name: round(value, 4) for name, value in values.items() if isinstance(value, float)}))


def print_samples(path: Path, tokenizer_dir: str, prompt: str) -> None:
    """Continues the prompt by the model of a checkpoint, and by its teacher."""
    saved = convert.load_checkpoint(path)
    if isinstance(saved, models.Student):
        speakers = {"student": saved.merge(), "teacher": saved.teacher}
    elif teacher:
        speakers = {"student": saved, "teacher": load_teacher(torch.float32)}
    else:
        speakers = {"model": saved}
    tokens = load_tokenizer(tokenizer_dir)
    bos, eos = special_ids(tokens, tokenizer_dir)
    ids = bos + encode_text(tokens, prompt)
    for name, llama in speakers.items():
        new = [token for (token,) in generate(llama, [ids], 64, 0.8, top_p=0.9, seed=1, stop_ids=(eos,))]
        whole = tokens.decode(ids + [token for token in new if token is not None])
        print(f"\n--- {name}\n{prompt}{whole[len(tokens.decode(ids)) :]}")  # with its first space


# ---- checkpoints

# options that decide what is computed: a resumed run must have the same
TRAJECTORY = (
    "teacher", "train", "student_hidden_size", "student_layers", "student_intermediate_size", "model_config",
    "share_qkv", "share_gate_up", "tie_head_projection", "student_rms_norm_eps", "data", "seq_len",
    "global_batch_size", "mask_documents", "sft", "seed", "optimizer", "calibration_tokens",
)  # fmt: skip

# options of optimizer and loss, which a resumed run may change, but not without a word
SCHEDULE = (
    "max_steps", "epochs", "learning_rate", "lr_schedule", "warmup_ratio", "decay_ratio",
    "beta1", "beta2", "momentum", "weight_decay", "max_grad_norm",
    *(field.name for field in dataclasses.fields(models.LossConfig)),
)  # fmt: skip


def optimizer_state(trained, optimizer) -> dict[str, torch.Tensor]:
    """{parameter.exp_avg and so on: the optimizer's own tensors}, zeros before its first step."""
    names = {p: name for name, p in trained.named_parameters()}
    state = {}
    for group in getattr(optimizer, "groups", ()):
        for p in group["params"]:
            state[f"{names[p]}.momentum_buffer"] = optimizer.state[p]["momentum_buffer"]
    for group in getattr(optimizer, "adamw", optimizer).param_groups:
        for p in group["params"]:
            values = optimizer.state[p]
            values.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{names[p]}.{key}"] = values.setdefault(key, torch.zeros_like(p.detach()))
    return state


def identity_of(model, train_data: Mixture) -> dict[str, str]:
    """Hashes of what a path alone does not tell: a resumed run must have the same."""
    identity = {"data": train_data.fingerprint()}
    return identity | ({"teacher": convert.fingerprint(model.teacher)} if model.teacher else {})


def save_checkpoint(model, optimizer, step: int, tokenizer_dir: str | None, run_of: dict) -> Path:
    """out_dir/step_00001000, renamed from another name when whole; OSError on every rank where one fails."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    path = Path(out_dir) / f"step_{step:08d}"
    partial = path.with_name(path.name + ".partial")
    error = None
    tensors = {name: unshard(tensor) for name, tensor in model.trained.state_dict().items()}
    moments = optimizer_state(model.trained, optimizer)
    taken = next((int(values["step"]) for values in optimizer.state.values() if "step" in values), 0)
    try:
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
            ends = turn_ends(tokenizer_dir)
            convert.save_weights(model, partial, tensors, tokenizer_dir, teacher, ends)
            state = {"step": step, "optimizer_steps": taken, "options": options, **run_of}
            (partial / "trainer" / "state.json").write_text(json.dumps(state, indent=2))
    except (OSError, SafetensorError) as failure:
        error = failure
    if not on_any_rank(error is not None):
        try:
            writer = HuggingFaceStorageWriter(str(partial / "trainer"), save_distributed=True)
            with warnings.catch_warnings():  # that one process is alone is no news
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                save(moments, storage_writer=writer, no_dist=not dist.is_initialized())
        except (OSError, SafetensorError, CheckpointException) as failure:
            error = failure
    if on_any_rank(error is not None):
        if RANK == 0:
            shutil.rmtree(partial, ignore_errors=True)
        cause = str(error or "on another rank").strip().splitlines()[-1]
        raise OSError(f"{path} could not be written ({cause}); the checkpoints before it are intact")
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        # One of a later step could not be read when the run was resumed.
        ours = [saved for saved in convert.checkpoints(out_dir) if saved.name <= path.name]
        for old in ours[:-keep_last]:
            shutil.rmtree(old)
    barrier()  # no rank goes on, or ends, before the name is there
    return path


def read_state(path: Path) -> dict:
    """The checkpoint's {step, optimizer_steps, options}; ValueError where it belongs to another run."""
    state = convert.read_json(path / "trainer" / "state.json")
    if not {"step", "optimizer_steps", "options"} <= state.keys():
        raise ValueError(f"{path}/trainer/state.json is damaged: it lacks the step or the options")
    for name in TRAJECTORY:
        saved = state["options"].get(name)
        now = json.loads(json.dumps(options[name]))
        # As text, since the order of the data sets decides which sample is which.
        if json.dumps(saved) != json.dumps(now):
            raise ValueError(f"{path} has {name} = {saved!r}, not {now!r}; a resumed run must keep it")
    for name in SCHEDULE:
        now = json.loads(json.dumps(options[name]))
        if state["options"].get(name, now) != now:
            print0(f"{name} was {state['options'][name]} and is {now} from here on")
    return state


def load_optimizer(path: Path, trained, optimizer, steps: int) -> None:
    """Takes the optimizer's state from a checkpoint of any number of ranks, ddp or fsdp; ValueError where a
    part of it is missing."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(path / "trainer"))
    state = optimizer_state(trained, optimizer)
    for tensor in state.values():
        tensor.fill_(math.nan)  # which stays where a file is missing that had a part of the tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        is_whole = all(local_shard(tensor).isfinite().all() for tensor in state.values())
    except (RuntimeError, ValueError, CheckpointException):
        is_whole = False
    if on_any_rank(not is_whole):
        raise ValueError(f"{path}/trainer lacks a part of the optimizer's state, or has one of another shape")
    for values in optimizer.state.values():
        if "step" in values:
            values["step"].fill_(steps)


# ---- logs


def keep_log(file: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and one that a kill cut short."""
    lines = [line for line in read_lines(file) if line["step"] <= step] if step else []
    partial = file.with_name("metrics.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(file)


def start_wandb():
    """A function (step, values) that logs to Weights & Biases, or does nothing; it never raises."""
    if not wandb or RANK:
        return lambda step, values: None
    try:
        import wandb as service

        run = service.init(project=wandb_project, name=run_name or out_dir, tags=tags, config=options)
    except Exception as error:  # not installed, no network, no key, …
        print(f"wandb is off: {error}")
        return lambda step, values: None

    def send(step: int, values: dict) -> None:
        with contextlib.suppress(Exception):
            run.log(values, step=step)

    return send


def shape_of(config: models.ModelConfig) -> str:
    sizes = f"hidden size {config.hidden_size}, FFN {config.intermediate_size}"
    return f"{config.num_hidden_layers} layers, {sizes}"


def print_derived(model, train_data: Mixture, steps: int, device: torch.device) -> None:
    """What follows from the options."""
    blocks, passes = split_batch()
    trained = sum(p.numel() for p in model.trained.parameters())
    tokens_per_step = round(global_batch_size * train_data.tokens_per_block)
    epochs_taken = steps * global_batch_size / train_data.total
    threads = torch.get_num_threads()
    print0(f"{device.type} x {WORLD_SIZE} ({threads} threads), torch {torch.__version__}, {dtype_on(device)}")
    if model.teacher:
        frozen = sum(p.numel() for p in model.teacher.parameters())
        size = sum(math.prod(shape) for _, shape in convert.weight_names(model.config).values())
        print0(f"teacher: {frozen:,} parameters, frozen; {shape_of(model.teacher.config)}")
        print0(f"student: {size:,} parameters, made of {trained:,} that train; {shape_of(model.config)}")
    else:
        print0(f"model: {trained:,} parameters; {shape_of(model.config)}")
    print0(
        f"{steps:,} steps of {tokens_per_step:,} tokens: {WORLD_SIZE} processes, each with {passes} forward "
        f"passes (micro-batches) of {blocks} blocks"
    )
    print0(f"{steps * tokens_per_step:,} tokens in all, {epochs_taken:.2g} epochs of the data")
    if model.teacher:
        print0(
            "in the log: lm is the next-token loss, kl the divergence from the teacher, clone the sum of all"
        )
        print0("clone losses, and teacher_lm, where kl_temperature is 1, the teacher's own lm")


def print_end(saved: Path | None, tokenizer_dir: str | None, values: dict) -> None:
    """Samples, the held-out loss and what to do next."""
    prompt = sample_prompt
    if prompt is None:
        prompt = "def read(" if data == f"{QUICKSTART}/corpus" else ""
    if prompt and tokenizer_dir and saved:
        print_samples(saved, tokenizer_dir, prompt)
    if "val_lm" in values:
        role = "model" if teacher is None else "student"
        line = f"\nheld-out loss, nats a token: {role} {values['val_lm']:.4f}"
        if "val_kl" in values:
            line += f", teacher {values['val_teacher_lm']:.4f}, KL {values['val_kl']:.4f}"
        print(line)
    if saved:
        print(f"sample it:           python sample.py --model={out_dir}")
        if convert.is_clone(saved):
            print(f"export it:           python convert.py --checkpoint={out_dir} --out=student")
        else:
            print(f"it is a Hugging Face directory: {saved}")
        if teacher == f"{QUICKSTART}/teacher":
            print("a real model next:   python train.py config/smollm2_135m.py  (it says what to download)")


# ---- the run


def check_options(reads_files: bool = True) -> None:
    """Refuses what can be refused before anything is loaded: ValueError, one line. reads_files: a teacher and
    data must be directories, not a shape and random tokens."""

    def refuse(names: str, is_right, allowed: str) -> None:
        for name in names.split():
            value = globals()[name]
            if value is not None and not is_right(value):
                raise ValueError(f"{name} is {value}; it must be {allowed}")

    counts = "seq_len global_batch_size micro_batch_size log_every eval_blocks replicas calibration_tokens"
    refuse(f"{counts} max_bad_steps keep_last", lambda value: value >= 1, "at least 1")
    weights = "max_steps save_every eval_every lm_weight kl_weight clone_weight weight_decay max_grad_norm"
    refuse(weights, lambda value: value >= 0, "at least 0")
    refuse("kl_temperature epochs learning_rate", lambda value: value > 0, "above 0")
    refuse("student_rms_norm_eps", lambda value: value > 0, "above 0")
    refuse("warmup_ratio decay_ratio", lambda value: 0 <= value <= 1, "from 0 to 1")
    refuse("beta1 beta2 momentum", lambda value: 0 <= value < 1, "from 0 to below 1")
    if dtype == "float16":
        raise ValueError("dtype is float16, which has too small a range to train in: use float32 or bfloat16")
    split_batch()
    if reads_files and (isinstance(teacher, dict) or data is None):
        raise ValueError(
            "a teacher's shape and random tokens are for tools/bench.py; here both are directories"
        )
    if student_hidden_size is None and teacher is not None:
        raise ValueError(
            "student_hidden_size is None: choose one, by tools/plan.py --target_params=SIZE for instance"
        )
    if eval_only and init_from is None:
        raise ValueError("eval_only evaluates the model of init_from, which is None: name its directory")
    if WORLD_SIZE % replicas or (replicas > 1 and parallel == "ddp"):
        raise ValueError(f"replicas is {replicas}; it must divide {WORLD_SIZE} processes, with parallel=fsdp")
    if sft and (teacher is not None or mask_documents):
        raise ValueError(
            "sft fine-tunes a plain LM, a row a chat: set teacher to None, mask_documents to False"
        )


def main() -> None:
    check_options()
    device = start_device()
    if mask_documents and device.type == "cuda" and dtype_on(device) == torch.float32:
        raise ValueError("mask_documents on a GPU needs dtype bfloat16: its attention has no float32")
    if compile:
        need_compiler(device.type)
    # By torchrun, after a rank died; only the node of that rank is told. What it restarts must be its own.
    restarted = on_any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    launch = Path(out_dir) / "launch"
    restarted = on_any_rank(restarted and launch.is_file() and launch.read_text() == launch_id())
    found = convert.checkpoints(out_dir)
    log_file = Path(out_dir) / "metrics.jsonl"
    if not (resume or restarted or eval_only) and (found or (log_file.exists() and save_every)):
        raise ValueError(f"{out_dir} holds a run: go on with --resume=True, or choose another --out_dir")
    goes_on = bool(found) and (resume or restarted) and not eval_only
    last = convert.newest_whole(found) if goes_on else None
    if goes_on and last is None:
        raise ValueError(f"no checkpoint of {out_dir} can be read: choose another --out_dir to begin anew")
    if last is None and init_from is not None and not Path(init_from).exists():
        make = " ".join(["python tools/compress.py", *sys.argv[1:]])
        raise ValueError(f"init_from is {init_from}, which does not exist; a start in closed form: {make}")
    state = read_state(last) if last else {"step": 0, "optimizer_steps": 0}
    start = state["step"]
    if RANK == 0 and not eval_only and Path(out_dir).is_dir():
        lock(Path(out_dir))

    # ---- model, data, optimizer
    tokenizer_dir = tokenizer_directory()
    base = base_shape()
    if seq_len > base.max_position_embeddings:
        made_for = f"{teacher or 'the model'} was made for, {base.max_position_embeddings}"
        print0(f"seq_len is {seq_len}, more than {made_for}")
    train_data, heldout = open_data(base.vocab_size, tokenizer_dir)
    model = build_model(dtype_on(device), last).to(device)
    run_of = identity_of(model, train_data)
    for name in run_of.keys() & state.keys():
        if state[name] != run_of[name]:
            raise ValueError(
                f"{last}: its {name} is another now, of the same name; a resumed run must keep it"
            )
    source = last or (convert.resolve(init_from) if init_from else None)
    start_weights(model, train_data, source, device)
    if eval_only:
        return report_evaluation(model, heldout)
    speed_up(model, device)
    make_weights = distribute(model.trained, device)
    optimizer = make_optimizer(model.trained)
    if last:
        load_optimizer(last, model.trained, optimizer, state["optimizer_steps"])
    steps = max_steps or max(1, round(epochs * train_data.total / global_batch_size))
    tokens_per_step = round(global_batch_size * train_data.tokens_per_block)  # with sft on average
    print_derived(model, train_data, steps, device)
    if last:
        print0(f"resumed from {last}, at a learning rate of {learning_rate_at(start, steps):.2e}")

    # ---- logs and signals
    if RANK == 0:
        # Made now, when nothing is left to be refused.
        os.makedirs(out_dir, exist_ok=True)
        lock(Path(out_dir))
        launch.write_text(launch_id())
        keep_log(log_file, start)
    send = start_wandb()

    def log(step: int, values: dict) -> None:
        if RANK == 0:
            line = {"step": step, "tokens": step * tokens_per_step, **values}
            line = tree_map(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v, line)
            with open(log_file, "a") as file:
                file.write(json.dumps(line) + "\n")
            send(step, line)

    signals = []  # SIGTERM or Ctrl-C asks for the end of the run; a second one is not waited for

    def stop(number: int, _) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    # ---- the loop
    in_terminal = sys.stderr.isatty()
    bar = tqdm(total=steps, initial=start, desc="training", unit="step", disable=RANK > 0 or not in_terminal)
    done = start
    saved = None
    stopping = False
    values = {}
    metrics = Metrics()  # since the last line of the log
    logged = start
    since = time.perf_counter()
    bad_steps, bad_in_a_row, most_in_a_row = torch.zeros((3,), device=device)
    bad_steps += start - state["optimizer_steps"]
    for step in range(start, steps):
        lr = learning_rate_at(step, steps)
        grad_norm = training_step(model, make_weights, optimizer, train_data, step, lr, metrics)
        bad = (~grad_norm.isfinite()).float()
        bad_steps = bad_steps + bad
        bad_in_a_row = (bad_in_a_row + 1) * bad
        most_in_a_row = torch.maximum(most_in_a_row, bad_in_a_row)

        done = step + 1
        stopping = on_any_rank(bool(signals)) and done < steps
        last_step = done == steps or stopping
        bar.update()
        if done % log_every == 0 or last_step:
            mean = metrics.means()
            speed = (done - logged) * tokens_per_step / (time.perf_counter() - since)
            memory = over_ranks(torch.tensor(peak_memory_gib(device)), dist.ReduceOp.MAX).item()
            mean |= {"grad_norm": grad_norm.item(), "learning_rate": lr, "tokens_per_second": speed}
            log(done, mean | {"peak_memory_gib": memory, "bad_steps": int(bad_steps)})
            progress = f"loss {mean['loss']:.3f}, lm {mean['lm']:.3f}, {speed:,.0f} tok/s"
            bar.set_postfix_str(progress)
            if not in_terminal:
                print0(f"step {done} of {steps}: {progress}")
            if most_in_a_row >= max_bad_steps:
                raise ValueError(
                    f"loss or gradient not finite in {int(most_in_a_row)} steps in a row up to step {done}; "
                    "none of them was taken. A lower learning_rate may help"
                )
            metrics = Metrics()
            logged = done
            since = time.perf_counter()
        paused = time.perf_counter()
        if eval_every and (done % eval_every == 0 or last_step) and not stopping:
            values = evaluate(model, heldout)
            log(done, values)
            print0(f"step {done}, held out: {summary(values)}")
        if save_every and (done % save_every == 0 or last_step):
            saved = save_checkpoint(model, optimizer, done, tokenizer_dir, run_of)
        since += time.perf_counter() - paused
        if stopping:
            break
    bar.close()

    # ---- what came of it
    if bad_steps > 0:
        print0(f"{int(bad_steps)} steps had a loss or gradient that was not finite, and were not taken")
    if start >= steps:
        print0(f"nothing to do: {last} is at step {start} of {steps}")
    elif stopping:
        print0(f"stopped after step {done} of {steps}{'; go on with --resume=True' if saved else ''}")
    elif RANK == 0:
        print_end(saved, tokenizer_dir, values)


if __name__ == "__main__":
    try:
        main()
        barrier()  # gloo can abort a rank whose peers have left
    except (ValueError, OSError) as error:
        message = f"error: {error}" if RANK == 0 else f"error on rank {RANK}: {error}"
        if WORLD_SIZE > 1:
            print(message, file=sys.stderr, flush=True)
            os._exit(2)  # gloo can hang where a group is taken down after an error
        print(message, file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized() and not wandb:
        sys.stdout.flush()
        os._exit(0)  # gloo can abort a process that takes its group down
    if dist.is_initialized():
        dist.destroy_process_group()  # wandb ends its run at exit
