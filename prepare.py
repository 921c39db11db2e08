"""Text -> memmapped token shards, and the reader that train.py uses; the shard format is defined here.

    python prepare.py --input='corpus/*.jsonl.gz' --tokenizer=models/Llama-3.2-3B-Instruct --out=data/corpus
    python prepare.py --input='books/**/*.txt' --tokenizer=models/Qwen2.5-3B-Instruct --out=data/books
    python prepare.py                       # the quickstart's corpus: the Python standard library's own
    source

Input: .txt or .py (a file is a document) and .jsonl (a line is a document, its text under --text_key), each
also as .gz. Documents are tokenized on all cores, put between the tokenizer's BOS (where it adds one itself)
and EOS, and packed.

A shard directory holds meta.json and plain .npy files of uint16 or uint32 token ids: tokens_00000.npy, … for
training and heldout_00000.npy, … for evaluation. It is written under another name and renamed when whole.
"""

input: str | tuple = (
    "stdlib"  # file or glob, or several; "stdlib": this Python's own standard library (.py files)
)
out = "data/quickstart/corpus"  # shard directory to write; must not exist
tokenizer = "data/quickstart/teacher"  # directory with tokenizer.json and tokenizer_config.json
text_key = "text"  # JSONL field of a document's text
heldout_fraction = (
    0.02  # of the documents, chosen by a hash, for evaluation (less will do for a large corpus)
)
shard_tokens = 100_000_000  # tokens in one .npy file

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import bisect
import glob
import gzip
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

FORMAT = 1
BATCH_CHARACTERS = 2**22  # text tokenized at a time: enough for every core, little enough to hold

# ---- tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; a tokenizer is a Hugging Face directory with a tokenizer.json"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from None


def special_ids(tokenizer: Tokenizer, path: str | Path) -> tuple[list[int], int | None]:
    """(ids the tokenizer itself puts before a text, EOS id by tokenizer_config.json)."""
    bos = tokenizer.encode("").ids
    config = Path(path) / "tokenizer_config.json"
    eos = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
    eos = eos["content"] if isinstance(eos, dict) else eos
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    return [i for i in bos if i != eos_id], eos_id


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The same for any file that maps the same tokens to the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


# ---- documents


def open_text(file: Path):
    opener = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", errors="replace")


def stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    # encodings and pydoc_data are tables and prose in .py files
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "pydoc_data",
    }
    return root, sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))


def read_documents(files: list[Path], text_key: str, root: Path | None) -> Iterator[tuple[str, str]]:
    """(key, text) of every document; the key decides whether it is held out: its text, or its path under
    root.
    """
    for file in files:
        with open_text(file) as stream:
            if ".jsonl" not in file.suffixes:
                text = stream.read()
                yield str(file.relative_to(root)) if root else text, text
                continue
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[text_key]
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}:{number} is not JSON: {error}") from None
                except (KeyError, TypeError):
                    raise ValueError(f'{file}:{number} has no field "{text_key}"') from None
                yield text, text


def is_held_out(key: str, fraction: float) -> bool:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- writing shards


