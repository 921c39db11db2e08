"""Clones a teacher into a smaller student (Low-Rank Clone), or trains a plain language model.

    python train.py                               # quickstart: clones the bundled teacher on any CPU
    python train.py config/smollm2_135m.py        # a real clone that a laptop can run
    python train.py config/lrc_1_5b.py            # one GPU
    python train.py config/quickstart_teacher.py  # a plain LM, as the bundled teacher was trained
    python train.py config/X.py --resume=True     # goes on from the last checkpoint in out_dir

The options come first, then the pieces of the loop that are longer than their names, then the loop in `main`.
"""

from typing import Literal

# what to train
teacher: str | dict | None = "data/quickstart/teacher"  # Hugging Face directory to clone; None: a plain LM
student_hidden_size = 96  # d_S, width of the student's residual stream; its other sizes are the teacher's
model_config: dict | str | None = None  # shape of a plain LM: config.json's fields, or its directory
tokenizer: str | None = None  # directory whose tokenizer goes into the checkpoints; None: the teacher's
init: Literal["random", "orthogonal", "channel"] = "channel"  # of the projections; paper: random, N(0, 0.02)
share_qkv = False  # one projection for q, k and v, and one clone loss on their input in place of three
share_gate_up = False  # one projection for gate and up, likewise
tie_head_projection = True  # one projection for embedding and LM head
student_rms_norm_eps = 1e-5  # epsilon of the student's RMSNorms
# loss: lm_weight · CE + kl_weight · T² · KL + clone_weight · Σ clone terms
lm_weight = 1.0  # next-token cross entropy
kl_weight = 1.0  # KL(teacher ‖ student) at kl_temperature, per token and times T²
kl_temperature = 1.0  # T of the KL term (paper: 40)
clone_weight = 0.2  # the sum of all clone losses (paper: alpha); 0 leaves them out
clone_attn_out: Literal["student", "teacher"] = "student"  # compared in whose space (authors' code: teacher)
clone_mlp_out: Literal["student", "teacher"] = "student"  # likewise, for the FFN's output
clone_scale: Literal["none", "teacher"] = "teacher"  # teacher: each term over its activation's mean square
clone_skip: tuple = ()  # clone terms to leave out: q k v attn_out gate up mlp_out (shared: attn_in mlp_in)
clone_skip_layers: tuple = ()  # layers without clone losses, by index
# data
data: str | dict | None = "data/quickstart/corpus"  # shard directory, or {directory: token budget or None}
seq_len = 256  # tokens in a block
global_batch_size = 16  # blocks a step, over all devices and micro-batches
micro_batch_size = 16  # blocks of one forward pass; global_batch_size / micro_batch_size are accumulated
mask_documents = False  # attention and positions restart where a document ends
seed = 1  # of the initial weights and the order of the data
# optimizer: AdamW
max_steps = 100  # optimizer steps of the run
learning_rate = 3e-3  # peak
lr_schedule: Literal["linear", "cosine", "warmup_stable_decay", "constant"] = "linear"  # after the warmup
warmup_ratio = 0.05  # of max_steps, linear from 0
decay_ratio = 0.1  # of max_steps, the last part of warmup_stable_decay
beta1 = 0.9  # AdamW
beta2 = 0.999  # AdamW
weight_decay = 0.0  # on matrices, not on norms
max_grad_norm = 1.0  # gradients are scaled down to this norm; 0 does not
# run
out_dir = "out/quickstart"  # checkpoints and metrics.jsonl; must be new, or resumed
resume = False  # go on from the last checkpoint in out_dir, if there is one
save_every = 1000  # steps between checkpoints, besides the one at the end; 0: none at all
keep_last = 2  # checkpoints to keep
log_every = 10  # steps between lines of metrics.jsonl
eval_every = 500  # steps between evaluations on held-out blocks, besides the one at the end; 0: none at all
eval_blocks = 128  # held-out blocks of an evaluation
sample_prompt = "def read("  # the student and the teacher continue it at the end of the run; "" does not
compile = False  # torch.compile of one layer, used for all
activation_checkpointing = False  # keep only the layers' inputs; each layer runs again in backward
benchmark = False  # time every step; at the end, FLOPs by part and the fraction of the matmul rate achieved
device: str | None = None  # None: cuda where there is one, or cpu
dtype: Literal["float32", "bfloat16"] | None = None  # to compute in; None: bfloat16 on cuda, float32 on cpu

