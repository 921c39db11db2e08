"""Text, JSON, Parquet and chats -> memmapped token shards, and the readers of those that train.py uses.

    python prepare.py                        # the quickstart's corpus: this Python's standard library
    python prepare.py --input='books/**/*.txt' --tokenizer=models/Qwen2.5-3B-Instruct --out=data/books
    python prepare.py --input='fineweb-edu/**/*.parquet' --min_score=4 --tokenizer=… --out=data/fineweb_edu
    python prepare.py --input='openhermes/*.parquet' --tokenizer=… --out=data/openhermes      # chats, packed
    python prepare.py --input='ultrachat/train_sft*.parquet' --sft=True --tokenizer=… --out=data/ultrachat
    python prepare.py --inspect=data/books   # what a shard directory holds, and whether it is intact

Input: .txt or .py (a file is a document; over 16 MB, several), .jsonl (a line), .json (an object of an array
of at most 64 MB, or else a line), each also .gz or .zst, and .parquet (a row). A row with `messages` or
`conversations` is a chat, any other the text under text_key. Text is put between the tokenizer's BOS (where
it adds one itself) and EOS; a chat is what the tokenizer's chat template makes of it, nothing added.
"<|im_end|>" in a text or in what a turn says is text, no special token, unless special_tokens is True.

One work unit makes one shard. A unit is at most about unit_bytes of input: a byte range of lines or text,
some row groups, several small files, or a whole compressed file or .json array. A worker reads it, tokenizes
it, writes the shard under a temporary name and renames it. So the same bytes come out for any number of
workers, and killed at any moment, the same command skips the units that are there in OUT.partial.
What cannot be read is reported, counted and skipped, up to max_bad.

A shard directory holds meta.json and plain .npy files: tokens_00000.npy (uint16 or uint32 ids),
ends_00000.npy (int64: where each document ends) and with sft, where a document is a row, mask_00000.npy
(uint8: 1 for the tokens to train on). heldout_tokens_00000.npy and so on are likewise for evaluation.
"""

input: str | tuple = "stdlib"  # file or glob, or several; "stdlib": this Python's own library (.py files)
out = "data/quickstart/corpus"  # shard directory to write; must not exist
tokenizer = "data/quickstart/teacher"  # directory with tokenizer.json and tokenizer_config.json
text_key = "text"  # field of a row's text; dots reach into objects (document.body)
min_score: float | None = None  # keep only the rows whose score is at least this
score_key = "int_score"  # field of a row's score; dots reach into objects (metadata.int_score)
special_tokens = False  # True: "<|im_end|>" in a text or turn is that token, as in corpora written with marks
sft = False  # True: chats as rows, with a loss mask over the assistant's turns; False: packed text
seq_len = 2048  # longest SFT row, in tokens; the rest of the chat is cut off
heldout_fraction = 0.02  # of the documents, by a hash of their text, for evaluation
unit_bytes = 64_000_000  # bytes of input, at most about so many, that one worker makes one shard of
max_bad = 100  # unreadable rows, files or row groups to skip before giving up
num_workers = 0  # processes, each at a unit of its own; 0: one a core
inspect: str | None = None  # shard directory to describe and verify; nothing is written

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tqdm import tqdm

from configurator import fail, lock, need, read_json, sha256, show, write_json

FORMAT = 2
HEADER = 128  # bytes before the values of a one-dimensional .npy file
BLOCK = 2**16  # bytes read at a time where neither lines nor documents say how many
PIECE = 2**20  # characters tokenized at a time: longer documents are cut between two lines
LINE_END = re.compile(r"\S\r?\n(?=\S)")  # between two lines, neither of them blank
LONGEST_TEXT = 2**24  # bytes in which a .txt file is one document; a longer one is several
LONGEST_ROW = 2**26  # bytes in which a line, or the array of a .json file, must end
OPEN_ARRAYS = 256  # shard files open at a time, of the 1024 that a process may have on many systems
PAD_TO = 128  # tokens to whose multiple a batch of SFT rows is padded: a new length costs a GPU a new plan
CHAT_KEYS = {"messages", "conversations"}  # fields of which a row has one if it is a chat
SAID_TOO = ("tool_calls", "reasoning_content")  # what an assistant can say beside content
OTHER_NAMES = ("thinking", "reasoning")  # of reasoning_content, as transformers takes them
ROLES = {"human": "user", "gpt": "assistant"}  # by what conversations call them
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
CUT = "\ufdd0"  # put into a special token's string that a chat spells out; Unicode keeps it for such uses
MARK = "\ufdd1"  # put in place of what an assistant says, to find where the template writes it
BOM = b"\xef\xbb\xbf"  # a byte order mark, which is no content
PREFIX = {"tokens": "", "heldout": "heldout_"}  # of the files of each split
# What gzip, json and pyarrow raise of a damaged file.
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, NotImplementedError, RecursionError)
ARRAY_TOO_LONG = "a JSON array over 64 MB; give its rows as .jsonl or .parquet, as the hub converts them"
STDLIB = Path(os.__file__).parent


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, by all of its files; ValueError where they contradict."""
    file = Path(path) / "tokenizer.json"
    try:
        model = Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} is no tokenizer.json of a Hugging Face directory: {error}") from None
    # A file can carry the length limit of whoever saved it.
    model.no_truncation()
    model.no_padding()
    config = tokenizer_config(path)
    # transformers 5 makes this class's parts anew, without a second space before a text; 4.51 did not. Of a
    # Mistral it takes the file as it is, which also names this class.
    is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    beside = Path(path) / "config.json"
    is_llama = is_llama and not (beside.is_file() and read_json(beside).get("model_type") == "mistral")
    if is_llama and "ByteLevel" not in f"{model.decoder} {model.pre_tokenizer}":
        scheme = "always" if config.get("legacy") else "first"
        scheme = "never" if config.get("add_prefix_space") is False else scheme
        model.normalizer = normalizers.Sequence([])
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    more = config["additional_special_tokens"]
    named = [token for name, token in config.items() if name.endswith("_token") and token] + more
    added = {token.content: token for token in model.get_added_tokens_decoder().values()}
    for i, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        if isinstance(token, dict):
            token = AddedToken(**token)
        else:
            # Of added_tokens.json, which has no flags; tokenizer.json can have them.
            token = added.get(token) or AddedToken(token, normalized=token not in named)
        added[token.content] = token
        model.add_tokens([token])
        if (found := model.token_to_id(token.content)) != int(i):
            raise ValueError(f"{path} contradicts itself: {token.content!r} is token {i} and token {found}")
    for name in ("bos_token", "eos_token"):
        if config.get(name) and model.token_to_id(config[name]) is None:
            raise ValueError(f"{path} names {config[name]!r} as its {name}, but no file there has that token")
    # A name without an id gets the next one, as in transformers; but a pad_token and its like are in no text.
    for token in (token for token in named if token in more or model.token_to_id(token) is not None):
        model.add_special_tokens([added.get(token) or AddedToken(token, normalized=False)])
    return model


def tokenizer_config(path: str | Path) -> dict:
    """What the files beside tokenizer.json say: tokenizer_config.json's fields, with tokens as strings."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    files = [Path(path) / name for name in names]
    config, special, ids = (read_json(file) if file.is_file() else {} for file in files)
    # transformers lets the other two files win, or passes over them where there is an added_tokens_decoder.
    config = special | config if "added_tokens_decoder" in config else config | special
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []

    def content(token) -> str | None:
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None  # add_bos_token and the like are no tokens

    config |= {name: content(token) for name, token in config.items() if name.endswith("_token")}
    more = more.values() if isinstance(more, dict) else more
    config["additional_special_tokens"] = [content(token) for token in more]
    decoder = {i: token for token, i in ids.items()}
    return config | {"added_tokens_decoder": config.get("added_tokens_decoder") or decoder}


