"""Text, JSON, Parquet and chats -> memmapped token shards, and the readers of those that train.py uses.

    python prepare.py                        # the quickstart's corpus: this Python's standard library
    python prepare.py --input='books/**/*.txt' --tokenizer=models/Qwen2.5-3B-Instruct --out=data/books
    python prepare.py --input='fineweb-edu/**/*.parquet' --min_score=4 --tokenizer=… --out=data/fineweb_edu
    python prepare.py --input=openhermes2_5.json --tokenizer=… --out=data/openhermes      # chats, packed
    python prepare.py --input='ultrachat/train_sft*.parquet' --sft=True --tokenizer=… --out=data/ultrachat
    python prepare.py --inspect=data/books   # what a shard directory holds, and whether it is intact

Input: .txt or .py (a file is a document; over 16 MB, several), .jsonl (a line), .json (an object of an array
or of many), each also .gz or .zst, and .parquet (a row). A row with `messages` or `conversations` is a chat,
any other the text under text_key. Text is put between the tokenizer's BOS (where it adds one itself) and EOS;
a chat is what the tokenizer's chat template makes of it, nothing added.

One work unit makes one shard. A unit is at most about unit_bytes of input: a byte range of lines or text,
some row groups, several small files, or a whole compressed or .json file. A worker reads it, tokenizes it,
writes the shard under a temporary name and renames it. So the same bytes come out for any number of workers,
and killed at any moment, the same command skips the units that are there in OUT.partial.
What cannot be read is reported, counted and skipped, up to max_bad.

A shard directory holds meta.json and plain .npy files: tokens_00000.npy (uint16 or uint32 ids),
ends_00000.npy (int64: where each document ends) and with sft, where a document is a row, mask_00000.npy
(uint8: 1 for the tokens to train on). heldout_tokens_00000.npy and so on are likewise for evaluation, all
units' together.
"""

input: str | tuple = "stdlib"  # file or glob, or several; "stdlib": this Python's own library (.py files)
out = "data/quickstart/corpus"  # shard directory to write; must not exist
tokenizer = "data/quickstart/teacher"  # directory with tokenizer.json and tokenizer_config.json
text_key = "text"  # field of a row's text; dots reach into objects (document.body)
min_score: float | None = None  # keep only the rows whose score is at least this
score_key = "int_score"  # field of a row's score; dots reach into objects (metadata.int_score)
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
import importlib
import io
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
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

FORMAT = 2
HEADER = 128  # bytes before the values of a one-dimensional .npy file
BLOCK = 2**16  # bytes read at a time where neither lines nor documents say how many
PIECE = 2**20  # characters tokenized at a time: longer documents are cut between two lines
LONGEST_TEXT = 2**24  # bytes in which a .txt file is one document; a longer one is several
LONGEST_ROW = 2**26  # bytes in which a line, or an object of a .json file, must end
OPEN_ARRAYS = 256  # shard files open at a time, of the 1024 that a process may have on many systems
PAD_TO = 128  # tokens to whose multiple a batch of SFT rows is padded: a new length costs a GPU a new plan
PARQUET_ERRORS = (OSError, ValueError, NotImplementedError)  # that pyarrow raises of a damaged file
STDLIB = Path(os.__file__).parent


def load_tokenizer(path: str | Path) -> Tokenizer:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a tokenizer is a Hugging Face directory with that file")
    try:
        model = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from None
    model.no_truncation()  # a file can carry the length limit of whoever saved it
    model.no_padding()
    return model


def tokenizer_config(path: str | Path) -> dict:
    """tokenizer_config.json, special tokens as plain strings."""
    file = Path(path) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    return config | {name: v["content"] if isinstance(v, dict) else v for name, v in tokens.items()}


def special_ids(tokenizer: Tokenizer, path: str | Path) -> tuple[list[int], int | None]:
    """(ids the tokenizer itself puts before a text, EOS id by tokenizer_config.json)."""
    eos = tokenizer_config(path).get("eos_token")
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    return [i for i in tokenizer.encode("").ids if i != eos_id], eos_id


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The same for any file that maps the same tokens to the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def need(module: str, why: str | Path):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{why} needs the package {package}: pip install {package}") from None


