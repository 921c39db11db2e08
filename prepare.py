"""Text, JSON, Parquet and chats -> memmapped token shards, and the readers of those that train.py uses.

    python prepare.py                        # the quickstart's corpus: this Python's standard library
    python prepare.py --input='books/**/*.txt' --tokenizer=models/Qwen2.5-3B-Instruct --out=data/books
    python prepare.py --input='fineweb-edu/**/*.parquet' --min_score=4 --tokenizer=… --out=data/fineweb_edu
    python prepare.py --input=openhermes2_5.json --tokenizer=… --out=data/openhermes      # chats, packed
    python prepare.py --input='ultrachat/train_sft*.parquet' --sft=True --tokenizer=… --out=data/ultrachat
    python prepare.py --inspect=data/books   # what a shard directory holds, and whether it is intact

Input: .txt or .py (a file is a document), .jsonl (a line), .json (an object of an array or of many), each
also .gz or .zst, and .parquet (a row). A row with `messages` or `conversations` is a chat, any other the text
under text_key. Text is put between the tokenizer's BOS (where it adds one itself) and EOS; a chat is what the
tokenizer's chat template makes of it, nothing added.

What cannot be read is reported, counted and skipped, up to max_bad. Killed at any moment, the same command
goes on from the last checkpoint in OUT.partial and ends with the same bytes.

A shard directory holds meta.json and plain .npy files: tokens_00000.npy (uint16 or uint32 ids),
ends_00000.npy (int64: where each document ends; one that its shard's end cuts in two ends in the next) and
with sft, where a document is a row and never cut, mask_00000.npy (uint8: 1 for the tokens to train on);
heldout_00000.npy, heldout_ends_00000.npy and heldout_mask_00000.npy likewise for evaluation.
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

import bisect
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
import sysconfig
import threading
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

FORMAT = 1
BLOCK = 2**16  # bytes read at a time; bounds what a block of compressed data can grow to
UNIT = 2**20  # bytes of documents that a worker gets at a time
PIECE = 2**20  # bytes tokenized at a time: longer documents are cut between two lines
LONGEST = 2**26  # characters in which an object of a .json file must end
CHECKPOINT_SECONDS = 10  # what a kill can cost

# ---- tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; a tokenizer is a Hugging Face directory with a tokenizer.json"
        )
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
    for name, value in config.items():
        if name.endswith("_token") and isinstance(value, dict):
            config[name] = value["content"]
    return config


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
        raise ValueError(f"{why} needs the package {module}: pip install {module}") from None


def chat_template(path: str | Path) -> Callable[..., str]:
    """The chat template in a tokenizer's directory as a function of messages, set up as transformers does."""
    config, file = tokenizer_config(path), Path(path) / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        raise ValueError(
            f"{path} has no chat template: no chat_template.jinja, none in tokenizer_config.json"
        )
    jinja2 = need("jinja2", f"the chat template of {path}")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    # a fixed day, the one Llama's templates fall back to: shards must not depend on when they were made
    strftime_now = datetime(2024, 7, 26).strftime
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # {% generation %} only marks what the assistant says; as an `if` it keeps its whitespace control
    block = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")
    template = environment.from_string(block.sub(lambda m: m[1] + ("endif" if m[2] else "if true"), source))
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    return lambda messages, add_generation_prompt=False: template.render(
        **tokens, messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
    )


# ---- reading files: (where, item, its bytes, position after it or None at the file's end, file bytes read)
# An item is a JSON line (bytes), a row (dict), a piece of text (tuple) or what is wrong there (ValueError).


def kind_of(file: Path) -> tuple[str, str]:
    """("jsonl", "gz") of name.jsonl.gz, ("txt", "") of name.txt."""
    stem, _, kind = file.name.rpartition(".")
    return (stem.rpartition(".")[2], kind) if kind in ("gz", "zst") else (kind, "")