def special_ids(tokenizer: Tokenizer, path: str | Path) -> tuple[list[int], int | None]:
    """(ids the tokenizer itself puts before a text, EOS id by its directory's files)."""
    eos = tokenizer_config(path).get("eos_token")
    # transformers 5 passes over add_bos_token where there is a tokenizer.json, as here; 4.51 did not.
    encoded = tokenizer.encode("a")
    before = [*encoded.sequence_ids, 0].index(0)
    return encoded.ids[:before], None if eos is None else tokenizer.token_to_id(eos)


def special_pattern(tokenizer: Tokenizer) -> re.Pattern:
    """Finds the special tokens' strings in a text; of several that begin alike the longest."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def break_specials(special: re.Pattern, value):
    """A text, or an object with texts in it, with CUT in every special token's string that it spells out.

    ValueError where CUT or MARK is in it already."""
    if isinstance(value, str) and (CUT in value or MARK in value):
        raise ValueError(f"it has {CUT!a} or {MARK!a} in it, which Unicode keeps for programs")
    if isinstance(value, str):
        return special.sub(lambda match: match[0][0] + CUT + match[0][1:], value)
    if isinstance(value, dict):
        return {key: break_specials(special, member) for key, member in value.items()}
    return [break_specials(special, member) for member in value] if isinstance(value, list) else value


def puts_space_first(tokenizer: Tokenizer) -> bool:
    """Whether it puts a space before a text, as those of Llama 2 and Mistral do."""
    return "".join(tokenizer.encode("a", add_special_tokens=False).tokens).startswith("▁")


def encode_text(
    tokenizer: Tokenizer, text: str, special_tokens: bool = False, goes_on: bool = False
) -> list[int]:
    """Ids of a text in which special tokens' strings are those tokens, or else text like any other.

    goes_on: the text stands behind another one, so that a tokenizer which puts a space first must not.
    ValueError where the text has half of a surrogate pair, as JSON can.
    """
    text.encode()
    tokenizer.encode_special_tokens = not special_tokens
    ids = []
    start = 0
    while start < len(text):
        # A long text is cut between two lines, where a token ends anyway, or else where it must be.
        end = start + PIECE
        if end < len(text) and (match := LINE_END.search(text, start + PIECE // 2, end)):
            end = match.end()
        # A line end before the piece takes the space, and no token reaches over it.
        lead = "\n" if goes_on and puts_space_first(tokenizer) else ""
        both = [lead, lead + text[start:end]]
        before, whole = tokenizer.encode_batch_fast(both, add_special_tokens=False)
        ids += whole.ids[len(before.ids) :]
        start = end
        goes_on = True
    tokenizer.encode_special_tokens = False
    return ids


def encode_rendered(tokenizer: Tokenizer, text: str, goes_on: bool = False) -> list[int]:
    """Ids of a rendered chat: special tokens' strings are those tokens, but for those with CUT in them."""
    ids = []
    for part in text.split(CUT):
        ids += encode_text(tokenizer, part, special_tokens=True, goes_on=goes_on)
        goes_on = True
    return ids


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The same for any file that maps the same tokens to the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


@functools.cache
def chat_template(path: str | Path) -> Callable[..., str]:
    """The chat template in a tokenizer's directory as a function of messages, set up as transformers does."""
    config = tokenizer_config(path)
    # A tokenizer can have several by name, as for tools or for retrieval.
    sources = config.get("chat_template") or {}
    if isinstance(sources, str):
        sources = {"default": sources}
    if isinstance(sources, list):
        sources = {entry["name"]: entry["template"] for entry in sources}
    # Those in files take the place of all in the config.
    files = [*Path(path).glob("additional_chat_templates/*.jinja"), *Path(path).glob("chat_template.jinja")]
    if files:
        sources = {file.stem: file.read_text(encoding="utf-8-sig") for file in files}
        sources["default"] = sources.pop("chat_template", None)
    if sources.get("default") is None:
        raise ValueError(f"{path} has no chat template, in chat_template.jinja or tokenizer_config.json")
    sandbox = need("jinja2.sandbox", f"the chat template of {path}")

    def raise_exception(message):
        raise ValueError(message)

    def to_json(value, ensure_ascii=False, **options):
        text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        # Escaped, CUT and MARK would be content.
        return re.sub(r"\\ufdd[01]", lambda match: json.loads(f'"{match[0]}"'), text)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    # A fixed day, the one Llama's templates fall back to: shards must not depend on when they were made.
    environment.globals["strftime_now"] = datetime(2024, 7, 26).strftime
    templates = {}
    for name, source in sources.items():
        # {% generation %} only marks what the assistant says; as an `if` it keeps its whitespace control.
        source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
        try:
            templates[name] = environment.from_string(source)
        except Exception as error:  # jinja2 is imported only by need
            raise ValueError(f"the chat template of {path} is broken: {error}") from None
    fixed = {name: token for name, token in config.items() if name.endswith("_token") and token}

    def render(
        messages: list[dict], tools: list[dict] | None = None, add_generation_prompt=False, **more
    ) -> str:
        template = templates["tool_use" if tools is not None and "tool_use" in templates else "default"]
        options = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(messages=messages, **fixed | options | more)
        except Exception as error:  # whatever a template does not like about a chat
            raise ValueError(f"the chat template: {error}") from None

    return render


