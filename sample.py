"""Generates text from a clone's checkpoint, a run's out_dir or a Hugging Face directory.

python sample.py                                                       # from the quickstart's student
python sample.py --model=out/smollm2_135m --prompt="The capital of France"
python sample.py --model=student --num_samples=4 --temperature=0.8 --top_p=0.95 --seed=7
python sample.py --model=student --chat=True    # a conversation, by the model's own template
"""

from typing import Literal

model = "out/quickstart"  # Hugging Face directory, checkpoint, or out_dir (its last checkpoint)
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
tokenizer: str | None = None  # directory of the tokenizer; None: the model's own
prompt = "def read("  # to continue; a special token's name in it is text; "": from the BOS or EOS
num_samples = 1  # continuations of the prompt
chat = False  # talk with the model in the terminal, by its own chat template
system = ""  # the chat's system message; "": what the template has of its own
max_new_tokens = 200  # tokens of each continuation or reply; it ends earlier at an EOS or end of turn
temperature = 0.8  # of the softmax; 0 always takes the likeliest token
top_k = 0  # sample among the k likeliest tokens; 0: among all
top_p = 1.0  # sample among the likeliest tokens that together have this probability
seed = 1  # of the sampling
device: str | None = None  # None: cuda where there is one, or cpu
dtype: Literal["float32", "bfloat16"] | None = None  # to compute in; None: bfloat16 on cuda, float32 on cpu
compile = False  # compile the layers; worth it for long generations

if __name__ == "__main__":
    import sys

    from configurator import configure

    configure(globals(), log=sys.stderr)  # stdout is for the text

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import convert
import prepare
from configurator import choose_device, fail, need_compiler, read_json
from model import Llama, ModelConfig, Student, head_of, hidden_states, layer_contexts


def pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator) -> torch.Tensor:
    """One token id a row of logits [B, V], float32; a temperature of 0, or next to it, is greedy."""
    if temperature < 1e-4:
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
    llama: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Iterator[list[int | None]]:
    """Continues every prompt, one token of each a step; None for those that have met a stop id.

    Prompts are padded on the left to one length. Masks and the key/value cache are made once,
    for all tokens to come; a step reads back its tokens and nothing else.
    """
    config = llama.config
    device = llama.norm.device
    weights = llama.weights()
    batch = len(prompts)
    width = max(map(len, prompts))
    length = width + max_new_tokens
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    caches = [[torch.zeros(shape, dtype=llama.dtype, device=device) for _ in "kv"] for _ in llama.layers]
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    positions = torch.arange(length, device=device)
    mask = None
    real = None
    if any(len(p) < width for p in prompts):
        padding = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]
        real = (positions >= padding)[:, None, None]  # [B, 1, 1, L]: keys that are not padding
        order = positions[:width]
        # a padding row sees itself, so that its softmax has something to divide by
        mask = (real[..., :width] & (order[:, None] >= order)) | (order[:, None] == order)
        positions = (positions - padding).clamp(min=0)[:, None]  # [B, 1, L]
    generator = torch.Generator(device).manual_seed(seed)
    finished = [False] * batch
    start = 0
    for end in range(width, length):
        contexts = layer_contexts(config, positions[..., start:end], mask)
        slots = [(keys, values, start) for keys, values in caches]
        x = hidden_states(weights, tokens, config, contexts, slots, llama.run_block)
        logits = F.linear(x[:, -1], head_of(weights)).float()
        chosen = pick(logits, temperature, top_k, top_p, generator)
        ids = chosen.tolist()
        finished = [done or token in stop_ids for done, token in zip(finished, ids, strict=True)]
        yield [None if done else token for done, token in zip(finished, ids, strict=True)]
        if all(finished):
            return
        tokens = chosen[:, None]
        start = end
        mask = None if real is None else real[..., : end + 1]


class Streamer:
    """Turns token ids into text as they come, holding back bytes of a character that is not whole yet."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.ids = prompt[-8:]  # some decoders take the space from a text's first word
        self.length = len(tokenizer.decode(self.ids, skip_special_tokens=False))  # of the text so far

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return ""
        new = text[self.length :]
        self.length = len(text)
        return new


def ending_ids(eos: int | None, config: ModelConfig, directories: set[Path]) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's EOS, the model's, and those of each generation_config.json."""
    files = [directory / "generation_config.json" for directory in directories]
    generation = [read_json(file).get("eos_token_id") for file in files if file.is_file()]
    return tuple(set().union(*map(convert.eos_ids, (eos, config.eos_token_id, *generation))))


