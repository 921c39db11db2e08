"""Mathematics: the Llama family and its low-rank clone.

    teacher = convert.load_model("models/Llama-3.2-3B-Instruct")     # a Hugging Face directory -> Llama
    student = Student(shape, teacher, student_config, loss_config)   # what trains, beside its frozen teacher
    made = student.make()                                            # its weights, once a step
    losses = student.loss(ids, labels, made)                         # {"loss", "lm", "kl", "clone", "terms"}
    llama = student.merge()                                          # an ordinary, smaller Llama

Method: Low-Rank Clone, arXiv 2505.12781. The student has the teacher's layers, heads and FFN width but a
narrower residual stream, d_S < d_T. With y = x W^T and projections P [d_T, d_S], its weights are W P where a
weight reads the stream (q, k, v, gate, up, embedding, head) and P^T W where it writes to it (o, down). Past
the paper it may have weights of its own in their place, and fewer layers and neurons.

In reading order: the shape of a model, one layer (`block`), a plain model, the loss of a chunk of tokens, the
clone losses, what trains (`StudentWeights`), the step's loss (`Student`), how it starts. Shapes: B batch,
T tokens, D hidden_size, H heads, G key/value heads, F intermediate_size, V vocabulary.
"""

import dataclasses
import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:  # optional, on CUDA, for documents kept apart: where it is not installed, PyTorch's own kernel does it
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


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
    no_rope_layers: tuple[int, ...]  # of each layer, 1 where it has rotary embeddings (the name is theirs)
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | list | None
    hf: dict = dataclasses.field(compare=False, repr=False)  # the whole file, from which an export starts

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the weights of one layer."""
        d = self.hidden_size
        f = self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        shapes = {"input_norm": (d,), "q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)}
        if self.qkv_bias:
            shapes |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
        if self.o_bias:
            shapes["o_bias"] = (d,)
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        return shapes | {"post_norm": (d,), "gate": (f, d), "up": (f, d), "down": (d, f)}


# ---- one layer, as a function of its weights


def block(x: Tensor, w: dict[str, Tensor], config: ModelConfig, context: tuple, cache=None):
    """One Llama layer, x [B, T, D] -> (x [B, T, D], activations): the one definition of a layer, for the
    teacher, the composed student, the merged student and cached decoding.

    w: the layer's weights by the names of layer_shapes. context: (rope, mask) of layer_contexts.
    cache: (keys [B, G, L, head_dim], values, start); this call writes positions start .. start + T and
    attends to all before. activations: q, k, v, gate, up before RoPE and nonlinearity; attn_out and mlp_out
    as added to the stream; attended [B, T, H·head_dim], which o reads; attn_in and mlp_in, the normed inputs.
    """
    rope, mask = context
    a = {"attn_in": rms_norm(x, w["input_norm"], config.rms_norm_eps)}
    for name in ("q", "k", "v"):
        a[name] = F.linear(a["attn_in"], w[name], w.get(f"{name}_bias"))
    # [B, T, heads · head_dim] -> [B, heads, T, head_dim]
    q, k, v = (a[name].unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for name in ("q", "k", "v"))
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, w["k_norm"], config.rms_norm_eps)
    if rope is not None:
        q = rotate(q, rope)
        k = rotate(k, rope)
    if cache is not None:
        keys, values, start = cache
        end = start + q.shape[2]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        k = keys[:, :, :end]
        v = values[:, :, :end]

    a["attended"] = attention(q, k, v, mask)
    a["attn_out"] = F.linear(a["attended"], w["o"], w.get("o_bias"))
    x = x + a["attn_out"]

    a["mlp_in"] = rms_norm(x, w["post_norm"], config.rms_norm_eps)
    a["gate"] = F.linear(a["mlp_in"], w["gate"])
    a["up"] = F.linear(a["mlp_in"], w["up"])
    a["mlp_out"] = gated_linear(a["gate"], a["up"], w["down"])
    return x + a["mlp_out"], a


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, float32 inside whatever x's dtype."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def layer_contexts(config: ModelConfig, positions: Tensor, mask=None) -> list[tuple]:
    """(rope, mask) of every layer, for `block`: the one place that knows what differs by layer.

    positions: of the tokens, as rope_table takes them. mask: see attention. rope is None in layers without.
    """
    rope = rope_table(config, positions)
    return [(rope if has_rope else None, mask) for has_rope in config.no_rope_layers]


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, head_dim/2], float32, of positions [..., T]; scaled as transformers does."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Wavelengths beyond the original context are divided by factor, short ones kept, others blended.
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = blend * frequencies + (1 - blend) * frequencies / scaling["factor"]
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, T, head_dim] by cos, sin [T, head_dim/2] or [B, 1, T, head_dim/2]."""
    cos, sin = rope
    halves = x.float().unflatten(-1, (2, -1))  # [B, H, T, 2, head_dim/2]
    turned = halves.flip(-2) * torch.stack((-sin, sin), dim=-2)
    return torch.addcmul(turned, halves, cos[..., None, :]).flatten(-2).to(x.dtype)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A numpy array on the device, the copy not waited for."""
    tensor = torch.as_tensor(np.ascontiguousarray(array))  # pinned with gaps it would be copied once more
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    positions = to_device((order - starts)[:, None], device)
    if device.type == "cuda":
        bounds = np.append(np.flatnonzero(begins), documents.size).astype(np.int32)
        return positions, (to_device(bounds, device), length)
    mask = (starts[:, :, None] == starts[:, None, :]) & (order[:, None] >= order)
    return positions, to_device(mask[:, None], device)


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
            attended = varlen_attention(*flat, *lengths)
        return attended.unflatten(0, (q.shape[0], q.shape[2])).flatten(2)
    causal = mask is None and q.shape[2] > 1
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def varlen_attention(q, k, v, *lengths) -> Tensor:
    """Causal attention of documents in a row; q [B·T, H, head_dim], k and v [B·T, G, head_dim]."""
    # Its module takes half a second to import, and only this needs it.
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1, 0)}
    # PyTorch 2.11 takes grouped heads as they are; later versions want to be told of them.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *lengths, **options)


class GatedLinear(torch.autograd.Function):
    """(silu(gate) · up) W^T of gate, up [B, T, F] and W [D, F]; keeps only these for backward.

    Autograd would keep silu(gate) and the product too, [B, T, F] each in every layer. tools/README.md says
    what that and MeanSquaredError save.
    """

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
            # This way round, since D < F: CPU products are faster with few columns than with few rows.
            weight_grad = ((silu * up).flatten(0, -2).T @ grad.flatten(0, -2)).T
        grad = grad @ weight
        # silu' = sigmoid - silu · sigmoid + silu
        gate_grad = sigmoid.addcmul_(silu, sigmoid, value=-1).add_(silu).mul_(up).mul_(grad)
        return gate_grad, silu.mul_(grad), weight_grad


gated_linear = GatedLinear.apply


# ---- a plain model


class Llama(nn.Module):
    """A Llama, Mistral, Qwen2, Qwen3 or SmolLM3 LM. It computes in the dtype of its weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.run_block = block  # sample.py may compile it
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            shapes = config.layer_shapes()
            self.layers.append(nn.ParameterDict({name: torch.empty(shapes[name]) for name in shapes}))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embedding))

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def weights(self) -> dict:
        """{"layers": [{name: weight}], "embedding", "norm", and "head" where it is not the embedding}."""
        layers = [dict(layer.items()) for layer in self.layers]
        weights = {"layers": layers, "embedding": self.embedding, "norm": self.norm}
        return weights if self.head is None else weights | {"head": self.head}

    def forward(self, ids: Tensor, **options) -> Tensor:
        """ids [B, T] -> logits [B, T, V], float32; options: see hidden_states."""
        weights = self.weights()
        options = {"layer": self.run_block} | options
        return F.linear(hidden_states(weights, ids, self.config, **options), head_of(weights)).float()


