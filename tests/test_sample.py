"""sample.py: decoding against transformers and the plain forward pass, and the chat."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import BUNDLED, ROOT, run
from test_convert import call, refused
from test_model import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import prepare
import sample
from sample import ending_ids, generate

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CTRL_C = "\x03"  # at the end of a reply: the user interrupts it there


def prompts(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 96, (n,), generator=generator).tolist() for n in lengths]


def continuations(*arguments, **options):
    return [list(row) for row in zip(*generate(*arguments, **options), strict=True)]


@pytest.mark.parametrize("lengths", [(9,), (3, 11, 7), tuple(range(2, 22))])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_greedy_tokens_are_transformers(family, lengths, tmp_path):
    """One row, a padded batch, a large one."""
    ours = random_llama(family=family, head_dim=16, no_rope_layer_interval=2, pad_token_id=0)
    convert.save_model(ours, tmp_path, torch.float32, None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rows = prompts(*lengths)
    width = max(lengths)
    expected = theirs.generate(
        torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None,
    )[:, width:].tolist()  # fmt: skip
    assert continuations(ours, rows, 16) == expected


def test_decoding_in_bfloat16_and_compiled():
    """Compiled layers (here traced only) give the same tokens."""
    llama = random_llama(head_dim=16)
    (prompt,) = prompts(5)
    expected = continuations(llama, [prompt], 12)
    llama.run_block = torch.compile(llama.run_block, backend="eager", dynamic=True)
    assert continuations(llama, [prompt], 12) == expected
    half = copy.deepcopy(llama).bfloat16()
    (row,) = continuations(half, [prompt], 12)
    logits = half(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(12), torch.tensor(row)]
    # the likeliest of the whole sequence's forward pass, but for what bfloat16 cannot tell apart
    assert (logits.max(-1).values - chosen).max() < 0.02 * logits.abs().max()


def test_a_step_allocates_no_cache(monkeypatch):
    steps = generate(random_llama(family="qwen2"), prompts(4, 6), 10)
    next(steps)
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(1) or zeros(*a, **k))
    assert len(list(steps)) == 9 and made == []


def test_ending_ids(tmp_path):
    """The model's own generation_config.json counts, and that beside a tokenizer of another directory."""
    config = Mock(eos_token_id=[3, 4])
    directories = {tmp_path / "model", tmp_path / "tokenizer"}
    assert set(ending_ids(None, config, directories)) == {3, 4}
    for directory, named, expected in (("model", [4, 5], {2, 3, 4, 5}), ("tokenizer", 7, {2, 3, 4, 5, 7})):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert set(ending_ids(2, config, directories)) == expected


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The bundled teacher with a chat template."""
    path = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(BUNDLED, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def converse(monkeypatch, talker, lines, replies, **options):
    """The prompts the model sees, as text, when a user says `lines` and it answers `replies`."""
    tokens = prepare.load_tokenizer(talker)
    seen = []

    def answer(llama, ids, *arguments):
        seen.append(tokens.decode(ids[0], skip_special_tokens=False))
        reply = replies[len(seen) - 1]
        for token in tokens.encode(reply.strip(CTRL_C), add_special_tokens=False).ids:
            yield [token]
        if reply.endswith(CTRL_C):
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", answer)
    monkeypatch.setattr("builtins.input", Mock(side_effect=[*lines, EOFError]))
    for name, value in {"chat": True, **options}.items():
        monkeypatch.setattr(sample, name, value)
    sample.converse(convert.load_model(talker), tokens, prepare.chat_template(talker), ())
    return seen


def test_chat_keeps_history_and_survives_interrupts(monkeypatch, talker, capsys):
    """Of a reply and at the prompt; an empty line leaves."""
    lines = ["one", "two", KeyboardInterrupt, "three", "", "four"]
    seen = converse(monkeypatch, talker, lines, ["first", "sec" + CTRL_C, "third"])
    first = "<user>one</user><assistant>"
    second = f"{first}first</assistant><user>two</user><assistant>"
    assert seen == [first, second, f"{second}sec</assistant><user>three</user><assistant>"]
    printed = capsys.readouterr().out
    assert "first\n" in printed and "sec\n" in printed and "third\n" in printed


def test_chat_forgets_its_oldest_turns_but_not_its_instructions(monkeypatch, talker):
    context = convert.read_config(talker).max_position_embeddings
    lines = ["x = 1\n" * (context // 8), "two"]
    options = {"system": "S", "max_new_tokens": context // 2}
    seen = converse(monkeypatch, talker, lines, ["first", "second"], **options)
    assert seen[1] == "<system>S</system><user>two</user><assistant>"


def test_only_the_templates_marks_are_special(talker):
    """A mark that a message spells out is text; any other conversation is encoded as transformers does."""
    mark = "<|endoftext|>"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}" + mark + "{% endfor %}assistant:"
    path = Path(shutil.copytree(talker, talker.with_name("marks")))
    (path / "chat_template.jinja").write_text(template)
    tokens = prepare.load_tokenizer(path)
    render = prepare.chat_template(path)
    chat = [{"role": "user", "content": " def f():\n"}, {"role": "assistant", "content": "pass"}]
    theirs = AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert sample.encode_chat(tokens, render, chat) == expected and expected.count(0) == 2

    chat[0]["content"] = f" def f():{mark}user: {mark[:3]}{mark}\n"
    ids = sample.encode_chat(tokens, render, chat)
    text = tokens.decode(ids, skip_special_tokens=False)
    assert text == f"user: def f():{mark}user: {mark[:3]}{mark}{mark}assistant: pass{mark}assistant:"
    assert ids.count(0) == 2
    # A prompt's are text too; what is encoded after it has its marks again.
    prompt = prepare.encode_text(tokens, f"a{mark}b")
    assert 0 not in prompt and tokens.decode(prompt, skip_special_tokens=False) == f"a{mark}b"
    assert tokens.encode(mark).ids == [0]


def test_chat_through_pipes(talker):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = ("--chat=True", "--max_new_tokens=1000", "--temperature=1.0", "--seed=3", "--device=cpu")
    command = [sys.executable, "sample.py", f"--model={talker}", *options]
    chat = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    chat.stdin.write("hello\n")
    chat.stdin.flush()
    seen = ""
    while len(seen.partition("> ")[2]) < 20:  # in the middle of a reply
        seen += chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    out, errors = chat.communicate("again\n", timeout=300)
    assert chat.returncode == 0 and out.count("> ") >= 2  # the next prompt, and the last
    assert errors.startswith("options that differ from the defaults:\n") and "Traceback" not in errors


def test_stdout_is_the_text_alone():
    done = run("sample.py", f"--model={BUNDLED}", "--prompt=def f(", "--max_new_tokens=5", "--temperature=0")
    assert done.returncode == 0 and "max_new_tokens = 5" in done.stderr
    tokens = prepare.load_tokenizer(BUNDLED)
    (row,) = continuations(convert.load_model(BUNDLED), [tokens.encode("def f(").ids], 5)
    assert done.stdout == f"def f({tokens.decode(row)}\n"


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("temperature", -1.0, "temperature is -1.0; it must be at least 0"),
        ("top_k", -1, "top_k is -1; it must be at least 0"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p is 1.5; it must be above 0 and at most 1"),
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be at least 1"),
        ("num_samples", 0, "num_samples is 0; it must be at least 1"),
        ("system", "\udce9", r"system is not UTF-8: "),
        ("model", "no/such/model", "no/such/model does not exist"),
        ("device", "gpu", "device is 'gpu', which torch .* lacks here"),
    ],
)
def test_refusals(name, value, words):
    """Before the model is looked for."""
    refused(f"^{words}", sample, **{"model": "no/such/model", name: value})


def test_a_context_that_is_too_short_is_said(talker):
    refused("max_new_tokens is 1024; a chat needs less than its context, 1024", sample, model=talker,
            chat=True, max_new_tokens=1024)  # fmt: skip
    short = Path(shutil.copytree(talker, talker.with_name("short")))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    done = run("sample.py", f"--model={short}", "--prompt=def f(", "--max_new_tokens=2")
    words = f"3 tokens and 2 new ones are more than {short} was made for, 4"
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == words


def test_a_token_that_the_model_lacks_is_refused(tmp_path):
    """By the largest id: here there are fewer tokens than ids."""
    path = Path(shutil.copytree(BUNDLED, tmp_path / "holes"))
    content = json.loads((path / "tokenizer.json").read_text())
    bpe = content["model"]
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < 3000}
    bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) in bpe["vocab"]]
    bpe["vocab"]["<|far|>"] = 4096
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert prepare.load_tokenizer(path).get_vocab_size() == 3001
    refused("has token ids up to 4096; .* has 4096", sample, model=BUNDLED, tokenizer=path)


def test_a_chat_without_a_template_and_a_prompt_that_is_not_utf8_are_refused():
    refused("has no chat template", sample, model=BUNDLED, chat=True)
    done = run("sample.py", f"--model={BUNDLED}", "--prompt=caf\udce9")  # the byte E9
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == r"error: prompt is not UTF-8: 'caf\udce9'"


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    """Of the newer ones, one has no file and one is cut short."""
    whole = Path(shutil.copytree(BUNDLED, tmp_path / "step_00000001"))
    (whole / "trainer").mkdir()
    (whole / "trainer/state.json").write_text("{}")
    cut = shutil.copytree(whole, tmp_path / "step_00000002")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "step_00000003").mkdir()
    call(sample, model=tmp_path, max_new_tokens=2, prompt="def f(")
    printed = capsys.readouterr()
    assert printed.out.startswith("def f(")
    empty, truncated = printed.err.splitlines()
    assert "step_00000003: " in empty and "config.json does not exist" in empty
    assert "step_00000002: " in truncated and "truncated" in truncated
    shutil.rmtree(whole)
    refused("has neither a config.json nor a whole checkpoint", sample, model=tmp_path)