def turn_end_ids(tokens, directory: str) -> tuple[int, ...]:
    """The token by which the chat template closes the assistant's turn, where that is one of the added ones.

    ValueError where there is no template, or none that renders a question with its answer.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": prepare.MARK}]
    after = prepare.chat_template(directory)(chat).partition(prepare.MARK)[2].lstrip()
    ids = prepare.encode_text(tokens, after, special_tokens=True)[:1]
    return tuple(i for i in ids if i in tokens.get_added_tokens_decoder())


def encode_chat(tokens, render, messages: list[dict]) -> list[int]:
    """The ids of a chat up to the assistant's next turn; only the template's own marks are special tokens."""
    safe = prepare.break_specials(prepare.special_pattern(tokens), messages)
    return prepare.encode_rendered(tokens, render(safe, add_generation_prompt=True))


def stream(llama: Llama, tokens, ids: list[int], seed: int, stop_ids: tuple[int, ...]) -> list[int]:
    """Prints the continuation of ids as it comes and returns it; in a chat, Ctrl-C only ends it."""
    streamer = Streamer(tokens, ids)
    new = []
    try:
        steps = generate(llama, [ids], max_new_tokens, temperature, top_k, top_p, seed, stop_ids)
        for (token,) in steps:
            if token is not None:
                new.append(token)
                print(streamer.add(token), end="", flush=True)
    except KeyboardInterrupt:
        if not chat:
            raise
    print()
    return new


def converse(llama: Llama, tokens, render, stop_ids: tuple[int, ...]) -> None:
    """A chat in the terminal, a line a turn; its oldest turns are forgotten when the context is full."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401, input() then edits its line and knows those before
    instructions = [{"role": "system", "content": system}] if system else []
    history = []
    room = llama.config.max_position_embeddings - max_new_tokens
    turn = 0
    print("Ctrl-C stops a reply; an empty line or Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if not line:
            return
        history.append({"role": "user", "content": line})
        while len(ids := encode_chat(tokens, render, instructions + history)) > room and len(history) > 1:
            del history[:2]
        reply = stream(llama, tokens, ids, seed + turn, stop_ids)
        history.append({"role": "assistant", "content": tokens.decode(reply).strip()})
        turn += 1


def check_options() -> None:
    """Refuses, before anything is loaded, what no model can do: ValueError, one line."""
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("top_k", 0), ("temperature", 0)):
        if globals()[name] < least:
            raise ValueError(f"{name} is {globals()[name]}; it must be at least {least}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    # Python reads a byte that is not UTF-8 as half a surrogate pair, which cannot be encoded.
    for name, text in (("prompt", prompt), ("system", system)):
        if text.encode(errors="ignore").decode() != text:
            raise ValueError(f"{name} is not UTF-8: {text!r}")


def main() -> None:
    check_options()
    device_used = choose_device(device)
    if compile:
        need_compiler(device_used.type)
    source = convert.resolve(model)
    directory = tokenizer or convert.tokenizer_directory(source, teacher)
    tokens = prepare.load_tokenizer(directory)
    render = prepare.chat_template(directory) if chat else None
    llama = convert.load_checkpoint(source, teacher)
    size = llama.config.vocab_size
    largest = max(tokens.get_vocab().values())
    if largest >= size:
        raise ValueError(f"{directory} has token ids up to {largest}; {model} has {size}")
    context = llama.config.max_position_embeddings
    if chat and max_new_tokens >= context:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; a chat needs less than its context, {context}")
    if isinstance(llama, Student):
        llama = llama.merge()
    compute_dtype = dtype or ("bfloat16" if device_used.type == "cuda" else "float32")
    llama = llama.to(device_used, getattr(torch, compute_dtype))
    if compile:
        llama.run_block = torch.compile(llama.run_block, dynamic=True)
    bos, eos = prepare.special_ids(tokens, directory)
    stop_ids = ending_ids(eos, llama.config, {source, Path(directory)})
    if chat:
        stop_ids += turn_end_ids(tokens, directory)
        sys.stdin.reconfigure(errors="replace")
        return converse(llama, tokens, render, stop_ids)
    ids = bos + prepare.encode_text(tokens, prompt)
    if not ids and eos is None:
        raise ValueError("the prompt is empty and the tokenizer has neither BOS nor EOS to start from")
    ids = ids or [eos]
    if len(ids) + max_new_tokens > context:
        asked = f"{len(ids)} tokens and {max_new_tokens} new ones"
        print(f"{asked} are more than {model} was made for, {context}", file=sys.stderr)
    for i in range(num_samples):
        if num_samples > 1:
            print(f"--- {i + 1}")
        print(prompt, end="", flush=True)
        stream(llama, tokens, ids, seed + i, stop_ids)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print()