def head_of(weights: dict) -> Tensor:
    return weights["head"] if "head" in weights else weights["embedding"]


def hidden_states(
    weights: dict, ids: Tensor, config: ModelConfig, contexts=None, caches=None, layer=block, look=None
) -> Tensor:
    """Final normed hidden states [B, T, D] of ids [B, T] by a plain model's weights, see Llama.weights.

    contexts: layer_contexts', where the tokens are not one document from its start on. caches: one (keys,
    values, start) a layer. layer: block, or it compiled. look: is called with (i, x, activations) of every
    layer, x [B, T, D] what comes out of it; before them with i = -1 and the embedding, which has none.
    """
    contexts = contexts or layer_contexts(config, torch.arange(ids.shape[1], device=ids.device))
    x = F.embedding(ids, weights["embedding"])
    if look:
        look(-1, x, {})
    for i, layer_weights in enumerate(weights["layers"]):
        x, activations = layer(x, layer_weights, config, contexts[i], caches[i] if caches else None)
        if look:
            look(i, x, activations)
    return rms_norm(x, weights["norm"], config.rms_norm_eps)


# ---- the loss of a chunk of tokens, and of all of them


def chunk_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, temperature: float):
    """What each token of a chunk costs: logits [n, V], float32, and labels [n] -> {name: [n]}.

    "lm" is the cross entropy, 0 where the label is -100; "kl" is KL(teacher ‖ student) at the temperature;
    "teacher_lm", only at temperature 1, the teacher's cross entropy; "agreement", only under no_grad, which
    is how an evaluation is told everywhere, 1 where both have the same likeliest token.
    Any differentiable function may stand here: torch.func has its gradient, to which an autograd.Function
    needs a setup_context.
    """
    labelled = labels != -100
    label = labels.clamp(min=0)[:, None]

    def cross_entropy(z: Tensor, log_sum: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # then a gather's gradient is a pass of its own, over zeros
            is_label = torch.arange(z.shape[-1], device=z.device) == label
            of_label = torch.where(is_label, z, 0.0).sum(-1)
        else:
            of_label = z.gather(-1, label)[:, 0]
        return (log_sum - of_label) * labelled

    *_, log_sum = log_sum_exp(logits)
    costs = {"lm": cross_entropy(logits, log_sum)}
    if teacher_logits is None:
        return costs
    z = logits
    if temperature != 1.0:
        z = logits / temperature
        teacher_logits = teacher_logits / temperature
        *_, log_sum = log_sum_exp(z)
    # KL = Σ p (log p - log q): p = exponentials / total, log p = teacher_logits - teacher_log_sum and
    # log q = z - log_sum
    exponentials, total, teacher_log_sum = log_sum_exp(teacher_logits)
    expected_difference = (exponentials * (z - teacher_logits)).sum(-1) / total[:, 0]
    costs["kl"] = log_sum - teacher_log_sum - expected_difference
    if temperature == 1.0:
        costs["teacher_lm"] = cross_entropy(teacher_logits, teacher_log_sum)
    if not torch.is_grad_enabled():
        costs["agreement"] = (logits.argmax(-1) == teacher_logits.argmax(-1)).float()
    return costs


def log_sum_exp(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(z - max z) [n, V], their sum [n, 1], log Σ exp z [n]) of z [n, V].

    The last two are float64, since a KL at a high temperature is a small difference of such logarithms.
    """
    top = z.detach().amax(-1, keepdim=True)
    exponentials = (z - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    # A GPU's sum is a tree. A compiled sum on a CPU adds value by value: here is what it was rounded by.
    if z.device.type == "cpu":
        parts = [part.sum(-1, keepdim=True) for part in exponentials.detach().chunk(16, -1)]
        exact = torch.cat(parts, -1).sum(-1, keepdim=True, dtype=torch.float64)
        total = total + (exact - total).detach()
    return exponentials, total, (total.double().log() + top)[:, 0]


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
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product(a, b)


def run_chunk(logits, labels, teacher_logits, temperature: float, weights: list | None, dtype: torch.dtype):
    """(chunk_loss's costs, the gradient [n, V] by logits of their sums times `weights`, in dtype).

    weights: of "lm" and "kl", as tensors, since a compiled function is compiled anew for another number; None
    in an evaluation, which has no gradient. Both in one function: compiled, one kernel has both.
    """
    if weights is None:
        return chunk_loss(logits, labels, teacher_logits, temperature), None

    def weighted(z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        costs = chunk_loss(z, labels, teacher_logits, temperature)
        loss = weights[0] * costs["lm"].sum()
        if "kl" in costs:
            loss = loss + weights[1] * costs["kl"].sum()
        return loss, costs

    grad, costs = torch.func.grad(weighted, has_aux=True)(logits)
    return costs, grad.to(dtype)


class ChunkedLoss(torch.autograd.Function):
    """lm_scale · Σ lm + kl_scale · T² · Σ kl of chunk_loss, the logits of one chunk of tokens at a time.

    hidden [N, D], head [V, D], labels [N] (-100: no label), teacher_hidden [N, D_T] and teacher_head [V, D_T]
    or None. The gradients of hidden and head are formed in the forward pass, chunk by chunk, so that backward
    only scales them: O(chunk · V) memory and no logits computed twice. Returns (loss, the tokens' lm [N], kl
    [N], teacher_lm [N], agreement [N]); the loss alone is differentiable, once.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher_hidden, teacher_head, scales, chunk, run):
        lm_scale, kl_scale, temperature = scales
        kl_scale = kl_scale * temperature**2
        tokens = hidden.shape[0]
        # float32, or float64 to check gradients in
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        names = ("lm", "kl", "teacher_lm", "agreement")
        costs = {name: hidden.new_zeros(tokens, dtype=sum_dtype) for name in names}
        weights = None
        if any(ctx.needs_input_grad):
            # Filled on the device: a number that is copied there makes the CPU wait for a GPU.
            weights = [hidden.new_zeros((), dtype=sum_dtype) + scale for scale in (lm_scale, kl_scale)]
            hidden_grad = torch.empty_like(hidden)
            head_grad = torch.zeros_like(head, dtype=sum_dtype)
        # On a CPU the vocabulary is the logits' outer dimension: their products are up to a third faster.
        outer = hidden.device.type == "cpu"

        def logits(x: Tensor, weight: Tensor) -> Tensor:  # [chunk, V]
            return product(weight, x.T).T if outer else product(x, weight.T)

        def of_chunk(rows: slice) -> None:
            """A function, so that the logits of a chunk are freed before the next one's are made."""
            teacher_z = None if teacher_hidden is None else logits(teacher_hidden[rows], teacher_head)
            z = logits(hidden[rows], head)
            chunk_costs, grad = run(z, labels[rows], teacher_z, temperature, weights, hidden.dtype)
            for name, values in chunk_costs.items():
                costs[name][rows] = values
            if grad is not None:
                hidden_grad[rows] = grad @ head
                accumulate_product(head_grad, grad.T, hidden[rows])

        for start in range(0, tokens, chunk):
            of_chunk(slice(start, start + chunk))
        ctx.grads = None if weights is None else (hidden_grad, head_grad.to(head.dtype))
        ctx.mark_non_differentiable(*costs.values())
        loss = lm_scale * costs["lm"].sum() + kl_scale * costs["kl"].sum()
        return loss, *costs.values()

    @staticmethod
    def backward(ctx, scale, *_):
        assert ctx.grads is not None, "backward runs once: it gives its buffers away"
        hidden_grad, head_grad = ctx.grads
        ctx.grads = None
        return hidden_grad.mul_(scale), head_grad.mul_(scale), None, None, None, None, None, None


def loss_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk: up to 24 MB of float32 logits a buffer on a CPU, 512 MB on a GPU."""
    if device.type == "cuda":
        return max(128, 2**27 // vocab_size // 128 * 128)
    return max(32, min(512, 6 * 2**20 // vocab_size // 32 * 32))


def head_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor] | None = None,
    lm_weight=1.0, kl_weight=1.0, temperature=1.0, num_labels=None, share=1.0, run=run_chunk,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss of final hidden states [B, T, D] under head [V, D]; teacher: (hidden, head) or None.

    CE is a mean over the labelled tokens, KL over all. Where the batch is a part of a larger one, num_labels
    is the labels in the whole and share this part of its tokens: losses of the parts then add up to the
    whole's. Returns {"loss", "lm", "kl", "teacher_lm", "agreement", "token_lm"}: scalars, and the CE of each
    token [B, T].
    """
    labels = labels.flatten()
    if num_labels is None:
        num_labels = (labels != -100).sum().clamp(min=1)
    tokens = labels.numel()
    teacher_hidden, teacher_head = (None, None) if teacher is None else teacher
    loss, lm, kl, teacher_lm, agreement = ChunkedLoss.apply(
        hidden.flatten(0, 1),
        head,
        labels,
        None if teacher is None else teacher_hidden.flatten(0, 1),
        teacher_head,
        (lm_weight / num_labels, kl_weight * share / tokens, temperature),
        loss_chunk(head.shape[0], head.device),
        run,
    )
    result = {"loss": loss, "lm": lm.sum() / num_labels, "token_lm": lm.view(hidden.shape[:-1])}
    if teacher is not None:
        result["kl"] = kl.sum() * share / tokens
    if teacher is not None and not torch.is_grad_enabled():
        result["agreement"] = agreement.sum() * share / tokens
    if teacher is not None and temperature == 1.0:
        result["teacher_lm"] = teacher_lm.sum() / num_labels
    return result


# ---- the clone losses


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """What a student is, besides its teacher and its trained tensors; saved with it.

    share_qkv, share_gate_up: one projection for q, k, v (gate, up), whose clone losses become one loss on
    their input (paper, Table 7). tie_head_projection: one projection for embedding and LM head. train: its
    weights are made by "projections", as in the paper, or its own ("weights"). student_layers: the teacher's
    layers that it has, by index, or None for all. student_intermediate_size: FFN neurons that it has of the
    teacher's, or None for all.
    """

    student_hidden_size: int
    share_qkv: bool
    share_gate_up: bool
    tie_head_projection: bool
    student_rms_norm_eps: float
    # Not in the checkpoints of before there was a choice.
    train: str = "projections"
    student_layers: tuple[int, ...] | None = None
    student_intermediate_size: int | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How a student is trained: lm_weight · CE + kl_weight · T² · KL + clone_weight · Σ clone losses.

    clone_attn_out, clone_mlp_out: compare in the "student"'s space (paper) or the "teacher"'s (attn_out in
    the authors' code). clone_scale: "teacher" divides each term by the mean square of the teacher's
    activation, so that no layer drowns the others. clone_skip: terms to leave out, by name.
    """

    lm_weight: float
    kl_weight: float
    kl_temperature: float
    clone_weight: float
    clone_attn_out: str
    clone_mlp_out: str
    clone_scale: str
    clone_skip: tuple
    clone_skip_layers: tuple


def clone_losses(
    s: dict[str, Tensor], t: dict[str, Tensor], p: dict[str, Tensor], teacher: dict[str, Tensor],
    student_config: StudentConfig, loss_config: LossConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """The clone losses of a layer, {name: scalar}: what training asks to be equal in student and teacher.

    s, t: activations of student and teacher, by block's names. p: the layer's projections [d_T, d_S], by the
    weight they project. teacher: the teacher's weights of the layer.

    A new term is a line here, and clone_skip knows its name. A pair is compared by its mean squared error,
    which clone_scale="teacher" divides by the mean square of the teacher's activation of that name, if block
    has one. A number is what it is, with a weight of its own:

        pairs["attended"] = (s["attended"], t["attended"])
        numbers["cosine"] = 0.5 * (1 - F.cosine_similarity(s["gate"], t["gate"], dim=-1)).mean()

    Returns the losses of pairs, and the numbers.
    """
    skip = loss_config.clone_skip
    pairs = {}  # (student's, teacher's) or (student's, teacher's, the projection of the teacher's)
    numbers = {}
    if not student_config.share_qkv:
        pairs |= {name: (s[name], t[name]) for name in ("q", "k", "v")}
    elif "attn_in" not in skip:
        pairs["attn_in"] = (F.linear(s["attn_in"], p["q"]), t["attn_in"])
    if loss_config.clone_attn_out == "student":
        pairs["attn_out"] = (s["attn_out"], t["attn_out"], p.get("o"))
    elif "attn_out" not in skip:
        pairs["attn_out"] = (F.linear(s["attended"], teacher["o"], teacher.get("o_bias")), t["attn_out"])
    if not student_config.share_gate_up:
        pairs |= {name: (s[name], t[name]) for name in ("gate", "up")}
    elif "mlp_in" not in skip:
        pairs["mlp_in"] = (F.linear(s["mlp_in"], p["gate"]), t["mlp_in"])
    if loss_config.clone_mlp_out == "student":
        pairs["mlp_out"] = (s["mlp_out"], t["mlp_out"], p.get("down"))
    elif "mlp_out" not in skip:
        pairs["mlp_out"] = (gated_linear(s["gate"], s["up"], teacher["down"]), t["mlp_out"])
    assert not pairs.keys() & numbers.keys(), "a pair and a number of one name"
    errors = {name: mse(*pair) for name, pair in pairs.items() if name not in skip}
    return errors, {name: number for name, number in numbers.items() if name not in skip}


def clone_terms(student_config: StudentConfig, loss_config: LossConfig) -> tuple[str, ...]:
    """The names of clone_losses' terms, skipped ones too: what it makes of a layer with one neuron."""
    activations = defaultdict(lambda: torch.ones(1, 1, 1))
    weights = defaultdict(lambda: torch.ones(1, 1))
    whole = dataclasses.replace(loss_config, clone_skip=())
    errors, numbers = clone_losses(activations, activations, weights, weights, student_config, whole)
    return (*errors, *numbers)


class MeanSquaredError(torch.autograd.Function):
    """Mean of (student - teacher P)² in float32; P [d_T, d_S] or None, and then of (student - teacher)².

    student [B, T, d_S], teacher [B, T, d_T] without gradient. Keeps the difference and P's gradient, formed
    here, for backward, and nothing of the teacher, whose activations die with their layer.
    """

    @staticmethod
    def forward(ctx, student, teacher, projection):
        difference = student - (teacher if projection is None else teacher @ projection)
        ctx.projection_grad = None
        if ctx.needs_input_grad[2]:
            ctx.projection_grad = teacher.flatten(0, 1).T @ difference.flatten(0, 1)
        ctx.save_for_backward(difference)
        sum_dtype = torch.promote_types(difference.dtype, torch.float32)
        # On a CPU a norm adds up value by value, and is off by 6e-5 after two million; a mean adds pairwise.
        # On a GPU a norm is as exact, and takes no memory for the squares.
        if difference.device.type == "cpu":
            return difference.to(sum_dtype).square().mean()
        return torch.linalg.vector_norm(difference, dtype=sum_dtype).square() / difference.numel()

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        scale = (grad * (2 / difference.numel())).to(difference.dtype)
        projection_grad = None if ctx.projection_grad is None else ctx.projection_grad * -scale
        return difference.mul_(scale), None, projection_grad  # in place: a second backward is refused


def mse(student: Tensor, teacher: Tensor, projection: Tensor | None = None) -> Tensor:
    return MeanSquaredError.apply(student, teacher, projection)


# ---- what trains

READS = ("q", "k", "v", "gate", "up")  # weights W of which a clone has W P
WRITES = ("o", "down")  # weights W of which it has P^T W


def student_shape(teacher: ModelConfig, student: StudentConfig) -> ModelConfig:
    """The shape of a student that is made of the teacher's weights; ValueError where it does not fit them."""
    d_t = teacher.hidden_size
    d_s = student.student_hidden_size
    f = teacher.intermediate_size
    f_s = f if student.student_intermediate_size is None else student.student_intermediate_size
    layers = student.student_layers
    if layers is None:
        layers = tuple(range(teacher.num_hidden_layers))
    heads = teacher.num_attention_heads
    if not 0 < d_s <= d_t:
        raise ValueError(f"student_hidden_size is {d_s}; it must be between 1 and {d_t}, the teacher's")
    if teacher.model_type == "llama" and d_s % heads:
        low = d_s // heads * heads
        near = " or ".join(str(size) for size in (low, low + heads) if 0 < size <= d_t)
        raise ValueError(
            f"student_hidden_size is {d_s}; a llama needs a multiple of its {heads} heads: {near}"
        )
    if not 0 < f_s <= f:
        raise ValueError(f"student_intermediate_size is {f_s}; it must be between 1 and {f}, the teacher's")
    if not layers or list(layers) != sorted(set(layers) & set(range(teacher.num_hidden_layers))):
        last = teacher.num_hidden_layers - 1
        raise ValueError(f"student_layers is {layers}; it must be rising indices of layers, from 0 to {last}")
    return dataclasses.replace(
        teacher,
        hidden_size=d_s,
        intermediate_size=f_s,
        num_hidden_layers=len(layers),
        no_rope_layers=tuple(teacher.no_rope_layers[k] for k in layers),
        rms_norm_eps=student.student_rms_norm_eps,
        tie_word_embeddings=teacher.tie_word_embeddings and student.tie_head_projection,
    )


def spread_layers(count: int, layers: int) -> tuple[int, ...]:
    """`count` of a teacher's layers, evenly spaced, the first and the last among them."""
    if not 1 < count <= layers:
        raise ValueError(f"student_layers is {count}; as a number it must be between 2 and {layers}")
    return tuple(round(i * (layers - 1) / (count - 1)) for i in range(count))


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight to compute with. What trains is copied, also where it has the dtype: FSDP frees a parameter
    that it has gathered as soon as the module's forward() ends."""
    return weight.to(dtype, copy=weight.requires_grad)


class Projected(torch.autograd.Function):
    """W P, or P^T W where the weight writes to the stream, of a frozen W and P [d_T, d_S], in W's dtype.

    P's gradient is formed in its own dtype, not rounded to W's and cast back: that is two copies less.
    """

    @staticmethod
    def forward(ctx, weight, projection, writes):
        ctx.save_for_backward(weight)
        ctx.dtype = projection.dtype
        ctx.writes = writes
        p = projection.to(weight.dtype)
        return p.T @ weight if writes else weight @ p

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        factors = (weight, grad.T) if ctx.writes else (weight.T, grad)
        multiply = torch.mm if ctx.dtype == grad.dtype else product
        return None, multiply(*factors), None


project = Projected.apply


class StudentLayer(nn.Module):
    """What trains of one layer of the student; forward() makes the layer's weights of it.

    With train="projections": projections P [d_T, d_S] and norms [d_S]; the weights are W P and P^T W of the
    teacher's W. Else, also without a teacher: all weights, and of the projections those that clone losses
    read.
    """

    def __init__(
        self, config: ModelConfig, teacher_size: int, student: StudentConfig, losses: LossConfig | None
    ):
        super().__init__()
        self.composes = student.train == "projections"
        self.compared = projections_compared(student, losses)
        self.parameter_of = {name: name for name in (*READS, *WRITES)}  # the projection of each weight
        if student.share_qkv:
            self.parameter_of |= dict.fromkeys(("q", "k", "v"), "qkv")
        if student.share_gate_up:
            self.parameter_of |= dict.fromkeys(("gate", "up"), "gate_up")
        projected = (*READS, *WRITES) if self.composes else self.compared
        names = dict.fromkeys(self.parameter_of[name] for name in projected)
        self.projections = nn.ParameterDict(
            {name: torch.empty(teacher_size, config.hidden_size) for name in names}
        )
        shapes = config.layer_shapes()
        self.trained_names = ("input_norm", "post_norm") if self.composes else tuple(shapes)
        for name in self.trained_names:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))
        # Which of the teacher's FFN neurons the student has, where it has not all.
        neurons = None
        if student.student_intermediate_size is not None:
            neurons = torch.arange(student.student_intermediate_size)
        self.register_buffer("neurons", neurons)

    def projection(self, name: str) -> nn.Parameter:
        """The projection of a weight of READS or WRITES."""
        return self.projections[self.parameter_of[name]]

    def forward(self, teacher: nn.ParameterDict | None, dtype: torch.dtype) -> tuple[dict, dict]:
        """(the layer's weights by the names of layer_shapes, the projections that clone losses read by the
        weights they project). teacher: the weights of its layer; not read where the student's are its own."""
        weights = {}
        if self.composes:
            w = {name: weight.to(dtype) for name, weight in teacher.items()}
            w = keep_neurons(w, self.neurons)
            # Biases of q, k and v, and Qwen3's q and k norms, do not touch the stream.
            weights = {name: w[name] for name in w if name[:2] in ("q_", "k_", "v_")}
            weights |= {name: project(w[name], self.projection(name), False) for name in READS}
            weights |= {name: project(w[name], self.projection(name), True) for name in WRITES}
            if "o_bias" in w:
                weights["o_bias"] = w["o_bias"] @ self.projection("o").to(dtype)
        weights |= {name: in_dtype(getattr(self, name), dtype) for name in self.trained_names}
        projections = {name: in_dtype(self.projection(name), dtype) for name in self.compared}
        return weights, projections


