"""The start of a clone in closed form: every projection by least squares, in minutes on a CPU.

    python tools/compress.py config/smollm2_135m.py              # writes the config's init_from
    python tools/compress.py --out=out/start                     # the quickstart's teacher to half its width
    python train.py --init_from=out/start                        # goes on from there
    python convert.py --checkpoint=out/start --out=student       # or a smaller model without any training

Takes train.py's options besides `out`, of which those of loss and optimizer have no effect. It writes the
checkpoint of a clone, and prints the held-out loss of student and teacher.
"""

out: str | None = None  # directory to write, which must not exist; None: that of init_from

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from configurator import configure

    own = [a for a in sys.argv[1:] if a.startswith("--out=") or a in ("-h", "--help")]
    others = [a for a in sys.argv[1:] if a not in own]
    configure(globals(), own)
    options = configure({"__file__": ROOT / "train.py"}, others)

import json
import shutil
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convert
import train
from configurator import fail, show
from model import Llama, Student, StudentLayer, block, head_of, keep_neurons, layer_contexts, rms_norm

RIDGE = 0.01  # of the mean energy of what a projection gets: how firmly it is held to its start


@torch.no_grad()
def fit_clone(clone: Student, ids: Tensor) -> None:
    """Fits the projections of a clone that "pca" has started to the tokens ids [N, T], in closed form.

    Teacher and student walk the tokens side by side, a layer at a time. What reads the student's stream is
    fitted to the teacher's normed input. What writes to it is fitted to bring it to x B where the teacher's
    stream is x, B the embedding's projection as it starts; so it also mends the errors of the layers before,
    and what layers and neurons that are left out would have written. A tied head's projection is then fitted
    to serve embedding and head, and the layers again.

    Memory: the normal equations of one weight, float64, and the streams of all tokens at one layer.
    """
    teacher = clone.teacher
    basis = clone.trained.embedding_projection.float().clone()
    x_t, x_s = fit_layers(clone, ids, basis)
    hidden_t = rms_norm(x_t, teacher.norm, teacher.config.rms_norm_eps)
    if clone.trained.head_projection is not None:
        hidden_s = rms_norm(x_s, clone.trained.norm, clone.config.rms_norm_eps)
        fit_reads([clone.trained.head_projection], hidden_s, hidden_t)
        return
    metric = logit_metric(teacher, hidden_t)
    fit_tied_projection(clone, ids, basis, hidden_t, x_s, metric)
    _, x_s = fit_layers(clone, ids, basis)
    second, cross = final_moments(hidden_t, x_s, clone.config.rms_norm_eps)
    projection = clone.trained.embedding_projection.double()
    norm = clone.trained.norm
    norm.copy_(final_norm(projection, norm.double(), second, cross, metric))