def read_blocks(file: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """(data, file bytes read) from offset on, decompressed; EOFError where compressed data is broken."""
    compression, decoder = kind_of(file)[1], None
    if compression == "zst":
        new = importlib.import_module("zstandard").ZstdDecompressor().decompressobj
    else:
        new = functools.partial(zlib.decompressobj, wbits=31)
    with open(file, "rb") as stream:
        if not compression:
            stream.seek(offset)
            while data := stream.read(BLOCK):
                yield data, stream.tell()
            return
        while raw := stream.read(BLOCK):
            while raw:
                try:
                    decoder = decoder or new()
                    data = decoder.decompress(raw)
                except Exception as error:  # zlib.error or zstandard.ZstdError
                    raise EOFError(f"broken compression: {error}") from None
                raw = decoder.unused_data.lstrip(b"\0")  # another member, or padding
                decoder = None if decoder.eof else decoder
                skipped = min(offset, len(data))
                offset -= skipped
                yield data[skipped:], stream.tell()
    if decoder is not None:
        raise EOFError("the compressed data ends early")


def read_lines(file: Path, offset: int, number: int) -> Iterator[tuple]:
    parts, done = [], 0
    for data, done in read_blocks(file, offset):
        first, *rest = data.split(b"\n")
        parts.append(first)
        for start in rest:
            line, parts, number = b"".join(parts), [start], number + 1
            offset += len(line) + 1
            yield f"{file}:{number}", line, len(line), (offset, number), done
    yield f"{file}:{number + 1}", b"".join(parts), 0, None, done


def cut_point(data: bytes | bytearray, start: int = 0) -> int:
    """Where to cut what is longer than PIECE from start on: between two lines, where a token ends anyway."""
    at = start + PIECE
    while (at := data.rfind(b"\n", start + PIECE // 2, at)) > 0:
        if not data[at - 1 : at].isspace() and not data[at + 1 : at + 2].isspace():
            return at + 1
    at = start + PIECE
    while data[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return at


def read_text(file: Path, root: Path | None, fraction: float, number: int) -> Iterator[tuple]:
    """Pieces (text, is first, is last, is held out, what is wrong or None) from piece `number` on."""
    blocks, buffer, line, index, last, held, done = read_blocks(file), bytearray(), 1, 0, False, False, 0
    while not last:
        wrong = None
        try:
            while len(buffer) <= PIECE and (block := next(blocks, None)):
                buffer += block[0]
                done = block[1]
        except EOFError as error:
            wrong = str(error)
            buffer.clear()
        last = len(buffer) <= PIECE
        data = bytes(buffer[: None if last else cut_point(buffer)])
        del buffer[: len(data)]
        where, line, index = line, line + data.count(b"\n"), index + 1
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            text, wrong, where = "", "invalid UTF-8", where + data.count(b"\n", 0, error.start)
        if index == 1:
            held = is_held_out(str(file.relative_to(root)) if root else text, fraction)
        if index > number:
            item = (text, index == 1, last, held, wrong)
            yield f"{file}:{where}", item, len(data), None if last else (0, index), done


def read_json(file: Path, number: int) -> Iterator[tuple]:
    """Objects of an array, or one after another, from object `number` on; one of them in memory."""
    parse, between, text, index = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*"), "", 0
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # the row's text tells later
    for data, done in read_blocks(file):
        text += decode(data)
        end = start = between.match(text).end()
        wrong = "it ends within an object"
        while start < len(text):
            try:
                row, end = parse(text, start)
            except (json.JSONDecodeError, RecursionError) as error:  # cut off by the block's end, or wrong
                wrong = str(error)
                break
            index += 1
            if index > number:
                yield f"{file}: object {index}", row, end - start, (0, index), done
            start = between.match(text, end).end()
        text = text[start:]
        if len(text) > LONGEST:
            break
    if text:
        wrong = ValueError(f"not JSON, and so is what follows: {wrong}")
        yield f"{file}: object {index + 1}", wrong, 0, None, os.path.getsize(file)


def read_parquet(file: Path, settings: dict, group: int, number: int) -> Iterator[tuple]:
    """Rows from row `number` of row group `group` on, with only the columns that matter."""
    import pyarrow.parquet

    errors, size, done = (OSError, pyarrow.ArrowException), os.path.getsize(file), 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    except errors as error:
        yield str(file), ValueError(f"not Parquet: {error}"), 0, None, size
        return
    names, text, score = parquet.schema_arrow.names, settings["text_key"], settings["score_key"]
    columns = [name for name in names if name in (text, text.split(".")[0], "messages", "conversations")]
    scores = [name for name in names if name in (score, score.split(".")[0])]
    if not columns or (settings["min_score"] is not None and not scores):
        wanted = score if columns else f"{text}, messages or conversations"
        raise ValueError(f"{file} has no column {wanted}; it has {', '.join(names)}")
    for g in range(parquet.num_row_groups):
        rows, skipped = 0, number if g == group else 0
        total = parquet.metadata.row_group(g).num_rows
        try:
            for batch in parquet.iter_batches(256, [g], {*columns, *scores}) if g >= group else ():
                bytes_each, read = batch.nbytes // batch.num_rows, size * done // parquet.metadata.num_rows
                for i, row in enumerate(batch_rows(batch), rows + 1):
                    if i > skipped:
                        yield f"{file}: row group {g}, row {i}", row, bytes_each, (g, i), read
                rows, done = rows + batch.num_rows, done + batch.num_rows
        except errors as error:
            wrong = ValueError(f"{total - rows} rows lost: {error}".replace("\n", " "))
            yield f"{file}: row group {g}", wrong, 0, (g + 1, 0), size * done // parquet.metadata.num_rows
        done += total - rows


def batch_rows(batch) -> list[dict | ValueError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [ValueError("invalid UTF-8")]
        return [row for i in range(batch.num_rows) for row in batch_rows(batch.slice(i, 1))]


def read_units(files: list[Path], root: Path | None, settings: dict, position: list[int]) -> Iterator[tuple]:
    """([(where, item)], position after them, input bytes read), of about UNIT bytes of documents each.

    A position is [file, offset or row group in it, lines, pieces, objects or rows that were read there].
    """
    unit, size, (first, part, number) = [], 0, position
    before = sum(os.path.getsize(file) for file in files[:first])
    for index, file in enumerate(files[first:], first):
        kind = kind_of(file)[0]
        if kind == "parquet":
            items = read_parquet(file, settings, part, number)
        elif kind == "jsonl":
            items = read_lines(file, part, number)
        elif kind == "json":
            items = read_json(file, number)
        else:
            items = read_text(file, root, settings["heldout_fraction"], number)
        try:
            for where, item, item_bytes, after, file_bytes in items:
                unit.append((where, item))
                size += item_bytes
                position = [index, *after] if after else [index + 1, 0, 0]
                number = position[2]
                if size >= UNIT or len(unit) == 4096:
                    yield unit, position, before + file_bytes
                    unit, size = [], 0
        except EOFError as error:
            unit.append((f"{file}:{number + 1}", ValueError(error)))
            position = [index + 1, 0, 0]
        before, part, number = before + os.path.getsize(file), 0, 0
    yield unit, position, before


# ---- what a worker process makes of a unit

WORKER = {}  # its settings, tokenizer and chat template
MARK = "\ue000\ue001\ue000"  # private-use characters, which no chat has and no template touches


def is_held_out(key: str, fraction: float) -> bool:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def lookup(row: dict, key: str):
    """The value under a name, or under names joined by dots; None where there is none."""
    if key in row:
        return row[key]
    for name in key.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def read_chat(row: dict) -> list[dict] | None:
    """A row's chat as messages of role and content; None where it has none."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is None:
        return None
    chat = []
    for turn in turns if isinstance(turns, list) and turns else [{}]:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("no turns, or one without a role (from) or without text as its content (value)")
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        chat.append({**turn, "role": role, "content": content})
    return chat


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


def common_prefix(a: str, b: str) -> int:
    same = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return len(b) if a.startswith(b) else next(same, min(len(a), len(b)))


def read_row(row) -> tuple[str, list[tuple[str, bool]], bool] | None:
    """(split, segments (text, trained on), whether it is a chat) of a row; None: filtered out."""
    settings, sft = WORKER["settings"], WORKER["settings"]["sft"]
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
    chat = read_chat(row)
    if chat is None:
        text = lookup(row, settings["text_key"])
        if sft or not isinstance(text, str):
            raise ValueError("not a chat" if sft else f"no text under {settings['text_key']}")
    else:
        if "render" not in WORKER:
            try:
                WORKER["render"] = chat_template(settings["tokenizer"])
            except ValueError as error:
                raise RuntimeError(error) from None  # not the row's fault: ends the run
        try:
            segments = chat_segments(chat, WORKER["render"], WORKER["closing"])
        except Exception as error:  # whatever a template does not like about a chat
            raise ValueError(f"chat: {error}") from None
        text = "".join(segment for segment, _ in segments)
    try:
        data, start = text.encode(), 0
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ValueError("invalid UTF-8") from None
    if chat is None:
        segments = []
        while len(data) - start > PIECE:
            end = cut_point(data, start)
            segments.append((data[start:end].decode(), False))
            start = end
        segments.append((data[start:].decode(), False))
    split = "heldout" if is_held_out(text, settings["heldout_fraction"]) else "tokens"
    return split, segments, chat is not None


def start_worker(settings: dict, model: Tokenizer, bos: list[int], eos: list[int], code: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():  # which may be killed without a chance to tell
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    special = [token.content for token in model.get_added_tokens_decoder().values() if token.special]
    closing = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "(?!)"
    WORKER.update(settings=settings, model=model, code=code, bos=array(code, bos), eos=array(code, eos))
    WORKER["closing"] = re.compile(rf"\s*(?:{closing})")


def tokenize(unit: list[tuple]) -> tuple[dict, int, list[str]]:
    """({split: (tokens, where in them documents end, mask or empty)}, rows filtered out, what was bad)."""
    settings, code, encode = WORKER["settings"], WORKER["code"], WORKER["model"].encode_batch_fast
    results = {split: (array(code), array("q"), bytearray()) for split in ("tokens", "heldout")}
    filtered, bad = 0, []
    for where, item in unit:
        first = last = True
        if isinstance(item, tuple):
            text, first, last, held, wrong = item
            document = "heldout" if held else "tokens", [(text, False)], False
            if wrong:
                bad.append(f"{where}: {wrong}")
                if first and last:
                    continue
        elif isinstance(item, bytes) and not item.strip():
            continue
        else:
            try:
                document = read_row(item)
            except ValueError as error:
                bad.append(f"{where}: {error}")
                continue
        if document is None:
            filtered += 1
            continue
        split, segments, chat = document
        ids, ends, mask = results[split]
        start = len(ids)
        if first and not chat:
            ids += WORKER["bos"]
        for text, trained in segments:
            # each by itself: no token reaches over the boundary of a turn, as none does when it is generated
            new = encode([text], add_special_tokens=False)[0].ids
            ids += array(code, new)
            if settings["sft"]:
                mask += bytes([trained]) * len(new)
        if last and not chat:
            ids += WORKER["eos"]
        if settings["sft"]:
            del ids[start + settings["seq_len"] :], mask[start + settings["seq_len"] :]
            if 1 not in mask[start:]:  # nobody answers, or the question alone is too long
                del ids[start:], mask[start:]
                filtered += 1
        if last and (len(ids) > start or not first):
            ends.append(len(ids))
    dtypes = (f"u{array(code).itemsize}", "i8", "u1")
    arrays = {split: tuple(map(np.array, parts, dtypes)) for split, parts in results.items()}
    return arrays, filtered, bad


# ---- writing shards


def shard_file(split: str, column: str, number: int) -> str:
    stem = column if split == "tokens" else "heldout" if column == "tokens" else f"heldout_{column}"
    return f"{stem}_{number:05d}.npy"


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
    open one.
    """

    def __init__(self, directory: Path, split: str, dtypes: dict[str, str], limit: int, state: dict):
        self.directory, self.split, self.limit, self.state, self.files = directory, split, limit, state, {}
        self.dtypes = {column: np.dtype(dtype) for column, dtype in dtypes.items()}
        if state["counts"]:
            self.open("r+b")

    def header(self, column: str) -> int:
        # numpy pads the header so that a longer count fits in the same bytes: it is written again at the end
        file, shape = self.files[column], (self.state["counts"][column],)
        file.seek(0)
        fields = {"descr": self.dtypes[column].str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)
        return file.tell()

    def open(self, mode: str) -> None:
        for column, dtype in self.dtypes.items():
            count = self.state["counts"].setdefault(column, 0)
            name = shard_file(self.split, column, len(self.state["shards"]))
            self.files[column] = open(self.directory / name, mode)
            self.files[column].truncate(self.header(column) + count * dtype.itemsize)
            self.files[column].seek(0, os.SEEK_END)

    def write(self, tokens: np.ndarray, ends: np.ndarray, mask: np.ndarray) -> None:
        """Documents that end at `ends` in tokens; with a mask they are rows, which stay whole."""
        while len(tokens):
            filled = self.state["counts"].get("tokens", 0)
            whole = int(np.searchsorted(ends, self.limit - filled, side="right"))  # documents that end in it
            size = min(self.limit - filled, len(tokens))
            if "mask" in self.dtypes:
                if whole == 0 and filled:
                    self.close()
                    continue
                whole = max(whole, 1)  # a row longer than a shard is a shard
                size = int(ends[whole - 1])
            if not self.files:
                self.open("w+b")
            parts = {"tokens": tokens[:size], "ends": ends[:whole] + filled, "mask": mask[:size]}
            for column, dtype in self.dtypes.items():
                self.files[column].write(parts[column].astype(dtype).tobytes())
                self.state["counts"][column] += len(parts[column])
            tokens, ends, mask = tokens[size:], ends[whole:] - size, mask[size:]
            if filled + size >= self.limit:
                self.close()

    def flush(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        if not self.files:
            return
        for column in self.files:
            self.header(column)
        self.flush()
        for file in self.files.values():
            file.close()
        names = [Path(file.name).name for file in self.files.values()]
        counts, sums = self.state["counts"], {name: sha256(self.directory / name) for name in names}
        shard = {"file": names[0], "tokens": counts["tokens"], "documents": counts["ends"], "sha256": sums}
        self.state["shards"].append(shard)
        self.files, self.state["counts"] = {}, {}


def find_files(input: str | tuple) -> tuple[Path | None, list[Path]]:
    """(root of the standard library or None, the input's files in the order they are read)."""
    if input == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # encodings and pydoc_data are tables and prose in .py files
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        skipped |= {"encodings", "pydoc_data"}
        return root, sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))
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
    return None, files


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


def lock_directory(directory: Path):
    """An open file that keeps other processes out until it is closed; ValueError where one keeps us out."""
    import fcntl

    lock = open(directory / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing {directory}") from None
    return lock


def write_shards(
    input=input, out=out, tokenizer=tokenizer, text_key=text_key, min_score=min_score, score_key=score_key,
    sft=sft, seq_len=seq_len, heldout_fraction=heldout_fraction, shard_tokens=shard_tokens, max_bad=max_bad,
    num_workers=num_workers,
) -> None:  # fmt: skip
    """Tokenizes the input into the shard directory `out`; ValueError before any work if something is missing.

    Goes on in out.partial where an earlier call with the same settings was cut off.
    """
    # ---- what is there, and can it be read
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be from 0 to below 1")
    if min(seq_len, shard_tokens) < 2:
        raise ValueError(f"seq_len is {seq_len}, shard_tokens {shard_tokens}; both must be at least 2")
    root, files = find_files(input)
    for file in files:
        kind, compression = kind_of(file)
        if kind in ("txt", "py") and (sft or min_score is not None):
            raise ValueError(f"{file} is plain text: it has no {'chats' if sft else 'scores'}")
        if kind == "parquet" or compression == "zst":
            need("pyarrow" if kind == "parquet" else "zstandard", file)
    model = load_tokenizer(tokenizer)
    if sft:
        chat_template(tokenizer)
    bos, eos = special_ids(model, tokenizer)
    vocab_size = max(model.get_vocab().values()) + 1
    code = "H" if vocab_size <= 2**16 else "I"
    dtypes = {"tokens": "<u2" if code == "H" else "<u4", "ends": "<i8"} | ({"mask": "|u1"} if sft else {})

    # ---- begin, or go on
    sizes = [file.stat().st_size for file in files]
    listing = hashlib.sha256(json.dumps([[str(file) for file in files], sizes]).encode()).hexdigest()
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    settings = {
        "input": input if isinstance(input, str) else list(input),
        "input_files": f"{len(files)} files, {sum(sizes):,} bytes, {listing[:16]}",
        "tokenizer": str(tokenizer),
        "tokenizer_files": {n: sha256(Path(tokenizer) / n) for n in names if (Path(tokenizer) / n).is_file()},
        "text_key": text_key, "min_score": min_score, "score_key": score_key, "sft": sft, "seq_len": seq_len,
        "heldout_fraction": heldout_fraction, "shard_tokens": shard_tokens,
    }  # fmt: skip
    state = {
        "settings": settings, "position": [0, 0, 0], "bytes": 0, "filtered": 0, "bad": 0, "first_bad": [],
        "splits": {split: {"shards": [], "counts": {}} for split in ("tokens", "heldout")},
    }  # fmt: skip
    partial.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(partial)
    if (partial / "progress.json").is_file():
        state = json.loads((partial / "progress.json").read_text(encoding="utf-8"))
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                begun = state["settings"].get(name)
                raise ValueError(
                    f"{partial} was begun with {name} = {begun!r}, not {value!r}; remove it first"
                )
        print(f"going on in {partial}: {state['bytes']:,} bytes of the input are done")
    else:
        for stale in set(partial.iterdir()) - {partial / "lock"}:
            stale.unlink()
    writers = {s: ShardWriter(partial, s, dtypes, shard_tokens, state["splits"][s]) for s in state["splits"]}

    def checkpoint() -> None:
        for writer in writers.values():
            writer.flush()
        write_json(partial / "progress.json", state)

    # ---- read, tokenize, write
    checkpoint()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arguments = (settings, model, bos, [] if eos is None else [eos], code)
    pool = ProcessPoolExecutor(num_workers or cores, None, start_worker, arguments)
    bar = tqdm(
        desc=f"{len(files)} files", total=sum(sizes), initial=state["bytes"], unit="B", unit_scale=True
    )
    started = saved = time.perf_counter()
    documents = tokens = 0
    try:
        units = read_units(files, root, settings, state["position"])
        for (parts, filtered, bad), position, done in in_order(pool, units, 3 * (num_workers or cores)):
            for reason in bad:
                bar.write(f"skipped {reason}", file=sys.stderr)
            if state["bad"] + len(bad) > max_bad:
                checkpoint()
                raise ValueError(
                    f"{state['bad'] + len(bad)} bad documents, more than max_bad = {max_bad}, the last "
                    f"{bad[-1]}; the same command with a higher --max_bad goes on from here"
                )
            for split, part in parts.items():
                writers[split].write(*part)
                documents, tokens = documents + len(part[1]), tokens + len(part[0])
            bar.update(done - state["bytes"])
            state |= {"position": position, "bytes": done, "filtered": state["filtered"] + filtered}
            state |= {"bad": state["bad"] + len(bad), "first_bad": (state["first_bad"] + bad)[:100]}
            now = time.perf_counter()
            rates = [f"{count / (now - started):,.0f}" for count in (documents, tokens)]
            bar.set_postfix_str("{} documents/s, {} tokens/s".format(*rates), refresh=False)
            if now - saved >= CHECKPOINT_SECONDS:
                checkpoint()
                saved = now
    except RuntimeError as error:  # of a worker; BrokenProcessPool where one was killed
        checkpoint()
        raise ValueError(f"{str(error).rstrip('.')}; the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()

    # ---- finish
    for writer in writers.values():
        writer.close()
    shards = {split: state["splits"][split]["shards"] for split in state["splits"]}
    documents = {split: sum(shard["documents"] for shard in shards[split]) for split in shards}
    counts = {split: sum(shard["tokens"] for shard in shards[split]) for split in shards}
    dropped = f"{state['filtered']:,} filtered out, {state['bad']:,} bad"
    if not shards["tokens"]:
        shutil.rmtree(partial)
        raise ValueError(
            f"the input holds no text to train on: {len(files)} files, {documents['heldout']} documents held "
            f"out, {dropped}"
        )
    meta = {
        "format": FORMAT, "dtype": np.dtype(dtypes["tokens"]).name, "vocab_size": vocab_size,
        "vocabulary_hash": vocabulary_hash(model), "tokenizer": str(tokenizer), "bos_ids": bos, "eos_id": eos,
        "sft": sft, "settings": settings, "documents": documents, "filtered": state["filtered"],
        "bad": state["bad"], "first_bad": state["first_bad"], "splits": shards,
    }  # fmt: skip
    write_json(partial / "meta.json", meta)
    (partial / "progress.json").unlink()
    (partial / "lock").unlink()
    partial.rename(out)
    lock.close()
    print(
        f"{out}: {documents['tokens']:,} documents, {counts['tokens']:,} tokens for training; "
        f"{documents['heldout']:,} documents, {counts['heldout']:,} tokens held out; {dropped}"
    )


# ---- reading shards


def read_meta(path: Path) -> dict:
    if not (path / "meta.json").is_file():
        raise ValueError(f"{path} has no meta.json: not a shard directory (prepare.py writes one)")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise ValueError(f"{path} has shard format {meta['format']}; this code reads {FORMAT}")
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
    ValueError names a directory that is not whole, a file that is not as long as meta.json says, or no block
    at all.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int, sft: bool = False):
        self.path, self.split, self.seq_len, self.sft = Path(path), split, seq_len, sft
        self.meta, self.starts, self.blocks = read_meta(self.path), [], 0
        if sft and not self.meta["sft"]:
            raise ValueError(f"{path} holds packed text, not SFT rows (prepare.py --sft=True writes those)")
        self.tokens = self.arrays("tokens", "tokens", self.meta["dtype"])
        self.ends = self.arrays("ends", "documents", "int64")
        self.masks = self.arrays("mask", "tokens", "uint8") if sft else []
        for tokens, ends in zip(self.tokens, self.ends, strict=True):
            self.starts.append(self.blocks)
            self.blocks += len(ends) if sft else max(0, len(tokens) - 1) // seq_len
        total = sum(map(len, self.tokens))
        if not self.blocks:
            wanted = "row" if sft else f"block of seq_len {seq_len} + 1"
            raise ValueError(f"{path}: {total} tokens in its {split} split, not one {wanted}")
        self.tokens_per_block = total / self.blocks if sft else seq_len

    def arrays(self, column: str, count: str, dtype: str) -> list[np.ndarray]:
        shards = enumerate(self.meta["splits"][self.split])
        return [read_array(self.path / shard_file(self.split, column, n), s[count], dtype) for n, s in shards]

    def find(self, i: int) -> tuple[int, int]:
        """(shard, row or first token in it) of block i."""
        shard = bisect.bisect_right(self.starts, i) - 1
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
        first, last = np.searchsorted(self.ends[shard], [start, start + self.seq_len], side="right")
        return np.searchsorted(
            self.ends[shard][first:last] - start, np.arange(self.seq_len + 1), side="right"
        )


def permute(i: int, n: int, seed: int) -> int:
    """Where a pseudo-random permutation of range(n), keyed by seed, puts i; needs no memory.

    A four-round Feistel network on the smallest even number of bits that holds n, walked until it lands
    below n.
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

    data: {directory: how many of its tokens come in `total` samples (repeated where it has fewer), or None
    for all}. Each source is spread evenly over the samples; each of its blocks comes once before any comes
    again, each time round in another order.
    """

    def __init__(self, data: dict[str, float | None], split: str, seq_len: int, seed: int, sft: bool = False):
        self.sources, self.seed = [Shards(path, split, seq_len, sft) for path in data], seed
        self.shares = [
            source.blocks if budget is None else max(1, int(budget / source.tokens_per_block))
            for source, budget in zip(self.sources, data.values(), strict=True)
        ]
        self.total = sum(self.shares)

    def place(self, i: int) -> tuple[int, int]:
        """(index of its source, block in the source) of sample i."""
        others = self.total
        for index, share in enumerate(self.shares):  # noqa: B007 (it is what is looked for)
            taken = i * share // others  # samples of this source among the first i
            if (i + 1) * share // others > taken:
                break
            i, others = i - taken, others - share  # sample i of the sources that remain
        blocks = self.sources[index].blocks
        epoch, k = divmod(taken, blocks)
        return index, permute(k, blocks, self.seed + epoch + 1_000_003 * index)

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
        places = (self.place(i) for i in range(start, start + count))
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

    def batch(self, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, self.vocab_size, (count, self.seq_len + 1))


def describe(directory: str) -> None:
    """Prints what a shard directory holds; ValueError names a file that is not what was written."""
    path, meta = Path(directory), read_meta(Path(directory))
    settings, model = meta["settings"], load_tokenizer(meta["tokenizer"])
    if vocabulary_hash(model) != meta["vocabulary_hash"]:
        raise ValueError(f"{meta['tokenizer']} is no longer the tokenizer that {path} was written with")
    print(f"{path}: {'SFT rows' if meta['sft'] else 'packed text'} from {settings['input']}")
    print(f"  {settings['input_files']}; {meta['filtered']:,} filtered out, {meta['bad']:,} bad")
    print("".join(f"  skipped {reason}\n" for reason in meta["first_bad"]), end="")
    print(f"  {meta['vocab_size']:,} token ids of {meta['tokenizer']}, as {meta['dtype']}")
    sums = {
        k: v for shards in meta["splits"].values() for shard in shards for k, v in shard["sha256"].items()
    }
    for name, written in tqdm(sums.items(), desc="verifying", unit="file", leave=False):
        if not (path / name).is_file() or sha256(path / name) != written:
            raise ValueError(f"{path / name} is missing or damaged: its sha256 is not the one in meta.json")
    print(f"  {len(sums)} files have the checksums they were written with")
    for split, shards in meta["splits"].items():
        tokens = sum(shard["tokens"] for shard in shards)
        print(f"{split}: {meta['documents'][split]:,} documents, {tokens:,} tokens in {len(shards)} shards")
        if tokens:
            source = Shards(path, split, 1, meta["sft"])
            ids = source.tokens[0][: min(256, *source.ends[0][:1])]
            print(f"  ids     {' '.join(map(str, ids[:24]))} …")
            print(f"  text    {model.decode(ids, skip_special_tokens=False)!r}")
        if tokens and meta["sft"]:
            trained = ids[source.masks[0][: len(ids)] == 1]
            print(f"  trained {model.decode(trained, skip_special_tokens=False)!r}")


if __name__ == "__main__":
    try:
        describe(inspect) if inspect else write_shards()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoint") from None
