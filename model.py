"""The Llama family and its low-rank clone, as functions of their weights.

    teacher = load_model("models/Llama-3.2-3B-Instruct")          # a Hugging Face directory -> Llama
    clone = LowRankClone(teacher, student_hidden_size=1536)        # trains projections and norms only
    weights = clone()                                              # the student's, composed
    losses = clone.loss(ids, labels, weights)                      # {"loss", "lm", "kl", "clone", "terms"}
    student = clone.merge()                                        # an ordinary, smaller Llama

Method: Low-Rank Clone, arXiv 2505.12781. The student has the teacher's layers, heads and FFN width but a
narrower residual stream, d_S < d_T. With y = x W^T and projections P [d_T, d_S], its weights are W P where a
weight reads the stream (q, k, v, gate, up, embedding, head) and P^T W where it writes to it (o, down).
A model's forward() makes its weights once per step, where DDP synchronises gradients and FSDP gathers shards;
`loss` then runs them on as many batches as a step has. `block` is the one definition of a layer, for the
teacher, the composed student, the merged student and cached decoding.

Shapes: B batch, T tokens, D hidden_size, H heads, G key/value heads, F intermediate_size, V vocabulary.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils._pytree import tree_leaves, tree_map

try:  # optional, on CUDA, for documents kept apart: where it is not installed, PyTorch's own kernel does it
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

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
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The part of a Hugging Face config.json that decides what a model computes; field names are theirs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | list | None

    @classmethod
    def from_hf(cls, hf: dict, where: str = "config.json") -> "ModelConfig":
        """Reads a config.json of transformers 4 or 5; ValueError names a field that is not supported."""

        def refuse(field, value, allowed):
            raise ValueError(f"{where}: {field} is {value!r}; this code supports {allowed}")

        family = hf.get("model_type")
        if family not in ARCHITECTURES:
            refuse("model_type", family, " | ".join(ARCHITECTURES))
        for field in ("num_local_experts", "num_experts", "quantization_config"):
            if hf.get(field):
                refuse(field, hf[field], "dense models with unquantised weights only")
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):
            refuse("hidden_act", hf["hidden_act"], "silu")
        if hf.get("mlp_bias"):
            refuse("mlp_bias", True, "no bias in the FFN")
        if "sliding_attention" in (hf.get("layer_types") or ()):
            refuse("layer_types", "sliding_attention", "full attention in every layer")
        window = hf.get("sliding_window")
        in_use = hf.get("use_sliding_window", family == "mistral")
        if in_use and window is not None and window < hf.get("max_position_embeddings", 0):
            refuse("sliding_window", window, "full attention in every layer (sliding_window null)")
        if family == "mistral" and "sliding_window" not in hf:
            refuse("sliding_window", "not given, which means 4096", "full attention (sliding_window null)")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
        kind = rope.pop("rope_type", None) or rope.get("type", "default")
        rope.pop("type", None)
        if kind not in ("default", "linear", "llama3"):
            refuse("rope_scaling type", kind, "default | linear | llama3")
        if (hf.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
            refuse("partial_rotary_factor", hf.get("partial_rotary_factor"), "1.0")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for field in sizes:
            if not isinstance(hf.get(field), int) or hf[field] < 1:
                refuse(field, hf.get(field), "a positive integer")
        heads, biased = hf["num_attention_heads"], bool(hf.get("attention_bias", False))
        head_dim = hf.get("head_dim") or (128 if family == "qwen3" else hf["hidden_size"] // heads)
        groups = hf.get("num_key_value_heads") or heads
        if heads % groups:
            refuse("num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
        if head_dim % 2:
            refuse("head_dim", head_dim, "an even number")
        needed = {"llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        for field in ("factor", *needed.get(kind, ())) if kind != "default" else ():
            if field not in rope:
                refuse(f"rope_scaling {field}", None, "a number there")
        return cls(
            model_type=family,
            **{field: hf[field] for field in sizes},
            num_key_value_heads=groups,
            head_dim=head_dim,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=None if kind == "default" else {"rope_type": kind, **rope},
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or (family != "mistral" and biased),
            o_bias=family in ("llama", "qwen3") and biased,
            qk_norm=family == "qwen3",
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=hf.get("eos_token_id"),
        )

    def to_hf(self, dtype: torch.dtype) -> dict:
        """A config.json that transformers 4 and 5 both read right."""
        hf = dataclasses.asdict(self)
        for field in ("qkv_bias", "o_bias", "qk_norm"):
            del hf[field]
        if self.model_type in ("llama", "qwen3"):
            hf["attention_bias"] = self.o_bias
        if self.model_type == "llama":
            hf["mlp_bias"] = False
        else:
            hf["sliding_window"] = None
        if self.model_type.startswith("qwen"):
            hf["use_sliding_window"] = False
        hf |= {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        return hf | {"torch_dtype": str(dtype).removeprefix("torch.")}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """{our name: shape} of the weights of one layer, in the order of LAYER_NAMES."""
        d, f = self.hidden_size, self.intermediate_size
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {"input_norm": (d,), "q": (heads, d), "k": (groups, d), "v": (groups, d), "o": (d, heads)}
        if self.qkv_bias:
            shapes |= {"q_bias": (heads,), "k_bias": (groups,), "v_bias": (groups,)}
        if self.o_bias:
            shapes["o_bias"] = (d,)
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        return shapes | {"post_norm": (d,), "gate": (f, d), "up": (f, d), "down": (d, f)}

    def weight_names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name in the Hugging Face checkpoint: (name in our state_dict, shape)} of a whole model."""
        d, v = self.hidden_size, self.vocab_size
        names = {MODEL_NAMES["embedding"]: ("embedding", (v, d)), MODEL_NAMES["norm"]: ("norm", (d,))}
        if not self.tie_word_embeddings:
            names[MODEL_NAMES["head"]] = ("head", (v, d))
        for i in range(self.num_hidden_layers):
            for name, shape in self.layer_shapes().items():
                names[f"model.layers.{i}.{LAYER_NAMES[name]}"] = (f"layers.{i}.{name}", shape)
        return names