def projections_compared(student: StudentConfig, losses: LossConfig | None) -> list[str]:
    """Which projections clone_losses reads, by the weight that they project."""
    if losses is None or not losses.clone_weight:
        return []
    reads = {
        "q": student.share_qkv and "attn_in" not in losses.clone_skip,
        "o": losses.clone_attn_out == "student" and "attn_out" not in losses.clone_skip,
        "gate": student.share_gate_up and "mlp_in" not in losses.clone_skip,
        "down": losses.clone_mlp_out == "student" and "mlp_out" not in losses.clone_skip,
    }
    return [name for name, is_read in reads.items() if is_read]


def keep_neurons(teacher: dict[str, Tensor], neurons: Tensor | None) -> dict[str, Tensor]:
    """A layer's weights with these FFN neurons alone."""
    if neurons is None:
        return teacher
    kept = {"gate": teacher["gate"][neurons], "up": teacher["up"][neurons]}
    return teacher | kept | {"down": teacher["down"][:, neurons]}


class StudentWeights(nn.Module):
    """All that trains of a student. forward() makes its weights, once a step; DDP and FSDP wrap this module.

    What it makes is shared by the passes of a step, and a teacher's activations need not be kept for it.
    """

    def __init__(
        self, config: ModelConfig, teacher_size: int, student: StudentConfig, losses: LossConfig | None
    ):
        super().__init__()
        size = config.hidden_size
        self.composes = student.train == "projections"
        skipped = losses.clone_skip_layers if losses else ()
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            layer_losses = None if i in skipped else losses
            self.layers.append(StudentLayer(config, teacher_size, student, layer_losses))
        self.norm = nn.Parameter(torch.empty(size))
        for name in ("embedding_projection", "head_projection", "embedding", "head"):
            self.register_parameter(name, None)
        if self.composes:
            self.embedding_projection = nn.Parameter(torch.empty(teacher_size, size))
        if self.composes and not student.tie_head_projection:
            self.head_projection = nn.Parameter(torch.empty(teacher_size, size))
        if not self.composes:
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, size))
        if not self.composes and not config.tie_word_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, size))
        # Which of the teacher's layers each is made of.
        self.layer_indices = student.student_layers or tuple(range(config.num_hidden_layers))

    def forward(self, teacher: Llama | None, dtype: torch.dtype) -> tuple[dict, dict]:
        """(weights, projections) in `dtype`: weights as Llama.weights has them, and the projections that the
        loss reads, {"layers": [{name: P}], "embedding": P}.

        A composed student's weights lack "embedding": Student.loss makes it for the tokens of a batch alone.
        """
        weights = {"layers": [], "norm": in_dtype(self.norm, dtype)}
        projections = {"layers": []}
        for layer, k in zip(self.layers, self.layer_indices, strict=True):
            layer_weights, layer_projections = layer(teacher.layers[k] if self.composes else None, dtype)
            weights["layers"].append(layer_weights)
            projections["layers"].append(layer_projections)
        if self.composes:
            p = in_dtype(self.embedding_projection, dtype)
            projections["embedding"] = p
            p_head = self.embedding_projection if self.head_projection is None else self.head_projection
            weights["head"] = project(head_of(teacher.weights()).to(dtype), p_head, False)
        for name in ("embedding", "head"):
            if getattr(self, name) is not None:
                weights[name] = in_dtype(getattr(self, name), dtype)
        return weights, projections


