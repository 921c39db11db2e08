"""Turns a checkpoint into an ordinary Hugging Face model directory.

    python convert.py --checkpoint=out/quickstart --out=student                    # a clone's last checkpoint
    python convert.py --checkpoint=out/lrc_1_5b/step_00208000 --out=student --dtype=bfloat16
    python convert.py --checkpoint=out/lrc_1_7b --out=student --arch=llama         # Qwen2 as LlamaForCausalLM
    python convert.py --checkpoint=lrc/checkpoint-20000 --teacher=models/Llama-3.2-3B-Instruct --out=student

The last reads a checkpoint of the method's authors' code (safetensors with zoom_* names). The student's
weights are composed in float32 and written in `dtype` with the teacher's tokenizer files. What was written is
loaded again and its logits compared with the checkpoint's before the directory gets its name.
"""

from typing import Literal

checkpoint = (
    "out/quickstart"  # a checkpoint, an out_dir (its last), a Hugging Face directory, or the authors'
)
out = "student"  # directory to write; must not exist
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights written
max_shard_gb = 5.0  # largest file of weights, in 10^9 bytes
arch: Literal["native", "llama"] = "native"  # llama: write a Qwen2 or Mistral student as a Llama

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import dataclasses
import shutil
from pathlib import Path

import torch

import model as models

# Our name of each trained tensor -> its name in the authors' checkpoints, layers under "model.layers.{i}.".
REFERENCE_NAMES = {
    "embedding_projection": "model.zoom",
    "head_projection": "zoom_down",
    "norm": "model.target_norm",
    "input_norm": "target_input_layernorm",
    "post_norm": "target_post_attention_layernorm",
    "projections.q": "self_attn.zoom_q",
    "projections.k": "self_attn.zoom_k",
    "projections.v": "self_attn.zoom_v",
    "projections.qkv": "self_attn.zoom_up",
    "projections.o": "self_attn.zoom_down",
    "projections.gate": "mlp.zoom_gate",
    "projections.up": "mlp.zoom_up",
    "projections.gate_up": "mlp.zoom_up",
    "projections.down": "mlp.zoom_down",
}


def reference_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint of the authors' code, none where `path` is something else."""
    files = [path] if path.is_file() else []
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        files = models.weight_files(path)
    found = "model.zoom.weight" in models.tensor_slices(files)
    if path.is_file() and not found:
        raise ValueError(f"{path} has no tensor model.zoom.weight: not a checkpoint of the authors' code")
    return files if found else []


def load_reference(files: list[Path], teacher: str) -> models.LowRankClone:
    """A clone from the authors' checkpoint: sizes, sharing and tying as its tensors say."""
    found, config = models.tensor_slices(files), models.read_config(teacher)
    (d_s, d_t), settings = found["model.zoom.weight"][1], files[0].with_name("config.json")
    if d_t != config.hidden_size:
        raise ValueError(f"{files[0]} has a teacher of hidden size {d_t}; {teacher} has {config.hidden_size}")
    settings = models.read_json(settings) if settings.is_file() else {}
    frozen = models.load_model(teacher)
    with torch.device("meta"):
        clone = models.LowRankClone(
            frozen,
            d_s,
            share_qkv="model.layers.0.self_attn.zoom_q.weight" not in found,
            share_gate_up="model.layers.0.mlp.zoom_gate.weight" not in found,
            tie_head_projection="zoom_down.weight" not in found,
            student_rms_norm_eps=settings.get("target_rms_norm_eps", 1e-5),
        )
    trained, names, shapes = clone.trained(), {}, {}
    for ours, parameter in trained.items():
        _, i, name = ours.split(".", 2) if ours.startswith("layers.") else ("", "", ours)
        names[ours] = f"model.layers.{i}." * bool(i) + f"{REFERENCE_NAMES[name]}.weight"
        # projections are stored as they multiply, many as P^T; d_S < d_T tells which
        shape = tuple(parameter.shape)
        shapes[names[ours]] = shape if found.get(names[ours], (None, shape))[1] == shape else shape[::-1]
    # zoom_out only serves a loss; a checkpoint of everything also holds the teacher
    ignored = ("zoom_out.weight", "lm_head.weight", *config.weight_names())
    tensors = models.read_tensors(files, shapes, ignored, torch.float32)
    state = {f"teacher.{name}": weight for name, weight in frozen.state_dict().items()}
    for ours, theirs in names.items():
        as_is = tensors[theirs].shape == trained[ours].shape
        state[ours] = tensors[theirs] if as_is else tensors[theirs].T.contiguous()
    clone.load_state_dict(state, assign=True)
    return clone


def as_llama(student: models.Llama) -> models.Llama:
    """The same model as a LlamaForCausalLM, which has a bias in o where it has one in q, k and v."""
    config = student.config
    if config.qk_norm:
        raise ValueError(f"arch is llama; a {config.model_type} normalises q and k, which no Llama does")
    size, heads = config.hidden_size, config.num_attention_heads
    if size % heads:
        raise ValueError(f"arch is llama; its hidden_size, {size}, must be a multiple of its {heads} heads")
    with torch.device("meta"):
        llama = models.Llama(dataclasses.replace(config, model_type="llama", o_bias=config.qkv_bias))
    zeros = {n: torch.zeros(p.shape) for n, p in llama.named_parameters() if n.endswith("o_bias")}
    llama.load_state_dict({**zeros, **student.state_dict()}, assign=True)
    return llama


def largest_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """max |found - expected| over max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def main() -> None:
    target = Path(out)
    if target.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb is {max_shard_gb}; it must be above 0")
    if files := reference_files(Path(checkpoint)):
        if teacher is None:
            raise ValueError(f"{checkpoint} is of the authors' code; name its teacher with --teacher=DIR")
        source, tokenizer = Path(checkpoint), teacher
        original = load_reference(files, teacher)
    else:
        source = models.resolve(checkpoint)
        tokenizer = models.tokenizer_directory(source, teacher)
        original = models.load_checkpoint(source, teacher)
    student = original.merge() if isinstance(original, models.LowRankClone) else original
    if arch == "llama":
        student = as_llama(student)
    ids = torch.randint(student.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = original.logits(ids)  # of a clone: by its own composition, not by the merged weights
    del original

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    stored = getattr(torch, dtype)
    models.save_model(student, partial, stored, tokenizer, max_shard_gb * 10**9)
    rounded = student.to(stored).to(torch.float32).logits(ids)
    written = models.load_model(partial).logits(ids)
    exact, rounding = largest_difference(rounded, written), largest_difference(expected, written)
    limit = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype]
    if not (exact <= 1e-4 and rounding <= limit):  # a NaN is neither
        shutil.rmtree(partial)
        raise ValueError(
            f"the logits of what was written differ by {max(exact, rounding):.1e}; {out} is not kept"
        )
    partial.rename(target)
    count = sum(weight.numel() for weight in student.parameters())
    print(f"{out}: {count:,} parameters in {dtype}; logits within {rounding:.1e} (relative) of {source}'s")
    if not (target / "tokenizer.json").is_file():
        print(f"{out} has no tokenizer: {tokenizer} has no tokenizer.json")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