# ---- one layer, as a function of its weights


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, head_dim/2], float32, of positions [..., T]; scaled as transformers does."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Wavelengths beyond the original context are divided by factor, short ones kept, those between
        # blended.
        context = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = context * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = blend * frequencies + (1 - blend) * frequencies / scaling["factor"]
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def document_layout(documents: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | tuple]:
    """(positions [B, 1, T], what `attention` takes as mask), both restarting where documents [B, T] change.

    Worked out by numpy before the batch goes to the device, so that nothing waits for a GPU. On CUDA no T x T
    mask is made: (offsets into the batch's B * T tokens at which documents begin and end, int32; T).
    """
    rows, length = documents.shape
    order = np.arange(length)
    begins = np.ones((rows, length), bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, order, 0), axis=1)
    positions = torch.from_numpy(order - starts)[:, None].to(device, non_blocking=True)
    if device.type == "cuda":
        bounds = np.append(np.flatnonzero(begins), documents.size).astype(np.int32)
        return positions, (torch.from_numpy(bounds).to(device, non_blocking=True), length)
    mask = (starts[:, :, None] == starts[:, None, :]) & (order[:, None] >= order)
    return positions, torch.from_numpy(mask)[:, None].to(device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """q [B, H, T, head_dim] to k, v [B, G, L, head_dim] -> [B, T, H·head_dim].

    mask: None: causal; bool [B, 1, T, L]; or (bounds [documents + 1], longest), from document_layout: causal
    within documents, by flash-attn where it is installed and else by PyTorch's kernel for lengths that vary.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, tuple):
        bounds, longest = mask
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B·T, heads, head_dim]
        lengths = (bounds, bounds, longest, longest)
        if flash_attn_varlen_func is not None:
            attended = flash_attn_varlen_func(*flat, *lengths, causal=True)
        else:
            attended = varlen_attn(*flat, *lengths, window_size=(-1, 0), enable_gqa=grouped)
        return attended.unflatten(0, (q.shape[0], q.shape[2])).flatten(2)
    causal = mask is None and q.shape[2] > 1
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, T, head_dim] by cos, sin [T, head_dim/2] or [B, 1, T, head_dim/2]."""
    cos, sin = rope
    halves = x.float().unflatten(-1, (2, -1))  # [B, H, T, 2, head_dim/2]
    turned = halves.flip(-2) * torch.stack((-sin, sin), dim=-2)
    return torch.addcmul(turned, halves, cos[..., None, :]).flatten(-2).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, float32 inside whatever x's dtype."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class GatedLinear(torch.autograd.Function):
    """(silu(gate) · up) W^T of gate, up [B, T, F] and W [D, F]; keeps only these for backward."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        weight_grad = None
        if ctx.needs_input_grad[2]:
            # this way round, since D < F: CPU products are faster with few columns than with few rows
            weight_grad = ((silu * up).flatten(0, -2).T @ grad.flatten(0, -2)).T
        grad = grad @ weight
        # silu' = sigmoid - silu · sigmoid + silu, in place: fresh memory costs more than arithmetic
        gate_grad = sigmoid.addcmul_(silu, sigmoid, value=-1).add_(silu).mul_(up).mul_(grad)
        return gate_grad, silu.mul_(grad), weight_grad


def block(x: Tensor, w: dict[str, Tensor], config: ModelConfig, rope, mask=None, cache=None):
    """One Llama layer. x [B, T, D] -> (x [B, T, D], activations).

    w: the layer's weights by the names of LAYER_NAMES. mask: see attention.
    cache: (keys [B, G, L, head_dim], values, start); this call writes positions start .. start + T and
    attends to all before. activations: q, k, v, gate, up before RoPE and nonlinearity, o and down as added
    to the stream, attended [B, T, H·head_dim] and ffn [B, T, F] as o and down read them, and attn_in,
    mlp_in, the normed inputs.
    """
    a = {"attn_in": rms_norm(x, w["input_norm"], config.rms_norm_eps)}
    for name in ("q", "k", "v"):
        a[name] = F.linear(a["attn_in"], w[name], w.get(f"{name}_bias"))
    q, k, v = (
        a[name].unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for name in ("q", "k", "v")
    )  # [B,H|G,T,D]
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config.rms_norm_eps), rms_norm(k, w["k_norm"], config.rms_norm_eps)
    q, k = rotate(q, rope), rotate(k, rope)
    if cache is not None:
        keys, values, start = cache
        end = start + q.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        k, v = keys[:, :, :end], values[:, :, :end]
    a["attended"] = attention(q, k, v, mask)  # [B, T, H·head_dim]
    a["o"] = F.linear(a["attended"], w["o"], w.get("o_bias"))
    x = x + a["o"]
    a["mlp_in"] = rms_norm(x, w["post_norm"], config.rms_norm_eps)
    a["gate"], a["up"] = F.linear(a["mlp_in"], w["gate"]), F.linear(a["mlp_in"], w["up"])
    a["down"] = GatedLinear.apply(a["gate"], a["up"], w["down"])
    return x + a["down"], a


def plain_block(x, w, config, rope, mask=None, cache=None) -> Tensor:
    return block(x, w, config, rope, mask, cache)[0]


def need_compiler(device: torch.device) -> None:
    """ValueError where torch.compile lacks the C++ compiler that it needs on a CPU."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        raise ValueError("compile needs a C++ compiler on a CPU, and there is none: g++, or what CXX names")


# ---- the loss head


def log_sum_exp(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(z - max z) [n, V], their sum [n, 1], log Σ exp z [n]) of z [n, V].

    The last is float64, since a KL at a high temperature is a small difference of two of these.
    """
    top = z.detach().amax(-1, keepdim=True)
    exponentials = (z - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials, total, (total.double().log() + top)[:, 0]


def chunk_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, temperature: float):
    """What each token of a chunk costs: logits [n, V], float32, and labels [n] -> {name: [n]}.

    "lm" is the cross entropy, 0 where the label is -100; "kl" is KL(teacher ‖ student) at the temperature;
    "teacher_lm", only at temperature 1, the teacher's cross entropy. Any differentiable function may stand
    here: its gradient is autograd's.
    """
    labelled = labels != -100
    label = labels.clamp(min=0)[:, None]

    def cross_entropy(z: Tensor, log_sum: Tensor) -> Tensor:
        return torch.where(labelled, log_sum - z.gather(-1, label)[:, 0], 0.0)

    *_, log_sum = log_sum_exp(logits)
    costs = {"lm": cross_entropy(logits, log_sum)}
    if teacher_logits is None:
        return costs
    z = logits
    if temperature != 1.0:
        z = logits / temperature
        teacher_logits = teacher_logits / temperature
        *_, log_sum = log_sum_exp(z)
    exponentials, total, teacher_log_sum = log_sum_exp(teacher_logits)
    p = exponentials / total
    # KL = Σ p (log p - log q), with log p = teacher_logits - teacher_log_sum and log q = z - log_sum
    costs["kl"] = (p * (teacher_logits - z)).sum(-1) - teacher_log_sum + log_sum
    if temperature == 1.0:
        costs["teacher_lm"] = cross_entropy(teacher_logits, teacher_log_sum)
    return costs


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 of float64): on CUDA without rounding to bfloat16 in between."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)


class ChunkedLoss(torch.autograd.Function):
    """lm_scale · Σ lm + kl_scale · T² · Σ kl of chunk_loss, the logits of one chunk of tokens alive at a time.

    hidden [N, D], head [V, D], labels [N] (-100: no label), teacher_hidden [N, D_T] and teacher_head [V, D_T]
    or None. The gradients of hidden and head are formed in the forward pass, chunk by chunk, so that backward
    only scales them: O(chunk · V) memory and no logits computed twice. Returns (loss, the tokens' lm [N], kl
    [N], teacher_lm [N]); the loss alone is differentiable, once.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher_hidden, teacher_head, scales, chunk, loss_function):
        lm_scale, kl_scale, temperature = scales
        tokens = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)  # float32, or float64 to check gradients in
        costs = {name: hidden.new_zeros(tokens, dtype=wide) for name in ("lm", "kl", "teacher_lm")}
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        head_grad = torch.zeros_like(head, dtype=wide) if needs_head else None
        # On a CPU the vocabulary is the logits' outer dimension: their products are up to a third faster.
        outer = hidden.device.type == "cpu"

        def logits(x: Tensor, weight: Tensor) -> Tensor:  # [chunk, V]
            return product(weight, x.T).T if outer else product(x, weight.T)

        def run(rows: slice) -> None:
            z = logits(hidden[rows], head)
            teacher_z = None if teacher_hidden is None else logits(teacher_hidden[rows], teacher_head)
            with torch.set_grad_enabled(needs_hidden or needs_head):
                z.requires_grad_(needs_hidden or needs_head)
                chunk_costs = loss_function(z, labels[rows], teacher_z, temperature)
                loss = lm_scale * chunk_costs["lm"].sum()
                if teacher_z is not None:
                    loss = loss + kl_scale * temperature**2 * chunk_costs["kl"].sum()
            for name, values in chunk_costs.items():
                costs[name][rows] = values.detach()
            if not loss.requires_grad:
                return
            grad = torch.autograd.grad(loss, z)[0].to(hidden.dtype)
            if needs_hidden:
                hidden_grad[rows] = grad @ head
            if needs_head:
                accumulate_product(head_grad, grad.T, hidden[rows])

        for start in range(0, tokens, chunk):
            run(slice(start, start + chunk))
        ctx.grads = hidden_grad, None if head_grad is None else head_grad.to(head.dtype)
        ctx.mark_non_differentiable(*costs.values())
        loss = lm_scale * costs["lm"].sum() + kl_scale * temperature**2 * costs["kl"].sum()
        return loss, *costs.values()

    @staticmethod
    def backward(ctx, scale, *_):
        hidden_grad, head_grad = ctx.grads
        assert hidden_grad is not None or head_grad is not None, (
            "backward runs once: it gives its buffers away"
        )
        ctx.grads = None, None
        scaled = (None if grad is None else grad.mul_(scale) for grad in (hidden_grad, head_grad))
        return *scaled, None, None, None, None, None, None


