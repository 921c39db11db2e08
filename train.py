"""Clones a teacher into a smaller student (Low-Rank Clone), or trains a plain language model.

python train.py                                   # quickstart: clones the bundled teacher on any CPU in two
minutes python train.py config/smollm2_135m.py            # a real clone that a laptop can run
python train.py config/lrc_1_5b.py                # one GPU
python train.py config/quickstart_teacher.py      # a plain LM (teacher = None): how the bundled teacher was
made python train.py config/X.py --resume=True         # goes on from the last checkpoint in out_dir
"""

from typing import Literal

# what to train
teacher: str | None = (
    "data/quickstart/teacher"  # Hugging Face directory of the model to clone; None: a plain LM
)
student_hidden_size = (
    96  # d_S, the width of the student's residual stream; the rest of its shape is the teacher's
)
model_config: dict | str | None = (
    None  # shape of a plain LM: fields of a config.json, or a directory that has one
)
tokenizer: str | None = None  # directory whose tokenizer goes into the checkpoints; None: the teacher's
share_qkv = False  # one projection for q, k and v, and one clone loss on their input in place of three
share_gate_up = False  # one projection for gate and up, likewise
tie_head_projection = True  # one projection for embedding and LM head
student_rms_norm_eps = 1e-5  # epsilon of the student's RMSNorms
# loss: lm_weight · CE + kl_weight · T² · KL + clone_weight · Σ clone terms
lm_weight = 1.0  # next-token cross entropy
kl_weight = 1.0  # KL(teacher ‖ student) at kl_temperature, per token and times T²
kl_temperature = 40.0  # T of the KL term
clone_weight = 0.2  # the sum of all clone losses (paper: alpha); 0 leaves them out
clone_attn_out: Literal["student", "teacher"] = "student"  # compared in whose space (authors' code: teacher)
clone_mlp_out: Literal["student", "teacher"] = "student"  # likewise, for the FFN's output
clone_skip: tuple = ()  # clone terms to leave out: q k v attn_out gate up mlp_out (shared: attn_in mlp_in)
clone_skip_layers: tuple = ()  # layers without clone losses, by index
# data
data: dict | str = "data/quickstart/corpus"  # shard directory, or {directory: token budget or None for all}
seq_len = 256  # tokens in a block
global_batch_size = 16  # blocks a step, over all devices and micro-batches
micro_batch_size = 16  # blocks of one forward pass; global_batch_size / micro_batch_size are accumulated
seed = 1  # of the initial weights and the order of the data
# optimizer: AdamW
max_steps = 130  # optimizer steps of the run
learning_rate = 5e-3  # peak
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
save_every = 1000  # steps between checkpoints; one is always made at the end
keep_last = 2  # checkpoints to keep
log_every = 10  # steps between lines of metrics.jsonl
eval_every = 500  # steps between evaluations on the held-out blocks; one is always made at the end
eval_blocks = 128  # held-out blocks of an evaluation
sample_prompt = "def "  # the student and the teacher continue it at the end of the run; "" does not
device: str | None = None  # None: cuda where there is one, or cpu
dtype: Literal["float32", "bfloat16"] | None = None  # to compute in; None: bfloat16 on cuda, float32 on cpu

if __name__ == "__main__":
    from configurator import configure

    options = configure(globals())

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import model as models
from prepare import Mixture, load_tokenizer, special_ids, vocabulary_hash, write_shards
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
    """The clone or the plain LM that the options describe, with new weights."""
    if teacher is not None:
        clone = models.LowRankClone(
            models.load_model(teacher, compute_dtype), student_hidden_size, share_qkv=share_qkv,
            share_gate_up=share_gate_up, tie_head_projection=tie_head_projection,
            student_rms_norm_eps=student_rms_norm_eps, lm_weight=lm_weight, kl_weight=kl_weight,
            kl_temperature=kl_temperature, clone_weight=clone_weight, clone_attn_out=clone_attn_out,
            clone_mlp_out=clone_mlp_out, clone_skip=clone_skip, clone_skip_layers=clone_skip_layers,
        )  # fmt: skip
        return clone.init_weights(seed)
    if model_config is None:
        raise ValueError("teacher is None, so a plain LM is trained: give its shape as model_config")
    if isinstance(model_config, str):
        config = models.read_config(model_config)
    else:
        config = models.ModelConfig.from_hf(model_config, "model_config")
    return models.Llama(config, compute_dtype).init_weights(seed)