if __name__ == "__main__":
    from configurator import configure

    options = configure(globals())

import dataclasses
import functools
import json
import math
import os
import resource
import shutil
import statistics
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as models
from prepare import Mixture, RandomTokens, load_tokenizer, special_ids, vocabulary_hash, write_shards
from sample import generate

# ---- pieces of the loop that are longer than their names


def learning_rate_at(step: int) -> float:
    """The learning rate of optimizer step `step` (from 0)."""
    warmup = round(warmup_ratio * max_steps)
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    if lr_schedule == "linear":
        return learning_rate * (1 - progress)
    if lr_schedule == "cosine":
        return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if lr_schedule == "warmup_stable_decay":
        return learning_rate * min(1.0, (max_steps - step) / max(1, round(decay_ratio * max_steps)))
    return learning_rate


def build_model(compute_dtype: torch.dtype):
    """The clone or the plain LM that the options describe, its own weights not yet set."""
    if teacher is not None:
        if isinstance(teacher, dict):  # a random teacher of that shape, to measure with
            config = models.ModelConfig.from_hf(teacher, "teacher")
            big = models.Llama(config, compute_dtype).init_weights(seed).to(compute_dtype)
        else:
            big = models.load_model(teacher, compute_dtype)
        names = {field.name for field in dataclasses.fields(models.CloneConfig)}
        return models.LowRankClone(big, **{name: globals()[name] for name in names})
    if model_config is None:
        raise ValueError("teacher is None, so a plain LM is trained: give its shape as model_config")
    if isinstance(model_config, str):
        config = models.read_config(model_config)
    else:
        config = models.ModelConfig.from_hf(model_config, "model_config")
    return models.Llama(config, compute_dtype)


def open_data(vocab_size: int, tokenizer_dir: str | None):
    """(training blocks, held-out blocks or None), which must fit the model and its tokenizer."""
    if data is None:
        return RandomTokens(vocab_size, seq_len), RandomTokens(vocab_size, seq_len)
    if data == "data/quickstart/corpus" and not Path(data).exists():
        write_shards("stdlib", data, "data/quickstart/teacher")
    sources = {data: None} if isinstance(data, str) else data
    train_data = Mixture(sources, "tokens", seq_len, seed)
    known = vocabulary_hash(load_tokenizer(tokenizer_dir)) if tokenizer_dir else None
    for shards in train_data.sources:
        size, name = shards.meta["vocab_size"], shards.meta["tokenizer"]
        if size > vocab_size:
            raise ValueError(
                f"{shards.path} has {size} token ids (tokenizer {name}); the model has {vocab_size}"
            )
        if known and shards.meta["vocabulary_hash"] != known:
            raise ValueError(
                f"{shards.path} was tokenized by {name}, whose vocabulary is not {tokenizer_dir}'s"
            )
    return train_data, Mixture(dict.fromkeys(sources), "heldout", seq_len, 0) if eval_every else None


