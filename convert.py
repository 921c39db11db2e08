"""Every model format: Hugging Face directories and checkpoints, read and written; and the export.

    python convert.py --checkpoint=out/quickstart --out=student                    # a clone's last checkpoint
    python convert.py --checkpoint=out/lrc_1_5b/step_00208000 --out=student --dtype=bfloat16
    python convert.py --checkpoint=out/lrc_1_7b --out=student --arch=llama         # Qwen2 as LlamaForCausalLM

Turns a checkpoint into an ordinary Hugging Face directory. The student's weights are composed in float32 and
written in `dtype` with the teacher's tokenizer files. What was written is loaded again, and its logits are
compared with the checkpoint's, before the directory gets its name. A README.md in it says what it is, its
model card. tools/from_authors.py reads the authors' checkpoints.
"""

from typing import Literal

checkpoint = "out/quickstart"  # a checkpoint, an out_dir (its last checkpoint), or a Hugging Face directory
out = "student"  # directory to write; must not exist
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights written
max_shard_gb = 5.0  # largest file of weights, in 10^9 bytes
arch: Literal["native", "llama"] = "native"  # llama: write a Qwen2 or Mistral student as a Llama

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import dataclasses
import functools
import hashlib
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configurator import FIRST, fail, read_json, read_lines, write_json
from model import Llama, ModelConfig, Student, StudentConfig, start_from_clone, student_shape