def clone_block(
    x_t: Tensor | None, x_s: Tensor, teacher: tuple | None, student: tuple | None, compare: tuple | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, dict, dict]:  # fmt: skip
    """One layer of teacher and student beside each other, so that a teacher's activation lives only as long
    as its loss: x_t [B, T, d_T], x_s [B, T, d_S] -> (x_t, x_s, clone_losses' pairs and numbers).

    teacher, student: block's (weights, config, context), None where one of the two has no layer here.
    compare: (projections, neurons, StudentConfig, LossConfig), or None: no clone losses here. recompute: keep
    of the student's layer only what the losses need, and run it again in backward; the teacher runs once.
    """
    if teacher is not None:
        with torch.no_grad():
            x_t, t = block(x_t, *teacher)
    if student is not None and recompute:
        x_s, s = checkpoint(block, x_s, *student, use_reentrant=False)
    elif student is not None:
        x_s, s = block(x_s, *student)
    if compare is None:
        return x_t, x_s, {}, {}
    projections, neurons, student_config, loss_config = compare
    teacher_weights = keep_neurons(teacher[0], neurons)
    if neurons is not None:
        t = t | {name: t[name][..., neurons] for name in ("gate", "up")}
    errors, numbers = clone_losses(s, t, projections, teacher_weights, student_config, loss_config)
    return x_t, x_s, errors, numbers