def forward(model, blocks: Mixture, first: int, count: int, whole: int, where: torch.device, **options):
    """Samples first, first + 1, … through the model, as a part of a batch of `whole` blocks.

    Returns (loss, {name in metrics.jsonl: scalar}), both shares of the batch's; nothing here waits for a GPU.
    Of several sources, each has lm/NAME, the sum of its blocks' losses, and blocks/NAME, their number.
    """
    tokens = torch.from_numpy(blocks.batch(first, count)).to(where)
    if mask_documents:
        options["documents"] = torch.from_numpy(blocks.documents(first, count)[:, :-1]).to(where)
    losses = model(tokens[:, :-1], tokens[:, 1:], whole * seq_len, count / whole, **options)
    named = {
        name: losses[name].detach() for name in ("loss", "lm", "kl", "clone", "teacher_lm") if name in losses
    }
    if "terms" in losses:
        sums = losses["terms"].detach().sum(0)  # none at all where clone_weight is 0
        named |= {f"clone_{name}": value for name, value in zip(model.clone.terms(), sums, strict=False)}
    if len(getattr(blocks, "sources", ())) > 1:
        block_lm, source_of = (
            losses["token_lm"].mean(1),
            torch.from_numpy(blocks.sources_of(first, count)).to(where),
        )
        for index, source in enumerate(blocks.sources):
            named[f"lm/{source.path.name}"] = (block_lm * (source_of == index)).sum()
            named[f"blocks/{source.path.name}"] = (source_of == index).sum()
    return losses["loss"], named


