"""Tokenizer directories of every kind, read as AutoTokenizer reads them or refused in one line.

BOS and EOS are by prepare.py's rule: what the tokenizer itself puts before a text, and its EOS behind it.
"""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import BUNDLED
from test_prepare import CHATS, encoded, messages_of, prepared, sentencepiece_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, __version__

import prepare

pytestmark = pytest.mark.skipif(__version__ < "5", reason="transformers 4 reads some of these otherwise")

TEXT_END = "<|endoftext|>"
START, END, _ = MARKS = ["<|im_start|>", "<|im_end|>", "<think>"]
IDS = {mark: 4096 + i for i, mark in enumerate(MARKS)}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "count 0", " leads", "trails ", "def f(x):\n    return x\n\n", "ünï 日本 🙂", "a  b\t\tc", "\n\nline",
    "x = '<|nothing|>'", "é" * 50 + "e\u0301",
]  # fmt: skip
CHATS = [*CHATS[:3], [("user", ""), ("assistant", "")], [("user", " spaces "), ("assistant", "lines\n\n")]]
SPECIAL = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def token(content, **flags):
    return {"content": content, **SPECIAL, **flags}


def wrap(before, behind):
    """A post-processor that puts tokens before a text and behind it."""
    used = [(name, IDS[name]) for name in {*before, *behind}]
    single = " ".join([*before, "$A", *behind])
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=used)


def make(path, in_json=MARKS, special=True, post=None, files=None, **config):
    """A directory with the bundled tokenizer; in_json: marks that stand in tokenizer.json; files: others, by
    name. config: on top of tokenizer_config.json."""
    path.mkdir()
    content = json.loads((BUNDLED / "tokenizer.json").read_text())
    for mark in in_json:
        content["added_tokens"].append({"id": IDS[mark], **token(mark, special=special)})
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if post:
        tokenizer.post_processor = post
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": CHATML}
    settings = {name: value for name, value in (settings | config).items() if value != "left out"}
    for name, value in {"tokenizer_config": settings, **(files or {})}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


DECODER = {str(IDS[mark]): token(mark) for mark in MARKS}
NAMED = {"in_json": [], "eos_token": TEXT_END}
TEMPLATES = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
WITH_BOS = "{{ bos_token }}" + CHATML
KINDS = {
    "plain": {},
    "null BOS in the template": {"bos_token": None, "chat_template": WITH_BOS},
    "BOS in the template": {
        "bos_token": {"__type": "AddedToken", **token(START)}, "chat_template": WITH_BOS
    },
    "EOS in special_tokens_map.json": {
        "eos_token": "left out", "files": {"special_tokens_map": {"eos_token": TEXT_END}}
    },
    "EOS there as an object, and another in the config": {
        "files": {"special_tokens_map": {"eos_token": token(TEXT_END)}}
    },
    "EOS in both, with an added_tokens_decoder": {
        "added_tokens_decoder": DECODER, "files": {"special_tokens_map": {"eos_token": TEXT_END}}
    },
    "tokens in added_tokens_decoder": {
        "in_json": [], "added_tokens_decoder": {"0": token(TEXT_END), **DECODER}
    },
    "tokens in added_tokens.json": {"in_json": [], "files": {"added_tokens": IDS}},
    "some of them there": {"in_json": MARKS[:1], "files": {"added_tokens": {TEXT_END: 0, **IDS}}},
    "tokens that are only named": {**NAMED, "additional_special_tokens": MARKS},
    "tokens only named in the map": {
        **NAMED, "files": {"special_tokens_map": {"additional_special_tokens": MARKS[:2]}}
    },
    "extra_special_tokens": {**NAMED, "extra_special_tokens": MARKS},
    "EOS without its flag": {"special": False},
    "EOS of the vocabulary alone": {"eos_token": "def"},
    "EOS behind a text": {"post": wrap([], [END])},
    "BOS before a text": {"post": wrap([START], []), "bos_token": START},
    "both": {"post": wrap([START], [END]), "bos_token": START},
    "BOS that is the EOS": {"post": wrap([END], []), "bos_token": END},
    "the same on both sides": {"post": wrap([END], [END]), "bos_token": END},
    "add_bos_token beside none": {"add_bos_token": True, "add_eos_token": True, "bos_token": START},
    "add_bos_token False beside one": {
        "post": wrap([START], []), "add_bos_token": False, "bos_token": START
    },
    "add_bos_token of a Llama": {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": START
    },
    "null add_bos_token": {"add_bos_token": None},
    "templates in a list": {"chat_template": TEMPLATES},
    "tokens of the model's own": {"image_token": "<think>"},
}  # fmt: skip


def ids_of(path, rows, **settings):
    return [ids.tolist() for ids, _ in encoded(path, rows, **settings)]