def loss_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk of the loss head: up to 48 MB of float32 logits a buffer on a CPU, 512 MB on a GPU."""
    if device.type == "cuda":
        return max(128, 2**27 // vocab_size // 128 * 128)
    return max(32, min(512, 6 * 2**20 // vocab_size // 32 * 32))


def head_loss(
    hidden,
    head,
    labels,
    teacher=None,
    lm_weight=1.0,
    kl_weight=1.0,
    temperature=1.0,
    num_labels=None,
    share=1,
    loss_function=chunk_loss,
):
    """The loss of final hidden states [B, T, D] under head [V, D]; see ChunkedLoss. teacher: (hidden, head)
    or None.

    CE is a mean over the labelled tokens, KL over all. Where the batch is a part of a larger one, num_labels
    is the labels in the whole and share this part of its tokens: losses of the parts then add up to the
    whole's. Returns {"loss", "lm", "kl", "teacher_lm", "token_lm"}: scalars, and the CE of each token [B, T].
    """
    labels = labels.flatten()
    if num_labels is None:
        num_labels = (labels != -100).sum().clamp(min=1)
    tokens = labels.numel()
    teacher_hidden, teacher_head = (teacher[0].flatten(0, 1), teacher[1]) if teacher else (None, None)
    loss, lm, kl, teacher_lm = ChunkedLoss.apply(
        hidden.flatten(0, 1), head, labels, teacher_hidden, teacher_head,
        (lm_weight / num_labels, kl_weight * share / tokens, temperature),
        loss_chunk(head.shape[0], head.device), loss_function,
    )  # fmt: skip
    result = {"loss": loss, "lm": lm.sum() / num_labels, "token_lm": lm.view(hidden.shape[:-1])}
    if teacher:
        result["kl"] = kl.sum() * share / tokens
    if teacher and temperature == 1.0:
        result["teacher_lm"] = teacher_lm.sum() / num_labels
    return result


# ---- weights for several batches


class Held:
    """Weights on which the gradients of several batches gather: `weights`, a tree of leaves.

    Not a dict itself: FSDP looks for tensors in dicts, lists and dataclasses among the arguments of a forward
    pass, and would wait for the gradients of all these before it frees one.
    """

    def __init__(self, weights: dict):
        self.weights = weights


def hold(weights: dict, accumulate: bool) -> Held:
    """A model's weights as leaves of their own. accumulate: gradients of several batches add up on them, in
    float32 at least; else they keep the dtype of the weights, to which they are cast in the end."""

    def leaf(weight: Tensor) -> Tensor:
        held = weight.detach().requires_grad_(weight.requires_grad)
        if held.requires_grad and accumulate:
            held.grad_dtype = torch.promote_types(weight.dtype, torch.float32)
        return held

    return Held(tree_map(leaf, weights))


def release(weights: dict, held: Held, before_layer: Callable[[int], None] = lambda i: None) -> None:
    """Takes the gradients gathered on `held` back to what is trained, the layers from the last to the first.

    before_layer(i) is called before layer i's turn. Both trees are used up: a gradient is freed once taken.
    """

    def take(part: dict, held_part: dict) -> None:
        pairs = zip(tree_leaves(part), tree_leaves(held_part), strict=True)
        pairs = [(weight, leaf) for weight, leaf in pairs if leaf.grad is not None]
        gradients = [leaf.grad.to(weight.dtype) for weight, leaf in pairs]
        for _, leaf in pairs:
            leaf.grad = None
        if pairs:
            torch.autograd.backward([weight for weight, _ in pairs], gradients)

    layers = weights.pop("layers")
    held_layers = held.weights.pop("layers")
    take(weights, held.weights)
    for i in reversed(range(len(layers))):
        before_layer(i)
        take(layers.pop(), held_layers.pop())


# ---- a plain model


class Layer(nn.Module):
    """The weights of one layer under the names of LAYER_NAMES."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        for name, shape in config.layer_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: weight.to(dtype) for name, weight in self.named_parameters()}

    def forward(self, function, dtype: torch.dtype, *args):
        """function(this layer's weights, *args): FSDP has them gathered for as long as the call lasts."""
        return function(self.weights(dtype), *args)