class ShardWriter:
    """Appends tokens to name_00000.npy, name_00001.npy, … of at most `limit` tokens each."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, limit: int):
        self.directory, self.name, self.dtype, self.limit = directory, name, dtype, limit
        self.shards, self.file, self.count = [], None, 0

    def header(self) -> None:
        # numpy pads the header so that a longer count fits in the same bytes: it is written again at the end
        self.file.seek(0)
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, fields)

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.file, self.count = (
                    open(self.directory / f"{self.name}_{len(self.shards):05d}.npy", "w+b"),
                    0,
                )
                self.header()
            part = tokens[: self.limit - self.count]
            self.file.write(part.astype(self.dtype).tobytes())
            self.count += len(part)
            tokens = tokens[len(part) :]
            if self.count == self.limit:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.header()
            self.file.seek(0)
            digest = hashlib.file_digest(self.file, "sha256") if hasattr(hashlib, "file_digest") else None
            digest = digest or hashlib.sha256(self.file.read())  # Python 3.10
            self.file.close()
            self.shards.append(
                {"file": Path(self.file.name).name, "tokens": self.count, "sha256": digest.hexdigest()}
            )
            self.file = None


def write_shards(
    input, out, tokenizer, text_key=text_key, heldout_fraction=heldout_fraction, shard_tokens=shard_tokens
) -> None:
    """Tokenizes the input into the shard directory `out`; ValueError before any work where something is
    missing.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be from 0 to below 1")
    if input == "stdlib":
        root, files = stdlib_files()
    else:
        patterns = [input] if isinstance(input, str) else input
        root, files = None, []
        for pattern in patterns:
            matches = sorted(Path(f) for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
            if not matches:
                raise ValueError(f"input {pattern} matches no file")
            files += matches
    for file in files:
        kind = [s for s in file.suffixes if s != ".gz"][-1:]
        if kind not in (["." + k] for k in ("txt", "py", "jsonl")):
            raise ValueError(f"{file}: input must be .txt, .py or .jsonl, each also as .gz")
    model, tokenizer_directory = load_tokenizer(tokenizer), tokenizer
    bos, eos = special_ids(model, tokenizer_directory)
    suffix = [] if eos is None else [eos]
    vocab_size = model.get_vocab_size()
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writers = {name: ShardWriter(partial, name, dtype, shard_tokens) for name in ("tokens", "heldout")}
    documents = {"tokens": 0, "heldout": 0}

    def tokenize(batch: list[tuple[str, str]]) -> None:
        encoded = model.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (key, _), encoding in zip(batch, encoded, strict=True):
            split = "heldout" if is_held_out(key, heldout_fraction) else "tokens"
            writers[split].write(np.array(bos + encoding.ids + suffix, dtype=dtype))
            documents[split] += 1

    with tqdm(desc=f"tokenizing {len(files)} files", unit=" chars", unit_scale=True) as bar:
        batch, characters = [], 0
        for key, text in read_documents(files, text_key, root):
            batch.append((key, text))
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                tokenize(batch)
                bar.update(characters)
                batch, characters = [], 0
        tokenize(batch)
        bar.update(characters)
    for writer in writers.values():
        writer.close()
    if not writers["tokens"].shards:
        shutil.rmtree(partial)
        raise ValueError(
            f"the input holds no text: {sum(documents.values())} documents in {len(files)} files"
        )
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "vocabulary_hash": vocabulary_hash(model),
        "tokenizer": str(tokenizer_directory),
        "bos_ids": bos,
        "eos_id": eos,
        "documents": documents,
        "splits": {name: writer.shards for name, writer in writers.items()},
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    partial.rename(out)
    counts = {name: sum(shard["tokens"] for shard in writer.shards) for name, writer in writers.items()}
    print(
        f"{out}: {documents['tokens']:,} documents, {counts['tokens']:,} tokens for training; "
        f"{documents['heldout']:,} documents, {counts['heldout']:,} tokens held out"
    )


# ---- reading shards


class Shards:
    """One split of a shard directory as blocks of seq_len + 1 tokens, which overlap by one: input and next
    tokens.

    ValueError names a directory that is not whole, a file that is not as long as meta.json says, or no block
    at all.
    """

    def __init__(self, path: str | Path, split: str, seq_len: int):
        self.path, self.seq_len, self.arrays, self.starts, blocks = Path(path), seq_len, [], [], 0
        if not (self.path / "meta.json").is_file():
            raise ValueError(f"{path} has no meta.json: not a shard directory (prepare.py writes one)")
        self.meta = json.loads((self.path / "meta.json").read_text())
        if self.meta["format"] != FORMAT:
            raise ValueError(f"{path} has shard format {self.meta['format']}; this code reads {FORMAT}")
        for shard in self.meta["splits"][split]:
            file = self.path / shard["file"]
            try:
                array = np.load(file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} is truncated or missing: {error}") from None
            if array.shape != (shard["tokens"],) or array.dtype != self.meta["dtype"]:
                raise ValueError(
                    f"{file} holds {array.shape[0]:,} tokens; meta.json says {shard['tokens']:,}"
                )
            self.arrays.append(array)
            self.starts.append(blocks)
            blocks += max(0, len(array) - 1) // seq_len
        self.blocks = blocks
        if not blocks:
            tokens = sum(len(array) for array in self.arrays)
            raise ValueError(
                f"{path}: {tokens} tokens in its {split} split, not one block of seq_len {seq_len} + 1"
            )

    def block(self, i: int) -> np.ndarray:
        shard = bisect.bisect_right(self.starts, i) - 1
        start = (i - self.starts[shard]) * self.seq_len
        return self.arrays[shard][start : start + self.seq_len + 1].astype(np.int64)


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

    data: {directory: how many of its tokens to take (repeating it where it has fewer), or None for all}.
    Every block comes once before any comes again, each time round in another order.
    """

    def __init__(self, data: dict[str, float | None], split: str, seq_len: int, seed: int):
        self.sources = [Shards(path, split, seq_len) for path in data]
        self.seed, self.starts, self.total = seed, [], 0
        for source, budget in zip(self.sources, data.values(), strict=True):
            self.starts.append(self.total)
            self.total += source.blocks if budget is None else max(1, int(budget) // seq_len)

    def sample(self, i: int) -> tuple[int, np.ndarray]:
        """(index of its source, tokens [seq_len + 1]) of sample i."""
        epoch, i = divmod(i, self.total)
        i = permute(i, self.total, self.seed + epoch)
        source = bisect.bisect_right(self.starts, i) - 1
        return source, self.sources[source].block((i - self.starts[source]) % self.sources[source].blocks)

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start, start + 1, … as [count, seq_len + 1]."""
        return np.stack([self.sample(i)[1] for i in range(start, start + count)])


class RandomTokens:
    """Uniformly random blocks in place of a Mixture, to measure with."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size, self.seq_len, self.total = vocab_size, seq_len, 2**40

    def batch(self, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, self.vocab_size, (count, self.seq_len + 1))


if __name__ == "__main__":
    try:
        write_shards(input, out, tokenizer)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