def check_vocabulary(mixture: Mixture, config: models.ModelConfig, tokenizer_dir: str | None) -> None:
    known = vocabulary_hash(load_tokenizer(tokenizer_dir)) if tokenizer_dir else None
    for shards in mixture.sources:
        size, name = shards.meta["vocab_size"], shards.meta["tokenizer"]
        if size > config.vocab_size:
            raise ValueError(
                f"{shards.path} has {size} token ids ({name}); the model has {config.vocab_size}"
            )
        if known and shards.meta["vocabulary_hash"] != known:
            raise ValueError(
                f"{shards.path} was tokenized by {name}, whose vocabulary is not {tokenizer_dir}'s"
            )


@torch.no_grad()
def evaluate(model, mixture: Mixture, where: torch.device) -> dict[str, float]:
    """Means over the first eval_blocks held-out blocks: losses at T = 1, each clone term summed over
    layers.
    """
    clone = isinstance(model, models.LowRankClone)
    shared = {"student": model.compose(), "temperature": 1.0} if clone else {}
    blocks, sums = min(eval_blocks, mixture.total), {}
    for start in tqdm(range(0, blocks, micro_batch_size), desc="evaluating", leave=False):
        count = min(micro_batch_size, blocks - start)
        tokens = torch.from_numpy(mixture.batch(start, count)).to(where)
        losses = model(tokens[:, :-1], tokens[:, 1:], blocks * seq_len, count / blocks, **shared)
        for name, value in metrics_of(model, losses).items():
            sums[name] = sums.get(name, 0.0) + value.double()
    return {f"val_{name}": value.item() for name, value in sums.items() if name != "loss"}


