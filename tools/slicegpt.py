"""SliceGPT (arXiv 2401.15024) on the same teacher, width and tokens, to compare tools/compress.py with.

    python tools/slicegpt.py                          # the quickstart's teacher to half its width
    python tools/slicegpt.py --teacher=models/SmolLM2-135M-Instruct --data=data/pod \\
        --student_hidden_size=288 --seq_len=512 --eval_blocks=16 --calibration_tokens=16384

The stream is cut to its principal directions, in a basis of its own before each attention and each FFN; a
matrix [d_S, d_S] leads from one basis to the next. Such a model is no Llama, so nothing is written but the
held-out loss. Takes train.py's options.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from configurator import configure, fail

    options = configure({"__file__": ROOT / "train.py", "__doc__": __doc__})

import json

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from model import attention, head_loss, rms_norm, rope_table, rotate


class Slicer:
    """Walks all tokens through the layers; the bases are fitted to those before `held`, the rest follows."""

    def __init__(self, width: int, eps: float, held: int):
        self.width = width
        self.eps = eps
        self.held = held  # sequences from here on are held out

    def basis(self, x: torch.Tensor) -> torch.Tensor:
        """Principal directions [d_T, d_S] of the normed stream x [N, T, d_T]."""
        tokens = rms_norm(x[: self.held].flatten(0, 1), x.new_ones(x.shape[-1]), self.eps).double()
        return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -self.width :].float()

    def normed(self, z: torch.Tensor, d_t: int) -> torch.Tensor:
        """RMSNorm of a stream in a basis, by the teacher's width."""
        return z * torch.rsqrt(z.square().sum(-1, keepdim=True) / d_t + self.eps)


@torch.no_grad()
def slice_model(teacher, ids: torch.Tensor, held: int, width: int) -> torch.Tensor:
    """The final hidden states [N - held, T, d_S] and head [V, d_S] of the sliced teacher on ids [N, T]."""
    config = teacher.config
    d_t = config.hidden_size
    slicer = Slicer(width, config.rms_norm_eps, held)
    rope = rope_table(config, torch.arange(ids.shape[1]))
    x = F.embedding(ids, teacher.embedding)
    basis = slicer.basis(x)
    z = x @ basis  # [N, T, d_S], the stream in this basis
    for layer in tqdm(teacher.layers, desc="slicing", unit="layer"):
        w = layer(torch.float32)
        # Attention.
        read = w["input_norm"][:, None] * basis
        normed = slicer.normed(z, d_t)
        heads = {}
        for name in ("q", "k", "v"):
            y = F.linear(normed, w[name] @ read, w.get(f"{name}_bias"))
            heads[name] = y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        if config.qk_norm:
            for name in ("q", "k"):
                heads[name] = rms_norm(heads[name], w[f"{name}_norm"], config.rms_norm_eps)
        attended = attention(rotate(heads["q"], rope), rotate(heads["k"], rope), heads["v"])
        x = z @ basis.T + F.linear(attended, w["o"], w.get("o_bias"))
        basis = slicer.basis(x)
        z = x @ basis
        # The FFN.
        read = w["post_norm"][:, None] * basis
        normed = slicer.normed(z, d_t)
        for n in range(len(z)):  # a sequence at a time, since F is wide
            hidden = F.silu(F.linear(normed[n], w["gate"] @ read)) * F.linear(normed[n], w["up"] @ read)
            x[n] = z[n] @ basis.T + F.linear(hidden, w["down"])
        basis = slicer.basis(x)
        z = x @ basis
    head = teacher.head_weight() @ (teacher.norm[:, None] * basis)
    return slicer.normed(z[held:], d_t), head


def main() -> None:
    vars(train).update(options)
    train.check_options()
    if train.teacher is None:
        raise ValueError("teacher is None: slicegpt.py slices one")
    teacher = train.load_teacher(torch.float32)
    width = train.student_hidden_size
    if not 0 < width <= teacher.config.hidden_size:
        most = teacher.config.hidden_size
        raise ValueError(f"student_hidden_size is {width}; it must be between 1 and {most}, the teacher's")
    calibration, heldout = train.open_data(teacher.config.vocab_size, train.tokenizer_directory())
    count = max(1, train.calibration_tokens // train.seq_len)
    blocks = heldout.batch(0, min(train.eval_blocks, heldout.total))
    ids = torch.cat([torch.from_numpy(b.ids) for b in (calibration.batch(0, count), blocks)])
    hidden, head = slice_model(teacher, ids, count, width)
    with torch.no_grad():
        loss = head_loss(hidden, head, torch.from_numpy(blocks.labels))["lm"].item()
    print(json.dumps({"val_lm": round(loss, 4), "calibration_tokens": count * train.seq_len}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