# ---- input: work units, and the rows in them


class Part(NamedTuple):
    """A piece of an input file, for one worker."""

    file: Path
    start: int  # in bytes; of a Parquet file its row group
    end: int  # in bytes
    size: int  # bytes of input, by which parts become units


def kind_of(file: Path) -> tuple[str, str | None]:
    """("jsonl", "gz") of name.jsonl.gz, ("txt", None) of name.txt and of name.py."""
    match = re.fullmatch(r".*\.(txt|py|jsonl|json|parquet$)(?:\.(gz|zst))?", file.name)
    if match is None:
        raise ValueError(f"{file}: input must be .parquet, or .txt .py .jsonl .json, also as .gz or .zst")
    return match[1].replace("py", "txt"), match[2]


def find_files(input: str | list[str]) -> list[Path]:
    """The input's files in the order they are read."""
    if input == "stdlib":
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        skipped |= {"encodings", "pydoc_data"}  # tables and prose in .py files
        return sorted(f for f in STDLIB.rglob("*.py") if not skipped & set(f.relative_to(STDLIB).parts))
    files = []
    for pattern in [input] if isinstance(input, str) else input:
        if not isinstance(pattern, str):
            raise ValueError(f"input has {pattern!r} in it, which is no file or glob; several are ('a', 'b')")
        # What is there is meant as it is written, brackets and stars too; what is not is a glob.
        there = pattern
        while there and not os.path.exists(there):
            there = os.path.dirname(there)
        pathname = glob.escape(there) + pattern[len(there) :]
        matches = sorted(Path(f) for f in glob.glob(pathname, recursive=True) if os.path.isfile(f))
        if os.path.isdir(pattern):
            raise ValueError(f"input {pattern} is a directory; name its files: '{pattern}/**/*.parquet'")
        if not matches:
            raise ValueError(f"input {pattern} matches no file")
        files += matches
    return list(dict.fromkeys(files))  # one that several patterns match is read once


def columns_of(key: str) -> set[str]:
    """Names of the Parquet columns that a field can be in: its whole name, or the first before a dot."""
    return {key, key.partition(".")[0]}


def begins_array(stream) -> bool:
    return stream.peek(BLOCK).removeprefix(BOM).lstrip().startswith(b"[")


def split_file(file: Path, settings: dict) -> Iterator[Part]:
    """The parts of a file that workers can read side by side."""
    kind, compression = kind_of(file)
    size = file.stat().st_size
    if kind == "parquet":
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        if not (columns_of(settings["text_key"]) | CHAT_KEYS) & set(names):
            wanted = f"{settings['text_key']}, messages or conversations"
            raise ValueError(f"{file} has no column {wanted}; it has {', '.join(names)}")
        for group in range(parquet.num_row_groups):
            yield Part(file, group, 0, parquet.metadata.row_group(group).total_byte_size)
        return
    # Here what cannot be opened, or lacks a package, is told before any work.
    with open_stream(file, compression) as stream:
        is_array = kind == "json" and begins_array(stream)
    if is_array and size > LONGEST_ROW:
        raise ValueError(f"{file} is {ARRAY_TOO_LONG}")
    # Lines are cut into small parts, so that units of them are of one size; a part of a text is a document.
    step = LONGEST_TEXT if kind == "txt" else max(1, settings["unit_bytes"] // 16)
    # What is compressed, or an array, is read from its start.
    if compression or is_array:
        step = sys.maxsize
    for start in range(0, size, step):
        yield Part(file, start, start + step, min(step, size - start))


def plan_units(files: list[Path], settings: dict) -> list[list[Part]]:
    """Work units of one size, half to all of unit_bytes, as far as parts allow; in the order of the input."""
    parts = [part for file in files for part in split_file(file, settings)]
    total = sum(part.size for part in parts)
    # A power of two, so that two, four or eight workers end at about the same time.
    count = 1 << math.ceil(math.log2(max(1, total / settings["unit_bytes"])))
    units = [[] for _ in range(count)]
    # A part goes where it begins, so that the last unit is no smaller than the others.
    before = 0
    for part in parts:
        units[before * count // total].append(part)
        before += part.size
    return [unit for unit in units if unit]


def skip_line(stream) -> int:
    """Reads on to the end of a line; returns how many bytes that took."""
    skipped = 0
    while data := stream.readline(BLOCK):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def read_spans(stream, part: Part, size: int) -> Iterator[tuple[str, bytes | ValueError]]:
    """(where, span) of a part: each `size` bytes and on to the end of the line; 0: single lines.

    A part begins after the first newline at or past its start and ends with the line that holds its end, so
    that neighbours share no line and leave none out. A span whose last line is over LONGEST_ROW is an error.
    """
    offset = part.start
    # The line that the start lies in is the part's before.
    if offset:
        stream.seek(offset)
        offset += skip_line(stream)
    # One that begins right at the end is skipped by the next part, and so is this one's.
    while offset <= part.end:
        where = f"byte {offset}"
        span = stream.read(min(size, part.end - offset))
        line = stream.readline(LONGEST_ROW + 1)
        span += line
        length = len(span)
        if not length:
            return
        if offset == 0:
            span = span.removeprefix(BOM)
        if len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            length += skip_line(stream)
            yield where, ValueError(f"a line over {LONGEST_ROW:,} bytes")
        elif span.strip():  # blank lines stand between rows or at the end
            yield where, span
        offset += length


# Row groups follow one another, and the metadata of thousands of them takes a while to read.
@functools.lru_cache(maxsize=1)
def open_parquet(file: Path):
    parquet = need("pyarrow.parquet", file)
    try:
        return parquet.ParquetFile(file, buffer_size=BLOCK, page_checksum_verification=True)
    except UNREADABLE as error:
        raise ValueError(f"{file} is not Parquet: {error}") from None


def drop_nulls(value):
    """An object without the keys that are null: Arrow gives all structs of a column the keys of each."""
    if isinstance(value, dict):
        return {key: drop_nulls(member) for key, member in value.items() if member is not None}
    return [drop_nulls(member) for member in value] if isinstance(value, list) else value


def open_stream(file: Path, compression: str | None):
    """A file's bytes, decompressed; reading broken or truncated compression raises OSError or EOFError."""
    if compression == "gz":
        return gzip.open(file, "rb")
    if compression == "zst":
        # The package zstandard takes a truncated file for a whole one.
        pyarrow = need("pyarrow", file)
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), BLOCK)
    return open(file, "rb")