class Student(nn.Module):
    """What a run trains, and its loss: a low-rank clone of a frozen teacher, a student with weights of its
    own beside one, or a plain language model, which has no teacher.

    config: its shape. student, losses: what it is and how it is trained, for one with a teacher. dtype: what
    to compute in; a teacher's weights must have it. Only what is in `trained` has requires_grad.
    """

    def __init__(
        self, config: ModelConfig, teacher: Llama | None = None, student: StudentConfig | None = None,
        losses: LossConfig | None = None, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        teacher_size = config.hidden_size
        self.teacher = None
        self.dtype = dtype
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False)
            self.dtype = teacher.dtype
            teacher_size = teacher.config.hidden_size
        if student is None:  # a plain model
            student = StudentConfig(config.hidden_size, False, False, True, config.rms_norm_eps, "weights")
        self.config = config
        self.student_config = student
        self.loss_config = losses
        self.trained = StudentWeights(config, teacher_size, student, losses)
        self.composes = self.trained.composes
        self.run_block = clone_block  # train.py may compile it
        self.run_chunk = run_chunk  # and this
        self.recompute = "none"  # what runs again in backward: "student", see clone_block, or "both"
        self.mean_squares = {}  # {activation: [layers]} of the teacher, from calibrate

    @property
    def device(self) -> torch.device:
        return self.trained.norm.device

    def make(self, dtype: torch.dtype | None = None) -> tuple[dict, dict]:
        """StudentWeights.forward's (weights, projections), by this process alone."""
        return self.trained(self.teacher, dtype or self.dtype)

    def loss(
        self, ids: Tensor, labels: Tensor, made=None, num_labels=None, share=1.0, documents=None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Every loss of ids [B, T] against labels [B, T], already shifted (-100: no label); no host sync.

        made: make()'s result, where several batches share it. num_labels, share: see head_loss. documents:
        document_layout's result, where the documents of a block do not see each other. Under no_grad it is an
        evaluation, at temperature 1. Returns {"loss", "lm", "token_lm"}: the optimised total, the CE, and
        that of each token [B, T]; with a teacher {"kl", "clone", "terms"} too: KL at the temperature without
        T², the sum of the clone losses, unweighted, and {name: [layers]} of them; at temperature 1 also
        "teacher_lm".
        """
        weights, projections = made or self.make()
        losses = self.loss_config
        positions, mask = documents or (torch.arange(ids.shape[1], device=ids.device), None)
        contexts = layer_contexts(self.config, positions, mask)
        teacher_layers = []
        x_t = None
        if self.teacher:
            teacher_layers = self.teacher.weights()["layers"]
            teacher_contexts = layer_contexts(self.teacher.config, positions, mask)
            x_t = F.embedding(ids, self.teacher.embedding)
        x_s = x_t @ projections["embedding"] if self.composes else F.embedding(ids, weights["embedding"])

        run = self.run_block
        if self.recompute == "both":
            run = functools.partial(checkpoint, run, use_reentrant=False)
        # Every layer that one of the two has, the student's beside the teacher's that it is made of.
        layer_of = {k: j for j, k in enumerate(self.trained.layer_indices)}
        by_layer = []
        for i in range(max(len(teacher_layers), self.trained.layer_indices[-1] + 1)):
            teacher = None
            student = None
            compare = None
            if i < len(teacher_layers):
                teacher = (teacher_layers[i], self.teacher.config, teacher_contexts[i])
            j = layer_of.get(i)
            if j is not None:
                student = (weights["layers"][j], self.config, contexts[j])
            if j is not None and losses and losses.clone_weight and j not in losses.clone_skip_layers:
                neurons = self.trained.layers[j].neurons
                compare = (projections["layers"][j], neurons, self.student_config, losses)
            x_t, x_s, errors, numbers = run(x_t, x_s, teacher, student, compare, self.recompute == "student")
            # A term over its activation's mean square: else the layers with the largest drown the others.
            for name in errors.keys() & self.mean_squares.keys():
                errors[name] = errors[name] / self.mean_squares[name][i]
            if j is not None:
                by_layer.append(errors | numbers)

        # The heads. A plain model has no more than this.
        x_s = rms_norm(x_s, weights["norm"], self.config.rms_norm_eps)
        part = {"num_labels": num_labels, "share": share, "run": self.run_chunk}
        if self.teacher is None:
            return head_loss(x_s, head_of(weights), labels, **part)
        x_t = rms_norm(x_t, self.teacher.norm, self.teacher.config.rms_norm_eps)
        teacher = (x_t, head_of(self.teacher.weights()))
        temperature = losses.kl_temperature if torch.is_grad_enabled() else 1.0
        scales = (losses.lm_weight, losses.kl_weight, temperature)
        result = head_loss(x_s, head_of(weights), labels, teacher, *scales, **part)

        # The clone losses by name; 0 in layers that have none.
        zero = x_t.new_zeros((), dtype=torch.float32)
        names = dict.fromkeys(name for terms in by_layer for name in terms)
        result["terms"] = {
            name: share * torch.stack([terms.get(name, zero) for terms in by_layer]) for name in names
        }
        result["clone"] = sum((values.sum() for values in result["terms"].values()), zero)
        result["loss"] = result["loss"] + losses.clone_weight * result["clone"]
        return result

    def merge(self, dtype: torch.dtype = torch.float32) -> Llama:
        """The student as an ordinary Llama, its weights composed in float32, or in `dtype`."""
        with torch.no_grad():
            weights, projections = self.make(dtype)
            if self.composes:
                weights["embedding"] = self.teacher.embedding.to(dtype) @ projections["embedding"]
        state = {name: weights[name].clone() for name in ("embedding", "norm")}
        if not self.config.tie_word_embeddings:
            state["head"] = weights["head"].clone()
        for i, layer in enumerate(weights["layers"]):
            state |= {f"layers.{i}.{name}": layer[name].clone() for name in self.config.layer_shapes()}
        with torch.device("meta"):
            student = Llama(self.config)
        student.load_state_dict(state, strict=True, assign=True)
        return student

    def forward(self, ids: Tensor) -> Tensor:
        """The student's logits [B, T, V], float32, of ids [B, T]; composed and computed in `dtype`."""
        return self.merge(self.dtype)(ids)

    @torch.no_grad()
    def calibrate(self, blocks: Iterable[Tensor]) -> Tensor:
        """Runs the teacher on blocks of ids, [T] each, for what is to be known of it before training.

        With clone_scale="teacher" it sets mean_squares, by which clone losses are divided: the mean square of
        each activation, the same for every batch and any number of devices. Where the student has fewer FFN
        neurons, it has those that add most energy to the stream. Returns the second moments [d_T, d_T],
        float64, of the residual stream's directions x / |x|, averaged over tokens and over what each layer
        and the head read; their trace is 1.
        """
        config = self.teacher.config
        weights = self.teacher.weights()
        fewer_neurons = self.config.intermediate_size < config.intermediate_size
        count = 0
        squares = {}
        energies = self.teacher.norm.new_zeros(config.num_hidden_layers, config.intermediate_size).float()
        covariance = energies.new_zeros(config.hidden_size, config.hidden_size).double()

        def look(i: int, x: Tensor, activations: dict[str, Tensor]) -> None:
            directions = F.normalize(x[0].float(), dim=-1)
            covariance.add_(directions.T @ directions)
            for name, value in activations.items():
                layers = squares.setdefault(name, energies.new_zeros(config.num_hidden_layers))
                layers[i] += value.float().square().mean()
            if activations and fewer_neurons:
                hidden = F.silu(activations["gate"]) * activations["up"]
                down = weights["layers"][i]["down"]
                energies[i] += hidden.float().square().sum((0, 1)) * down.float().square().sum(0)

        for ids in blocks:
            count += 1
            hidden_states(weights, ids[None], config, look=look)
        if self.loss_config.clone_scale == "teacher":
            self.mean_squares = {name: total / count for name, total in squares.items()}
        for layer, k in zip(self.trained.layers, self.trained.layer_indices, strict=True):
            if layer.neurons is not None:
                layer.neurons.copy_(energies[k].topk(len(layer.neurons)).indices.sort().values)
        return covariance / covariance.trace()


# ---- how a student starts


def init_random(module: nn.Module, seed: int, std: float = 0.02) -> None:
    """N(0, std), as the authors' code and transformers do it; ones for norms, zeros for biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if name.endswith("norm"):
            nn.init.ones_(weight)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
        else:
            weight.data.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def init_student(student: Student, seed: int, init: str, covariance: Tensor | None = None) -> None:
    """Sets what trains; the same for the same seed and covariance (calibrate()'s).

    init: "random", or "pca": the student's stream is the teacher's in one basis U [d_T, d_S], the directions
    with most of its energy. (tools/compress.py fits the projections in closed form.) Weights of a student's
    own start as what its clone would compose.
    """
    if student.teacher and not student.composes:
        config = dataclasses.replace(student.student_config, train="projections")
        with student.trained.norm.device:
            start = Student(student.config, student.teacher, config, student.loss_config)
        for layer, other in zip(start.trained.layers, student.trained.layers, strict=True):
            layer.neurons = other.neurons
        init_student(start, seed, init, covariance)
        start_from_clone(student, start)
        return
    trained = student.trained
    init_random(trained, seed)
    if init == "pca" and student.teacher:
        balance = torch.ones_like(student.teacher.norm.double())
        if trained.head_projection is None:
            # The head's projection is the embedding's: half of the final norm's weight goes into either.
            final = student.teacher.norm.double()
            balance = (final / rms(final)).clamp(min=0.1).sqrt()
            covariance = balance[:, None] * covariance * balance
        basis = torch.linalg.eigh(covariance).eigenvectors[:, -student.config.hidden_size :]
        init_from_basis(student, basis, covariance, balance)


@torch.no_grad()
def start_from_clone(student: Student, clone: Student) -> None:
    """Sets a student's own weights to what a clone of its shape composes, its projections and which neurons
    it has to the clone's."""
    ours = dict(student.trained.named_parameters())
    theirs = dict(clone.merge().named_parameters()) | dict(clone.trained.named_parameters())
    for name, weight in ours.items():
        weight.copy_(theirs[name])
    for layer, other in zip(student.trained.layers, clone.trained.layers, strict=True):
        layer.neurons = other.neurons


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def init_from_basis(student: Student, basis: Tensor, covariance: Tensor, balance: Tensor) -> None:
    """Makes the student's stream U^T diag(balance) x of the teacher's x: what writes to it goes through
    diag(balance) U, what reads it through U, with the teacher's norm weights absorbed.

    basis: U [d_T, d_S], orthonormal. covariance [d_T, d_T]: of balance · x, its trace 1. balance [d_T].
    """
    d_t, d_s = basis.shape
    write = balance[:, None] * basis
    read = basis / balance[:, None]
    # Less energy in fewer channels: x / rms(x) of what is kept is smaller by this than the teacher's.
    scale = ((basis * (covariance @ basis)).sum() * d_t / d_s).sqrt()

    def fold_norm(norm: nn.Parameter, projections: list[nn.Parameter], teacher_norm: Tensor) -> None:
        """The teacher's norm weight goes into what reads behind it, as far as a basis allows."""
        norm.data.fill_(rms(teacher_norm) * scale)
        for projection in projections:
            projection.data.copy_(teacher_norm.double()[:, None] / rms(teacher_norm) * read)

    teacher = student.teacher
    trained = student.trained
    for layer, k in zip(trained.layers, trained.layer_indices, strict=True):
        norms = teacher.layers[k]
        fold_norm(layer.input_norm, [layer.projection(name) for name in ("q", "k", "v")], norms["input_norm"])
        fold_norm(layer.post_norm, [layer.projection(name) for name in ("gate", "up")], norms["post_norm"])
        for name in WRITES:
            layer.projection(name).data.copy_(write)
    trained.embedding_projection.data.copy_(write)
    head_projections = [] if trained.head_projection is None else [trained.head_projection]
    fold_norm(trained.norm, head_projections, teacher.norm)