@functools.cache
def chat_template(path: str | Path) -> Callable[..., str]:
    """The chat template in a tokenizer's directory as a function of messages, set up as transformers does."""
    config = tokenizer_config(path)
    file = Path(path) / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        raise ValueError(f"{path} has no chat template, in chat_template.jinja or tokenizer_config.json")
    sandbox = need("jinja2.sandbox", f"the chat template of {path}")

    def raise_exception(message):
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    # A fixed day, the one Llama's templates fall back to: shards must not depend on when they were made.
    strftime_now = datetime(2024, 7, 26).strftime
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # {% generation %} only marks what the assistant says; as an `if` it keeps its whitespace control.
    block = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")
    template = environment.from_string(block.sub(lambda m: m[1] + ("endif" if m[2] else "if true"), source))
    fixed = {name: value for name, value in config.items() if name.endswith("_token")}
    fixed |= {"tools": None, "documents": None, "add_generation_prompt": False}
    return lambda messages, **options: template.render(messages=messages, **fixed | options)


# ---- input: work units, and the rows in them


class Part(NamedTuple):
    """A piece of an input file, for one worker."""

    file: Path
    start: int  # in bytes; of a Parquet file its row group
    end: int  # likewise, the first that is not in it
    size: int  # bytes of input, for the progress bar


def kind_of(file: Path) -> tuple[str, str]:
    """("jsonl", "gz") of name.jsonl.gz, ("txt", "") of name.txt."""
    stem, _, kind = file.name.rpartition(".")
    if kind in ("gz", "zst"):
        return stem.rpartition(".")[2], kind
    return kind, ""