def agree(path):
    """Our ids of the texts and the chats, and our special tokens, are AutoTokenizer's."""
    oracle = AutoTokenizer.from_pretrained(path)
    expected = []
    for text in TEXTS:
        ids = oracle(text)["input_ids"]
        if ids[-1] != oracle.eos_token_id and oracle.eos_token_id is not None:
            ids.append(oracle.eos_token_id)
        expected.append(ids)
    assert ids_of(path, [{"text": text} for text in TEXTS]) == expected
    ours = prepare.load_tokenizer(path).get_added_tokens_decoder()
    special, theirs = (
        {token.content for token in tokens.values() if token.special}
        for tokens in (ours, oracle.added_tokens_decoder)
    )
    assert special == theirs
    if oracle.chat_template is None:
        return
    rows = [{"messages": messages_of(chat)} for chat in CHATS]
    expected = [oracle.apply_chat_template(row["messages"], return_dict=True)["input_ids"] for row in rows]
    assert ids_of(path, rows) == ids_of(path, rows, sft=True) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_made_directory_gives_the_ids_of_transformers(kind, tmp_path):
    agree(make(tmp_path / "tokenizer", **KINDS[kind]))


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("family", ["llama2", "mistral"])
def test_a_made_tokenizer_of_llamas_class(family, legacy, model_type, tmp_path):
    """transformers 5 makes its parts anew, whatever tokenizer.json has, but of a Mistral."""
    path = tmp_path / "tokenizer"
    sentencepiece_tokenizer(path, family)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    oracle = AutoTokenizer.from_pretrained(path)
    texts = ["Hi you", " Hi", "  Hi", "Hi\n Hi"]
    expected = [[*oracle(text)["input_ids"], oracle.eos_token_id] for text in texts]
    assert ids_of(path, [{"text": text} for text in texts]) == expected


REFUSED = {
    "an EOS that is nowhere": ({"eos_token": "</s>"}, "names '</s>' as its eos_token, but no file"),
    "a BOS that is nowhere": (
        {"eos_token": "left out", "files": {"special_tokens_map": {"bos_token": {"content": "<s>"}}}},
        "names '<s>' as its bos_token, but no file",
    ),
    "another id in the decoder": (
        {"added_tokens_decoder": {"4099": token(END)}}, "'<|im_end|>' is token 4099 and token 4097",
    ),
    "another id in added_tokens.json": (
        {"in_json": [], "files": {"added_tokens": {END: 4100}}}, "'<|im_end|>' is token 4100 and token 4096",
    ),
    "no JSON": ({"files": {"added_tokens": [END]}}, "added_tokens.json holds no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_contradicts_itself_is_one_line_before_any_work(kind, tmp_path):
    made, words = REFUSED[kind]
    path = make(tmp_path / "tokenizer", **made)
    (tmp_path / "a.txt").write_text("count 0")
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        prepared(tmp_path / "a.txt", tmp_path / "out", tokenizer=path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.glob("out*"))


def test_no_eos_is_said(tmp_path, capsys):
    path = make(tmp_path / "tokenizer", eos_token=None)
    (tmp_path / "a.txt").write_text("count 0")
    assert prepared(tmp_path / "a.txt", tmp_path / "out", tokenizer=path)["eos_id"] is None
    assert "names no EOS" in capsys.readouterr().err
    assert ids_of(path, [{"text": "count 0"}]) == [[1806, 288]]


def test_byte_order_marks_in_a_directory_are_no_content(tmp_path):
    """transformers cannot read such a directory; it is compared with one without."""
    paths = [tmp_path / "plain", tmp_path / "marked"]
    for path in paths:
        make(path, in_json=[], chat_template="left out", files={"added_tokens": IDS})
        (path / "chat_template.jinja").write_text(CHATML)
    for file in paths[1].iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    rows = [{"messages": messages_of(chat)} for chat in CHATS]
    plain, marked = (ids_of(path, rows, sft=True) for path in paths)
    assert plain == marked and len(plain) == 5


def test_a_row_with_tools_takes_the_template_for_tools(tmp_path):
    path = make(tmp_path / "tokenizer", chat_template="left out")
    (path / "chat_template.jinja").write_text(CHATML)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | tojson }}" + CHATML)
    oracle = AutoTokenizer.from_pretrained(path)
    chat = messages_of(CHATS[0])
    given = [None, [], [{"name": "count"}]]
    expected = [
        oracle.apply_chat_template(chat, tools=tools, return_dict=True)["input_ids"] for tools in given
    ]
    assert len(set(map(len, expected))) == 3
    rows = [{"messages": chat, "tools": tools} for tools in given]
    assert ids_of(path, rows) == expected


@pytest.mark.parametrize("family", ["llama3", "qwen", "smollm2", "llama2"])
def test_the_families_own_tokenizers_give_the_ids_of_transformers(family):
    """From TOKENIZERS/llama3 and so on."""
    path = Path(os.environ.get("TOKENIZERS", "tokenizers")) / family
    if not path.is_dir():
        pytest.skip(f"no {path}: give the families' own tokenizers as TOKENIZERS")
    agree(path)