def averages(sums: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """What `forward` returned, summed over steps, as means; a source without a block has none."""
    blocks = {name[7:]: int(value) for name, value in sums.items() if name.startswith("blocks/")}
    over = {f"lm/{name}": count for name, count in blocks.items()} | {f"blocks/{name}": 0 for name in blocks}
    return {
        name: value.item() / over.get(name, steps) for name, value in sums.items() if over.get(name, steps)
    }


@torch.no_grad()
def evaluate(model, heldout: Mixture, where: torch.device) -> dict[str, float]:
    """Means over the first eval_blocks held-out blocks; losses at T = 1, clone terms summed over layers."""
    clone = isinstance(model, models.LowRankClone)
    options = {"student": model.compose(), "temperature": 1.0} if clone else {}
    blocks, sums = min(eval_blocks, heldout.total), {}
    for first in tqdm(range(0, blocks, micro_batch_size), desc="evaluating", leave=False):
        count = min(micro_batch_size, blocks - first)
        _, values = forward(model, heldout, first, count, blocks, where, **options)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    return {f"val_{name}": value for name, value in averages(sums, 1).items() if name != "loss"}


def print_samples(speakers: dict[str, models.Llama], tokenizer_dir: str) -> None:
    """Continues sample_prompt by each model."""
    tokens = load_tokenizer(tokenizer_dir)
    bos, eos = special_ids(tokens, tokenizer_dir)
    ids = bos + tokens.encode(sample_prompt, add_special_tokens=False).ids
    for name, llama in speakers.items():
        new = [token for (token,) in generate(llama, [ids], 64, 0.8, top_p=0.9, seed=1, stop_ids=(eos,))]
        text = tokens.decode([token for token in new if token is not None])
        print(f"\n--- {name}\n{sample_prompt}{text}")


def peak_memory_gib(where: torch.device) -> float:
    """The most memory held so far: on the GPU, or resident in this process (Linux: KiB, macOS: bytes)."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if os.uname().sysname == "Darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def matmul_rate(where: torch.device, compute_dtype: torch.dtype) -> float:
    """GFLOP/s of torch.mm on square matrices, the median of ten: the ceiling of a step's speed."""
    n, rates = 8192 if where.type == "cuda" else 1024, []
    a = torch.randn(n, n, device=where, dtype=compute_dtype)
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def report_benchmark(model, seconds: list[float], rates: list[float], where: torch.device) -> None:
    """FLOPs by part, and the fraction of the matmul rate at which a step's necessary arithmetic was done."""
    tokens = global_batch_size * seq_len
    parts, median, rate = models.flops(model, tokens, seq_len), statistics.median(seconds[1:]), max(rates)
    parts["all"] = sum(parts.values())
    print(f"first step {seconds[0]:.2f} s, then a median of {median:.3f} s")
    for name, value in parts.items():
        print(f"  {name:14}{value / tokens / 1e6:9.1f} MFLOP a token {value / 1e9:10.1f} GFLOP a step")
    numbers = {
        "tokens_per_second": tokens / median,
        "seconds_per_step": median,
        "matmul_gflops": rate,
        "matmul_fraction": parts["all"] / 1e9 / median / rate,
        "peak_memory_gib": peak_memory_gib(where),
    }
    print(json.dumps({name: round(value, 4) for name, value in numbers.items()}))


def save_checkpoint(model, optimizer, step: int, tokenizer_dir: str | None) -> Path:
    """out_dir/step_00001000, written under another name and renamed when whole."""
    path = Path(out_dir) / f"step_{step:08d}"
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(model, models.LowRankClone):
        models.save_clone(model, partial, teacher, tokenizer_dir)
    else:
        models.save_model(model, partial, torch.float32, tokenizer_dir)
    (partial / "trainer").mkdir()
    names = {p: name for name, p in model.named_parameters()}
    state = {
        f"{names[p]}.{key}": value.contiguous()
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    save_file(state, partial / "trainer" / "optimizer.safetensors")
    (partial / "trainer" / "state.json").write_text(json.dumps({"step": step, "options": options}, indent=2))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    for old in models.checkpoints(out_dir)[: -max(1, keep_last)]:
        shutil.rmtree(old)
    return path


# options that decide what is computed: a resumed run must have the same
TRAJECTORY = (
    "teacher", "student_hidden_size", "model_config", "share_qkv", "share_gate_up", "tie_head_projection",
    "student_rms_norm_eps", "data", "seq_len", "global_batch_size", "mask_documents", "seed",
)  # fmt: skip


def load_checkpoint(path: Path, model, optimizer) -> int:
    """Takes weights and optimizer state from a checkpoint of this run; returns its step."""
    state = models.read_json(path / "trainer" / "state.json")
    for name in TRAJECTORY:
        saved, now = state["options"].get(name), json.loads(json.dumps(options[name]))
        if saved != now:
            raise ValueError(
                f"{path} was trained with {name} = {saved!r}, not {now!r}; a resumed run must keep it"
            )
    if isinstance(model, models.LowRankClone):
        parameters = model.trained()
        names = {name: name for name in parameters}
    else:
        parameters = dict(model.named_parameters())
        names = {theirs: ours for theirs, (ours, _) in model.config.weight_names().items()}
    expected = {theirs: tuple(parameters[ours].shape) for theirs, ours in names.items()}
    for theirs, tensor in models.read_tensors([path / "model.safetensors"], expected).items():
        parameters[names[theirs]].data.copy_(tensor)
    try:
        saved = load_file(path / "trainer" / "optimizer.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{path}/trainer/optimizer.safetensors is truncated: {error}") from None
    for name, p in parameters.items():
        values = {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {key: v if key == "step" else v.to(p.device) for key, v in values.items()}
    return state["step"]


def main() -> None:
    # ---- what is there, and does it fit: whatever can be refused is refused here
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compute_dtype = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    accumulation, rest = divmod(global_batch_size, micro_batch_size)
    if rest:
        raise ValueError(
            f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size}"
        )
    if isinstance(teacher, dict) and save_every:
        raise ValueError("teacher is a shape, not a model, so nothing can be saved: set save_every to 0")
    found, log_file = models.checkpoints(out_dir), Path(out_dir) / "metrics.jsonl"
    if not resume and (found or (log_file.exists() and save_every)):
        raise ValueError(
            f"{out_dir} holds a run; go on with it by --resume=True, or choose another --out_dir"
        )
    model = build_model(compute_dtype).to(where)
    clone = isinstance(model, models.LowRankClone)
    tokenizer_dir = tokenizer or (teacher if isinstance(teacher, str) else None)
    train_data, heldout = open_data(model.config.vocab_size, tokenizer_dir)

    if clone:
        calibration = torch.from_numpy(train_data.batch(0, micro_batch_size)[:, :-1]).to(where)
        model.init_weights(seed, init, calibration)
    else:
        model.init_weights(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
    start = load_checkpoint(found[-1], model, optimizer) if resume and found else 0
    if compile:
        model.run_block = torch.compile(model.run_block)
    if activation_checkpointing:
        model.run_block = functools.partial(checkpoint, model.run_block, use_reentrant=False)

    # ---- what was derived
    tokens_per_step = global_batch_size * seq_len
    print(f"{where} ({torch.get_num_threads()} threads), torch {torch.__version__}, {compute_dtype}")
    if clone:
        frozen = sum(p.numel() for p in model.teacher.parameters())
        print(f"teacher: {frozen:,} parameters, frozen; hidden size {model.teacher.config.hidden_size}")
    trained = sum(p.numel() for p in parameters)
    role = "student" if clone else "model"
    print(f"{role}: {trained:,} trained parameters; hidden size {model.config.hidden_size}")
    total, epochs = max_steps * tokens_per_step, max_steps * global_batch_size / train_data.total
    print(f"{max_steps:,} steps of {tokens_per_step:,} tokens in {accumulation} micro-batches")
    print(f"{total:,} tokens in all, {epochs:.2g} epochs of the data")
    if start:
        print(f"resumed from {found[-1]}")
    os.makedirs(out_dir, exist_ok=True)
    lines = log_file.read_text().splitlines() if start else []
    log_file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

    def log(step: int, values: dict) -> None:
        with open(log_file, "a") as file:
            file.write(json.dumps({"step": step, "tokens": step * tokens_per_step, **values}) + "\n")

    # ---- the loop
    bar = tqdm(total=max_steps, initial=start, desc="training", unit="step")
    rates, seconds = [matmul_rate(where, compute_dtype)] if benchmark else [], []
    sums, logged, since = {}, start, time.perf_counter()
    for step in range(start, max_steps):
        lr = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The student's weights are composed once a step; with accumulation, gradients gather on a held copy.
        composed = model.compose() if clone else None
        held = model.hold(composed) if clone and accumulation > 1 else composed
        for micro in range(accumulation):
            first = step * global_batch_size + micro * micro_batch_size
            shared = {"student": held} if clone else {}
            loss, values = forward(
                model, train_data, first, micro_batch_size, global_batch_size, where, **shared
            )
            loss.backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        if held is not composed:
            model.release(composed, held)
        del composed, held, shared, loss

        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done, last = step + 1, step + 1 == max_steps
        bar.update()
        if done % log_every == 0 or last or benchmark:
            mean = averages(sums, done - logged)
            seconds.append(time.perf_counter() - since)
            speed = (done - logged) * tokens_per_step / seconds[-1]
            mean |= {"grad_norm": grad_norm.item(), "learning_rate": lr, "tokens_per_second": speed}
            log(done, mean | {"peak_memory_gib": peak_memory_gib(where)})
            bar.set_postfix_str(f"loss {mean['loss']:.3f}, lm {mean['lm']:.3f}, {speed:,.0f} tok/s")
            sums, logged, since = {}, done, time.perf_counter()
        if eval_every and (done % eval_every == 0 or last):
            values = evaluate(model, heldout, where)
            log(done, values)
            shown = ", ".join(
                f"{name[4:]} {value:.4f}" for name, value in values.items() if "clone_" not in name
            )
            tqdm.write(f"step {done}, held out: {shown}")
            since = time.perf_counter()
        if save_every and (done % save_every == 0 or last):
            save_checkpoint(model, optimizer, done, tokenizer_dir)
            since = time.perf_counter()
    bar.close()

    # ---- what came of it
    if benchmark:
        report_benchmark(model, seconds, [*rates, matmul_rate(where, compute_dtype)], where)
    if sample_prompt and tokenizer_dir:
        print_samples(
            {"student": model.merge(), "teacher": model.teacher} if clone else {"model": model}, tokenizer_dir
        )
    if eval_every and start < max_steps:
        teachers = f", teacher {values['val_teacher_lm']:.4f}, KL {values['val_kl']:.4f}" if clone else ""
        print(f"\nheld-out loss, nats a token: {role} {values['val_lm']:.4f}{teachers}")
    if save_every:
        print(f"sample it:           python sample.py --model={out_dir}")
        print(f"export it:           python convert.py --checkpoint={out_dir} --out=student")
        print(
            "clone a real model:  python train.py config/smollm2_135m.py  (that file says what to download)"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