def fit_layers(clone: Student, ids: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the layers, from the first to the last; returns the final streams of teacher and student.

    basis B [d_T, d_S]: the student's stream shall be x B where the teacher's is x. See fit_clone.
    """
    teacher = clone.teacher
    config = clone.config
    contexts = layer_contexts(teacher.config, torch.arange(ids.shape[1], device=ids.device))
    x_t = F.embedding(ids, teacher.embedding).float()  # [N, T, d_T]
    x_s = x_t @ clone.trained.embedding_projection.float()  # [N, T, d_S]
    kept = clone.trained.layer_indices
    ends = [*kept[1:], len(teacher.layers)]
    # The layers before the first that is kept.
    x_t = teacher_streams(teacher, x_t, contexts, 0, kept[0])[1]
    steps = [*zip(clone.trained.layers, kept, ends, strict=True)]
    for layer, first, end in show(steps, desc="fitting", unit="layer"):
        weights = {name: weight.float() for name, weight in teacher.layers[first].items()}
        middle, out = teacher_streams(teacher, x_t, contexts, first, end)
        # Errors count relative to the token's stream, or the massive tokens would decide alone.
        token_weight = x_t.square().mean(-1).reciprocal()

        # Attention: what reads the stream, then what writes to it.
        normed_s = rms_norm(x_s, layer.input_norm, config.rms_norm_eps)
        normed_t = rms_norm(x_t, weights["input_norm"], teacher.config.rms_norm_eps)
        fit_reads([layer.projection(name) for name in ("q", "k", "v")], normed_s, normed_t)
        student, _ = layer(weights, torch.float32)
        # What o reads, [N, T, heads · head_dim]; the rest of the block is not yet fitted.
        blocks = (block(rows, student, config, contexts[first])[1] for rows in x_s.split(1))
        attended = torch.cat([activations["attended"] for activations in blocks])
        fit_write(layer, "o", weights, attended, middle @ basis - x_s, token_weight)
        student, _ = layer(weights, torch.float32)
        x_s = x_s + F.linear(attended, student["o"], student.get("o_bias"))

        # The FFN, likewise.
        normed_s = rms_norm(x_s, layer.post_norm, config.rms_norm_eps)
        normed_t = rms_norm(middle, weights["post_norm"], teacher.config.rms_norm_eps)
        fit_reads([layer.projection(name) for name in ("gate", "up")], normed_s, normed_t)
        student, _ = layer(weights, torch.float32)

        def features(rows=normed_s, gate=student["gate"], up=student["up"]) -> Iterator[Tensor]:
            """What the student's down reads: [T, F], row by row."""
            for row in rows:
                yield F.silu(F.linear(row, gate)) * F.linear(row, up)

        fit_write(layer, "down", weights, features(), out @ basis - x_s, token_weight)
        down = layer(weights, torch.float32)[0]["down"]
        x_s = torch.stack([row + F.linear(a, down) for row, a in zip(x_s, features(), strict=True)])
        x_t = out
    return x_t, x_s


def teacher_streams(teacher: Llama, x: Tensor, contexts, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The teacher's stream [N, T, d_T] after the attention of layer `first`, and before layer `end`."""
    middle = torch.empty_like(x)
    out = torch.empty_like(x)
    layers = [{name: w.float() for name, w in layer.items()} for layer in teacher.layers[first:end]]
    for n in range(len(x)):
        rows = x[n : n + 1]
        for i, weights in enumerate(layers):
            before = rows
            rows, activations = block(before, weights, teacher.config, contexts[first + i])
            if i == 0:
                middle[n] = (before + activations["attn_out"])[0]
        out[n] = rows[0]
    return middle, out


def least_squares(inputs: Iterable[Tensor], targets: Tensor, weights: Tensor | None, start: Tensor) -> Tensor:
    """argmin over Z [a, b] of Σ weight · |A Z - X|² + RIDGE · (mean energy of A's columns) · |Z - start|².

    inputs: A by row, [T, a]. targets: X [N, T, b]. weights [N, T]; None: ones. Sums are float64.
    """
    if weights is None:
        weights = torch.ones_like(targets[..., 0])
    gram = torch.zeros(len(start), len(start), dtype=torch.float64, device=start.device)
    moment = torch.zeros(start.shape, dtype=torch.float64, device=start.device)
    for a, x, weight in zip(inputs, targets, weights, strict=True):
        a = a.double()
        weighted = (a * weight.double()[:, None]).T
        gram += weighted @ a
        moment += weighted @ x.double()
    strength = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(strength)
    return torch.linalg.solve(gram, moment + strength * start.double())


def fit_reads(projections: list[nn.Parameter], normed_s: Tensor, normed_t: Tensor) -> None:
    """Sets projections P [d_T, d_S] so that A P^T comes near X: the normed inputs of student and teacher.

    The weights W that read them have no say: W P is also the best weight of all to give W X.
    """
    solution = least_squares(normed_s, normed_t, None, projections[0].T).T
    for projection in projections:
        projection.copy_(solution)


def fit_write(
    layer: StudentLayer, name: str, teacher: dict[str, Tensor], features: Iterable[Tensor],
    missing: Tensor, token_weight: Tensor,
) -> None:  # fmt: skip
    """Sets the projection P of o or down so that P^T W adds what the student is missing [N, T, d_S].

    features: what the weight reads, row by row."""
    weight = keep_neurons(teacher, layer.neurons)[name]
    bias = teacher.get(f"{name}_bias")
    projection = layer.projection(name)
    written = (F.linear(row, weight, bias) for row in features)
    projection.copy_(least_squares(written, missing, token_weight, projection))


def logit_metric(teacher: Llama, hidden: Tensor) -> Tensor:
    """M [d_T, d_T], float64: an error e of the final hidden state makes a KL of e^T M e / 2 or so.

    It is the mean over tokens of H^T (diag(p) - p p^T) H, H the head and p what the teacher predicts.
    """
    head = head_of(teacher.weights()).float()
    probability = torch.zeros(len(head), dtype=torch.float64, device=head.device)
    outer = 0.0
    # 2,048 tokens, spread over all, give the mean well enough.
    tokens = hidden.flatten(0, 1)
    tokens = tokens[:: max(1, len(tokens) // 2048)]
    for chunk in tokens.split(256):
        p = (chunk @ head.T).softmax(-1)
        probability += p.sum(0, dtype=torch.float64)
        mean = (p @ head).double()
        outer = outer + mean.T @ mean
    head = head.double()
    return ((head.T * probability) @ head - outer) / len(tokens)


def final_moments(hidden_t: Tensor, x_s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Means over tokens of s s^T [d_S, d_S] and t s^T [d_T, d_S], float64.

    s is the student's final stream, normed with a weight of ones, and t the teacher's hidden state.
    """
    s = rms_norm(x_s, torch.ones_like(x_s[0, 0]), eps).flatten(0, 1).double()
    t = hidden_t.flatten(0, 1).double()
    return s.T @ s / len(s), t.T @ s / len(s)


def final_norm(projection: Tensor, start: Tensor, second: Tensor, cross: Tensor, metric: Tensor) -> Tensor:
    """The norm n [d_S] with which P diag(n) s comes nearest to the teacher's hidden state, by the metric."""
    gram = second * (projection.T @ metric @ projection)
    moment = (projection * (metric @ cross)).sum(0)
    strength = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(strength)
    return torch.linalg.solve(gram, moment + strength * start)


def fit_tied_projection(
    clone: Student, ids: Tensor, basis: Tensor, hidden_t: Tensor, x_s: Tensor, metric: Tensor
) -> None:
    """Sets the one projection P [d_T, d_S] of embedding and head, and the final norm n.

    The embeddings e of the tokens should come near e B, and P diag(n) s near the teacher's hidden states t:
    P minimises E|e (P - B)|² / E|e B|² + E|P diag(n) s - t|²_M / E|t|²_M. Given n that is linear in P, and
    diagonal in the right bases; n and P are fitted in turn.
    """
    tokens = F.embedding(ids.flatten(), clone.teacher.embedding).double()
    every = clone.teacher.embedding.double()
    # A part for tokens that the calibration has not seen.
    embedded = tokens.T @ tokens
    everything = every.T @ every
    embedded = 0.8 * embedded / embedded.trace() + 0.2 * everything / everything.trace()
    embedded.diagonal().add_(1e-9)  # where embeddings do not fill all dimensions
    basis = basis.double()
    second, cross = final_moments(hidden_t, x_s, clone.config.rms_norm_eps)
    t = hidden_t.flatten(0, 1).double()
    embedding_scale = 1 / (basis.T @ embedded @ basis).trace()
    head_scale = len(t) / ((t @ metric) * t).sum()

    lower = torch.linalg.cholesky(embedded)
    inverse = torch.linalg.inv(lower)
    values, vectors = torch.linalg.eigh(inverse @ metric @ inverse.T)
    projection = basis
    norm = final_norm(projection, clone.trained.norm.double(), second, cross, metric)
    for _ in range(3):
        energies, directions = torch.linalg.eigh(norm[:, None] * second * norm)
        right = embedding_scale * embedded @ basis + head_scale * (metric @ cross) * norm
        right = vectors.T @ inverse @ right @ directions
        right = right / (embedding_scale + head_scale * values.clamp(min=0)[:, None] * energies.clamp(min=0))
        projection = inverse.T @ vectors @ right @ directions.T
        norm = final_norm(projection, norm, second, cross, metric)
    clone.trained.embedding_projection.copy_(projection)
    clone.trained.norm.copy_(norm)


def main() -> None:
    target = out or options["init_from"]
    if target is None:
        raise ValueError("there is no directory to write: give --out=DIR, or a config with init_from")
    if Path(target).exists():
        raise ValueError(f"{target} exists; remove it or choose another --out")
    # Weights of a student's own too start from a clone's projections.
    vars(train).update(options, init="pca", init_from=None, train="projections")
    train.check_options()
    if train.teacher is None:
        raise ValueError("teacher is None: compress.py makes a student of one")
    device = train.start_device()
    began = time.perf_counter()
    model = train.build_model(train.dtype_on(device)).to(device)
    tokenizer = train.tokenizer_directory()
    train_data, heldout = train.open_data(model.config.vocab_size, tokenizer)
    train.start_weights(model, train_data, None, device)
    fit_clone(model, train.calibration_ids(train_data, device))
    seconds = time.perf_counter() - began
    values = train.evaluate(model, heldout) if heldout else {}

    partial = Path(target).with_name(Path(target).name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert.save_clone(model, partial, train.teacher, tokenizer)
    partial.rename(target)
    print(f"{target}: fitted in {seconds:.0f} s, without training")
    print(json.dumps({name: round(value, 4) for name, value in values.items() if isinstance(value, float)}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
