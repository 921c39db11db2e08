"""Reads a checkpoint of the method's authors' code (safetensors with zoom_* names), and writes one of ours.

    python tools/from_authors.py --checkpoint=lrc/checkpoint-20000 --teacher=models/Llama-3.2-3B-Instruct \\
        --out=out/from_authors

convert.py, sample.py and train.py --init_from then take it as any other. What the reference converts wrongly
(eps, rope, head_dim) comes from the teacher's config.json here.
"""

checkpoint: str | None = None  # directory of the authors' checkpoint, or its file of weights
teacher: str | None = None  # Hugging Face directory of its teacher
out = "out/from_authors"  # directory to write; must not exist

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from configurator import configure, fail

    configure(globals())

import torch

import convert
from model import Student, StudentConfig, student_shape

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


def reference_name(ours: str) -> str:
    """Of a trained tensor, its name in the authors' checkpoints."""
    if not ours.startswith("layers."):
        return f"{REFERENCE_NAMES[ours]}.weight"
    _, i, name = ours.split(".", 2)
    return f"model.layers.{i}.{REFERENCE_NAMES[name]}.weight"


def as_stored(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A projection or its gradient, transposed where the authors store it so."""
    return tensor if tensor.shape == like.shape else tensor.T.contiguous()


def reference_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint of the authors' code: a directory's, or one of them."""
    files = [path] if path.is_file() else convert.weight_files(path)
    if "model.zoom.weight" not in convert.tensor_slices(files):
        raise ValueError(f"{path} has no tensor model.zoom.weight: not a checkpoint of the authors' code")
    return files


def load_reference(files: list[Path], teacher: str) -> Student:
    """A clone from the authors' checkpoint: sizes, sharing and tying as its tensors say."""
    found = convert.tensor_slices(files)
    config = convert.read_config(teacher)
    d_s, d_t = found["model.zoom.weight"][1]
    if d_t != config.hidden_size:
        raise ValueError(f"{files[0]} has a teacher of hidden size {d_t}; {teacher} has {config.hidden_size}")
    file = files[0].with_name("config.json")
    settings = convert.read_json(file) if file.is_file() else {}
    frozen = convert.load_model(teacher)
    with torch.device("meta"):
        student = StudentConfig(
            student_hidden_size=d_s,
            share_qkv="model.layers.0.self_attn.zoom_q.weight" not in found,
            share_gate_up="model.layers.0.mlp.zoom_gate.weight" not in found,
            tie_head_projection="zoom_down.weight" not in found,
            student_rms_norm_eps=settings.get("target_rms_norm_eps", 1e-5),
        )
        clone = Student(student_shape(config, student), frozen, student)
    # Projections are stored as they multiply, many as P^T; d_S < d_T tells which.
    shapes = {}
    for ours, parameter in clone.trained.named_parameters():
        name = reference_name(ours)
        shape = tuple(parameter.shape)
        is_transposed = name in found and found[name][1] != shape
        shapes[name] = shape[::-1] if is_transposed else shape
    # zoom_out only serves a loss; a checkpoint of everything also holds the teacher
    ignored = ("zoom_out.weight", "lm_head.weight", *convert.weight_names(config))
    tensors = convert.read_tensors(files, shapes, ignored, torch.float32)
    state = {}
    for ours, parameter in clone.trained.named_parameters():
        state[ours] = as_stored(tensors[reference_name(ours)], like=parameter)
    clone.trained.load_state_dict(state, assign=True)
    return clone


def main() -> None:
    for name in ("checkpoint", "teacher"):
        if globals()[name] is None:
            raise ValueError(f"{name} is None; give its directory with --{name}=DIR")
    if Path(out).exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if not Path(checkpoint).exists():
        raise ValueError(f"{checkpoint} does not exist")
    clone = load_reference(reference_files(Path(checkpoint)), teacher)
    convert.save_clone(clone, Path(out), teacher, teacher)
    print(f"{out}: a clone's checkpoint; next: python convert.py --checkpoint={out} --out=student")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
