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

What cannot be read is reported, counted and skipped, up to max_bad. Killed at any moment, the same command
goes on from the last checkpoint in OUT.partial and ends with the same bytes.

A shard directory holds meta.json and plain .npy files: tokens_00000.npy (uint16 or uint32 ids),
ends_00000.npy (int64: where each document ends; one that its shard's end cuts in two ends in the next) and
with sft, where a document is a row and never cut, mask_00000.npy (uint8: 1 for the tokens to train on);
heldout_tokens_00000.npy and so on likewise for evaluation.
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
shard_tokens = 100_000_000  # tokens in one .npy file
max_bad = 100  # unreadable rows, files or row groups to skip before giving up
num_workers = 0  # processes that tokenize; 0: one a core
inspect: str | None = None  # shard directory to describe and verify; nothing is written

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import codecs
import functools
import glob
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

FORMAT = 2
HEADER = 128  # bytes before the values of a one-dimensional .npy file
BLOCK = 2**16  # bytes read at a time; bounds what a block of compressed data can grow to
UNIT = 2**20  # bytes of documents that a worker gets at a time
PIECE = 2**20  # bytes tokenized at a time: longer documents are cut between two lines
LONGEST_TEXT = 2**24  # bytes in which a .txt file is one document; a longer one is several
LONGEST_OBJECT = 2**26  # characters in which an object of a .json file must end
CHECKPOINT_SECONDS = 10  # what a kill can cost
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
    config, file = tokenizer_config(path), Path(path) / "chat_template.jinja"
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
    # a fixed day, the one Llama's templates fall back to: shards must not depend on when they were made
    strftime_now = datetime(2024, 7, 26).strftime
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # {% generation %} only marks what the assistant says; as an `if` it keeps its whitespace control
    block = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")
    template = environment.from_string(block.sub(lambda m: m[1] + ("endif" if m[2] else "if true"), source))
    fixed = {name: value for name, value in config.items() if name.endswith("_token")}
    fixed |= {"tools": None, "documents": None, "add_generation_prompt": False}
    return lambda messages, **options: template.render(messages=messages, **fixed | options)


# Readers give (where, item, its bytes): a line of JSON (bytes), a row (dict) or what is wrong (ValueError).


def kind_of(file: Path) -> tuple[str, str]:
    """("jsonl", "gz") of name.jsonl.gz, ("txt", "") of name.txt."""
    stem, _, kind = file.name.rpartition(".")
    return (stem.rpartition(".")[2], kind) if kind in ("gz", "zst") else (kind, "")


def read_blocks(stream, compression: str) -> Iterator[bytes]:
    """A file's bytes, decompressed; EOFError where compressed data is broken or ends early."""
    decoder, new_decoder = None, functools.partial(zlib.decompressobj, wbits=31)
    if compression == "zst":
        new_decoder = importlib.import_module("zstandard").ZstdDecompressor().decompressobj
    while raw := stream.read(BLOCK):
        while raw and compression:
            try:
                decoder = decoder or new_decoder()
                data = decoder.decompress(raw)
            except Exception as error:  # zlib.error or zstandard.ZstdError
                raise EOFError(f"broken compression: {error}") from None
            raw = decoder.unused_data.lstrip(b"\0")  # another member, or padding
            decoder = None if decoder.eof else decoder
            yield data
        yield raw
    if decoder:
        raise EOFError("the compressed data ends early")


def pieces(blocks: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """The same bytes in parts of at most `longest`, cut between two lines, where a token ends anyway."""
    data, between = b"", re.compile(rb"\S\n(?=\S)")
    for block in blocks:
        data += block
        while len(data) > longest:
            if match := between.search(data, longest // 2, longest):
                end = match.end()
            else:  # between two characters
                end = next((i for i in range(longest, longest - 4, -1) if data[i] & 0xC0 != 0x80), longest)
            yield data[:end]
            data = data[end:]
    yield data


def read_text(file: Path, blocks: Iterator[bytes], text_key: str) -> Iterator[tuple]:
    line = 1
    for data in pieces(blocks, LONGEST_TEXT):
        try:
            yield f"{file}:{line}", {text_key: data.decode()}, len(data)
        except UnicodeDecodeError as error:
            bad_line = line + data.count(b"\n", 0, error.start)
            yield f"{file}:{bad_line}", ValueError("invalid UTF-8"), 0
        line += data.count(b"\n")


def read_json(file: Path, blocks: Iterator[bytes]) -> Iterator[tuple]:
    """Objects of an array, or one after another; one of them in memory."""
    parse, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # the row's text tells later
    text, number, wrong = "", 1, None
    for block in blocks:
        text += decode(block)
        start = between.match(text).end()
        while start < len(text):
            try:
                row, end = parse(text, start)
            except (json.JSONDecodeError, RecursionError) as error:  # cut off by the block's end, or wrong
                wrong = error
                break
            yield f"{file}: object {number}", row, end - start
            start, number = between.match(text, end).end(), number + 1
        text = text[start:]
        if len(text) > LONGEST_OBJECT:
            break
    if text:
        yield f"{file}: object {number}", ValueError(f"not JSON, and so is what follows: {wrong}"), 0


def read_parquet(file: Path, stream, settings: dict) -> Iterator[tuple]:
    """Rows, with only the columns that matter."""
    import pyarrow.parquet

    errors, text, score = (OSError, pyarrow.ArrowException), settings["text_key"], settings["score_key"]
    try:
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK, page_checksum_verification=True)
    except errors as error:
        yield str(file), ValueError(f"not Parquet: {error}"), 0
        return
    names, texts = parquet.schema_arrow.names, {text, text.split(".")[0], "messages", "conversations"}
    if not texts & set(names):
        raise ValueError(f"{file} has no column {text}, messages or conversations; it has {', '.join(names)}")
    columns = [name for name in names if name in texts | {score, score.split(".")[0]}]
    for group in range(parquet.num_row_groups):
        number, where = 0, f"{file}: row group {group}"
        try:
            for batch in parquet.iter_batches(256, [group], columns):
                for row in batch_rows(batch):
                    number += 1
                    yield f"{where}, row {number}", row, batch.nbytes // batch.num_rows
        except errors as error:
            lost = parquet.metadata.row_group(group).num_rows - number
            yield where, ValueError(f"{lost} rows lost: {error}".replace("\n", " ")), 0


def batch_rows(batch) -> list[dict | ValueError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [ValueError("invalid UTF-8")]
        return [row for i in range(batch.num_rows) for row in batch_rows(batch.slice(i, 1))]


def read_file(file: Path, stream, settings: dict) -> Iterator[tuple]:
    kind, compression = kind_of(file)
    blocks, number = read_blocks(stream, compression), 0
    try:
        if kind == "jsonl":
            rest = b""
            for block in chain(blocks, [b"\n"]):
                *lines, rest = (rest + block).split(b"\n")
                for number, line in enumerate(lines, number + 1):  # noqa: B020
                    if line.strip():
                        yield f"{file}:{number}", line, len(line)
        elif kind == "json":
            yield from read_json(file, blocks)
        elif kind == "parquet":
            yield from read_parquet(file, stream, settings)
        else:
            yield from read_text(file, blocks, settings["text_key"])
    except EOFError as error:
        yield f"{file}:{number + 1}" if number else str(file), ValueError(error), 0


def read_units(files: list[Path], settings: dict, position: list[int]) -> Iterator[tuple]:
    """([(where, item)], position after them, input bytes read), of about UNIT bytes of documents each.

    A position is [file, items of it that were read].
    """
    unit, size, (first, skipped) = [], 0, position
    before = sum(file.stat().st_size for file in files[:first])
    for index, file in enumerate(files[first:], first):
        with open(file, "rb") as stream:
            items = enumerate(read_file(file, stream, settings), 1)
            for count, (where, item, item_bytes) in islice(items, skipped, None):
                unit.append((where, item))
                size += item_bytes
                if size >= UNIT or len(unit) == 4096:
                    yield unit, [index, count], before + stream.tell()
                    unit, size = [], 0
        before, skipped = before + file.stat().st_size, 0
    yield unit, [len(files), 0], before


WORKER = {}  # its settings and tokenizer
MARK = "\ue000\ue001\ue000"  # private-use characters, which no chat has and no template touches


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
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
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
    full, segments, done = render(chat), [], 0
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


def read_item(where: str, item) -> tuple[str, list[tuple[str | list[int], bool]]] | None:
    """(split, segments) of a document; None: filtered out; ValueError says what is wrong.

    A segment is (text or ids, whether they are an assistant's turn).
    """
    settings = WORKER["settings"]
    if isinstance(item, ValueError):
        raise item
    try:
        row = json.loads(item) if isinstance(item, bytes) else item
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
        if settings["sft"] or not isinstance(text, str):
            raise ValueError("not a chat" if settings["sft"] else f"no text under {settings['text_key']}")
    else:
        try:
            render = chat_template(settings["tokenizer"])
            segments = chat_segments(read_chat(turns), render, WORKER["closing"])
        except Exception as error:  # whatever a template does not like about a chat
            raise ValueError(f"chat: {error}") from None
        text = "".join(segment for segment, _ in segments)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ValueError("invalid UTF-8") from None
    if turns is None:
        parts = [piece.decode() for piece in pieces([data], PIECE)]
        segments = [(part, False) for part in (WORKER["bos"], *parts, WORKER["eos"])]
    path = Path(where.rpartition(":")[0])  # the library's: the same files held out in any version of Python
    key = str(path.relative_to(STDLIB)) if settings["input"] == "stdlib" else text
    return (split_of(key, settings["heldout_fraction"]), segments) if text else None


def start_worker(settings: dict, model: Tokenizer, bos: list[int], eos: list[int]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():  # which may be killed without a chance to tell
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    special = [token.content for token in model.get_added_tokens_decoder().values() if token.special]
    closing = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "(?!)"
    WORKER.update(settings=settings, encode=model.encode_batch_fast, bos=bos, eos=eos)
    WORKER["closing"] = re.compile(rf"\s*(?:{closing})")


def tokenize(unit: list[tuple]) -> tuple[dict, int, list[str]]:
    """({split: (ids, where in them documents end, loss mask)}, rows filtered out, what was bad)."""
    settings, encode = WORKER["settings"], WORKER["encode"]
    results = {split: ([], [], []) for split in ("tokens", "heldout")}
    filtered, bad = 0, []
    for where, item in unit:
        try:
            document = read_item(where, item)
        except ValueError as error:
            bad.append(f"{where}: {error}")
            continue
        if document is None:
            filtered += 1
            continue
        split, segments = document
        ids, ends, mask = results[split]
        start = len(ids)
        for part, trained in segments:
            # each by itself: no token reaches over the boundary of a turn, as none does when it is generated
            new = part if isinstance(part, list) else encode([part], add_special_tokens=False)[0].ids
            ids += new
            mask += [trained] * len(new)
        if settings["sft"]:
            del ids[start + settings["seq_len"] :], mask[start + settings["seq_len"] :]
            if True not in mask[start:]:  # nobody answers, or the question alone is too long
                del ids[start:], mask[start:]
                filtered += 1
                continue
        ends.append(len(ids))
    dtypes = (np.uint32, np.int64, np.uint8)
    return {split: tuple(map(np.array, lists, dtypes)) for split, lists in results.items()}, filtered, bad


def shard_file(split: str, column: str, number: int) -> str:
    return f"{'heldout_' if split == 'heldout' else ''}{column}_{number:05d}.npy"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(file: Path, value: dict) -> None:
    """Whole or not at all, whenever the process or the machine dies."""
    partial = file.with_name("write.tmp")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


class ShardWriter:
    """Appends documents to one split's shards of at most `limit` tokens.

    `state`, which it keeps up to date, says where: the shards that are whole, and how much there is of the
    open one. What a killed process wrote after its last checkpoint is written over.
    """

    def __init__(self, directory: Path, split: str, dtypes: dict[str, np.dtype], limit: int, state: dict):
        self.directory, self.split, self.dtypes, self.limit = directory, split, dtypes, limit
        self.shards, self.counts = state["shards"], state["counts"]

    def path(self, column: str) -> Path:
        return self.directory / shard_file(self.split, column, len(self.shards))

    def open(self, column: str):
        self.path(column).touch()
        return open(self.path(column), "r+b")

    def write(self, tokens: np.ndarray, ends: np.ndarray, mask: np.ndarray) -> None:
        """Documents that end at `ends` in tokens; with a mask they are rows, which stay whole."""
        while len(tokens):
            filled = self.counts["tokens"]
            whole = int(np.searchsorted(ends, self.limit - filled, side="right"))  # documents that end in it
            size = self.limit - filled
            if "mask" in self.dtypes:
                size = int(ends[whole - 1]) if whole else 0
            parts = {"tokens": tokens[:size], "ends": ends[:whole] + filled, "mask": mask[:size]}
            for column, dtype in self.dtypes.items():
                with self.open(column) as file:
                    file.seek(HEADER + self.counts[column] * dtype.itemsize)
                    file.write(parts[column].astype(dtype).tobytes())
                self.counts[column] += len(parts[column])
            tokens, ends, mask = tokens[size:], ends[whole:] - size, mask[size:]
            if len(tokens):
                self.close()

    def flush(self) -> None:
        """Makes the open shard, if there is one, a .npy file of what was written."""
        for column, dtype in self.dtypes.items() if self.counts["tokens"] else ():
            header = {"descr": dtype.str, "fortran_order": False, "shape": (self.counts[column],)}
            with self.open(column) as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(HEADER + self.counts[column] * dtype.itemsize)
                os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()
        if self.counts["tokens"]:
            paths = [self.path(column) for column in self.dtypes]
            shard = {"file": paths[0].name, "tokens": self.counts["tokens"], "documents": self.counts["ends"]}
            self.shards.append(shard | {"sha256": {path.name: sha256(path) for path in paths}})
            self.counts.update(dict.fromkeys(self.counts, 0))


def find_files(input: str | list[str]) -> list[Path]:
    """The input's files in the order they are read."""
    if input == "stdlib":
        # encodings and pydoc_data are tables and prose in .py files
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
            need("pyarrow" if kind == "parquet" else "zstandard", file)
    return files


def in_order(pool: ProcessPoolExecutor, units: Iterator[tuple], depth: int) -> Iterator[tuple]:
    """(tokenize's result, *rest) for every (unit, *rest), in order, at most `depth` units at a time."""
    pending = deque()
    for unit, *rest in units:
        pending.append((pool.submit(tokenize, unit), rest))
        if len(pending) >= depth:
            future, rest = pending.popleft()
            yield future.result(), *rest
    for future, rest in pending:
        yield future.result(), *rest


def write_shards(
    input=input, out=out, tokenizer=tokenizer, text_key=text_key, min_score=min_score, score_key=score_key,
    sft=sft, seq_len=seq_len, heldout_fraction=heldout_fraction, shard_tokens=shard_tokens, max_bad=max_bad,
    num_workers=num_workers,
) -> None:  # fmt: skip
    """Tokenizes the input into the shard directory `out`; ValueError before any work if something is missing.

    Goes on in out.partial where an earlier call with the same settings was cut off.
    """
    # what decides which bytes are written
    settings = {k: v for k, v in locals().items() if k not in ("out", "max_bad", "num_workers")}
    settings = json.loads(json.dumps(settings, default=str))  # as they are when read back
    import fcntl  # which Windows has not; the readers below work there too

    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be from 0 to below 1")
    if shard_tokens < (seq_len if sft else 2) or seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}, shard_tokens {shard_tokens}; a shard must hold an SFT row")
    files = find_files(settings["input"])
    plain = [file for file in files if kind_of(file)[0] in ("txt", "py")]
    if plain and (sft or min_score is not None):
        raise ValueError(f"{plain[0]} is plain text: it has no {'chats' if sft else 'scores'}")
    model = load_tokenizer(tokenizer)
    if sft:
        chat_template(tokenizer)
    bos, eos = special_ids(model, tokenizer)
    vocab_size = max(model.get_vocab().values()) + 1
    dtypes = {"tokens": np.dtype("<u2" if vocab_size <= 2**16 else "<u4"), "ends": np.dtype("<i8")}
    dtypes |= {"mask": np.dtype("u1")} if sft else {}

    sizes = [file.stat().st_size for file in files]
    listing = hashlib.sha256(json.dumps([[str(file) for file in files], sizes]).encode()).hexdigest()
    settings["input_files"] = f"{len(files)} files, {sum(sizes):,} bytes, {listing[:16]}"
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    found = [Path(tokenizer) / name for name in names if (Path(tokenizer) / name).is_file()]
    settings["tokenizer_files"] = {file.name: sha256(file) for file in found}
    state = {"settings": settings, "position": [0, 0], "bytes": 0, "filtered": 0, "bad": 0, "first_bad": []}
    for split in ("tokens", "heldout"):
        state[split] = {"shards": [], "counts": dict.fromkeys(dtypes, 0)}
    partial.mkdir(parents=True, exist_ok=True)
    lock = open(partial / "lock", "w")  # held until this process ends, however it does
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing {partial}") from None
    if (partial / "progress.json").is_file():
        state = json.loads((partial / "progress.json").read_text(encoding="utf-8"))
        for name, value in settings.items():
            if (begun := state["settings"].get(name)) != value:
                wrong = f"was begun with {name} = {begun!r}, not {value!r}"
                raise ValueError(f"{partial} {wrong}; remove it first")
        print(f"going on in {partial}: {state['bytes']:,} bytes of the input are done")
    else:
        for stale in set(partial.iterdir()) - {partial / "lock"}:
            stale.unlink()
    writers = {s: ShardWriter(partial, s, dtypes, shard_tokens, state[s]) for s in ("tokens", "heldout")}

    def checkpoint() -> None:
        for writer in writers.values():
            writer.flush()
        write_json(partial / "progress.json", state)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers, eos_ids = num_workers or cores, [] if eos is None else [eos]
    pool = ProcessPoolExecutor(workers, None, start_worker, (settings, model, bos, eos_ids))
    bar = tqdm(total=sum(sizes), initial=state["bytes"], unit="B", unit_scale=True)
    started = time.perf_counter()
    saved, documents, tokens = started - CHECKPOINT_SECONDS, 0, 0  # the first unit ends in a checkpoint
    try:
        units = read_units(files, settings, state["position"])
        for (parts, filtered, bad), position, done in in_order(pool, units, 3 * workers):
            for reason in bad:
                bar.write(f"skipped {reason}", file=sys.stderr)
            if (all_bad := state["bad"] + len(bad)) > max_bad:
                checkpoint()
                raise ValueError(
                    f"{all_bad} bad documents, more than max_bad = {max_bad}, the last {bad[-1]}; "
                    "the same command with a higher --max_bad goes on from here"
                )
            for split, part in parts.items():
                writers[split].write(*part)
                documents, tokens = documents + len(part[1]), tokens + len(part[0])
            bar.update(done - state["bytes"])
            state |= {"position": position, "bytes": done, "filtered": state["filtered"] + filtered}
            state |= {"bad": all_bad, "first_bad": (state["first_bad"] + bad)[:100]}
            now = time.perf_counter()
            rates = [f"{count / (now - started):,.0f}" for count in (documents, tokens)]
            bar.set_postfix_str("{} documents/s, {} tokens/s".format(*rates), refresh=False)
            if now - saved >= CHECKPOINT_SECONDS:
                checkpoint()
                saved = now
    except BrokenProcessPool:  # as the kernel does when memory is short
        raise ValueError("a worker was killed; the same command goes on from the last checkpoint") from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        if not (partial / "progress.json").is_file():
            shutil.rmtree(partial)

    for writer in writers.values():
        writer.close()
    shards = {split: writer.shards for split, writer in writers.items()}
    documents = {split: sum(shard["documents"] for shard in shards[split]) for split in shards}
    tokens = {split: sum(shard["tokens"] for shard in shards[split]) for split in shards}
    dropped = f"{state['filtered']:,} filtered out, {state['bad']:,} bad"
    if not tokens["tokens"]:
        shutil.rmtree(partial)
        held = f"{documents['heldout']} documents held out"
        raise ValueError(f"the input holds no text to train on: {len(files)} files, {held}, {dropped}")
    meta = {
        "format": FORMAT, "dtype": dtypes["tokens"].name, "vocab_size": vocab_size,
        "vocabulary_hash": vocabulary_hash(model), "tokenizer": str(tokenizer), "bos_ids": bos, "eos_id": eos,
        "sft": sft, "settings": settings, "documents": documents, "filtered": state["filtered"],
        "bad": state["bad"], "first_bad": state["first_bad"], "splits": shards,
    }  # fmt: skip
    write_json(partial / "meta.json", meta)
    (partial / "progress.json").unlink()
    (partial / "lock").unlink()
    partial.rename(out)
    counts = [f"{documents[split]:,} documents, {tokens[split]:,} tokens" for split in shards]
    print(f"{out}: {counts[0]} for training; {counts[1]} held out; {dropped}")


def read_meta(path: Path) -> dict:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path} has no meta.json: not a shard directory (prepare.py writes one)")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
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


class Shards:
    """One split of a shard directory as blocks to train on.

    Packed (sft = False): a block is seq_len + 1 tokens; blocks overlap by one, for input and next tokens. SFT
    rows (sft = True): a block is (tokens [n], mask [n]), the mask true for the tokens to train on.
    ValueError names a directory or file that is not whole, or one without a block.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int, sft: bool = False):
        self.path, self.seq_len, self.sft, self.meta = Path(path), seq_len, sft, read_meta(Path(path))
        if sft and not self.meta["sft"]:
            raise ValueError(f"{path} holds packed text, not SFT rows (prepare.py --sft=True writes those)")

        def arrays(column: str, count: str, dtype: str) -> list[np.ndarray]:
            shards = enumerate(self.meta["splits"][split])
            return [read_array(self.path / shard_file(split, column, n), s[count], dtype) for n, s in shards]

        self.tokens = arrays("tokens", "tokens", self.meta["dtype"])
        self.ends = arrays("ends", "documents", "int64")
        self.masks = arrays("mask", "tokens", "uint8") if sft else []
        blocks = [len(e) for e in self.ends] if sft else [max(0, len(t) - 1) // seq_len for t in self.tokens]
        self.starts = [0, *accumulate(blocks)]  # first block of each shard
        self.blocks, total = self.starts[-1], sum(map(len, self.tokens))
        if not self.blocks:
            wanted = "row" if sft else f"block of seq_len {seq_len} + 1"
            raise ValueError(f"{path}: {total} tokens in its {split} split, not one {wanted}")
        self.tokens_per_block = total / self.blocks if sft else seq_len

    def find(self, i: int) -> tuple[int, int]:
        """(shard, row or first token in it) of block i."""
        shard = bisect_right(self.starts, i) - 1
        return shard, (i - self.starts[shard]) * (1 if self.sft else self.seq_len)

    def block(self, i: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        shard, start = self.find(i)
        if not self.sft:
            return self.tokens[shard][start : start + self.seq_len + 1].astype(np.int64)
        row = slice(self.ends[shard][start - 1] if start else 0, self.ends[shard][start])
        return self.tokens[shard][row].astype(np.int64), self.masks[shard][row].astype(bool)

    def documents(self, i: int) -> np.ndarray:
        """[seq_len + 1]: 0 for the tokens of packed block i in the document it begins in, then 1, 2, …"""
        shard, start = self.find(i)
        ends = self.ends[shard]
        first, last = np.searchsorted(ends, [start, start + self.seq_len], side="right")
        return np.searchsorted(ends[first:last] - start, np.arange(self.seq_len + 1), side="right")


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
        self.sources, self.seed = [Shards(path, split, seq_len, sft) for path in data], seed
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

    def sample(self, i: int) -> tuple[int, np.ndarray | tuple]:
        """(index of its source, tokens [seq_len + 1] or an SFT row) of sample i."""
        source, block = self.place(i)
        return source, self.sources[source].block(block)

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start, start + 1, … as [count, seq_len + 1]."""
        return np.stack([self.sample(i)[1] for i in range(start, start + count)])

    def sources_of(self, start: int, count: int) -> np.ndarray:
        """[count]: the index in `sources` that each sample of a batch is from."""
        return np.array([self.place(i)[0] for i in range(start, start + count)])

    def documents(self, start: int, count: int) -> np.ndarray:
        """[count, seq_len + 1]: which document of its block, from 0 on, each token of a batch is in."""
        places = map(self.place, range(start, start + count))
        return np.stack([self.sources[source].documents(block) for source, block in places])

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """SFT samples as (input tokens, labels), both [count, longest - 1].

        labels are the next tokens, -100 where those are not trained on or padding; input is padded with 0.
        """
        rows = [self.sample(i)[1] for i in range(start, start + count)]
        shape = count, max(len(tokens) for tokens, _ in rows) - 1
        inputs, labels = np.zeros(shape, np.int64), np.full(shape, -100)
        for i, (tokens, mask) in enumerate(rows):
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            labels[i, : len(tokens) - 1] = np.where(mask[1:], tokens[1:], -100)
        return inputs, labels


class RandomTokens:
    """Uniformly random blocks in place of a Mixture, to measure with."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size, self.seq_len, self.total = vocab_size, seq_len, 2**40
        self.tokens_per_block = seq_len

    def batch(self, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, self.vocab_size, (count, self.seq_len + 1))


def describe(directory: str) -> None:
    """Prints what a shard directory holds; ValueError names a file that is not what was written."""
    path, meta = Path(directory), read_meta(Path(directory))
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
        ids = source.tokens[0][: min(256, *source.ends[0][:1])]
        print(f"  ids     {' '.join(map(str, ids[:24]))} …")
        print(f"  text    {model.decode(ids, skip_special_tokens=False)!r}")
        if meta["sft"]:
            trained = ids[source.masks[0][: len(ids)] == 1]
            print(f"  trained {model.decode(trained, skip_special_tokens=False)!r}")


if __name__ == "__main__":
    try:
        describe(inspect) if inspect else write_shards()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoint") from None