def find_files(input: str | list[str]) -> list[Path]:
    """The input's files in the order they are read."""
    if input == "stdlib":
        # encodings and pydoc_data are tables and prose in .py files.
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        skipped |= {"encodings", "pydoc_data"}
        return sorted(f for f in STDLIB.rglob("*.py") if not skipped & set(f.relative_to(STDLIB).parts))
    files = []
    for pattern in [input] if isinstance(input, str) else input:
        matches = sorted(Path(f) for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
        if not matches:
            raise ValueError(f"input {pattern} matches no file")
        files += matches
    for file in files:
        kind, compression = kind_of(file)
        if kind not in ("txt", "py", "jsonl", "json", "parquet") or (kind == "parquet" and compression):
            raise ValueError(f"{file}: input must be .parquet, or .txt .py .jsonl .json, also as .gz or .zst")
        if kind == "parquet" or compression == "zst":
            need("pyarrow", file)
    return files


def text_columns(settings: dict) -> set[str]:
    return {settings["text_key"], settings["text_key"].split(".")[0], "messages", "conversations"}


def count_parts(size: int, unit_bytes: int) -> int:
    """A power of two, so that two, four or eight workers end at the same time."""
    return 1 << (max(1, math.ceil(size / unit_bytes)) - 1).bit_length()


def split_file(file: Path, unit_bytes: int, settings: dict) -> Iterator[Part]:
    """The parts of a file that workers can read side by side."""
    kind, compression = kind_of(file)
    size = file.stat().st_size
    if kind == "parquet":
        try:
            parquet = open_parquet(file)
        except PARQUET_ERRORS:  # not Parquet, as its worker will report
            yield Part(file, 0, 0, size)
            return
        names = parquet.schema_arrow.names
        if not text_columns(settings) & set(names):
            wanted = f"{settings['text_key']}, messages or conversations"
            raise ValueError(f"{file} has no column {wanted}; it has {', '.join(names)}")
        for group in range(parquet.num_row_groups):
            yield Part(file, group, group + 1, parquet.metadata.row_group(group).total_byte_size)
    elif compression or kind == "json":
        yield Part(file, 0, sys.maxsize, size)
    else:
        # A part of a text is a document; a file of lines is cut into equal parts.
        step = LONGEST_TEXT
        if kind == "jsonl":
            step = max(1, math.ceil(size / count_parts(size, unit_bytes)))
        for start in range(0, size, step):
            end = min(start + step, size)
            yield Part(file, start, end, end - start)


def plan_units(files: list[Path], unit_bytes: int, settings: dict) -> list[list[Part]]:
    """Work units of one size, half to all of unit_bytes, as far as parts allow; in the order of the input."""
    parts = [part for file in files for part in split_file(file, unit_bytes, settings)]
    total = max(1, sum(part.size for part in parts))
    count = count_parts(total, unit_bytes)
    units = [[] for _ in range(count)]
    # A part goes where it begins, so that the last unit is no smaller than the others.
    before = 0
    for part in parts:
        units[min(before * count // total, count - 1)].append(part)
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


def read_spans(stream, part: Part, size: int) -> Iterator[tuple[int, bytes | ValueError]]:
    """(offset in bytes, span) of a part: each `size` bytes and on to the end of the line; 0: single lines.

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
        span = stream.read(min(size, part.end - offset))
        line = stream.readline(LONGEST_ROW + 1)
        length = len(span) + len(line)
        if not length:
            return
        if len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            length += skip_line(stream)
            yield offset, ValueError(f"a line over {LONGEST_ROW:,} bytes")
        else:
            yield offset, span + line
        offset += length


def read_json(stream, file: Path) -> Iterator[tuple]:
    """Objects of an array, or one after another; one of them in memory."""
    parse = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,\[\]]*")
    # What is not UTF-8 becomes surrogates, which the row is refused for later.
    characters = io.TextIOWrapper(stream, "utf-8", "surrogateescape")
    text = ""
    number = 1
    wrong = None
    while block := characters.read(BLOCK):
        text += block
        start = between.match(text).end()
        while start < len(text):
            try:
                row, end = parse(text, start)
            except (json.JSONDecodeError, RecursionError) as error:
                # It may only be cut off by the block's end; the next block tells.
                wrong = error
                break
            yield f"{file}: object {number}", row
            start = between.match(text, end).end()
            number += 1
        text = text[start:]
        if len(text) > LONGEST_ROW:
            break
    if text:
        yield f"{file}: object {number}", ValueError(f"not JSON, and so is what follows: {wrong}")


@functools.lru_cache(maxsize=1)
def open_parquet(file: Path):
    """Kept from one row group to the next: the metadata of thousands of them takes a while to read."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=BLOCK, page_checksum_verification=True)


def read_parquet(part: Part, settings: dict) -> Iterator[tuple]:
    try:
        parquet = open_parquet(part.file)
    except PARQUET_ERRORS as error:
        yield str(part.file), ValueError(f"not Parquet: {error}")
        return
    score = settings["score_key"]
    wanted = text_columns(settings) | {score, score.split(".")[0]}
    columns = [name for name in parquet.schema_arrow.names if name in wanted]
    for group in range(part.start, part.end):
        where = f"{part.file}: row group {group}"
        number = 0
        try:
            # The other cores have workers of their own.
            for batch in parquet.iter_batches(256, [group], columns, use_threads=False):
                for row in batch_rows(batch):
                    number += 1
                    yield f"{where}, row {number}", row
        except PARQUET_ERRORS as error:
            # What was read of the group before the damage is kept.
            lost = parquet.metadata.row_group(group).num_rows - number
            yield where, ValueError(f"{lost} rows lost: {error}".replace("\n", " "))


def batch_rows(batch) -> list[dict | ValueError]:
    """A batch's rows, one that is not UTF-8 found by itself."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [ValueError("invalid UTF-8")]
        return [row for i in range(batch.num_rows) for row in batch_rows(batch.slice(i, 1))]


def open_stream(file: Path, compression: str):
    """A file's bytes, decompressed; reading broken or truncated compression raises OSError or EOFError."""
    if compression == "gz":
        return gzip.open(file, "rb")
    if compression == "zst":
        import pyarrow  # zstandard's reader takes a truncated file for a whole one

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), BLOCK)
    return open(file, "rb")


def read_part(part: Part, settings: dict) -> Iterator[tuple]:
    """(where, row) of a part: a row is a line of JSON (bytes), a dict or what is wrong (ValueError)."""
    kind, compression = kind_of(part.file)
    if kind == "parquet":
        yield from read_parquet(part, settings)
        return
    with open_stream(part.file, compression) as stream:
        try:
            if kind == "json":
                yield from read_json(stream, part.file)
            elif kind == "jsonl":
                for offset, line in read_spans(stream, part, 0):
                    if isinstance(line, ValueError) or line.strip():
                        yield f"{part.file}: line at byte {offset}", line
            else:
                for offset, text in read_spans(stream, part, LONGEST_TEXT):
                    try:
                        row = text if isinstance(text, ValueError) else {settings["text_key"]: text.decode()}
                    except UnicodeDecodeError as error:
                        offset += error.start
                        row = ValueError("invalid UTF-8")
                    yield f"{part.file}: text at byte {offset}", row
        except (EOFError, OSError, zlib.error) as error:
            if not compression:
                raise
            yield str(part.file), ValueError(f"broken compression: {error}")


# ---- documents: the text or the turns of a row, as token ids


WORKER = {}  # settings, partial, dtypes, max_bad, bos, eos; encode; closing, what ends a turn
MARK = "\ue000\ue001\ue000"  # private-use characters, which no chat has and no template touches


def pieces(text: str) -> Iterator[str]:
    """The text in parts of at most PIECE characters, cut between two lines, where a token ends anyway."""
    between = re.compile(r"\S\n(?=\S)")
    start = 0
    while len(text) - start > PIECE:
        match = between.search(text, start + PIECE // 2, start + PIECE)
        end = match.end() if match else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def split_of(key: str, heldout_fraction: float) -> str:
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "heldout" if number < heldout_fraction * 2**64 else "tokens"


def lookup(row: dict, key: str):
    """The value under a name, or under names joined by dots; None where there is none."""
    if key in row:
        return row[key]
    for name in key.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def read_chat(turns) -> list[dict]:
    """The turns of either shape as messages of role and content."""
    chat = []
    for turn in turns if isinstance(turns, list) and turns else [None]:
        turn = turn if isinstance(turn, dict) else {}
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("no turns, or one without a role (from) or without text as its content (value)")
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        chat.append({**turn, "role": role, "content": content})
    return chat


def common_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda i: a[: i + 1] != b[: i + 1])


def chat_segments(chat: list[dict], render: Callable, closing: re.Pattern) -> list[tuple[str, bool]]:
    """The rendered chat in segments (text, whether it is an assistant's turn with its end-of-turn token).

    A turn is where the rendering differs from one with MARK as the turn's content; so it is found whatever
    the template adds, trims or leaves out. What both have stays out: the empty <think> block that Qwen3 puts
    before the last answer, part of the prompt when it answers. A thought that the template keeps is in.
    """
    full = render(chat)
    segments = []
    done = 0  # characters of it that are in segments
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        parts = render([*chat[:i], {**turn, "content": MARK}, *chat[i + 1 :]]).split(MARK)
        if len(parts) != 2:
            raise ValueError(f"the template writes turn {i + 1}, an assistant's, {len(parts) - 1} times")
        start = common_prefix(full, parts[0])
        end = len(full) - common_prefix(full[::-1], parts[1][::-1])
        if not done <= start <= end:
            raise ValueError(f"turn {i + 1}, an assistant's, cannot be told from the template's own text")
        if match := closing.match(full, end):
            end = match.end()
        segments += [(full[done:start], False), (full[start:end], True)]
        done = end
    return [*segments, (full[done:], False)]


def read_document(file: Path, row) -> tuple[str, list[tuple[str | list[int], bool]]] | None:
    """(split, segments) of a row; None: filtered out; ValueError says what is wrong.

    A segment is (text or ids, whether they are an assistant's turn).
    """
    settings = WORKER["settings"]
    if isinstance(row, ValueError):
        raise row
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except UnicodeDecodeError:
            raise ValueError("invalid UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if settings["min_score"] is not None:
        score = lookup(row, settings["score_key"])
        if not isinstance(score, int | float):
            raise ValueError(f"no number under {settings['score_key']}")
        if score < settings["min_score"]:
            return None
    turns = row.get("conversations") if row.get("messages") is None else row["messages"]
    if turns is None:
        text = lookup(row, settings["text_key"])
        if settings["sft"]:
            raise ValueError("not a chat")
        if not isinstance(text, str):
            raise ValueError(f"no text under {settings['text_key']}")
        parts = [WORKER["bos"], *pieces(text), WORKER["eos"]]
        segments = [(part, False) for part in parts]
    else:
        try:
            render = chat_template(settings["tokenizer"])
            segments = chat_segments(read_chat(turns), render, WORKER["closing"])
        except Exception as error:  # whatever a template does not like about a chat
            raise ValueError(f"chat: {error}") from None
        text = "".join(segment for segment, _ in segments)
    key = text
    if settings["input"] == "stdlib":
        # The same files are held out in any version of Python.
        key = str(file.relative_to(STDLIB))
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ValueError("invalid UTF-8") from None
    if not text:
        return None
    return split_of(key, settings["heldout_fraction"]), segments


def tokenize(segments: list[tuple[str | list[int], bool]]) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a document."""
    ids = []
    mask = []
    for part, trained in segments:
        # Each by itself: no token reaches over the boundary of a turn, as none does when it is generated.
        new = part
        if isinstance(part, str):
            new = WORKER["encode"]([part], add_special_tokens=False)[0].ids
        ids += new
        mask += [trained] * len(new)
    return ids, mask


# ---- shards, written


def shard_file(split: str, column: str, number: int) -> str:
    return f"{'heldout_' if split == 'heldout' else ''}{column}_{number:05d}.npy"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def temporary(file: Path) -> Path:
    """A process's own name for a file until it is whole: one that was killed may not have noticed yet."""
    return file.with_name(f"{file.name}.{os.getpid()}.tmp")


def rename(stream, file: Path) -> None:
    """Gives a written temporary file its name: whole or not at all, whenever process or machine die."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.replace(stream.name, file)


def write_json(file: Path, value: dict) -> None:
    with open(temporary(file), "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        rename(stream, file)


def load_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


class ShardWriter:
    """One shard's .npy files, which grow under temporary names: tokens, ends and, with sft, mask."""

    def __init__(self, directory: Path, split: str, number: int, dtypes: dict[str, str]):
        self.dtypes = {column: np.dtype(dtype) for column, dtype in dtypes.items()}
        self.paths = {column: directory / shard_file(split, column, number) for column in dtypes}
        self.counts = dict.fromkeys(dtypes, 0)
        self.files = {column: open(temporary(path), "wb") for column, path in self.paths.items()}
        for file in self.files.values():
            file.write(bytes(HEADER))

    def append(self, tokens, ends, mask) -> None:
        """Documents that end at `ends` in tokens."""
        ends = np.asarray(ends) + self.counts["tokens"]
        values = {"tokens": tokens, "ends": ends, "mask": mask}
        for column, file in self.files.items():
            file.write(np.asarray(values[column], self.dtypes[column]).tobytes())
            self.counts[column] += len(values[column])

    def close(self) -> list[dict]:
        """[the shard's entry in meta.json], or [] where there is nothing in it."""
        sums = {}
        for column, file in self.files.items():
            # How long the array is goes into the header, which was left free for it.
            file.seek(0)
            header = {
                "descr": self.dtypes[column].str,
                "fortran_order": False,
                "shape": (self.counts[column],),
            }
            np.lib.format.write_array_header_1_0(file, header)
            rename(file, self.paths[column])
            sums[self.paths[column].name] = sha256(self.paths[column])
        entry = {"file": self.paths["tokens"].name, "tokens": self.counts["tokens"]}
        entry |= {"documents": self.counts["ends"], "sha256": sums}
        if entry["documents"]:
            return [entry]
        for path in self.paths.values():
            path.unlink()
        return []


def start_worker(model: Tokenizer, worker: dict) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A file that the parent has open would be read from one position by all.
    open_parquet.cache_clear()

    def end_with_parent():  # which may be killed without a chance to tell
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # An assistant's turn ends with the special token that follows it, the longest that fits.
    special = [token.content for token in model.get_added_tokens_decoder().values() if token.special]
    closing = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "(?!)"
    WORKER.update(worker, encode=model.encode_batch_fast, closing=re.compile(rf"\s*(?:{closing})"))


def write_unit(number: int, parts: list[Part]) -> dict:
    """Makes the unit's shard, and a part of the held-out one in units/, unless they are there.

    Returns {"filtered", "bad", "splits"}, as in units/00000.json, which is written last.
    """
    settings = WORKER["settings"]
    partial = WORKER["partial"]
    done = partial / "units" / f"{number:05d}.json"
    if done.is_file():
        return load_json(done)
    writers = {
        "tokens": ShardWriter(partial, "tokens", number, WORKER["dtypes"]),
        "heldout": ShardWriter(partial / "units", "heldout", number, WORKER["dtypes"]),
    }
    filtered = 0
    bad = []
    for part in parts:
        for where, row in read_part(part, settings):
            try:
                document = read_document(part.file, row)
            except ValueError as error:
                bad.append(f"{where}: {error}")
                check_bad(bad, WORKER["max_bad"])
                continue
            if document is None:
                filtered += 1
                continue
            split, segments = document
            ids, mask = tokenize(segments)
            if settings["sft"]:
                ids = ids[: settings["seq_len"]]
                mask = mask[: settings["seq_len"]]
                if True not in mask:  # nobody answers, or the question alone is too long
                    filtered += 1
                    continue
            writers[split].append(ids, [len(ids)], mask)
    # The JSON comes last: where it is there, so are the shards.
    splits = {split: writer.close() for split, writer in writers.items()}
    result = {"filtered": filtered, "bad": bad, "splits": splits}
    write_json(done, result)
    return result


def check_bad(bad: list[str], max_bad: int) -> None:
    if len(bad) > max_bad:
        raise ValueError(
            f"{len(bad)} bad documents, more than max_bad = {max_bad}, the last {bad[-1]}; "
            "the same command with a higher --max_bad goes on from here"
        )


def join_heldout(partial: Path, units: list[dict], dtypes: dict[str, str]) -> list[dict]:
    """Makes one shard of the units' held-out documents, few in each, in which blocks would not fit."""
    writer = ShardWriter(partial, "heldout", 0, dtypes)
    for number, unit in enumerate(units):
        if unit["splits"]["heldout"]:
            files = {column: shard_file("heldout", column, number) for column in dtypes}
            arrays = {c: np.load(partial / "units" / file, mmap_mode="r") for c, file in files.items()}
            writer.append(arrays["tokens"], arrays["ends"], arrays.get("mask"))
    return writer.close()


def check_settings(file: Path, settings: dict) -> None:
    """ValueError where a directory was begun with other settings, by its meta.json or settings.json."""
    begun = load_json(file)["settings"]
    for name, value in settings.items():
        if begun.get(name) != value:
            wrong = f"was begun with {name} = {begun.get(name)!r}, not {value!r}"
            raise ValueError(f"{file.parent} {wrong}; remove it or choose another --out")


def run_units(units: list[list[Part]], workers: int, max_bad: int, arguments: tuple) -> list[dict]:
    """write_unit's results for all units, worked on in any order."""
    sizes = [sum(part.size for part in unit) for unit in units]
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True)
    bad = []
    try:
        pool = ProcessPoolExecutor(workers, None, start_worker, arguments)
        futures = [pool.submit(write_unit, number, unit) for number, unit in enumerate(units)]
        size_of = dict(zip(futures, sizes, strict=True))
        for future in as_completed(futures):
            for reason in future.result()["bad"]:
                bar.write(f"skipped {reason}", file=sys.stderr)
                bad.append(reason)
            check_bad(bad, max_bad)
            bar.update(size_of[future])
        pool.shutdown()
        return [future.result() for future in futures]
    except BrokenProcessPool:  # as the kernel does when memory is short
        raise ValueError("a worker was killed; the same command goes on with the units left") from None
    finally:
        # After an error or Ctrl-C nobody waits for units that are not whole, which can take hours.
        for worker in multiprocessing.active_children():
            worker.terminate()
        bar.close()


def begin(partial: Path, settings: dict) -> io.TextIOWrapper:
    """Makes the directory, or takes it as an earlier call with these settings left it; returns its lock."""
    import fcntl  # which Windows has not; the readers below work there too

    partial.mkdir(parents=True, exist_ok=True)
    lock = open(partial / "lock", "w")  # this process's until it ends, however it does
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing {partial}") from None
    if (partial / "progress.json").is_file():
        raise ValueError(f"{partial} was begun by an earlier version; remove it or choose another --out")
    if (partial / "settings.json").is_file():
        check_settings(partial / "settings.json", settings)
    else:
        (partial / "units").mkdir(exist_ok=True)
        write_json(partial / "settings.json", {"settings": settings})
    for stale in partial.rglob("*.tmp"):
        stale.unlink()
    return lock


def tidy(out: Path) -> None:
    """Removes what a finished directory was made from, and its reader does not look at."""
    shutil.rmtree(out / "units", ignore_errors=True)
    (out / "settings.json").unlink(missing_ok=True)
    (out / "lock").unlink(missing_ok=True)


def write_shards(
    input=input, out=out, tokenizer=tokenizer, text_key=text_key, min_score=min_score, score_key=score_key,
    sft=sft, seq_len=seq_len, heldout_fraction=heldout_fraction, unit_bytes=unit_bytes, max_bad=max_bad,
    num_workers=num_workers,
) -> None:  # fmt: skip
    """Tokenizes the input into the shard directory `out`; ValueError before any work if something is missing.

    Goes on in out.partial where an earlier call with the same settings was cut off.
    """
    # What decides which bytes are written.
    settings = {k: v for k, v in locals().items() if k not in ("out", "max_bad", "num_workers")}
    settings = json.loads(json.dumps(settings, default=str))  # as they are when read back
    out = Path(out)
    partial = Path(f"{out}.partial")
    if out.exists() and not (out / "meta.json").is_file():
        raise ValueError(f"{out} exists and is no shard directory; remove it or choose another --out")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be from 0 to below 1")
    if unit_bytes < 1 or seq_len < 2:
        raise ValueError(f"unit_bytes is {unit_bytes}, seq_len {seq_len}; they must be at least 1 and 2")
    files = find_files(settings["input"])
    plain = [file for file in files if kind_of(file)[0] in ("txt", "py")]
    if plain and (sft or min_score is not None):
        raise ValueError(f"{plain[0]} is plain text: it has no {'chats' if sft else 'scores'}")
    model = load_tokenizer(tokenizer)
    if sft:
        chat_template(tokenizer)

    # Of the input, names, sizes and times of change stand for what is in it.
    stats = [file.stat() for file in files]
    listing = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    total_size = sum(stat.st_size for stat in stats)
    settings["input_files"] = f"{len(files)} files, {total_size:,} bytes, {digest}"
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    found = [Path(tokenizer) / name for name in names if (Path(tokenizer) / name).is_file()]
    settings["tokenizer_files"] = {file.name: sha256(file) for file in found}
    if out.exists():
        check_settings(out / "meta.json", settings)
        tidy(out)
        print(f"{out} is there already, made with the same settings")
        return

    bos_ids, eos_id = special_ids(model, tokenizer)
    vocab_size = max(model.get_vocab().values()) + 1
    dtypes = {"tokens": "<u2" if vocab_size <= 2**16 else "<u4", "ends": "<i8"}
    if sft:
        dtypes["mask"] = "|u1"
    # The work, a unit a shard.
    units = plan_units(files, unit_bytes, settings)
    lock = begin(partial, settings)
    done = len(list(partial.glob("units/*.json")))
    if done:
        print(f"going on in {partial}: {done} of {len(units)} units are done")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    worker = {"settings": settings, "partial": partial, "dtypes": dtypes, "max_bad": max_bad}
    worker |= {"bos": bos_ids, "eos": [] if eos_id is None else [eos_id]}
    results = run_units(units, num_workers or cores, max_bad, (model, worker))

    # What came of it, in the order of the input.
    shards = {
        "tokens": [shard for unit in results for shard in unit["splits"]["tokens"]],
        "heldout": join_heldout(partial, results, dtypes),
    }
    documents = {split: sum(shard["documents"] for shard in shards[split]) for split in shards}
    tokens = {split: sum(shard["tokens"] for shard in shards[split]) for split in shards}
    filtered = sum(unit["filtered"] for unit in results)
    bad = [reason for unit in results for reason in unit["bad"]]
    dropped = f"{filtered:,} filtered out, {len(bad):,} bad"
    if not shards["tokens"]:
        shutil.rmtree(partial)
        held = f"{documents['heldout']} documents held out"
        raise ValueError(f"the input holds no text to train on: {len(files)} files, {held}, {dropped}")
    meta = {
        "format": FORMAT, "dtype": np.dtype(dtypes["tokens"]).name, "vocab_size": vocab_size,
        "vocabulary_hash": vocabulary_hash(model), "tokenizer": str(tokenizer), "bos_ids": bos_ids,
        "eos_id": eos_id, "sft": sft, "settings": settings, "documents": documents, "filtered": filtered,
        "bad": len(bad), "first_bad": bad[:100], "splits": shards,
    }  # fmt: skip
    write_json(partial / "meta.json", meta)
    partial.rename(out)
    tidy(out)
    lock.close()
    counts = [f"{documents[split]:,} documents, {tokens[split]:,} tokens" for split in shards]
    print(f"{out}: {counts[0]} for training; {counts[1]} held out; {dropped}")


# ---- shards, read


def read_meta(path: Path) -> dict:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path} has no meta.json: not a shard directory (prepare.py writes one)")
    meta = load_json(path / "meta.json")
    if meta["format"] != FORMAT:
        raise ValueError(f"{path} has shard format {meta['format']}, not {FORMAT}: prepare it again")
    return meta