def read_part(part: Part, settings: dict) -> Iterator[tuple[str, object]]:
    """(where, row) of a part: a row is text or JSON (bytes), an object or what is wrong (ValueError)."""
    kind, compression = kind_of(part.file)
    where = f"row group {part.start}" if kind == "parquet" else "its start"
    try:
        for where, row in read_rows(part, kind, compression, settings):
            yield f"{part.file}: {where}", row
    except UNREADABLE as error:
        # What was read before the damage is kept. An error of the machine has a number and ends the run.
        if getattr(error, "errno", None):
            raise
        reason = f"unreadable behind {where}: {error}".replace("\n", " ")
        yield str(part.file), ValueError(reason)


def read_rows(part: Part, kind: str, compression: str | None, settings: dict) -> Iterator[tuple[str, object]]:
    """(where in its file, row) of a part; one of UNREADABLE where the file is damaged."""
    if kind == "parquet":
        parquet = open_parquet(part.file)
        wanted = columns_of(settings["text_key"]) | columns_of(settings["score_key"]) | CHAT_KEYS
        wanted |= {"tools", "chat_template_kwargs"}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        # The other cores have workers of their own.
        batches = parquet.iter_batches(256, [part.start], columns, use_threads=False)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, 1):
            yield f"row group {part.start}, row {number}", drop_nulls(row)
        return
    with open_stream(part.file, compression) as stream:
        if kind == "json" and part.start == 0 and begins_array(stream):
            # In memory as a whole.
            data = stream.read(LONGEST_ROW + 1)
            if len(data) > LONGEST_ROW:
                raise ValueError(ARRAY_TOO_LONG)
            for number, row in enumerate(json.loads(data), 1):
                yield f"row {number}", row
        else:
            yield from read_spans(stream, part, LONGEST_TEXT if kind == "txt" else 0)


# ---- documents: the text or the turns of a row, as token ids


def lookup(row: dict, key: str):
    """The value under a name, or under names joined by dots; None where there is none."""
    if key in row:
        return row[key]
    for name in key.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