def metrics_of(model, losses: dict) -> dict[str, torch.Tensor]:
    """The scalars of a forward pass by their names in metrics.jsonl; on the device, no sync."""
    named = {
        name: losses[name].detach() for name in ("loss", "lm", "kl", "clone", "teacher_lm") if name in losses
    }
    if "terms" in losses:
        named |= {
            f"clone_{n}": v
            for n, v in zip(model.clone.terms(), losses["terms"].detach().sum(0), strict=False)
        }
    return named


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
    "student_rms_norm_eps", "data", "seq_len", "global_batch_size", "seed",
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
    saved = load_file(path / "trainer" / "optimizer.safetensors")
    for name, p in parameters.items():
        values = {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {key: v if key == "step" else v.to(p.device) for key, v in values.items()}
    return state["step"]


def main() -> None:
    # ---- what is there, and does it fit: everything that can be refused is refused here
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compute_dtype = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    if global_batch_size % micro_batch_size:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
        )
    accumulation = global_batch_size // micro_batch_size
    found = models.checkpoints(out_dir)
    if not resume and (found or (Path(out_dir) / "metrics.jsonl").exists()):
        raise ValueError(
            f"{out_dir} holds a run; --resume=True goes on with it, --out_dir=DIR starts another"
        )
    model = build_model(compute_dtype).to(where)
    clone = isinstance(model, models.LowRankClone)
    tokenizer_dir = tokenizer or teacher
    if data == "data/quickstart/corpus" and not Path(data).exists():
        write_shards("stdlib", data, "data/quickstart/teacher")
    sources = {data: None} if isinstance(data, str) else data
    train_data = Mixture(sources, "tokens", seq_len, seed)
    heldout = Mixture(dict.fromkeys(sources), "heldout", seq_len, 0)
    check_vocabulary(train_data, model.config, tokenizer_dir)

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
    start = load_checkpoint(found[-1], model, optimizer) if resume and found else 0

    # ---- what was derived
    count = sum(p.numel() for p in parameters)
    student = f"student {model.config.hidden_size} wide, " if clone else ""
    print(
        f"{where} ({torch.get_num_threads()} threads), torch {torch.__version__}, computing in {compute_dtype}"
    )
    if clone:
        total = sum(p.numel() for p in model.teacher.parameters())
        print(f"teacher {teacher}: {total:,} parameters, frozen, {model.teacher.config.hidden_size} wide")
    print(f"{student}{count:,} parameters to train")
    print(
        f"{global_batch_size * seq_len:,} tokens a step in {accumulation} micro-batches, {max_steps:,} steps, "
        f"{max_steps * global_batch_size * seq_len:,} tokens of {train_data.total * seq_len:,} "
        f"({max_steps * global_batch_size / train_data.total:.2f} epochs)"
    )
    os.makedirs(out_dir, exist_ok=True)
    log_file = Path(out_dir) / "metrics.jsonl"
    kept = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
    log_file.write_text(
        "".join(line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= start)
    )
    if start:
        print(f"resumed from {found[-1]} at step {start}")

    def log(step: int, values: dict) -> None:
        with open(log_file, "a") as file:
            file.write(
                json.dumps({"step": step, "tokens": step * global_batch_size * seq_len, **values}) + "\n"
            )

    # ---- the loop
    bar = tqdm(total=max_steps, initial=start, desc="training", unit="step")
    model.train()
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
            tokens = torch.from_numpy(train_data.batch(first, micro_batch_size)).to(where)
            shared = {"student": held} if clone else {}
            num_labels = global_batch_size * seq_len
            losses = model(tokens[:, :-1], tokens[:, 1:], num_labels, 1 / accumulation, **shared)
            losses["loss"].backward()
            for name, value in metrics_of(model, losses).items():
                sums[name] = sums.get(name, 0.0) + value
        if held is not composed:
            model.release(composed, held)

        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        bar.update()
        if done % log_every == 0 or done == max_steps:
            mean = {name: value.item() / (done - logged) for name, value in sums.items()}
            speed = (done - logged) * global_batch_size * seq_len / (time.perf_counter() - since)
            log(
                done, {**mean, "grad_norm": grad_norm.item(), "learning_rate": lr, "tokens_per_second": speed}
            )
            bar.set_postfix_str(f"loss {mean['loss']:.3f}, lm {mean['lm']:.3f}, {speed:,.0f} tok/s")
            sums, logged, since = {}, done, time.perf_counter()
        if done % eval_every == 0 or done == max_steps:
            values = evaluate(model, heldout, where)
            log(done, values)
            tqdm.write(
                f"step {done}: "
                + ", ".join(f"{k[4:]} {v:.4f}" for k, v in values.items() if "clone_" not in k)
            )
            since = time.perf_counter()
        if done % save_every == 0 or done == max_steps:
            save_checkpoint(model, optimizer, done, tokenizer_dir)
            since = time.perf_counter()
    bar.close()

    # ---- what came of it
    if sample_prompt and tokenizer_dir:
        tokens = load_tokenizer(tokenizer_dir)
        bos, eos = special_ids(tokens, tokenizer_dir)
        speakers = {"student": model.merge(), "teacher": model.teacher} if clone else {"model": model}
        for name, llama in speakers.items():
            ids = bos + tokens.encode(sample_prompt, add_special_tokens=False).ids
            new = [token for (token,) in generate(llama, [ids], 64, 0.8, top_p=0.9, seed=1, stop_ids=(eos,))]
            text = tokens.decode([token for token in new if token is not None])
            print(f"\n--- {name}\n{sample_prompt}{text}")
    print(
        f"\nheld out: student {values['val_lm']:.4f}, teacher {values['val_teacher_lm']:.4f}, "
        if clone
        else "\nheld out: ",
        end="",
    )
    print(f"KL {values['val_kl']:.4f} (nats a token)" if clone else f"{values['val_lm']:.4f} nats a token")
    print(f"sample it:   python sample.py --model={out_dir}")
    print(f"export it:   python convert.py --checkpoint={out_dir} --out=student")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