# Our name of each weight of a layer -> its name in a Hugging Face checkpoint, under "model.layers.{i}."
LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
MODEL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
BIASES_OF_ALL = ("llama", "qwen3", "smollm3")  # families whose attention_bias is o's too
# What transformers takes for a field that a family's config.json leaves out, where it is not what it takes
# for the others.
DEFAULTS = {
    "mistral": {"max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
    "smollm3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
        "tie_word_embeddings": True, "no_rope_layer_interval": 4,
    },
}  # fmt: skip
# Fields of config.json that this code does not compute: the values that leave them without effect, and what a
# user is told. An absent field has the first of them.
ALLOWED = {
    "quantization_config": ((None,), "unquantised weights only"),
    "hidden_act": (("silu", "swish"), "silu"),
    "mlp_bias": ((None, False), "no bias in the FFN"),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
INDEX = "model.safetensors.index.json"
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def from_hf(hf: dict, source: str = "config.json") -> ModelConfig:
    """Reads a config.json of transformers 4 or 5; ValueError names a field that is not supported."""

    def require(is_right, field, value, allowed):
        if not is_right:
            raise ValueError(f"{source}: {field} is {value!r}; this code supports {allowed}")

    family = hf.get("model_type")
    require(family in ARCHITECTURES, "model_type", family, " | ".join(ARCHITECTURES))
    hf = DEFAULTS.get(family, {}) | hf
    for field, (values, allowed) in ALLOWED.items():
        require(hf.get(field, values[0]) in values, field, hf.get(field), allowed)

    def require_size(field, size):
        require(isinstance(size, int) and size >= 1, field, size, "a positive integer")

    def require_number(field, value):
        is_positive = isinstance(value, int | float) and 0 < value < math.inf
        require(is_positive, field, value, "a positive number")

    for field in SIZES:
        require_size(field, hf.get(field))
    layers = hf["num_hidden_layers"]

    # Attention must reach over the whole context. A Mistral has a window unless its config says null.
    full = "full attention in every layer (sliding_window null)"
    is_mistral = family == "mistral"
    layer_types = hf.get("layer_types") or ()
    require("sliding_attention" not in layer_types, "layer_types", "sliding_attention", full)
    if is_mistral:
        require("sliding_window" in hf, "sliding_window", "not given, which means 4096", full)
    window = hf.get("sliding_window")
    if window is not None and (is_mistral or hf.get("use_sliding_window")):
        require(window >= (hf.get("max_position_embeddings") or math.inf), "sliding_window", window, full)

    # transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling, which counts where both are there.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    require(isinstance(rope, dict), "rope_scaling", rope, "an object")
    rope = dict(rope)
    rope_theta = rope.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
    older_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", None) or older_type
    rms_norm_eps = hf.get("rms_norm_eps", 1e-6)
    require_number("rms_norm_eps", rms_norm_eps)
    require_number("rope_theta", rope_theta)
    require(rope_type in ROPE_FIELDS, "rope_scaling type", rope_type, " | ".join(ROPE_FIELDS))
    for field in ROPE_FIELDS[rope_type]:
        require_number(f"rope_scaling {field}", rope.get(field))
        # transformers 5 would take this one.
        require(hf.get(field, rope[field]) == rope[field], field, hf.get(field), "what rope_scaling has")
    for place in (hf, rope):
        rotated = place.get("partial_rotary_factor")
        require(rotated in (None, 1), "partial_rotary_factor", rotated, "1.0")

    heads = hf["num_attention_heads"]
    key_value_heads = hf.get("num_key_value_heads") or heads
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    require_size("num_key_value_heads", key_value_heads)
    require_size("head_dim", head_dim)
    tied = hf.get("tie_word_embeddings", False)
    require(tied in (True, False, None), "tie_word_embeddings", tied, "true | false")
    rotated_layers = [1] * layers
    if family == "smollm3":
        every = [int(i % hf["no_rope_layer_interval"] != 0) for i in range(1, layers + 1)]
        rotated_layers = hf.get("no_rope_layers") or every
        require(
            len(rotated_layers) >= layers, "no_rope_layers", rotated_layers, f"a list for {layers} layers"
        )
    biased = bool(hf.get("attention_bias", False))
    divisor = f"a divisor of num_attention_heads {heads}"
    require(heads % key_value_heads == 0, "num_key_value_heads", key_value_heads, divisor)
    require(head_dim % 2 == 0, "head_dim", head_dim, "an even number")
    return ModelConfig(
        model_type=family,
        **{field: hf[field] for field in SIZES},
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=rms_norm_eps,
        rope_theta=float(rope_theta),
        rope_scaling=None if rope_type == "default" else {"rope_type": rope_type, **rope},
        tie_word_embeddings=bool(tied),
        qkv_bias=family == "qwen2" or (biased and not is_mistral),
        o_bias=family in BIASES_OF_ALL and biased,
        qk_norm=family == "qwen3",
        no_rope_layers=tuple(rotated_layers[:layers]),
        max_position_embeddings=hf.get("max_position_embeddings") or 2048,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=hf.get("eos_token_id"),
        hf=hf,
    )


# Fields of the source's config.json that an export writes anew, or that only transformers 5 reads
REWRITTEN = ("rope_parameters", "dtype", "transformers_version", "_name_or_path", "layer_types")


def to_hf(config: ModelConfig, weights_dtype: torch.dtype) -> dict:
    """A config.json that transformers 4 and 5 both read right: the one it came from, with its own sizes."""
    hf = {field: value for field, value in config.hf.items() if field not in REWRITTEN}
    hf |= dataclasses.asdict(config)
    for field in ("qkv_bias", "o_bias", "qk_norm", "hf"):
        del hf[field]
    if config.model_type != "smollm3":
        del hf["no_rope_layers"]
    hf["architectures"] = [ARCHITECTURES[config.model_type]]
    hf["hidden_act"] = "silu"
    hf["torch_dtype"] = str(weights_dtype).removeprefix("torch.")
    if config.model_type in BIASES_OF_ALL:
        hf["attention_bias"] = config.o_bias
    return hf


def weight_names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name in the Hugging Face checkpoint: (name in our state_dict, shape)} of a whole model."""
    d = config.hidden_size
    v = config.vocab_size
    names = {MODEL_NAMES["embedding"]: ("embedding", (v, d)), MODEL_NAMES["norm"]: ("norm", (d,))}
    if not config.tie_word_embeddings:
        names[MODEL_NAMES["head"]] = ("head", (v, d))
    for i in range(config.num_hidden_layers):
        for name, shape in config.layer_shapes().items():
            names[f"model.layers.{i}.{LAYER_NAMES[name]}"] = (f"layers.{i}.{name}", shape)
    return names


def read_config(path: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory; ValueError when there is none or it is not supported."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; get a model with: hf download NAME --local-dir {path}")
    config = from_hf(read_json(path / "config.json"), str(path / "config.json"))
    if config.tie_word_embeddings and has_head_of_its_own(path):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


@functools.cache
def warn_once(line: str) -> None:
    """One line on stderr, once."""
    if FIRST:
        print(line, file=sys.stderr)


@functools.cache
def has_head_of_its_own(path: Path) -> bool:
    """Whether the weights have an LM head that is another matrix than the embedding.

    transformers 5 does not tie such a model, whatever its config.json says; 4.51 did, without a word.
    """
    names = (MODEL_NAMES["embedding"], MODEL_NAMES["head"])
    if not any((path / name).is_file() for name in ("model.safetensors", INDEX)):
        return False
    found = tensor_slices(weight_files(path))
    if not all(name in found for name in names):
        return False
    embedding, head = (found[name][0].get_tensor(name) for name in names)
    if embedding.shape != head.shape or torch.equal(embedding, head):
        return False
    tied = "config.json says tie_word_embeddings"
    warn_once(f"{path}: {tied}, but {names[1]} is not the embedding: read as untied")
    return True


def weight_files(path: Path) -> list[Path]:
    """The files of a directory's weights; ValueError where one is not there."""
    index = path / INDEX
    names = {"model.safetensors"}
    is_whole = (path / "model.safetensors").is_file()
    # As transformers chooses where both are there.
    if is_whole and index.is_file():
        warn_once(f"{path} has model.safetensors and {INDEX}: the first is read, as transformers does")
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = set(map(str, weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not a file of its directory")
        if not (path / name).is_file():
            why = f", but {INDEX} names it" if index.is_file() else ""
            raise ValueError(f"{path / name} does not exist{why}")
    return [path / name for name in sorted(names)]


def tensor_slices(files: list[Path]) -> dict:
    """{name: (open file, shape)} of every tensor; ValueError names a file that is not whole."""
    found = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from None
        found |= {name: (handle, tuple(handle.get_slice(name).get_shape())) for name in list(handle.keys())}
    return found


def read_tensors(files: list[Path], expected: dict[str, tuple], ignored=(), dtype=None) -> dict[str, Tensor]:
    """The tensors of safetensors files, which must have exactly the expected names and shapes; names that end
    in one of `ignored`, and known leftovers, may be there.

    ValueError names what is missing, unexpected or misshapen, before any tensor is read.
    """
    found = tensor_slices(files)
    ignored = (*ignored, "rotary_emb.inv_freq")  # which older files have, and config.json says
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {n}" for n in found if n not in expected and not n.endswith(ignored)]
    for name, shape in expected.items():
        if name in found and found[name][1] != tuple(shape):
            problems.append(f"{name} is {list(found[name][1])}, config.json says {list(shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{files[0].parent}: weights do not fit: {'; '.join(problems[:5])}{more}")
    tensors = {name: found[name][0].get_tensor(name).to(dtype) for name in expected}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{files[0].parent}: {name} holds a value that is not finite")
    return tensors


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama from a Hugging Face directory, its weights in `dtype`; strict, see read_tensors."""
    path = Path(path)
    config = read_config(path)
    names = weight_names(config)
    ignored = (MODEL_NAMES["head"],) if config.tie_word_embeddings else ()
    expected = {name: shape for name, (_, shape) in names.items()}
    tensors = read_tensors(weight_files(path), expected, ignored, dtype)
    with torch.device("meta"):
        model = Llama(config)
    state = {names[name][0]: tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def save_model(
    model: Llama | Student, path: Path, dtype: torch.dtype, tokenizer: str | Path | None,
    max_shard_bytes=5 * 10**9, state: dict[str, Tensor] | None = None, turn_ends: tuple[int, ...] = (),
):  # fmt: skip
    """Writes a Hugging Face directory for transformers 4 and 5, with `tokenizer`'s files.

    state: of a student the weights of its own, whole. turn_ends: tokens that end a reply, at which generate()
    is to stop too.
    """
    config = model.config
    state = state or model.state_dict()
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", to_hf(config, dtype))
    shards = [{}]
    size = 0
    for name, (ours, _) in weight_names(config).items():
        tensor = state[ours].to(dtype).contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path / INDEX, index)
    for file, shard in zip(files, shards, strict=True):
        write_tensors(shard, path / file)

    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    source = Path(tokenizer) if tokenizer else path
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
    if turn_ends:
        ends = eos_ids(generation.get("eos_token_id")) | eos_ids(config.eos_token_id)
        generation["eos_token_id"] = sorted(ends.union(turn_ends))
    write_json(path / "generation_config.json", generation)
    for pattern in TOKENIZER_FILES if tokenizer else ():
        for file in source.glob(pattern):
            (path / file.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, path / file.relative_to(source))
    make_tokenizer_portable(path / "tokenizer_config.json")


def eos_ids(value: int | list | None) -> set[int]:
    """The ids of an eos_token_id, which is one, a list or none."""
    return set(value if isinstance(value, list) else [value]) - {None}


def make_tokenizer_portable(file: Path) -> None:
    """Writes what only transformers 5 reads as transformers 4 and llama.cpp's converter read it too."""
    config = read_json(file) if file.is_file() else {}
    portable = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
        # by default that class gives token_type_ids too, which generate() refuses
        portable.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable != config:
        write_json(file, portable)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from None
    # safetensors lets only the owner read what it writes
    shutil.copymode(file.with_name("config.json"), file)


PROJECTIONS_FILE = "projections.safetensors"


def fingerprint(model: Llama) -> str:
    """A hash of a model's shapes and of 64 values of each weight, at the precision of bfloat16: the same for
    any dtype, device or sharding it is loaded in, another for a fine-tuned copy."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64, device=flat.device).long()]
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_clone(clone: Student, path: Path, teacher: str, tokenizer: str, tensors=None) -> None:
    """Writes the clone's own tensors, and in config.json everything else needed to rebuild it.

    tensors: clone.trained.state_dict(), whole, where the clone is sharded.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = clone.trained.state_dict() if tensors is None else tensors
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    config = {
        "model_type": "low_rank_clone",
        "teacher": teacher,
        "teacher_absolute": str(Path(teacher).resolve()),
        "teacher_fingerprint": fingerprint(clone.teacher),
        "tokenizer": tokenizer,
        "tokenizer_absolute": tokenizer and str(Path(tokenizer).resolve()),
        "clone": dataclasses.asdict(clone.student_config),
    }
    write_json(path / "config.json", config)
    write_tensors(tensors, path / "model.safetensors")


def clone_directories(path: Path, teacher: str | None = None) -> tuple[str, str | None]:
    """Where the teacher and the tokenizer of a clone are now; teacher: its directory, where it has moved.

    None where a tokenizer that is not the teacher's is gone.
    """
    config = read_json(path / "config.json")

    def find(name):
        places = (config[name], config.get(f"{name}_absolute"))
        return next((place for place in places if place and Path(place).is_dir()), None)

    teacher = teacher or find("teacher")
    if teacher is None:
        was = config["teacher"]
        raise ValueError(f"{path}: its teacher {was} is not there; say where with --teacher=DIR")
    if config["tokenizer"] == config["teacher"]:
        return teacher, teacher
    return teacher, find("tokenizer")


def read_student_config(path: Path) -> StudentConfig:
    """What the clone of a checkpoint is."""
    saved = read_json(path / "config.json")["clone"]
    names = [field.name for field in dataclasses.fields(StudentConfig) if field.name in saved]
    student = StudentConfig(**{name: saved[name] for name in names})
    if student.student_layers is not None:
        student = dataclasses.replace(student, student_layers=tuple(student.student_layers))
    return student


def refuse_another_teacher(path: Path, teacher: Llama, name: str) -> None:
    """ValueError where a clone's checkpoint is not of this teacher."""
    if read_json(path / "config.json")["teacher_fingerprint"] != fingerprint(teacher):
        raise ValueError(f"{path}: {name} is not the teacher it was trained with (the weights differ)")


def load_clone(path: Path, teacher: str | None = None) -> Student:
    """A clone from its checkpoint; teacher: where its directory is now. Refuses another teacher."""
    teacher, _ = clone_directories(path, teacher)
    model = load_model(teacher)
    refuse_another_teacher(path, model, teacher)
    return clone_of(path, model)


def clone_of(path: Path, teacher: Llama) -> Student:
    """The clone of a checkpoint, on its teacher and on the CPU."""
    student = read_student_config(path)
    with torch.device("meta"):
        clone = Student(student_shape(teacher.config, student), teacher, student)
    expected = {name: tuple(tensor.shape) for name, tensor in clone.trained.state_dict().items()}
    tensors = read_tensors([path / "model.safetensors"], expected)
    clone.trained.load_state_dict(tensors, assign=True)
    return clone


def is_clone(path: Path) -> bool:
    return read_json(path / "config.json").get("model_type") == "low_rank_clone"


def load_checkpoint(path: Path, teacher: str | None = None) -> Llama | Student:
    """The model of a clone's checkpoint or of a Hugging Face directory."""
    return load_clone(path, teacher) if is_clone(path) else load_model(path)


def tokenizer_directory(path: Path, teacher: str | None = None) -> str:
    """Where the tokenizer of a clone's checkpoint (or Hugging Face directory) is now."""
    if not is_clone(path):
        return str(path)
    tokenizer = clone_directories(path, teacher)[1]
    if tokenizer is None:
        was = read_json(path / "config.json")["tokenizer"]
        raise ValueError(f"{path}: its tokenizer {was} is not there; put it back")
    return tokenizer


def has_projections(path: Path) -> bool:
    return (path / PROJECTIONS_FILE).is_file()


def save_weights(
    model: Student, path: Path, tensors: dict[str, Tensor], tokenizer: str | None, teacher: str | None,
    turn_ends: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """Writes the weights of a run's checkpoint; tensors: model.trained.state_dict(), whole. turn_ends: see
    save_model.

    A student with weights of its own is a Hugging Face directory. What clone losses compare it by
    (projections, and which neurons are kept) is in a file of its own.
    """
    if model.composes:
        save_clone(model, path, teacher, tokenizer, tensors)
        return
    save_model(model, path, torch.float32, tokenizer, state=tensors, turn_ends=turn_ends)
    plain = [name for name, _ in weight_names(model.config).values()]
    others = {name: tensor for name, tensor in tensors.items() if name not in plain}
    if others:
        write_tensors(others, path / PROJECTIONS_FILE)


@torch.no_grad()
def load_weights(path: Path, model: Student) -> None:
    """Sets what trains from a checkpoint or Hugging Face directory that must fit it exactly."""
    if is_clone(path) and not model.teacher:
        raise ValueError(f"{path} is a clone; this run trains a plain model")
    if not is_clone(path) and model.composes:
        raise ValueError(f"{path} is a plain model; this run trains a clone (train=projections)")
    trained = model.trained.state_dict()

    # A clone's checkpoint, for a clone or for a student that goes on with weights of its own.
    if is_clone(path):
        refuse_another_clone(path, model)
        if not model.composes:
            start = clone_of(path, model.teacher)
            if start.config != model.config:
                raise ValueError(f"{path} is a student of another shape than these options say")
            start.trained.to(model.device)
            start_from_clone(model, start)
            return
        expected = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        for name, tensor in read_tensors(weight_files(path), expected).items():
            trained[name].copy_(tensor)
        return

    # A plain model, and what clone losses compare it by.
    names = weight_names(model.config)
    ignored = (MODEL_NAMES["head"],) if model.config.tie_word_embeddings else ()
    expected = {theirs: shape for theirs, (_, shape) in names.items()}
    tensors = read_tensors(weight_files(path), expected, ignored)
    tensors = {names[theirs][0]: tensor for theirs, tensor in tensors.items()}
    others = {name: tuple(tensor.shape) for name, tensor in trained.items() if name not in tensors}
    if has_projections(path) and others:
        tensors |= read_tensors([path / PROJECTIONS_FILE], others)
    elif others:
        if any(shape != (shape[0], shape[0]) for shape in others.values()):
            missing = ", ".join(others)
            raise ValueError(f"{path} lacks {PROJECTIONS_FILE}, by which clone losses compare it: {missing}")
        # Of a student as wide as its teacher: the two streams are compared as they are.
        tensors |= {name: torch.eye(*shape) for name, shape in others.items()}
    for name, tensor in tensors.items():
        trained[name].copy_(tensor)


def refuse_another_clone(path: Path, model: Student) -> None:
    """ValueError where a clone's checkpoint is of another teacher, or another student of it."""
    saved = dataclasses.asdict(read_student_config(path))
    ours = dataclasses.asdict(model.student_config)
    refuse_another_teacher(path, model.teacher, "this run's")
    whole = tuple(range(len(model.teacher.layers)))
    for name in saved.keys() - {"train"}:
        theirs, own = saved[name], ours[name]
        if name == "student_layers":
            theirs, own = theirs or whole, own or whole
        if theirs != own:
            raise ValueError(f"{path} has {name} = {theirs}; this run has {own}")


def checkpoints(out_dir: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first; a directory has this name only when it is whole."""
    return sorted(path for path in Path(out_dir).glob("step_*") if path.name[5:].isdigit())


def newest_whole(found: list[Path]) -> Path | None:
    """The newest checkpoint whose files can all be read; says which could not."""
    for path in reversed(found):
        try:
            read_json(path / "config.json")
            read_json(path / "trainer/state.json")
            tensor_slices([*weight_files(path), *(path / "trainer").glob("*.safetensors")])
            return path
        except ValueError as error:
            warn_once(f"passing over {path}: {error}")
    return None


def resolve(path: str | Path) -> Path:
    """A Hugging Face directory or a checkpoint as it is; of an out_dir, its newest whole one."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if (path / "config.json").is_file():
        return path
    newest = newest_whole(checkpoints(path))
    if newest is None:
        raise ValueError(f"{path} has neither a config.json nor a whole checkpoint (step_*)")
    return newest


def as_llama(student: Llama) -> Llama:
    """The same model as a LlamaForCausalLM, which has a bias in o where it has one in q, k and v."""
    config = student.config
    size = config.hidden_size
    heads = config.num_attention_heads
    if config.qk_norm or not all(config.no_rope_layers):
        raise ValueError(f"arch is llama; no Llama computes what a layer of a {config.model_type} does")
    if size % heads:
        raise ValueError(f"arch is llama; its hidden_size, {size}, must be a multiple of its {heads} heads")
    with torch.device("meta"):
        llama = Llama(dataclasses.replace(config, model_type="llama", o_bias=config.qkv_bias, hf={}))
    zeros = {n: torch.zeros(p.shape) for n, p in llama.named_parameters() if n.endswith("o_bias")}
    llama.load_state_dict({**zeros, **student.state_dict()}, assign=True)
    return llama


def largest_difference(expected: Tensor, found: Tensor) -> float:
    """max |found - expected| over max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def transformers_logits(path: Path, ids: Tensor) -> Tensor | None:
    """What transformers makes of a Hugging Face directory in float32; None where it is not installed.

    Our reader and our writer agree with each other when both are wrong.
    """
    try:
        # It takes seconds to import, and is no requirement.
        from transformers import AutoModelForCausalLM, utils
    except ImportError:
        return None
    utils.logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(path).float()(ids).logits
    except Exception as error:  # of many kinds
        raise ValueError(f"transformers cannot load what was written: {error}") from None


CARD = """---
library_name: transformers
pipeline_tag: text-generation
{licence}---

# {name}

{origin}
{count:,} parameters: hidden size {shape.hidden_size}, {shape.num_hidden_layers} layers, \
{shape.num_attention_heads} heads of {shape.head_dim}, vocabulary {shape.vocab_size:,}.
{training}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{name}")
    model = AutoModelForCausalLM.from_pretrained("{name}", torch_dtype="auto")
{options}"""


def write_model_card(path: Path, name: str, student: Llama, source: Path, teacher: str | None) -> None:
    """README.md of an export to `path`, with the licence of its teacher, or of what it was made from."""
    options = {}
    training = ""
    if (source / "trainer/state.json").is_file():
        state = read_json(source / "trainer/state.json")
        options = state["options"]
        training = describe_training(source.parent / "metrics.jsonl", state["step"])
    origin = "Trained from scratch."
    licence = ""
    for kind, directory in (
        ("A low-rank clone (https://arxiv.org/abs/2505.12781) of", teacher),
        ("Distilled from", options.get("teacher")),
        ("Made from", options.get("init_from", source)),
    ):
        if directory:
            origin = f"{kind} {Path(directory).resolve().name}."
            licence = copy_licence(Path(directory), path)
            break
    lines = "".join(f"    {option} = {value!r}\n" for option, value in options.items())
    card = CARD.format(
        licence=licence,
        name=name,
        origin=origin,
        count=sum(weight.numel() for weight in student.parameters()),
        shape=student.config,
        training=training,
        options=f"\nThe options of its run:\n\n{lines}" if options else "",
    )
    (path / "README.md").write_text(card, encoding="utf-8")


def describe_training(log: Path, last_step: int) -> str:
    """Tokens and held-out losses up to a step, by a run's metrics.jsonl; "" where that is not there."""
    if not log.is_file():
        return ""
    tokens = 0
    losses = ""
    for line in read_lines(log):
        if line["step"] > last_step:
            break
        tokens = line["tokens"]
        if line.get("val_lm") is not None:
            losses = f"Held-out loss at step {line['step']:,}, nats a token: {line['val_lm']:.4f}"
        if line.get("val_teacher_lm") is not None:
            losses += f"; its teacher's: {line['val_teacher_lm']:.4f}"
    return f"\nTrained for {last_step:,} steps, {tokens:,} tokens.\n{losses}\n"


def copy_licence(source: Path, target: Path) -> str:
    """Copies LICENSE files; returns the licence's lines for the front matter of a model card."""
    lines = []
    if (source / "README.md").is_file():
        card = (source / "README.md").read_text(encoding="utf-8", errors="replace")
        front_matter = card.split("\n---")[0] if card.startswith("---") else ""
        # A field and what belongs to it, which is indented or a list.
        fields = re.findall(r"^license.*(?:\n[ -].*)*", front_matter, re.MULTILINE)
        lines = "\n".join(fields).splitlines()
    for file in sorted(source.glob("LICENSE*")):
        shutil.copyfile(file, target / file.name)
        lines = lines or ["license: other", "license_name: see-file", f"license_link: {file.name}"]
    return "".join(line + "\n" for line in lines)


@torch.no_grad()
def main() -> None:
    target = Path(out)
    if target.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb is {max_shard_gb}; it must be above 0")
    source = resolve(checkpoint)
    if "model.zoom.weight" in tensor_slices(weight_files(source)):
        raise ValueError(f"{source} is of the authors' code; convert it by tools/from_authors.py first")
    tokenizer = tokenizer_directory(source, teacher)
    its_teacher = clone_directories(source, teacher)[0] if is_clone(source) else None
    original = load_checkpoint(source, teacher)
    ids = torch.randint(original.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    student = original.merge() if isinstance(original, Student) else original
    expected = student(ids)
    del original
    family = student.config.model_type
    if arch == "llama":
        student = as_llama(student)

    stored = getattr(torch, dtype)
    for name, weight in student.named_parameters():
        if weight.abs().max() > torch.finfo(stored).max:
            raise ValueError(f"{name} has a value that {dtype} cannot hold: export it in another dtype")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(student, partial, stored, tokenizer, max_shard_gb * 10**9)
    file = partial / "tokenizer_config.json"
    if arch == "llama" and family == "mistral" and file.is_file():
        # transformers 5 makes a Llama's tokenizer anew, but a Mistral's is what its file says.
        write_json(file, read_json(file) | {"tokenizer_class": "TokenizersBackend"})
        make_tokenizer_portable(file)

    # Exact but for the rounding to `dtype`, which has a limit of its own.
    rounded = student.to(stored).to(torch.float32)(ids)
    written = load_model(partial)(ids)
    theirs = transformers_logits(partial, ids[:1])
    exact = largest_difference(rounded, written)
    against = f"{source}'s, by this code alone: transformers is not installed"
    if theirs is not None:
        their_difference = largest_difference(rounded[:1], theirs)
        exact = max(exact, their_difference)
        against = f"{source}'s, and transformers' of {out} within {their_difference:.1e}"
    rounding = largest_difference(expected, written)
    limit = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype]
    if not (exact <= 1e-4 and rounding <= limit):  # a NaN is neither
        shutil.rmtree(partial)
        difference = f"{max(exact, rounding):.1e}, compared with {against}"
        raise ValueError(f"the logits of what was written differ by {difference}; {out} is not kept")

    write_model_card(partial, target.resolve().name, student, source, its_teacher)
    partial.rename(target)
    count = sum(weight.numel() for weight in student.parameters())
    print(f"{out}: {count:,} parameters in {dtype}; logits within {rounding:.1e} (relative) of {against}")
    if not (target / "tokenizer.json").is_file():
        print(f"{out} has no tokenizer: {tokenizer} has no tokenizer.json")
    config = student.config
    if config.model_type == "qwen2" and config.hidden_size != config.num_attention_heads * config.head_dim:
        advice = "for them export it with --arch=llama"
        if config.hidden_size % config.num_attention_heads:
            advice = f"nor is {config.hidden_size} a multiple of {config.num_attention_heads}, as of a Llama"
        print(
            f"{out}: vLLM and llama.cpp take a Qwen2's head_dim as hidden size / heads, which is not its "
            f"{config.head_dim}; {advice}"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