class Encoder:
    """Rows -> token ids and loss masks, by a tokenizer's files and the settings."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.model = load_tokenizer(settings["tokenizer"])
        self.bos_ids, self.eos_id = special_ids(self.model, settings["tokenizer"])
        self.special = special_pattern(self.model)
        self.vocab_size = max(self.model.get_vocab().values()) + 1
        self.dtypes = {"tokens": "uint16" if self.vocab_size <= 2**16 else "uint32", "ends": "int64"}
        if settings["sft"]:
            self.dtypes["mask"] = "uint8"
            chat_template(settings["tokenizer"])

    def encode_chat(self, turns: list[dict], tools=None, more=None) -> tuple[str, list[int], list[bool]]:
        """(rendered text, ids, loss mask: the assistant's turns, each with the special token that ends it).

        tools, more: what the template gets beside the turns, as `tools` and by name. Without sft there is no
        mask. With it the chat is rendered a second time, with MARK as what the assistant says. Between
        special tokens, of which the turns themselves have none by CUT, a turn is where the two differ; so it
        is found whatever the template adds, trims or leaves out. It begins where the template's prompt for a
        reply ends: the <think> block that Qwen3 writes itself before the last answer is part of the turn.
        """
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
        if not all(isinstance(tool, dict) for tool in tools or []):
            raise ValueError("its tools are no list of objects")
        chat = []
        marked = []
        longer = []
        for turn in turns:
            # Chats come as messages of role and content, and as conversations of from and value.
            turn = {"role": turn.get("from"), "content": turn.get("value"), **turn}
            turn = {key: value for key, value in turn.items() if value is not None}
            for name in OTHER_NAMES:
                if name in turn:
                    turn.setdefault("reasoning_content", turn[name])
            role = turn.get("role")
            # A role that a template does not know is left out of the chat by some.
            if "from" in turn and role not in ROLES:
                raise ValueError(f"a turn is from {role!r}, which is none of {', '.join(ROLES)}")
            role = turn["role"] = ROLES.get(role, role)
            calls = role == "assistant" and any(turn.get(key) for key in SAID_TOO)
            if not (isinstance(role, str) and isinstance(turn.get("content", "" if calls else None), str)):
                raise ValueError("a turn without a role (from) or without text as its content (value)")
            if calls:
                longer.append(len(chat))
            chat.append(break_specials(self.special, turn))
            marked.append({**chat[-1], "content": MARK} if role == "assistant" and not calls else chat[-1])
        tools, more = break_specials(self.special, [tools, more or {}])
        render = functools.partial(chat_template(self.settings["tokenizer"]), tools=tools, **more)
        whole = render(chat)
        if not self.settings["sft"]:
            return whole.replace(CUT, ""), self.encode_rendered(whole), []
        # Lists of text, special token, text, …, of one length if the answers do not change the template.
        full = self.special.split(whole)
        skeleton = self.special.split(render(marked))
        if full[1::2] != skeleton[1::2]:
            raise ValueError("the template's special tokens depend on what the assistant says")

        # Of each turn its first text, what the prompt has of that, and the special token that ends it.
        bounds = [self.turn_bounds(render, chat, i, full) for i in longer]
        for i, pattern in enumerate(skeleton):
            before, mark, after = pattern.partition(MARK)
            if after.strip():
                raise ValueError("the template ends an assistant's turn without a special token")
            if mark:
                bounds.append((i, before, min(i + 1, len(full) - 1)))
        # The whole rendering, each turn of the assistant's between two MARKs.
        text = list(full)
        prompted = render(chat, add_generation_prompt=True)
        prompt = self.special.split(prompted)[-1]
        for first, before, last in bounds:
            if prompted != whole and before.startswith(prompt):
                before = prompt  # what the template writes behind it is for the model to write
            # Up to here the prompt is the same whatever the answer; a turn ends with the token after it.
            start = len(os.path.commonprefix([full[first], before]))  # noqa: RUF071
            if puts_space_first(self.model):  # its words begin with their space
                start = len(full[first][:start].rstrip(" "))
            text[last] += MARK
            text[first] = full[first][:start] + MARK + text[first][start:]
        # A turn by itself: no token reaches over its boundary, as none does when it is generated.
        ids = []
        mask = []
        goes_on = False
        for i, segment in enumerate("".join(text).split(MARK)):
            new = self.encode_rendered(segment, goes_on)
            goes_on = self.special.split(segment)[-1] != ""  # not behind a special token
            ids += new
            mask += [i % 2 == 1] * len(new)
        return whole.replace(CUT, ""), ids, mask

    def encode_rendered(self, text: str, goes_on: bool = False) -> list[int]:
        if self.settings["special_tokens"]:
            text = text.replace(CUT, "")
        return encode_rendered(self.model, text, goes_on)

    def turn_bounds(self, render: Callable, chat: list[dict], i: int, full: list[str]) -> tuple:
        """encode_chat's bounds of turn i, which says more than content, such as tool_calls: from where MARK
        alone would stand to where a chat up to it ends."""
        said = {"role": "assistant", "content": MARK}
        try:
            opened = self.special.split(render([*chat[:i], said, *chat[i + 1 :]]))
        except ValueError:  # a template can refuse what follows a turn without calls
            opened = self.special.split(render([*chat[:i], said]))
        whole = render(chat[: i + 1])
        if chat[i].get("tool_calls"):
            try:
                others = {name: value for name, value in chat[i].items() if name != "tool_calls"}
                without = render([*chat[:i], others])
            except ValueError:  # it may need one of the two
                without = None
            if without == whole:
                raise ValueError("the template does not write tool calls")
        closed = self.special.split(whole)
        first = next((k for k, text in enumerate(opened) if MARK in text), len(opened))
        last = len(closed) - 2
        is_prefix = opened[1:first:2] + closed[1::2] == full[1:first:2] + full[1 : last + 1 : 2]
        if closed[-1].strip() or first > last or not is_prefix:
            raise ValueError("the template's special tokens do not show the bounds of a turn of tool calls")
        return first, opened[first].partition(MARK)[0], last

    def row(self, row, file: Path) -> tuple[str, list[int], list[bool]] | None:
        """(split, ids, loss mask) of a row; None: filtered out; ValueError says what is wrong with it."""
        settings = self.settings
        if isinstance(row, ValueError):
            raise row
        if isinstance(row, bytes) and kind_of(file)[0] == "txt":
            row = {settings["text_key"]: row.decode()}
        elif isinstance(row, bytes):
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        if settings["min_score"] is not None:
            score = lookup(row, settings["score_key"])
            if not isinstance(score, int | float):
                raise ValueError(f"no number under {settings['score_key']}")
            if not score >= settings["min_score"]:  # a NaN is not
                return None

        turns = row.get("messages") or row.get("conversations")
        if turns:
            try:
                text, ids, mask = self.encode_chat(turns, row.get("tools"), row.get("chat_template_kwargs"))
            except Exception as error:  # whatever a template does not like about a chat
                raise ValueError(f"chat: {error}") from None
        elif settings["sft"]:
            raise ValueError("not a chat")
        else:
            text = lookup(row, settings["text_key"])
            if not isinstance(text, str):
                raise ValueError(f"no text under {settings['text_key']}")
            ids = self.bos_ids + encode_text(self.model, text, settings["special_tokens"])
            if self.eos_id is not None:
                ids.append(self.eos_id)
            mask = []
        if not text:
            return None
        if settings["sft"]:
            ids = ids[: settings["seq_len"]]
            mask = mask[: settings["seq_len"]]
            # Nobody answers, or the question alone is too long.
            if True not in mask:
                return None
        # The quickstart holds out the same files in any version of Python.
        key = str(file.relative_to(STDLIB)) if settings["input"] == "stdlib" else text
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        split = "heldout" if number < settings["heldout_fraction"] * 2**64 else "tokens"
        return split, ids, mask


# ---- shards, written

WORKER = {}  # a worker's Encoder, the directory it writes to, and max_bad


class ShardWriter:
    """One shard's .npy files, which grow: tokens, ends and, with sft, mask."""

    def __init__(self, directory: Path, split: str, number: int, dtypes: dict[str, str]):
        self.dtypes = dtypes
        self.counts = dict.fromkeys(dtypes, 0)
        self.paths = {column: directory / f"{PREFIX[split]}{column}_{number:05d}.npy" for column in dtypes}
        self.files = {column: open(path, "wb") for column, path in self.paths.items()}
        # Left free for the header, which says how long the array is.
        for file in self.files.values():
            file.write(bytes(HEADER))

    def append(self, ids: list[int], mask: list[bool]) -> None:
        """A document."""
        values = {"tokens": ids, "ends": [self.counts["tokens"] + len(ids)], "mask": mask}
        for column, file in self.files.items():
            file.write(np.asarray(values[column], self.dtypes[column]).tobytes())
            self.counts[column] += len(values[column])

    def close(self) -> dict:
        """The shard's entry in meta.json."""
        for column, file in self.files.items():
            descr = np.dtype(self.dtypes[column]).str
            header = {"descr": descr, "fortran_order": False, "shape": (self.counts[column],)}
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            os.fsync(file.fileno())
            file.close()
        counts = {"tokens": self.counts["tokens"], "documents": self.counts["ends"]}
        sums = {path.name: sha256(path) for path in self.paths.values()}
        return {"file": self.paths["tokens"].name, **counts, "sha256": sums}


def start_worker(worker: dict) -> None:
    WORKER.update(worker)
    # The other cores have workers of their own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A file that the parent has open would be read from one position by all.
    open_parquet.cache_clear()

    def end_with_parent():
        # It may be killed without a chance to tell.
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_unit(number: int, parts: list[Part]) -> dict:
    """Makes the unit's shards, unless they are there; returns {"filtered", "bad", "shards"} of it."""
    encoder = WORKER["encoder"]
    partial = WORKER["partial"]
    done = partial / f"unit_{number:05d}.json"
    if done.is_file():
        result = read_json(done)
        if not any(damaged_files(partial / "shards", shard) for shard in result["shards"].values()):
            return result
    result = {"filtered": 0, "bad": [], "shards": {}}
    writers = {}
    rows = ((part.file, *row) for part in parts for row in read_part(part, encoder.settings))
    for file, where, row in rows:
        try:
            document = encoder.row(row, file)
        except ValueError as error:
            result["bad"].append(f"{where}: {error}")
            # Nobody goes on, and so the unit is left as it is.
            if len(result["bad"]) > WORKER["max_bad"]:
                return result
            continue
        if document is None:
            result["filtered"] += 1
            continue
        split, ids, mask = document
        if split not in writers:
            writers[split] = ShardWriter(partial / "shards", split, number, encoder.dtypes)
        writers[split].append(ids, mask)
    result["shards"] = {split: writer.close() for split, writer in writers.items()}
    # Where this file is there, so are the shards.
    write_json(done, result)
    return result


def damaged_files(directory: Path, shard: dict) -> list[Path]:
    """The files of a shard, by its entry in meta.json, that are missing or not what was written."""
    files = {directory / name: written for name, written in shard["sha256"].items()}
    return [file for file, written in files.items() if not file.is_file() or sha256(file) != written]


def run_units(units: list[list[Part]], workers: int, worker: dict) -> list[dict]:
    """write_unit's results for all units, worked on side by side."""
    results = []
    bad = []
    pool = ProcessPoolExecutor(workers, None, start_worker, (worker,))
    try:
        # Not by map, which drops the units that wait after an error; the pool then breaks with a traceback.
        futures = [pool.submit(write_unit, number, parts) for number, parts in enumerate(units)]
        for future in show(futures, desc="preparing", unit="unit"):
            result = future.result()
            bad += result["bad"]
            if len(bad) > worker["max_bad"]:
                count = f"{len(bad)} bad documents, more than max_bad = {worker['max_bad']}"
                advice = "the same command with a higher --max_bad goes on from here"
                raise ValueError(f"{count}, the last {bad[-1]}; {advice}")
            for reason in result["bad"]:
                tqdm.write(f"skipped {reason}", file=sys.stderr)
            results.append(result)
        return results
    except BrokenExecutor:
        # As the kernel does when memory is short.
        raise ValueError("a worker was killed; the same command goes on with the units left") from None
    finally:
        # After an error or Ctrl-C nobody waits for units that are not whole, which can take hours.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()


def check_settings(begun: dict, settings: dict, directory: Path) -> None:
    """ValueError where a directory was begun with other settings than these."""
    for name, value in settings.items():
        if begun.get(name) != value:
            wrong = f"was begun with {name} = {begun.get(name)!r}, not {value!r}"
            raise ValueError(f"{directory} {wrong}; remove it or choose another --out")


def write_shards(
    input=input, out=out, tokenizer=tokenizer, text_key=text_key, min_score=min_score, score_key=score_key,
    special_tokens=special_tokens, sft=sft, seq_len=seq_len, heldout_fraction=heldout_fraction,
    unit_bytes=unit_bytes, max_bad=max_bad, num_workers=num_workers,
) -> None:  # fmt: skip
    """Tokenizes the input into the shard directory `out`; ValueError before any work if something is missing.

    Goes on in out.partial where an earlier call with the same settings was cut off.
    """
    # What decides which bytes are written, in the form that it has when it is read back.
    settings = {k: v for k, v in locals().items() if k not in ("out", "max_bad", "num_workers")}
    settings = json.loads(json.dumps(settings, default=str))
    out = Path(out)
    partial = Path(f"{out}.partial")
    if out.exists() and not (out / "meta.json").is_file():
        raise ValueError(f"{out} exists and is no shard directory; remove it or choose another --out")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be from 0 to below 1")
    least = {"max_bad": (max_bad, 0), "num_workers": (num_workers, 0), "unit_bytes": (unit_bytes, 1)}
    for name, (value, bound) in (least | {"seq_len": (seq_len, 2)}).items():
        if value < bound:
            raise ValueError(f"{name} is {value}; it must be at least {bound}")
    files = find_files(settings["input"])
    for file in files:
        if kind_of(file)[0] == "txt" and (sft or min_score is not None):
            raise ValueError(f"{file} is plain text: it has no {'chats' if sft else 'scores'}")
    encoder = Encoder(settings)
    if encoder.eos_id is None:
        print(f"{tokenizer} names no EOS: nothing marks where a text ends", file=sys.stderr)

    # Of the input, names, sizes and times of change stand for what is in it.
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    total_size = sum(size for _, size, _ in listing)
    settings["input_files"] = f"{len(files)} files, {total_size:,} bytes, {digest}"
    patterns = ("*token*.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
    found = [file for pattern in patterns for file in sorted(Path(tokenizer).glob(pattern))]
    settings["tokenizer_files"] = {file.name: sha256(file) for file in found}
    if out.exists():
        check_settings(read_meta(out)["settings"], settings, out)
        # Left by a call that was killed before its very last step.
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{out} is there already, made with the same settings")
        return

    units = plan_units(files, settings)
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    lock(partial)
    # Units that other settings made do not go with these.
    if (partial / "settings.json").is_file():
        check_settings(read_json(partial / "settings.json"), settings, partial)
    write_json(partial / "settings.json", settings)
    if done := len(list(partial.glob("unit_*.json"))):
        print(f"going on in {partial}: {done} of {len(units)} units are done")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    worker = {"encoder": encoder, "partial": partial, "max_bad": max_bad}
    results = run_units(units, num_workers or cores, worker)

    # What came of it, in the order of the input.
    filtered = sum(result["filtered"] for result in results)
    bad = [reason for result in results for reason in result["bad"]]
    shards = {}
    for split in PREFIX:
        shards[split] = [result["shards"][split] for result in results if split in result["shards"]]
    documents = {split: sum(shard["documents"] for shard in shards[split]) for split in shards}
    tokens = {split: sum(shard["tokens"] for shard in shards[split]) for split in shards}
    summary = [f"{documents[split]:,} documents, {tokens[split]:,} tokens" for split in shards]
    counts = f"{summary[0]} for training; {summary[1]} held out; {filtered:,} filtered out, {len(bad):,} bad"
    if not shards["tokens"]:
        shutil.rmtree(partial)
        raise ValueError(f"the input holds no text to train on: {len(files)} files, {counts}")
    meta = {
        "format": FORMAT, "dtype": encoder.dtypes["tokens"], "vocab_size": encoder.vocab_size,
        "vocabulary_hash": vocabulary_hash(encoder.model), "tokenizer": str(tokenizer),
        "bos_ids": encoder.bos_ids, "eos_id": encoder.eos_id, "sft": sft, "settings": settings,
        "documents": documents, "filtered": filtered, "bad": len(bad), "first_bad": bad[:100],
        "splits": shards,
    }  # fmt: skip
    # With its last file the directory is whole, and then gets its name.
    write_json(partial / "shards/meta.json", meta)
    (partial / "shards").rename(out)
    shutil.rmtree(partial)
    print(f"{out}: {counts}")
    if heldout_fraction and not documents["heldout"]:
        advice = "give more and shorter ones (files, or lines of .jsonl), or a larger --heldout_fraction"
        none = f"nothing is held out of {documents['tokens']:,} documents, so train.py cannot evaluate"
        print(f"{none}: {advice}")


# ---- shards, read


def read_meta(path: Path) -> dict:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path} has no meta.json: not a shard directory (prepare.py writes one)")
    meta = read_json(path / "meta.json")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has shard format {meta.get('format')}, not {FORMAT}: prepare it again")
    return meta


@functools.lru_cache(OPEN_ARRAYS)
def map_array(file: Path, length: int, dtype: str) -> np.ndarray:
    """A .npy file, memory-mapped; ValueError names it where it is not what meta.json says."""
    try:
        values = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or missing: {error}") from None
    if values.shape != (length,) or values.dtype != dtype:
        raise ValueError(f"{file} holds {values.shape} {values.dtype}; meta.json says ({length},) {dtype}")
    return values


class Batch(NamedTuple):
    """Samples to train on, packed text, SFT rows or random tokens alike; all arrays are int64."""

    ids: np.ndarray  # [B, T] input tokens, padded with 0
    labels: np.ndarray  # [B, T] the token after each; -100: not trained on
    documents: np.ndarray  # [B, T] which document of its block, from 0 on, each token is in
    source: np.ndarray  # [B] index in `sources` of where each sample is from


class Shards:
    """One split of a shard directory as blocks to train on.

    Packed (sft = False): a block is seq_len + 1 tokens; blocks overlap by one, for input and next tokens. SFT
    (sft = True): a block is a row. ValueError names a directory or file that is not whole, or one without a
    block.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int, sft: bool = False):
        self.path = Path(path)
        self.seq_len = seq_len
        self.sft = sft
        self.meta = read_meta(self.path)
        self.shards = self.meta["splits"][split]
        if sft and not self.meta["sft"]:
            raise ValueError(f"{path} holds packed text, not SFT rows (prepare.py --sft=True writes those)")
        # A packed reader leaves the mask of SFT rows alone.
        columns = ["tokens", "ends", "mask"] if sft else ["tokens", "ends"]
        blocks = []
        for number, shard in enumerate(self.shards):
            # Is everything there, and whole?
            for column in columns:
                self.array(number, column)
            blocks.append(shard["documents"] if sft else max(0, shard["tokens"] - 1) // seq_len)
        self.starts = [0, *itertools.accumulate(blocks)]  # first block of each shard
        self.blocks = self.starts[-1]
        total = sum(shard["tokens"] for shard in self.shards)
        if self.blocks == 0:
            wanted = "row" if sft else f"block of seq_len {seq_len} + 1"
            raise ValueError(f"{path}: {total} tokens in its {split} split, not one {wanted}")
        self.tokens_per_block = total / self.blocks if sft else seq_len

    def array(self, number: int, column: str) -> np.ndarray:
        """The tokens, ends or mask of shard `number`."""
        shard = self.shards[number]
        dtype = {"tokens": self.meta["dtype"], "ends": "int64", "mask": "uint8"}[column]
        length = shard["documents" if column == "ends" else "tokens"]
        return map_array(self.path / shard["file"].replace("tokens", column), length, dtype)

    def block(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, labels, documents), each [T], of block i; T is seq_len, or a row's length - 1."""
        shard = bisect_right(self.starts, i) - 1
        number = i - self.starts[shard]
        ends = self.array(shard, "ends")
        if self.sft:
            row = slice(ends[number - 1] if number else 0, ends[number])
            tokens = self.array(shard, "tokens")[row].astype(np.int64)
            labels = np.where(self.array(shard, "mask")[row], tokens, -100)[1:]
            return tokens[:-1], labels, np.zeros_like(labels)
        start = number * self.seq_len
        end = start + self.seq_len
        tokens = self.array(shard, "tokens")[start : end + 1].astype(np.int64)
        # Only the ends within the block; those at its very start belong to what is before it.
        first, last = np.searchsorted(ends, [start, end], side="right")
        documents = np.searchsorted(ends[first:last], np.arange(start, end), side="right")
        return tokens[:-1], tokens[1:], documents


def permute(i: int, n: int, seed: int) -> int:
    """Where a pseudo-random permutation of range(n), keyed by seed, puts i; needs no memory.

    A four-round Feistel network on the least even number of bits that holds n, walked until it lands below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            # splitmix64's finaliser as the round function
            z = (right + (seed * 4 + r + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((z ^ (z >> 31)) & mask)
        i = left << half | right
        if i < n:
            return i


class Mixture:
    """Blocks of several shard directories in one shuffled order: sample i is a pure function of (seed, i).

    data: {directory: how many of its tokens come in an epoch of `total` samples, or None for all}. Each epoch
    shuffles all the sources' blocks together; each block of a source comes once before any comes again.
    """

    def __init__(self, data: dict[str, float | None], split: str, seq_len: int, seed: int, sft: bool = False):
        self.sources = [Shards(path, split, seq_len, sft) for path in data]
        # What their losses are logged by: their paths where two directories have one name.
        self.names = [source.path.name for source in self.sources]
        if len(set(self.names)) < len(self.names):
            self.names = [str(source.path) for source in self.sources]
        self.seq_len = seq_len
        self.seed = seed
        self.sft = sft
        if not data:
            raise ValueError("data is {}; it must name a shard directory")
        for source, budget in zip(self.sources, data.values(), strict=True):
            least = source.tokens_per_block
            is_number = isinstance(budget, int | float)
            if budget is not None and not (is_number and least <= budget < math.inf):
                wanted = f"None, or a number of at least {math.ceil(least)}, which is a block"
                raise ValueError(f"data has {budget!r} tokens of {source.path}; it must be {wanted}")
        self.shares = [
            source.blocks if budget is None else int(budget / source.tokens_per_block)
            for source, budget in zip(self.sources, data.values(), strict=True)
        ]
        # Of each source among an epoch's samples, unshuffled.
        self.starts = [0, *itertools.accumulate(self.shares)]
        self.total = self.starts[-1]
        tokens = (s.tokens_per_block * share for s, share in zip(self.sources, self.shares, strict=True))
        self.tokens_per_block = sum(tokens) / self.total

    def fingerprint(self) -> str:
        """A hash of the shards' checksums: another where a directory was prepared anew with other content."""
        sums = [[shard["sha256"] for shard in source.shards] for source in self.sources]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]

    def place(self, i: int) -> tuple[int, int]:
        """(index of its source, block in the source) of sample i."""
        epoch, k = divmod(i, self.total)
        j = permute(k, self.total, self.seed + epoch)
        source = bisect_right(self.starts, j) - 1
        taken = epoch * self.shares[source] + j - self.starts[source]  # a number of the source's own samples
        blocks = self.sources[source].blocks
        time, k = divmod(taken, blocks)  # how often the source was used up before
        return source, permute(k, blocks, self.seed + 1_000_003 * (source + 1) + time)

    def batch(self, first: int, count: int) -> Batch:
        """Samples first, first + 1, …; T is seq_len, of SFT rows the longest's up to a multiple of PAD_TO."""
        places = [self.place(i) for i in range(first, first + count)]
        blocks = [self.sources[source].block(block) for source, block in places]
        # [B, T], T one length for all; rows are padded to few different ones.
        length = max(len(ids) for ids, _, _ in blocks)
        if self.sft:
            length = -(-length // PAD_TO) * PAD_TO
        ids = np.zeros((count, length), np.int64)
        labels = np.full((count, length), -100)
        documents = np.zeros((count, length), np.int64)
        for i, block in enumerate(blocks):
            for array, values in zip((ids, labels, documents), block, strict=True):
                array[i, : len(values)] = values
        return Batch(ids, labels, documents, np.array([source for source, _ in places]))

    def count_labels(self, first: int, count: int) -> int:
        """Tokens with a label in samples first, first + 1, …"""
        if not self.sft:
            return count * self.seq_len
        return int((self.batch(first, count).labels != -100).sum())


def describe(directory: str) -> None:
    """Prints what a shard directory holds; ValueError names a file that is not what was written."""
    path = Path(directory)
    meta = read_meta(path)
    print(f"{path}: {'SFT rows' if meta['sft'] else 'packed text'} from {meta['settings']['input']}")
    print(f"  {meta['settings']['input_files']}; {meta['filtered']:,} filtered out, {meta['bad']:,} bad")
    for reason in meta["first_bad"]:
        print(f"  skipped {reason}")
    print(f"  {meta['vocab_size']:,} token ids of {meta['tokenizer']}, as {meta['dtype']}")
    for split, shards in meta["splits"].items():
        for shard in show(shards, desc="verifying", unit="shard"):
            for file in damaged_files(path, shard):
                raise ValueError(f"{file} is missing or damaged: its sha256 is not meta.json's")
        tokens = sum(shard["tokens"] for shard in shards)
        counts = f"{meta['documents'][split]:,} documents, {tokens:,} tokens in {len(shards)} shards"
        print(f"{split}: {counts}; every file has the checksum it was written with")
    model = load_tokenizer(meta["tokenizer"])
    if vocabulary_hash(model) != meta["vocabulary_hash"]:
        raise ValueError(f"{meta['tokenizer']} is no longer the tokenizer that {path} was written with")
    source = Shards(path, "tokens", 1, meta["sft"])
    ids = source.array(0, "tokens")[: min(256, source.array(0, "ends")[0])]
    print(f"  first   {model.decode(ids, skip_special_tokens=False)!r}")
    if meta["sft"]:
        trained = ids[source.array(0, "mask")[: len(ids)] == 1]
        print(f"  trained {model.decode(trained, skip_special_tokens=False)!r}")


if __name__ == "__main__":
    try:
        describe(inspect) if inspect else write_shards()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with the units left") from None