def read_array(file: Path, length: int, dtype: str) -> np.ndarray:
    """A .npy file, memory-mapped; ValueError names it where it is not what meta.json says."""
    try:
        values = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or missing: {error}") from None
    if values.shape != (length,) or values.dtype != dtype:
        raise ValueError(f"{file} holds {values.shape} {values.dtype}; meta.json says ({length},) {dtype}")
    return values


open_array = functools.lru_cache(maxsize=OPEN_ARRAYS)(read_array)


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
        blocks = []
        for number, shard in enumerate(self.shards):
            for column in ("tokens", "ends", "mask") if sft else ("tokens", "ends"):
                read_array(*self.locate(number, column))  # is it there, and whole?
            blocks.append(shard["documents"] if sft else max(0, shard["tokens"] - 1) // seq_len)
        self.starts = [0, *accumulate(blocks)]  # first block of each shard
        self.blocks = self.starts[-1]
        total = sum(shard["tokens"] for shard in self.shards)
        if not self.blocks:
            wanted = "row" if sft else f"block of seq_len {seq_len} + 1"
            raise ValueError(f"{path}: {total} tokens in its {split} split, not one {wanted}")
        self.tokens_per_block = total / self.blocks if sft else seq_len

    def locate(self, number: int, column: str) -> tuple[Path, int, str]:
        """(file, length, dtype) of the tokens, ends or mask of shard `number`."""
        shard = self.shards[number]
        dtype = {"tokens": self.meta["dtype"], "ends": "int64", "mask": "uint8"}[column]
        length = shard["documents" if column == "ends" else "tokens"]
        return self.path / shard["file"].replace("tokens", column), length, dtype

    def array(self, number: int, column: str) -> np.ndarray:
        """The values themselves, opened again where too many were open."""
        return open_array(*self.locate(number, column))

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

    def count_labels(self, i: int) -> int:
        """Tokens of block i with a label."""
        return int((self.block(i)[1] != -100).sum()) if self.sft else self.seq_len


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
        self.seed = seed
        self.sft = sft
        self.shares = [
            source.blocks if budget is None else max(1, int(budget / source.tokens_per_block))
            for source, budget in zip(self.sources, data.values(), strict=True)
        ]
        self.starts = [0, *accumulate(self.shares)]  # of each source among an epoch's samples, unshuffled
        self.total = self.starts[-1]
        tokens = (s.tokens_per_block * share for s, share in zip(self.sources, self.shares, strict=True))
        self.tokens_per_block = sum(tokens) / self.total

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
        places = [self.place(i) for i in range(first, first + count)]
        return sum(self.sources[source].count_labels(block) for source, block in places)


class RandomTokens:
    """Uniformly random blocks in place of a Mixture, to measure with."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.total = 2**40
        self.tokens_per_block = seq_len

    def batch(self, first: int, count: int) -> Batch:
        tokens = np.random.default_rng(first).integers(0, self.vocab_size, (count, self.seq_len + 1))
        documents = np.zeros((count, self.seq_len), np.int64)
        return Batch(tokens[:, :-1], tokens[:, 1:], documents, np.zeros(count, np.int64))

    def count_labels(self, first: int, count: int) -> int:
        return count * self.seq_len


def describe(directory: str) -> None:
    """Prints what a shard directory holds; ValueError names a file that is not what was written."""
    path = Path(directory)
    meta = read_meta(path)
    model = load_tokenizer(meta["tokenizer"])
    if vocabulary_hash(model) != meta["vocabulary_hash"]:
        raise ValueError(f"{meta['tokenizer']} is no longer the tokenizer that {path} was written with")
    print(f"{path}: {'SFT rows' if meta['sft'] else 'packed text'} from {meta['settings']['input']}")
    print(f"  {meta['settings']['input_files']}; {meta['filtered']:,} filtered out, {meta['bad']:,} bad")
    print("".join(f"  skipped {reason}\n" for reason in meta["first_bad"]), end="")
    print(f"  {meta['vocab_size']:,} token ids of {meta['tokenizer']}, as {meta['dtype']}")
    sums = [pair for split in meta["splits"].values() for shard in split for pair in shard["sha256"].items()]
    for name, written in tqdm(sums, desc="verifying", unit="file", leave=False):
        if not (path / name).is_file() or sha256(path / name) != written:
            raise ValueError(f"{path / name} is missing or damaged: its sha256 is not the one in meta.json")
    print(f"  {len(sums)} files have the checksums they were written with")
    for split, shards in meta["splits"].items():
        tokens = sum(shard["tokens"] for shard in shards)
        print(f"{split}: {meta['documents'][split]:,} documents, {tokens:,} tokens in {len(shards)} shards")
        if not tokens:
            continue
        source = Shards(path, split, 1, meta["sft"])
        ids = source.array(0, "tokens")[: min(256, source.array(0, "ends")[0])]
        print(f"  ids     {' '.join(map(str, ids[:24]))} …")
        print(f"  text    {model.decode(ids, skip_special_tokens=False)!r}")
        if meta["sft"]:
            trained = ids[source.array(0, "mask")[: len(ids)] == 1]
            print(f"  trained {model.decode(trained, skip_special_tokens=False)!r}")


if __name__ == "__main__":
    try:
        describe(inspect) if inspect else write_shards()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with the units left") from None