class Llama(nn.Module):
    """A Llama, Mistral, Qwen2 or Qwen3 LM that computes in `dtype`; its weights may be wider."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.run_block = plain_block  # train.py may compile or checkpoint it
        self.chunk_loss = chunk_loss  # and compile this
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embedding))

    def init_weights(self, seed: int, std: float = 0.02) -> "Llama":
        """N(0, std), as transformers initialises these families; ones for norms, zeros for biases."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("norm"):
                nn.init.ones_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                weight.data.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
        return self

    def head_weight(self) -> Tensor:
        return (self.embedding if self.head is None else self.head).to(self.dtype)

    def forward(self) -> dict:
        """The weights to compute with: {"layers": [{name: weight}], "embedding", "head", "norm"}."""
        weights = {"layers": [layer(dict, self.dtype) for layer in self.layers]}
        weights |= {"embedding": self.embedding.to(self.dtype), "norm": self.norm.to(self.dtype)}
        if self.head is not None:
            weights["head"] = self.head.to(self.dtype)
        return weights

    def hidden_states(self, ids: Tensor, positions=None, mask=None, caches=None, weights=None) -> Tensor:
        """ids [B, T] -> final normed hidden states [B, T, D]. caches: one (keys, values, start) a layer."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        rope, weights = rope_table(self.config, positions), weights or self()
        x = F.embedding(ids, weights["embedding"])
        for i, layer in enumerate(weights["layers"]):
            x = self.run_block(x, layer, self.config, rope, mask, caches[i] if caches else None)
        return rms_norm(x, weights["norm"], self.config.rms_norm_eps)

    def logits(self, ids: Tensor, **kwargs) -> Tensor:
        """ids [B, T] -> logits [B, T, V], float32."""
        return (self.hidden_states(ids, **kwargs) @ self.head_weight().T).float()

    def loss(
        self, ids, labels, weights=None, num_labels=None, share=1.0, documents=None
    ) -> dict[str, Tensor]:
        """The next-token loss of ids [B, T] against labels [B, T], already shifted (-100: no label).

        weights: forward()'s result, where several batches share it, or that held. documents: document_layout's
        result, where the documents of a block do not see each other.
        """
        weights = weights.weights if isinstance(weights, Held) else weights or self()
        positions, mask = documents or (None, None)
        hidden = self.hidden_states(ids, positions, mask, weights=weights)
        head = weights.get("head", weights["embedding"])
        return head_loss(
            hidden, head, labels, num_labels=num_labels, share=share, loss_function=self.chunk_loss
        )


# ---- the low-rank clone

READS = ("q", "k", "v", "gate", "up")  # weights W of which the student has W P
WRITES = ("o", "down")  # weights W of which it has P^T W
COMPARED = {"attn_out": "o", "mlp_out": "down"}  # activations that clone terms of another name compare
PROJECTION_OF = {"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_out": "down"}  # clone terms with one


@dataclasses.dataclass(frozen=True)
class CloneConfig:
    """What defines a clone besides its teacher and its trained tensors, and how its loss is weighed.

    share_qkv, share_gate_up: one projection for q, k, v (gate, up), whose clone losses become one loss on
    their input (paper, Table 7). clone_attn_out, clone_mlp_out: compare in the "student"'s space (paper) or
    the "teacher"'s (attn_out in the authors' code). clone_scale: "teacher" divides each term by the mean
    square of the teacher's activation (LowRankClone.calibrate), so that no layer drowns the others.
    clone_skip: clone terms to leave out, by name.
    """

    student_hidden_size: int
    share_qkv: bool = False
    share_gate_up: bool = False
    tie_head_projection: bool = True
    student_rms_norm_eps: float = 1e-5
    lm_weight: float = 1.0
    kl_weight: float = 1.0
    kl_temperature: float = 40.0
    clone_weight: float = 0.2
    clone_attn_out: str = "student"
    clone_mlp_out: str = "student"
    clone_scale: str = "none"
    clone_skip: tuple = ()
    clone_skip_layers: tuple = ()

    def terms(self) -> list[str]:
        """Names of the clone losses of a layer, in the order they are computed."""
        attention = ["attn_in"] if self.share_qkv else ["q", "k", "v"]
        ffn = ["mlp_in"] if self.share_gate_up else ["gate", "up"]
        return [name for name in (*attention, "attn_out", *ffn, "mlp_out") if name not in self.clone_skip]


class CloneLayer(nn.Module):
    """The trained tensors of one layer: projections [d_T, d_S] and the student's norms [d_S]."""

    def __init__(self, d_t: int, clone: CloneConfig):
        super().__init__()
        d_s = clone.student_hidden_size
        self.home = {name: name for name in (*READS, *WRITES)}
        self.compared = [PROJECTION_OF[term] for term in clone.terms() if term in PROJECTION_OF]
        if clone.share_qkv:
            self.home |= dict.fromkeys("qkv", "qkv")
        if clone.share_gate_up:
            self.home |= dict.fromkeys(("gate", "up"), "gate_up")
        self.projections = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(d_t, d_s)) for name in dict.fromkeys(self.home.values())}
        )
        self.input_norm, self.post_norm = nn.Parameter(torch.empty(d_s)), nn.Parameter(torch.empty(d_s))

    def compose(self, teacher: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What the student has of its own in this layer, from the teacher's weights; the projections that
        clone losses need are under "P_" + name."""
        p = {name: self.projections[home].to(dtype) for name, home in self.home.items()}
        w = {name: teacher[name] @ p[name] for name in READS}
        w |= {name: p[name].T @ teacher[name] for name in WRITES}
        if "o_bias" in teacher:
            w["o_bias"] = teacher["o_bias"] @ p["o"]
        own = {"input_norm": self.input_norm.to(dtype), "post_norm": self.post_norm.to(dtype)}
        return w | own | {f"P_{name}": p[name] for name in self.compared}

    def forward(self, teacher: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """compose(), both layers gathered under FSDP."""
        return teacher(self.compose, dtype, dtype)


class MeanSquaredError(torch.autograd.Function):
    """Mean of (student - teacher P)² in float32; P [d_T, d_S] or None, and then of (student - teacher)².

    student [B, T, d_S], teacher [B, T, d_T] without gradient. Keeps the difference and P's gradient, formed
    here, for backward, and nothing of the teacher.
    """

    @staticmethod
    def forward(ctx, student, teacher, projection):
        difference = student - (teacher if projection is None else teacher @ projection)
        ctx.projection_grad = None
        if ctx.needs_input_grad[2]:
            ctx.projection_grad = teacher.flatten(0, 1).T @ difference.flatten(0, 1)
        ctx.save_for_backward(difference)
        wide = torch.promote_types(difference.dtype, torch.float32)
        return torch.linalg.vector_norm(difference, dtype=wide).square() / difference.numel()

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        scale = (grad * (2 / difference.numel())).to(difference.dtype)
        projection_grad = None if ctx.projection_grad is None else ctx.projection_grad * -scale
        return difference.mul_(scale), None, projection_grad  # in place: a second backward is refused


def clone_block(teacher, student, x_t, x_s, teacher_config, student_config, rope, mask, clone, terms):
    """One layer of teacher and student in lock-step, so that a teacher activation lives only as long as its
    loss.

    x_t [B, T, d_T], x_s [B, T, d_S] -> (x_t, x_s, [the clone losses named in terms]).
    """
    with torch.no_grad():
        x_t, t = block(x_t, teacher, teacher_config, rope, mask)
    x_s, s = block(x_s, teacher | student, student_config, rope, mask)
    losses = []
    for name in terms:
        compared = COMPARED.get(name, name)
        source, projection = s[compared], None
        if name == "attn_in":
            source = F.linear(source, student["P_q"])
        elif name == "mlp_in":
            source = F.linear(source, student["P_gate"])
        elif name == "attn_out" and clone.clone_attn_out == "teacher":
            source = F.linear(s["attended"], teacher["o"], teacher.get("o_bias"))
        elif name == "mlp_out" and clone.clone_mlp_out == "teacher":
            source = GatedLinear.apply(s["gate"], s["up"], teacher["down"])
        elif name in COMPARED:
            projection = student[f"P_{compared}"]
        losses.append(MeanSquaredError.apply(source, t[compared], projection))
    return x_t, x_s, losses


class LowRankClone(nn.Module):
    """A frozen teacher and the tensors that make a student of it; only the latter have requires_grad.

    ValueError when the student's hidden size does not fit the teacher.
    """

    def __init__(self, teacher: Llama, student_hidden_size: int, **options):
        super().__init__()
        d_t, d_s, heads = teacher.config.hidden_size, student_hidden_size, teacher.config.num_attention_heads
        if not 0 < d_s < d_t:
            raise ValueError(
                f"student_hidden_size is {d_s}; it must be between 1 and {d_t - 1} (the teacher has {d_t})"
            )
        if teacher.config.model_type == "llama" and d_s % heads:
            low = d_s // heads * heads
            near = " or ".join(str(size) for size in (low, low + heads) if 0 < size < d_t)
            raise ValueError(
                f"student_hidden_size is {d_s}; a llama needs a multiple of its {heads} heads: {near}"
            )
        self.teacher = teacher.requires_grad_(False)
        self.run_block = clone_block  # train.py may compile or checkpoint it
        self.chunk_loss = chunk_loss  # and compile this
        self.clone = CloneConfig(student_hidden_size, **options)
        c, layers = self.clone, range(teacher.config.num_hidden_layers)
        for name, given, allowed in (
            ("clone_skip", c.clone_skip, dataclasses.replace(c, clone_skip=()).terms()),
            ("clone_skip_layers", c.clone_skip_layers, layers),
            ("clone_attn_out", [c.clone_attn_out], ("student", "teacher")),
            ("clone_mlp_out", [c.clone_mlp_out], ("student", "teacher")),
            ("clone_scale", [c.clone_scale], ("none", "teacher")),
        ):
            if not set(given) <= set(allowed):
                raise ValueError(f"{name} is {given}; allowed: {allowed}")
        self.config = dataclasses.replace(
            teacher.config,
            hidden_size=d_s,
            rms_norm_eps=self.clone.student_rms_norm_eps,
            tie_word_embeddings=teacher.config.tie_word_embeddings and self.clone.tie_head_projection,
        )
        self.term_scale = 1.0
        self.layers = nn.ModuleList(CloneLayer(d_t, self.clone) for _ in teacher.layers)
        self.norm = nn.Parameter(torch.empty(d_s))
        self.embedding_projection = nn.Parameter(torch.empty(d_t, d_s))
        self.head_projection = None if self.clone.tie_head_projection else nn.Parameter(torch.empty(d_t, d_s))

    def trained(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of everything that trains; what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("teacher.")}

    @torch.no_grad()
    def calibrate(self, ids: Tensor) -> Tensor:
        """Runs the teacher on ids [B, T] for what is to be known of it before training.

        Sets term_scale [layers, terms], by which clone_scale="teacher" multiplies the clone losses: one over
        the mean square of the activation, the same for every batch and any number of devices. Returns the
        second moments [d_T, d_T], float64, of the residual stream's directions x / |x|, averaged over tokens
        and over what each layer and the head read; their trace is 1.
        """
        teacher, names = self.teacher, [COMPARED.get(name, name) for name in self.clone.terms()]
        rope = rope_table(teacher.config, torch.arange(ids.shape[1], device=ids.device))
        squares = torch.zeros((len(teacher.layers), len(names)), device=ids.device)
        covariance = 0.0
        for row in ids.split(1):
            x = F.embedding(row, teacher.embedding).to(teacher.dtype)
            for i, layer in enumerate([*teacher.layers, None]):
                directions = F.normalize(x[0].float(), dim=-1)
                covariance = covariance + (directions.T @ directions).double()
                if layer is not None:
                    x, a = block(x, layer.weights(teacher.dtype), teacher.config, rope)
                    squares[i] += torch.stack([a[name].float().square().mean() for name in names])
        if self.clone.clone_scale == "teacher":
            self.term_scale = len(ids) / squares
        return covariance / covariance.trace()

    def init_weights(
        self, seed: int, init: str = "random", covariance: Tensor | None = None
    ) -> "LowRankClone":
        """Projections and norms by `init`; the same for the same seed and covariance, calibrate()'s result.

        "random": N(0, 0.02) and ones, as the authors' code. "orthogonal": orthonormal columns and ones.
        "channel" (after arXiv 2605.29327) and "pca": the student's stream is the teacher's in one basis U
        [d_T, d_S], the channels or principal directions with most of its energy.
        """
        generator, weights = torch.Generator().manual_seed(seed), self.trained()
        for name, weight in weights.items():
            if name.endswith("norm"):
                nn.init.ones_(weight)
            elif init == "orthogonal":
                gaussian = torch.empty(weight.shape).normal_(generator=generator)
                weight.data.copy_(torch.linalg.qr(gaussian).Q)
            else:
                weight.data.copy_(torch.empty(weight.shape).normal_(0.0, 0.02, generator=generator))
        if init not in ("channel", "pca"):
            return self
        d_s, final = self.config.hidden_size, self.teacher.norm.double()
        balance = torch.ones_like(final)
        if init == "channel":
            chosen = covariance.diagonal().topk(d_s).indices.sort().values
            basis = F.one_hot(chosen, len(covariance)).T.double()
        else:
            if self.head_projection is None:
                # The head's projection is the embedding's: half of the final norm's weight goes into either.
                balance = (final / rms(final)).clamp(min=0.1).sqrt()
                covariance = balance[:, None] * covariance * balance
            basis = torch.linalg.eigh(covariance).eigenvectors[:, -d_s:]
        # less energy in fewer channels: x / rms(x) of what is kept is smaller by this than the teacher's
        scale = ((basis * (covariance @ basis)).sum() * len(covariance) / d_s).sqrt()
        into, out_of = balance[:, None] * basis, basis / balance[:, None]  # the student's stream, [d_T, d_S]

        def absorb(norm: nn.Parameter, projections: list[nn.Parameter], gamma: Tensor) -> None:
            """What reads the stream through the teacher's norm weight gamma, as far as a basis allows."""
            norm.data.fill_(rms(gamma) * scale)
            for projection in projections:
                projection.data.copy_(gamma[:, None] / rms(gamma) * out_of)

        for layer, teacher in zip(self.layers, self.teacher.layers, strict=True):
            p = {name: layer.projections[home] for name, home in layer.home.items()}
            absorb(layer.input_norm, [p["q"], p["k"], p["v"]], teacher.input_norm.double())
            absorb(layer.post_norm, [p["gate"], p["up"]], teacher.post_norm.double())
            for name in WRITES:
                p[name].data.copy_(into)
        self.embedding_projection.data.copy_(into)
        absorb(self.norm, [] if self.head_projection is None else [self.head_projection], final)
        if self.head_projection is None and init == "channel":
            self.norm.data.copy_(final[chosen] * scale)
        return self

    def forward(self) -> dict:
        """The student's weights, composed, but for those that are the teacher's own: {"layers": [{name:
        weight}], "embedding_projection", "head", "norm"}.
        """
        dtype = self.teacher.dtype
        p_embedding = self.embedding_projection.to(dtype)
        p_head = p_embedding if self.head_projection is None else self.head_projection.to(dtype)
        own = {"embedding_projection": p_embedding, "norm": self.norm.to(dtype)}
        return {
            "layers": [
                layer(teacher, dtype) for layer, teacher in zip(self.layers, self.teacher.layers, strict=True)
            ],
            "head": self.teacher.head_weight() @ p_head,
            **own,
        }

    def loss(
        self, ids, labels, weights=None, num_labels=None, share=1.0, documents=None, temperature=None
    ) -> dict[str, Tensor]:
        """Every loss of ids [B, T] against labels [B, T], already shifted (-100: no label), without a host
        sync.

        weights, documents: see Llama.loss. temperature: in place of kl_temperature.
        Returns {"loss", "lm", "kl", "clone", "terms", "token_lm"}: the optimised total; CE; KL at the
        temperature without T²; the sum of the clone losses, unweighted; each of them [layers, terms] by
        CloneConfig.terms(). At temperature 1 also "teacher_lm".
        """
        clone, teacher = self.clone, self.teacher
        student = weights.weights if isinstance(weights, Held) else weights or self()
        names = clone.terms() if clone.clone_weight else []
        positions, mask = documents or (torch.arange(ids.shape[1], device=ids.device), None)
        rope = rope_table(self.config, positions)
        x_t = F.embedding(ids, teacher.embedding).to(teacher.dtype)
        x_s = x_t @ student["embedding_projection"]
        terms = x_t.new_zeros((len(teacher.layers), len(names)), dtype=torch.float32)
        rows = []
        for i, (layer, weights) in enumerate(zip(teacher.layers, student["layers"], strict=True)):
            wanted = [] if i in clone.clone_skip_layers else names
            arguments = (weights, x_t, x_s, teacher.config, self.config, rope, mask, clone, wanted)
            x_t, x_s, losses = layer(self.run_block, teacher.dtype, *arguments)
            rows.append(torch.stack(losses) if losses else terms[i])
        x_t = rms_norm(x_t, teacher.norm, teacher.config.rms_norm_eps)
        x_s = rms_norm(x_s, student["norm"], self.config.rms_norm_eps)
        temperature = clone.kl_temperature if temperature is None else temperature
        scales = (clone.lm_weight, clone.kl_weight, temperature, num_labels, share)
        teacher_head = (x_t, teacher.head_weight())
        result = head_loss(x_s, student["head"], labels, teacher_head, *scales, self.chunk_loss)
        result["terms"] = torch.stack(rows) * share * (self.term_scale if names else 1.0)
        result["clone"] = result["terms"].sum()
        result["loss"] = result["loss"] + clone.clone_weight * result["clone"]
        return result

    def effective_ranks(self, ids: Tensor, weights: dict) -> dict[str, list[float]]:
        """Effective ranks of the residual streams after the first, two inner and the last layer: exp of the
        entropy of the singular values of [B · T, D], normalised to sum 1 (Roy & Vetterli, 2007)."""

        def effective_rank(x: Tensor) -> float:
            # The singular values are the roots of the Gram matrix's eigenvalues, and that is only D x D.
            tokens = x.flatten(0, 1).double()
            p = torch.linalg.eigvalsh(tokens.T @ tokens).clamp(min=0).sqrt()
            p = p / p.sum()
            return torch.special.entr(p).sum().exp().item()

        teacher, last = self.teacher, len(self.layers) - 1
        rope = rope_table(self.config, torch.arange(ids.shape[1], device=ids.device))
        x_t = F.embedding(ids, teacher.embedding).to(teacher.dtype)
        x_s, ranks = x_t @ weights["embedding_projection"], {"rank_student": [], "rank_teacher": []}
        for i, (layer, own) in enumerate(zip(teacher.layers, weights["layers"], strict=True)):
            arguments = (own, x_t, x_s, teacher.config, self.config, rope, None, self.clone, [])
            x_t, x_s, _ = layer(clone_block, teacher.dtype, *arguments)
            if i in {0, last // 3, 2 * last // 3, last}:
                for name, x in (("rank_student", x_s), ("rank_teacher", x_t)):
                    ranks[name].append(effective_rank(x))
        return ranks

    def logits(self, ids: Tensor) -> Tensor:
        """The student's logits [B, T, V], float32, by its composed weights."""
        student, dtype = self(), self.teacher.dtype
        rope = rope_table(self.config, torch.arange(ids.shape[1], device=ids.device))
        x = F.embedding(ids, self.teacher.embedding).to(dtype) @ student["embedding_projection"]
        for teacher, weights in zip(self.teacher.layers, student["layers"], strict=True):
            x, _ = block(x, teacher.weights(dtype) | weights, self.config, rope)
        return (rms_norm(x, student["norm"], self.config.rms_norm_eps) @ student["head"].T).float()

    @torch.no_grad()
    def merge(self) -> Llama:
        """The student as an ordinary Llama, composed in float32."""
        with torch.device("meta"):
            student = Llama(self.config)
        embedding = self.teacher.embedding.float()
        state = {"embedding": embedding @ self.embedding_projection, "norm": self.norm.clone()}
        if not self.config.tie_word_embeddings:
            head = embedding if self.teacher.head is None else self.teacher.head.float()
            p_head = self.embedding_projection if self.head_projection is None else self.head_projection
            state["head"] = head @ p_head
        for i, (layer, teacher) in enumerate(zip(self.layers, self.teacher.layers, strict=True)):
            weights = teacher.weights(torch.float32)
            weights |= layer.compose(weights, torch.float32)
            state |= {f"layers.{i}.{name}": weights[name].clone() for name in self.config.layer_shapes()}
        student.load_state_dict(state, strict=True, assign=True)
        return student


def flops(model: Llama | LowRankClone, tokens: int, seq_len: int) -> dict[str, float]:
    """Floating-point operations of a training step on `tokens` tokens in blocks of seq_len, by part.

    Matrix products only, a multiply and an add each; causal attention at half of its square. A trained model
    counts three times its forward pass (the gradients of inputs and of weights), a frozen one once;
    composing the student counts twice (the weights, and the gradients of the projections).
    """

    def forward(config, head):
        matrices = sum(math.prod(shape) for shape in config.layer_shapes().values() if len(shape) == 2)
        attention = 2 * config.num_attention_heads * config.head_dim * (seq_len + 1)
        layers = config.num_hidden_layers * (2 * matrices + attention)
        return tokens * (2 * config.hidden_size * config.vocab_size if head else layers)

    if isinstance(model, Llama):
        return {"model": 3 * forward(model.config, False), "head": 3 * forward(model.config, True)}
    big, small, clone = model.teacher.config, model.config, model.clone
    d_t, d_s = big.hidden_size, small.hidden_size
    shapes = big.layer_shapes()
    composed = big.num_hidden_layers * sum(math.prod(shapes[name]) for name in (*READS, *WRITES))
    losses = 0
    for name in clone.terms() if clone.clone_weight else ():
        space = {"attn_out": clone.clone_attn_out, "mlp_out": clone.clone_mlp_out}.get(name)
        if space == "student":
            losses += 2 * 2 * d_t * d_s  # the teacher's output times P, and P's gradient
        elif space == "teacher":
            # and the input's gradient
            losses += 2 * 2 * math.prod(shapes["o" if name == "attn_out" else "down"])
        elif name in ("attn_in", "mlp_in"):
            losses += 3 * 2 * d_t * d_s
    return {
        "teacher": forward(big, False),
        "compose": 2 * 2 * d_s * (composed + big.vocab_size * d_t),
        "student": 3 * forward(small, False) + 2 * 2 * tokens * d_t * d_s,
        "clone losses": tokens * (big.num_hidden_layers - len(clone.clone_skip_layers)) * losses,
        "head": forward(big, True) + 3 * forward(small, True),
    }


# ---- files: Hugging Face directories and checkpoints


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_config(path: str | Path) -> ModelConfig:
    """The config of a Hugging Face directory; ValueError when there is none or it is not supported."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; get a model with: hf download NAME --local-dir {path}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; a model is a Hugging Face directory")
    return ModelConfig.from_hf(read_json(path / "config.json"), str(path / "config.json"))


def weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = [path / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            why = f", but {index.name} names it" if len(names) > 1 else ""
            raise ValueError(f"{file} does not exist{why}")
    return files


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


def read_tensors(
    files: list[Path], expected: dict[str, tuple[int, ...]], ignored=(), dtype=None
) -> dict[str, Tensor]:
    """The tensors of safetensors files, which must have exactly the expected names and shapes; `ignored` may
    be there.

    ValueError names what is missing, unexpected or misshapen, before any tensor is read.
    """
    found = tensor_slices(files)
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {n}" for n in found if n not in expected and not n.endswith(tuple(ignored))]
    for name, shape in expected.items():
        if name in found and found[name][1] != tuple(shape):
            problems.append(f"{name} is {list(found[name][1])}, config.json says {list(shape)}")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{files[0].parent}: weights do not fit: {'; '.join(problems[:6])}{more}")
    return {name: found[name][0].get_tensor(name).to(dtype) for name in expected}


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama from a Hugging Face directory, its weights in `dtype`; strict, see read_tensors."""
    path, config = Path(path), read_config(path)
    names = config.weight_names()
    ignored = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tie_word_embeddings else ())
    expected = {name: shape for name, (_, shape) in names.items()}
    tensors = read_tensors(weight_files(path), expected, ignored, dtype)
    with torch.device("meta"):
        model = Llama(config, dtype)
    state = {names[name][0]: tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def save_model(
    model: Llama, path: Path, dtype: torch.dtype, tokenizer: str | Path | None, max_shard_bytes=5 * 10**9,
    state: dict[str, Tensor] | None = None,
):  # fmt: skip
    """Writes a Hugging Face directory for transformers 4 and 5, with `tokenizer`'s files.

    state: the model's state_dict, whole, where its own is sharded.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config.to_hf(dtype), indent=2) + "\n")
    state = model.state_dict() if state is None else state
    shards, size = [{}], 0
    for name, (ours, _) in model.config.weight_names().items():
        tensor = state[ours].to(dtype).contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, path / file, metadata={"format": "pt"})
    generation = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    source = Path(tokenizer) if tokenizer else path
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if source != path and (source / name).is_file():
            (path / name).write_bytes((source / name).read_bytes())


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


def save_clone(
    clone: LowRankClone, path: Path, teacher: str, tokenizer: str, tensors=None, teacher_fingerprint=None
) -> None:
    """Writes the trained tensors, and in config.json everything else needed to rebuild the clone.

    tensors, teacher_fingerprint: clone.trained() and the teacher's fingerprint, where the clone is sharded.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = clone.trained() if tensors is None else tensors
    tensors = {name: p.detach().float().contiguous() for name, p in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "low_rank_clone",
        "teacher": teacher,
        "teacher_absolute": str(Path(teacher).resolve()),
        "teacher_fingerprint": teacher_fingerprint or fingerprint(clone.teacher),
        "tokenizer": tokenizer,
        "clone": dataclasses.asdict(clone.clone),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def clone_directories(path: Path, teacher: str | None = None) -> tuple[str, str]:
    """Where the teacher and the tokenizer of a clone are now; teacher: its directory, where it has moved."""
    config = read_json(path / "config.json")
    if teacher is None:
        teacher = next((t for t in (config["teacher"], config["teacher_absolute"]) if Path(t).is_dir()), None)
        if teacher is None:
            was = config["teacher"]
            raise ValueError(f"{path}: its teacher {was} is not there; say where with --teacher=DIR")
    of_its_own = config["tokenizer"] != config["teacher"] and Path(config["tokenizer"]).is_dir()
    return teacher, config["tokenizer"] if of_its_own else teacher


def load_clone(path: str | Path, dtype=torch.float32, teacher: str | None = None) -> LowRankClone:
    """A clone from its checkpoint; teacher: where its directory is now. Refuses another teacher."""
    path = Path(path)
    config, (teacher, _) = read_json(path / "config.json"), clone_directories(path, teacher)
    model = load_model(teacher, dtype)
    if fingerprint(model) != config["teacher_fingerprint"]:
        raise ValueError(f"{path}: {teacher} is not the teacher it was trained with (the weights differ)")
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in config["clone"].items()}
    with torch.device("meta"):
        clone = LowRankClone(model, **options)
    expected = {name: tuple(p.shape) for name, p in clone.trained().items()}
    tensors = read_tensors([path / "model.safetensors"], expected, dtype=torch.float32)
    frozen = {f"teacher.{name}": weight for name, weight in model.state_dict().items()}
    clone.load_state_dict(tensors | frozen, assign=True)
    return clone


def load_checkpoint(path: Path, teacher: str | None = None) -> Llama | LowRankClone:
    """The model of a clone's checkpoint or of a Hugging Face directory."""
    return load_clone(path, teacher=teacher) if is_clone(path) else load_model(path)


def tokenizer_directory(path: Path, teacher: str | None = None) -> str:
    """Where the tokenizer of a clone's checkpoint (or Hugging Face directory) is now."""
    return clone_directories(path, teacher)[1] if is_clone(path) else str(path)


def is_clone(path: Path) -> bool:
    return read_json(path / "config.json").get("model_type") == "low_rank_clone"


def checkpoints(out_dir: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first; a directory has this name only when it is whole."""
    return sorted(path for path in Path(out_dir).glob("step_*") if path.name[5:].isdigit())


def resolve(path: str | Path) -> Path:
    """A Hugging Face directory or a checkpoint as it is; of an out_dir, its latest checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a Hugging Face directory, a checkpoint or an out_dir")
    if (path / "config.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ValueError(f"{path} has neither a config.json nor a checkpoint (step_*)")
    return found[-1]
