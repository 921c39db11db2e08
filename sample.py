"""Generates text from a clone's checkpoint, a run's out_dir or a Hugging Face directory.

python sample.py                                                       # from the quickstart's student
python sample.py --model=out/smollm2_135m --prompt="The capital of France"
python sample.py --model=student --num_samples=4 --temperature=0.8 --top_p=0.95 --seed=7
"""

model = "out/quickstart"  # Hugging Face directory, checkpoint, or out_dir (its last checkpoint)
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
tokenizer: str | None = None  # directory of the tokenizer; None: the model's own
prompt = "def read("  # text to continue; "" starts from the tokenizer's BOS or EOS
num_samples = 1  # continuations of the prompt
max_new_tokens = 200  # tokens of each; it ends earlier at the tokenizer's EOS
temperature = 0.8  # of the softmax; 0 always takes the likeliest token
top_k = 0  # sample among the k likeliest tokens; 0: among all
top_p = 1.0  # sample among the likeliest tokens that together have this probability
seed = 1  # of the sampling
device: str | None = None  # None: cuda where there is one, or cpu

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

from collections.abc import Iterator

import torch

import model as models
from prepare import load_tokenizer, special_ids


def pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator) -> torch.Tensor:
    """One token id a row of logits [B, V], float32; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token to pass top_p stays
        logits = torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(beyond, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    llama: models.Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Iterator[list[int | None]]:
    """Continues every prompt, one token of each a step; None for those that have met a stop id.

    Prompts are padded on the left to one length. The key/value cache is allocated once, for all tokens to
    come.
    """
    config, where = llama.config, llama.norm.device
    batch, width = len(prompts), max(map(len, prompts))
    length = width + max_new_tokens
    padding = torch.tensor([width - len(p) for p in prompts])
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).to(where)
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    caches = [
        (
            torch.zeros(shape, dtype=llama.dtype, device=where),
            torch.zeros(shape, dtype=llama.dtype, device=where),
        )
        for _ in llama.layers
    ]
    generator = torch.Generator(where).manual_seed(seed)
    real, order = None, torch.arange(length, device=where)
    if padding.any():
        real = (order >= padding.to(where)[:, None])[:, None, None]  # [B, 1, 1, L]: keys that are not padding
    positions = (order - padding.to(where)[:, None]).clamp(min=0)[:, None]  # [B, 1, L]
    finished = [False] * batch
    tokens, start = padded, 0
    for _ in range(max_new_tokens):
        end = start + tokens.shape[1]
        mask = None
        if real is not None:
            causal = order[start:end, None] >= order[:end]  # [T, end]
            # a padding row sees itself, so that its softmax has something to divide by
            mask = (real[..., :end] & causal) | (order[start:end, None] == order[:end])
        slots = [(keys, values, start) for keys, values in caches]
        hidden = llama.hidden_states(tokens, positions[:, :, start:end], mask, slots)[:, -1]
        logits = (hidden @ llama.head_weight().T).float()
        chosen = pick(logits, temperature, top_k, top_p, generator)
        values = chosen.tolist()
        finished = [done or value in stop_ids for done, value in zip(finished, values, strict=True)]
        yield [None if done else value for done, value in zip(finished, values, strict=True)]
        if all(finished):
            return
        tokens, start = chosen[:, None], end


def load_student(path: str, teacher: str | None = None) -> tuple[models.Llama, str]:
    """(model, directory of its tokenizer) of a Hugging Face directory, a checkpoint or an out_dir."""
    found = models.resolve(path)
    if models.is_clone(found):
        return models.load_clone(found, teacher=teacher).merge(), models.read_json(found / "config.json")[
            "tokenizer"
        ]
    return models.load_model(found), str(found)


class Streamer:
    """Turns token ids into text as they come, holding back bytes of a character that is not whole yet."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[self.shown :], len(text)
        return new


def main() -> None:
    llama, found_tokenizer = load_student(model, teacher)
    directory = tokenizer or found_tokenizer
    tokens = load_tokenizer(directory)
    bos, eos = special_ids(tokens, directory)
    if tokens.get_vocab_size() > llama.config.vocab_size:
        raise ValueError(
            f"{directory} has {tokens.get_vocab_size()} tokens; {model} has {llama.config.vocab_size}"
        )
    llama = llama.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ids = bos + tokens.encode(prompt, add_special_tokens=False).ids
    if not ids:
        if eos is None:
            raise ValueError("the prompt is empty and the tokenizer has neither BOS nor EOS to start from")
        ids = [eos]
    stop_ids = () if eos is None else (eos,)
    for i in range(num_samples):
        streamer = Streamer(tokens)
        if num_samples > 1:
            print(f"--- {i + 1}")
        print(prompt, end="", flush=True)
        for (token,) in generate(llama, [ids], max_new_tokens, temperature, top_k, top_p, seed + i, stop_ids):
            if token is not None:
                print(streamer.add(token), end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print()
