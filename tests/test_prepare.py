"""prepare.py: input formats, what is bad in them, kill -9, chats with their loss masks, and the readers."""

import copy
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import prepare
import sample
from prepare import Mixture, Shards, permute, write_shards

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "data/quickstart/teacher"
TOKENIZER = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
TEXTS = [
    f"# {i}: {'ünï 日本 🙂 ' * (i % 3)}\ndef f(x):\n    return {i} * x\n" * (1 + i % 5) for i in range(150)
]


def run(*arguments):
    command = [sys.executable, "prepare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def prepared(input, out, **options):
    """Of many units even where the input is small."""
    options = {"num_workers": 1, "unit_bytes": 4000, **options}
    write_shards(
        input if isinstance(input, list) else str(input),
        out,
        str(options.pop("tokenizer", BUNDLED)),
        **options,
    )
    return json.loads((Path(out) / "meta.json").read_text())


def arrays_of(directory, column, split="tokens"):
    shards = json.loads((directory / "meta.json").read_text())["splits"][split]
    return [np.load(directory / shard["file"].replace("tokens", column)) for shard in shards]


def documents_of(directory, column, split="tokens"):
    """The column's values, tokens or mask, of each document in turn."""
    documents = []
    for values, ends in zip(
        arrays_of(directory, column, split), arrays_of(directory, "ends", split), strict=True
    ):
        assert len(values) == ends[-1]  # no document goes from one shard into the next
        documents += np.split(values, ends[:-1])
    return documents


def texts_of(directory, split="tokens"):
    """The documents without their EOS."""
    shards = json.loads((directory / "meta.json").read_text())["splits"][split]
    assert [len(array) for array in arrays_of(directory, "tokens", split)] == [s["tokens"] for s in shards]
    assert [len(array) for array in arrays_of(directory, "ends", split)] == [s["documents"] for s in shards]
    documents = documents_of(directory, "tokens", split)
    assert all(document[-1] == 0 for document in documents)
    return [TOKENIZER.decode(document[:-1]) for document in documents]


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}


def lines(texts, key="text"):
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def write_as(kind, path, texts):
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=40)
    elif kind == "json":
        path.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=2))
    elif kind == "jsonl.gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(lines(texts[:50])) + gzip.compress(lines(texts[50:])))
    elif kind == "json.zst":  # objects one after another, not an array
        path.write_bytes(zstandard.compress(lines(texts)))
    else:
        compress = zstandard.compress if kind.endswith("zst") else bytes
        path.write_bytes(compress(lines(texts)))
    return path


# ---- formats


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.zst", "parquet"])
def test_every_format_gives_the_same_documents_and_bytes_for_any_number_of_workers(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "BLOCK", 1000)  # objects and lines that go over several blocks
    source = write_as(kind, tmp_path / f"data.{kind}", TEXTS)
    written = []
    for workers in (1, 2, 3):
        meta = prepared(source, tmp_path / str(workers), heldout_fraction=0.2, num_workers=workers)
        written.append(contents(tmp_path / str(workers)))
    assert written[0] == written[1] == written[2]
    assert len(meta["splits"]["tokens"]) == {"jsonl": 16, "parquet": 4}.get(kind, 1)
    held = texts_of(tmp_path / "1", "heldout")
    assert 10 < len(held) < 60
    assert held == [text for text in TEXTS if text in held]
    assert texts_of(tmp_path / "1") == [text for text in TEXTS if text not in held]
    names = {file.name for file in (tmp_path / "1").iterdir()}
    assert names == {
        "meta.json",
        *(name for shards in meta["splits"].values() for s in shards for name in s["sha256"]),
    }
    assert not list(tmp_path.glob("*.partial"))


def test_small_files_are_packed_into_units_whole(tmp_path):
    """As the quickstart's: one document a file, in the order of their names, and few shards."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03d}.py").write_text(text)
    meta = prepared(f"{tmp_path}/*.py", tmp_path / "out", heldout_fraction=0.1, unit_bytes=10_000)
    held = texts_of(tmp_path / "out", "heldout")
    assert 3 < len(held) < 30
    assert texts_of(tmp_path / "out") == [text for text in TEXTS if text not in held]
    size = sum(len(text.encode()) for text in TEXTS)
    assert size / 10_000 < len(meta["splits"]["tokens"]) < 2 * size / 10_000 + 1
    meta = prepared(f"{tmp_path}/*.py", tmp_path / "one", heldout_fraction=0.1, unit_bytes=64_000_000)
    assert len(meta["splits"]["tokens"]) == 1
    assert np.array_equal(
        np.concatenate(arrays_of(tmp_path / "out", "tokens")), arrays_of(tmp_path / "one", "tokens")[0]
    )


@pytest.mark.parametrize("unit_bytes", [7, 50, 99, 100, 101, 1000])
def test_byte_ranges_share_no_line_and_leave_none_out(unit_bytes, tmp_path):
    """Lines of every length around the unit's, so that some begin and end exactly where a range does."""
    texts = [str(i) * (1 + 7 * i % 40) for i in range(60)] + ["x" * (100 - len('{"text": ""}') - 1)] * 5
    (tmp_path / "a.jsonl").write_bytes(lines(texts) + b"\n\n" + lines(["no newline"])[:-1])
    prepared(tmp_path / "a.jsonl", tmp_path / "out", heldout_fraction=0, unit_bytes=unit_bytes)
    assert texts_of(tmp_path / "out") == [*texts, "no newline"]


def test_the_ranges_of_a_long_text_leave_nothing_out(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 100)
    rows = ["y" * (i * 37 % 130) for i in range(60)] + ["z" * 99] * 4
    (tmp_path / "a.txt").write_text("\n".join(rows))
    meta = prepared(tmp_path / "a.txt", tmp_path / "out", heldout_fraction=0, unit_bytes=500)
    assert "".join(texts_of(tmp_path / "out")) == "\n".join(rows)
    assert len(meta["splits"]["tokens"]) > 4 and meta["documents"]["tokens"] > 20


def test_held_out_documents_do_not_depend_on_order_or_format(tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    prepared(write_as("jsonl", tmp_path / "a.jsonl", TEXTS), tmp_path / "a", heldout_fraction=0.3)
    prepared(write_as("parquet", tmp_path / "b.parquet", shuffled), tmp_path / "b", heldout_fraction=0.3)
    assert sorted(texts_of(tmp_path / "a", "heldout")) == sorted(texts_of(tmp_path / "b", "heldout"))


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_a_long_document_is_cut_where_tokens_end(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 300)
    monkeypatch.setattr(prepare, "BLOCK", 100)
    text = "".join(TEXTS) + "x" * 1000 + "日本" * 500  # at its end no line to cut at
    data = lines([text]) if kind == "jsonl" else text.encode()
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    prepared(tmp_path / f"a.{kind}", tmp_path / "out", heldout_fraction=0)
    assert texts_of(tmp_path / "out") == [text]
    whole = TOKENIZER.encode(text).ids
    found = arrays_of(tmp_path / "out", "tokens")[0].tolist()
    length = len(TOKENIZER.encode("".join(TEXTS)).ids)
    assert found[: length - 100] == whole[: length - 100]


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_a_text_file_without_end_is_several_documents(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 2000)
    text = "".join(TEXTS) + "日本" * 100
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(text.encode()) if kind == "txt.gz" else text.encode())
    meta = prepared(tmp_path / f"a.{kind}", tmp_path / "out", heldout_fraction=0.3)
    kept, held = (texts_of(tmp_path / "out", split) for split in ("tokens", "heldout"))
    assert sum(meta["documents"].values()) == len(kept) + len(held) > 8 and len(held) > 1
    assert sorted("".join(kept + held)) == sorted(text)
    # at most 2000 bytes and what is left of the line, 600 at the end of the text
    assert all(len(document.encode()) <= 2700 and document in text for document in kept + held)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "json"])
def test_a_line_or_object_too_long_is_one_bad_row(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_ROW", 5000)
    monkeypatch.setattr(prepare, "BLOCK", 700)
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 1000)
    long = "x" * 20_000
    data = f"first\n{long}\nlast\n".encode() if kind == "txt" else lines(["first", long, "last"])
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.split(".")[-1], bytes)
    (tmp_path / f"a.{kind}").write_bytes(compress(data))
    (tmp_path / "b.jsonl").write_bytes(lines(["the next file"]))
    meta = prepared([f"{tmp_path}/a.{kind}", f"{tmp_path}/b.jsonl"], tmp_path / "out", heldout_fraction=0)
    assert meta["bad"] == 1
    expected = ["last\n"] if kind == "txt" else ["first", "last"]
    assert texts_of(tmp_path / "out") == [*expected, "the next file"]
    assert "a line over 5,000 bytes" in meta["first_bad"][0]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_gigabyte_in_one_line_takes_little_memory(kind, tmp_path):
    """Under 4 x the longest row of 64 MB, where the line alone is 1 GB; measured in a process of its own.

    The .zst has 32 kB.
    """
    open_file = {
        "jsonl.gz": lambda path: gzip.open(path, "wb", 1),
        "jsonl.zst": lambda path: zstandard.open(path, "wb"),
    }
    with open_file[kind](tmp_path / f"a.{kind}") as file:
        file.write(lines(["first"]) + b'{"text": "')
        for _ in range(1000):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + lines(["last"]))
    script = f"""
import resource, prepare
paths = {[str(tmp_path / f"a.{kind}"), str(tmp_path / "out"), str(BUNDLED)]}
prepare.write_shards(*paths, heldout_fraction=0)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 400
    assert texts_of(tmp_path / "out") == ["first", "last"]
    assert json.loads((tmp_path / "out/meta.json").read_text())["bad"] == 1


@pytest.mark.parametrize("kind", ["json", "json.gz"])
def test_an_array_is_read_whole_and_so_has_a_limit(kind, tmp_path, monkeypatch):
    """Before any work where the file tells; as a bad file where it grows when decompressed."""
    monkeypatch.setattr(prepare, "LONGEST_ROW", 5000)
    data = json.dumps([{"text": text} for text in TEXTS]).encode()
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind == "json.gz" else data)
    (tmp_path / "b.jsonl").write_bytes(lines(["the next file"]))
    paths = [f"{tmp_path}/a.{kind}", f"{tmp_path}/b.jsonl"]
    if kind == "json":
        with pytest.raises(
            ValueError, match=r"a.json is a JSON array over 64 MB; give its rows as .jsonl or .par"
        ):
            prepared(paths, tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()
    else:
        meta = prepared(paths, tmp_path / "out", heldout_fraction=0)
        assert meta["bad"] == 1 and "a JSON array over 64 MB" in meta["first_bad"][0]
        assert texts_of(tmp_path / "out") == ["the next file"]
    # An object a line has no limit but the lines' own.
    (tmp_path / "lines.json").write_bytes(lines(TEXTS))
    prepared(tmp_path / "lines.json", tmp_path / "lines", heldout_fraction=0)
    assert texts_of(tmp_path / "lines") == TEXTS


def test_scores_filter_rows_by_a_dotted_key(tmp_path):
    rows = [{"body": {"text": text}, "metadata": {"int_score": i % 6}} for i, text in enumerate(TEXTS)]
    rows[7]["metadata"] = None
    options = {
        "text_key": "body.text",
        "min_score": 4,
        "score_key": "metadata.int_score",
        "heldout_fraction": 0,
    }
    kept = [text for i, text in enumerate(TEXTS) if i % 6 >= 4 and i != 7]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind in ("parquet", "jsonl"):
        meta = prepared(tmp_path / f"a.{kind}", tmp_path / kind, **options)
        assert texts_of(tmp_path / kind) == kept
        assert meta["filtered"] == 150 - 1 - len(kept) and meta["bad"] == 1
    offset = sum(len(json.dumps(row)) + 1 for row in rows[:7])
    assert f"a.jsonl: byte {offset}: no number under metadata.int_score" in meta["first_bad"][0]


# ---- what is bad


def bad_line(position, line):
    def write(path):
        rows = lines(TEXTS).splitlines(keepends=True)
        rows[position - 1] = line + b"\n"
        path.write_bytes(b"".join(rows))
        return TEXTS[: position - 1] + TEXTS[position:]

    return write


def truncated(compress):
    def write(path):
        noise = random.Random(0)  # hard to compress, so that the cut is far from the start
        texts = ["".join(noise.choices("abcdefghij \n", k=900)) for _ in range(1000)]
        data = compress(lines(texts))
        path.write_bytes(data[: len(data) * 3 // 4])
        return texts

    return write


def bad_row_group(path):
    table = pa.table({"text": TEXTS})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    path.write_bytes(data)
    return TEXTS[:50] + TEXTS[100:]


def bad_parquet_text(path):
    texts = [text.encode() for text in TEXTS]
    texts[69] = b"caf\xe9"
    pq.write_table(pa.table({"text": pa.array(texts).view(pa.string())}), path, row_group_size=50)
    return TEXTS[:50] + TEXTS[100:]


def bad_array(path):
    rows = [json.dumps({"text": text}) for text in TEXTS[:5]]
    path.write_text("[" + ",\n".join([*rows, '{"text": ', *rows]) + "]")
    return []


def null_in_array(path):
    path.write_text(json.dumps([{"text": None if i == 3 else text} for i, text in enumerate(TEXTS)]))
    return TEXTS[:3] + TEXTS[4:]


def string_in_array(path):
    path.write_text(json.dumps([text if i == 3 else {"text": text} for i, text in enumerate(TEXTS)]))
    return TEXTS[:3] + TEXTS[4:]


def bad_text(path):
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    return []


BAD = {
    "json": ("jsonl", bad_line(3, b'{"text": "cut'), "bad.jsonl: byte {offset}: not JSON: "),
    "null": ("jsonl", bad_line(149, b'{"text": null}'), "bad.jsonl: byte {offset}: no text under text"),
    "missing": ("jsonl", bad_line(1, b'{"other": 1}'), "bad.jsonl: byte {offset}: no text under text"),
    "no object": ("jsonl", bad_line(77, b'["text"]'), "bad.jsonl: byte {offset}: not a JSON object"),
    "utf8": (
        "jsonl",
        bad_line(150, b'{"text": "caf\xe9"}'),
        "bad.jsonl: byte {offset}: not JSON: 'utf-8' codec can't decode byte 0xe9",
    ),
    "surrogate": (
        "jsonl",
        bad_line(9, rb'{"text": "\ud83d"}'),
        "bad.jsonl: byte {offset}: 'utf-8' codec can't encode character",
    ),
    "gzip": (
        "jsonl.gz",
        truncated(gzip.compress),
        "bad.jsonl.gz: broken compression: Compressed file ended before ",
    ),
    "zstd": (
        "jsonl.zst",
        truncated(zstandard.compress),
        "bad.jsonl.zst: broken compression: Truncated compressed stream",
    ),
    "row group": ("parquet", bad_row_group, "bad.parquet: row group 1, row 1: 50 rows lost: "),
    "parquet text": (
        "parquet",
        bad_parquet_text,
        "bad.parquet: row group 1, row 1: 50 rows lost: 'utf-8' codec",
    ),
    "array": ("json", bad_array, "bad.json: row 0: not JSON: "),
    "null in array": ("json", null_in_array, "bad.json: row 4: no text under text"),
    "string in array": ("json", string_in_array, "bad.json: row 4: not a JSON object"),
    "text": ("txt", bad_text, "bad.txt: byte 0: 'utf-8' codec can't decode byte 0xe9 in position 11"),
}


def missing_line(texts, good):
    """How many lines stand before the one that is not there."""
    return next((i for i, (a, b) in enumerate(zip(texts, good, strict=False)) if a != b), len(good))


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_told_counted_and_skipped(name, tmp_path, capfd):
    kind, write, message = BAD[name]
    good = write(tmp_path / f"bad.{kind}")
    write_as("jsonl", tmp_path / "good.jsonl", ["the next file"])
    meta = prepared(f"{tmp_path}/*", tmp_path / "out", heldout_fraction=0)
    found = texts_of(tmp_path / "out")
    if name in ("gzip", "zstd"):  # every line that is whole in what is left of the file
        assert 500 < len(found) - 1 < 900
        assert found == [*good[: len(found) - 1], "the next file"]
    else:
        assert found == [*good, "the next file"]
        message = message.format(offset=len(lines(TEXTS[: missing_line(TEXTS, good)])))
    assert meta["bad"] == len(meta["first_bad"]) == 1
    assert meta["first_bad"][0].startswith(f"{tmp_path}/{message}")
    assert f"skipped {tmp_path}/{message}" in capfd.readouterr().err


def test_more_than_max_bad_stops_and_a_higher_limit_goes_on(tmp_path):
    rows = lines(TEXTS).splitlines(keepends=True)
    rows[10:10], rows[80:80] = [b"bad\n"], [b"bad\n", b"bad\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    for limit, line in ((0, 10), (2, 81)):
        offset = sum(map(len, rows[:line]))
        wrong = f"more than max_bad = {limit}, the last .*a.jsonl: byte {offset}: not JSON"
        with pytest.raises(ValueError, match=wrong):
            prepared(tmp_path / "a.jsonl", tmp_path / "out", max_bad=limit)
        assert (tmp_path / "out.partial/settings.json").exists()
    assert prepared(tmp_path / "a.jsonl", tmp_path / "out", max_bad=3)["bad"] == 3
    prepared(tmp_path / "a.jsonl", tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_refusals_are_one_line(tmp_path, monkeypatch):
    source = write_as("jsonl", tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.txt").write_text("text")
    out, tokens = f"--out={tmp_path}/out", f"--tokenizer={BUNDLED}"
    write_as("parquet", tmp_path / "a.parquet", TEXTS)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more than that")
    for name in ("empty.txt", "empty.jsonl", "empty.json", "blank.jsonl"):
        (tmp_path / name).write_text("\n\n" if name == "blank.jsonl" else "")
    before = set(tmp_path.iterdir())
    for arguments, words in [
        (["--input=/nowhere/*.jsonl"], "/nowhere/*.jsonl matches no file"),
        (["--input=(1,2)"], "input has 1 in it, which is no file or glob"),
        (["--input=()"], "input names no file"),
        ([f"--input={ROOT}/README.md"], "README.md: input must be .parquet, or .txt .py .jsonl .json"),
        ([f"--input={tmp_path}/bad.parquet"], "bad.parquet is not Parquet: "),
        ([f"--input={tmp_path}/a.*", "--min_score=1"], "a.txt is plain text: it has no scores"),
        ([f"--input={tmp_path}/a.parquet", "--text_key=body"], "no column body, messages or conversations"),
        ([f"--input={source}", "--sft=True"], "has no chat template"),
        ([f"--input={source}", "--num_workers=-1"], "num_workers -1; they must be at least 0"),
        ([f"--input={source}", "--heldout_fraction=1.0"], "must be from 0 to below 1"),
        ([f"--inspect={tmp_path}"], "has no meta.json"),
        ([f"--input={tmp_path}/empty.txt"], "the input holds no text to train on: 1 files"),
        ([f"--input={tmp_path}/empty.jsonl"], "the input holds no text to train on: 1 files"),
        ([f"--input={tmp_path}/empty.json"], "the input holds no text to train on: 1 files"),
        ([f"--input={tmp_path}/blank.jsonl"], "the input holds no text to train on: 1 files"),
    ]:
        done = run(out, tokens, *arguments)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
        assert set(tmp_path.iterdir()) == before  # neither out nor out.partial
    for module, kind in (("pyarrow", "jsonl.zst"), ("pyarrow.parquet", "parquet")):
        write_as(kind, tmp_path / f"b.{kind}", TEXTS)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match="needs the package pyarrow: pip install pyarrow"):
                prepared(tmp_path / f"b.{kind}", tmp_path / f"b_{kind}")


# ---- killed and gone on with

DRIVER = """
import sys, prepare
prepare.write_shards(sys.argv[2:], sys.argv[1], sys.argv[0], heldout_fraction=0.2, unit_bytes=20_000)
"""


def test_killed_at_ten_moments_ends_with_the_same_bytes(tmp_path):
    texts = [text * 10 for text in TEXTS]
    files = [write_as(kind, tmp_path / f"data.{kind}", texts) for kind in ("jsonl.gz", "json", "parquet")]
    (tmp_path / "data.jsonl").write_bytes(lines(texts[:70]) + b"bad\n" + lines(texts[70:]))

    def start(out):
        """A run that has begun to work."""
        script = DRIVER.replace("sys.argv[0]", repr(str(BUNDLED)))
        command = [sys.executable, "-c", script, str(out), *map(str, files), str(tmp_path / "data.jsonl")]
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        while not (Path(f"{out}.partial") / "settings.json").exists() and process.poll() is None:
            time.sleep(0.002)
        return process

    straight = start(tmp_path / "straight")
    begun = time.perf_counter()
    assert straight.wait() == 0
    duration = time.perf_counter() - begun
    expected = contents(tmp_path / "straight")
    assert len(expected) > 20
    moments, gone_on = random.Random(1), 0
    for i in range(10):
        out = tmp_path / f"out{i}"
        process = start(out)
        time.sleep(moments.random() * duration)
        process.kill()
        process.wait()
        again = start(out)
        printed = again.communicate()[0].decode()
        assert again.returncode == 0
        gone_on += "going on in" in printed
        assert contents(out) == expected
        with pytest.raises(ProcessLookupError):  # its workers have noticed
            for _ in range(100):
                os.killpg(process.pid, signal.SIG_DFL)
                time.sleep(0.1)
        shutil.rmtree(out)
    assert gone_on >= 3


def test_going_on_with_other_settings_or_input_is_refused(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", [*TEXTS, "last"])
    with source.open("a") as file:
        file.write("bad\n")
    with pytest.raises(ValueError, match="more than max_bad"):
        prepared(source, tmp_path / "out", max_bad=0)
    shutil.rmtree(tmp_path / "out.partial/shards")
    before = contents(tmp_path / "out.partial")
    for options in (
        {"heldout_fraction": 0.5},
        {"unit_bytes": 5000},
        {"text_key": "body"},
        {"min_score": 1.0},
    ):
        with pytest.raises(ValueError, match=f"out.partial was begun with {next(iter(options))} = "):
            prepared(source, tmp_path / "out", **options)
    shutil.copytree(BUNDLED, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="was begun with tokenizer = "):
        prepared(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert contents(tmp_path / "out.partial") == before
    with source.open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(ValueError, match="was begun with input_files = "):
        prepared(source, tmp_path / "out")


def test_input_of_the_same_size_that_changed_is_refused(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", [*TEXTS, "last", 1])
    with pytest.raises(ValueError, match="more than max_bad"):
        prepared(source, tmp_path / "out", max_bad=0)
    data = source.read_bytes()
    source.write_bytes(data.replace(b'"last"', b'"tsal"'))
    with pytest.raises(ValueError, match="was begun with input_files = "):
        prepared(source, tmp_path / "out")


def test_what_is_there_is_said_and_other_settings_are_refused(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", TEXTS)
    arguments = (f"--input={source}", f"--out={tmp_path}/out", f"--tokenizer={BUNDLED}")
    assert run(*arguments).returncode == 0
    before = contents(tmp_path / "out")
    again = run(*arguments, "--num_workers=1", "--max_bad=7")
    assert (
        again.returncode == 0
        and again.stdout.splitlines()[-1] == f"{tmp_path}/out is there already, made with the same settings"
    )
    other = run(*arguments, "--heldout_fraction=0.5")
    assert other.returncode == 2
    assert f"{tmp_path}/out was begun with heldout_fraction = 0.02, not 0.5; remove it" in other.stderr
    (tmp_path / "else").mkdir()
    refused = run(*arguments[::2], f"--out={tmp_path}/else")
    assert refused.returncode == 2 and "exists and is no shard directory" in refused.stderr
    assert contents(tmp_path / "out") == before and not list((tmp_path / "else").iterdir())


def test_nothing_held_out_is_said(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(TEXTS))
    source = write_as("jsonl", tmp_path / "many.jsonl", TEXTS)
    tokens = f"--tokenizer={BUNDLED}"
    one = run(f"--input={tmp_path}/one.txt", f"--out={tmp_path}/one", tokens)
    assert one.returncode == 0
    assert one.stdout.splitlines()[-1].startswith(
        "nothing is held out of 1 documents, so train.py cannot evaluate"
    )
    asked = run(f"--input={tmp_path}/one.txt", f"--out={tmp_path}/asked", tokens, "--heldout_fraction=0.0")
    many = run(f"--input={source}", f"--out={tmp_path}/many", tokens, "--heldout_fraction=0.2")
    assert "nothing is held out" not in asked.stdout + many.stdout


def test_killed_before_the_last_rename(tmp_path, monkeypatch):
    source = write_as("jsonl", tmp_path / "a.jsonl", TEXTS)
    prepared(source, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Path, "rename", lambda *_: 1 / 0)
        prepared(source, tmp_path / "out")
    assert (tmp_path / "out.partial/shards/meta.json").is_file() and not (tmp_path / "out").exists()
    prepared(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # and after it
        patch.setattr(shutil, "rmtree", lambda *_: 1 / 0)
        prepared(source, tmp_path / "late")
    assert (tmp_path / "late.partial").is_dir()
    prepared(source, tmp_path / "late")
    assert contents(tmp_path / "late") == contents(tmp_path / "straight")
    assert not (tmp_path / "late.partial").exists()


def test_units_that_are_there_are_not_made_again(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", [*TEXTS, 1])
    with pytest.raises(ValueError, match="more than max_bad"):
        prepared(source, tmp_path / "out", max_bad=0)
    done = {file.stem.split("_")[1] for file in (tmp_path / "out.partial").glob("unit_*.json")}
    files = [file for file in (tmp_path / "out.partial/shards").glob("*.npy") if file.stem[-5:] in done]
    made = {file.name: file.stat().st_mtime_ns for file in files}
    assert len(made) > 10
    prepared(source, tmp_path / "out")
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.npy")}
    assert made.items() < now.items()


def test_two_writers_are_refused(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out.partial").mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "out.partial/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"another process is writing .*out.partial"):
            prepared(source, tmp_path / "out")
        process.communicate(b"\n")
    prepared(source, tmp_path / "out")


# ---- chats

LLAMA3 = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif -%}
<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>
{%- endfor %}"""
QWEN = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(query=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set last.query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set parts = m.content.split('</think>') %}
        {%- if loop.index0 > last.query %}
            {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- parts[-1].lstrip('\\n') if parts | length > 1 else m.content }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are SmolLM.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}
{{- m.content }}{% endif %}<|im_end|>
{% endfor %}"""
FAMILIES = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen": (QWEN, None, "<|im_end|>"),
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>"),
}
SPECIAL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
CHATS = [
    [("user", "What is 1 + 1?"), ("assistant", "It is 2.")],
    [("system", "Brief!"), ("user", "Hi"), ("assistant", "Hello"), ("user", "🙂"), ("assistant", "日\n\n本")],
    [("user", "x"), ("assistant", "user"), ("user", "assistant"), ("assistant", "x")],  # contents that repeat
    [("user", "a"), ("assistant", "\n  b\n\n"), ("user", "c"), ("assistant", "")],  # spaces at a turn's edges
    [("system", "s"), ("user", "a"), ("assistant", "<think>\nold\n</think>\n\nb"), ("user", "c"),
     ("assistant", "<think>\nc?\n</think>\n\nd"), ("user", "e"), ("assistant", "<think>\nf?\n</think>\n\nf")],
]  # fmt: skip


def said(family, chat):
    """What the assistant says in a chat, as its family's template writes it."""
    template, _, end = FAMILIES[family]
    turns = [content for role, content in chat if role == "assistant"]
    if template is LLAMA3:
        turns = [turn.strip() for turn in turns]
    if template is QWEN:  # the thought of the last answer only; what opens it stands in the prompt
        last = turns.pop().removeprefix("<think>\n")
        turns = [turn.split("</think>\n\n")[-1] for turn in turns] + [last]
    return "".join(turn + end for turn in turns)


def chat_tokenizer(family, path):
    template, bos, eos = FAMILIES[family]
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | (
        {"bos_token": bos} if bos else {}
    )
    if family == "smollm2":
        (path / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def family_tokenizer(family, real, path):
    """One with a template like the family's, or the family's own from TOKENIZERS/llama3, qwen or smollm2."""
    if not real:
        return chat_tokenizer(family, path)
    directory = Path(os.environ.get("TOKENIZERS", "tokenizers")) / family
    if not directory.is_dir():
        pytest.skip(f"no {directory}: give the families' own tokenizers as TOKENIZERS")
    shutil.copytree(directory, path)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def write_chats(path, chats):
    """The first as `messages`, the next as `conversations`, and so on, in the two data sets' own shapes."""
    rows = []
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    for i, chat in enumerate(chats):
        if i % 2:
            rows.append({"conversations": [{"from": names[r], "value": c} for r, c in chat], "source": None})
        else:
            rows.append({"messages": [{"role": r, "content": c} for r, c in chat], "prompt": chat[0][1]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trains_on_the_assistants_turns_and_nothing_else(family, real, tmp_path):
    """With templates like the families', and with their own, from TOKENIZERS/llama3, qwen and smollm2."""
    tokenizer = family_tokenizer(family, real, tmp_path / "tokenizer")
    source = write_chats(tmp_path / "chats.jsonl", CHATS)
    options = {"tokenizer": tmp_path / "tokenizer", "heldout_fraction": 0}
    meta = prepared(source, tmp_path / "sft", sft=True, **options)
    assert meta["sft"] and meta["documents"]["tokens"] == len(CHATS) and not meta["bad"]
    rows = documents_of(tmp_path / "sft", "tokens")
    masks = documents_of(tmp_path / "sft", "mask")
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for i, chat in enumerate(CHATS):
        tokens, mask = rows[i], masks[i] == 1
        messages = [{"role": role, "content": content} for role, content in chat]
        rendered = oracle.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(tokens, skip_special_tokens=False) == rendered
        assert tokenizer.decode(tokens[mask], skip_special_tokens=False) == said(family, chat)
        if i < 3:  # no token of the whole text's reaches over the edge of a turn
            assert tokens.tolist() == tokenizer.encode(rendered, add_special_tokens=False).ids

    prepared(source, tmp_path / "packed", **options)
    for column in ("tokens", "ends"):
        packed, sft = (arrays_of(tmp_path / name, column) for name in ("packed", "sft"))
        assert all(np.array_equal(a, b) for a, b in zip(packed, sft, strict=True))


LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"""


def sentencepiece_tokenizer(path, family):
    """One as Llama 2 or Mistral 0.3 has it: it puts a space before a text, and its decoder takes it away."""
    characters = [chr(i) for i in range(33, 127)]
    merges = [("▁", "H"), ("H", "i"), ("▁H", "i"), ("▁", "y")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *characters]
    vocabulary = {name: i for i, name in enumerate([*names, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if family == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:  # only where the whole text begins, not behind a special token
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": LLAMA2}))
    return tokenizer


@pytest.mark.parametrize("family", ["llama2", "mistral"])
def test_a_tokenizer_that_puts_a_space_first(family, tmp_path, monkeypatch):
    """It puts one where it does in the whole text, and not where ours is cut."""
    tokenizer = sentencepiece_tokenizer(tmp_path / "tokenizer", family)
    chats = [
        [("user", "Hi Hi"), ("assistant", "Hi you")],
        [("user", "a"), ("assistant", "y"), ("user", "Hi"), ("assistant", "\nHi")],
    ]
    source = write_chats(tmp_path / "chats.jsonl", chats)
    prepared(source, tmp_path / "sft", sft=True, tokenizer=tmp_path / "tokenizer", heldout_fraction=0)
    rows, masks = (documents_of(tmp_path / "sft", column) for column in ("tokens", "mask"))
    render = prepare.chat_template(tmp_path / "tokenizer")
    for tokens, mask, chat in zip(rows, masks, chats, strict=True):
        messages = [{"role": role, "content": content} for role, content in chat]
        whole = tokenizer.encode(render(messages), add_special_tokens=False).ids
        assert tokens.tolist() == whole
        # What is generated goes on behind the prompt's last token.
        prompt = sample.encode_chat(tokenizer, render, messages[:1])
        assert tokens[: len(prompt)].tolist() == prompt
        assert not mask[: len(prompt)].any() and mask[len(prompt)] == 1
    assert [tokenizer.id_to_token(i) for i in rows[0][masks[0] == 1]][:2] == ["▁Hi", "▁y"]

    text = "Hi you\n" * 40
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(prepare, "PIECE", 50)
    assert prepare.encode_text(tokenizer, text) == expected

    streamer = sample.Streamer(tokenizer, tokenizer.encode("Hi", add_special_tokens=False).ids)
    assert "".join(map(streamer.add, tokenizer.encode("y Hi", add_special_tokens=False).ids)) == " y Hi"


def test_sft_rows_are_cut_at_seq_len_and_stay_in_one_shard(tmp_path):
    tokenizer = chat_tokenizer("llama3", tmp_path / "tokenizer")
    never = [[("user", "long " * 200), ("assistant", "no")], [("user", "nobody answers")]]
    source = write_chats(tmp_path / "chats.jsonl", [*CHATS, *never] * 5)
    options = {"tokenizer": tmp_path / "tokenizer", "sft": True, "heldout_fraction": 0, "unit_bytes": 2000}
    whole = prepared(source, tmp_path / "whole", seq_len=10_000, **options)
    meta = prepared(source, tmp_path / "cut", seq_len=30, **options)
    assert whole["filtered"] == 5 and meta["filtered"] == 10 and meta["bad"] == 0
    assert len(meta["splits"]["tokens"]) > 5
    rows = {name: [documents_of(tmp_path / name, c) for c in ("tokens", "mask")] for name in ("whole", "cut")}
    long, cut = (list(zip(*rows[name], strict=True)) for name in ("whole", "cut"))
    assert len(cut) == 25 and len(long) == 30
    for i in range(25):
        (tokens, mask), (whole_tokens, whole_mask) = cut[i], long[i // 5 * 6 + i % 5]
        assert len(tokens) == min(30, len(whole_tokens)) and mask.any()
        assert np.array_equal(tokens, whole_tokens[:30]) and np.array_equal(mask, whole_mask[:30])

    mixture = Mixture({tmp_path / "cut": None}, "tokens", 0, seed=3, sft=True)
    assert sorted(mixture.place(i)[1] for i in range(25)) == list(range(25))
    batch = mixture.batch(4, 6)
    assert batch.ids.shape == batch.labels.shape == batch.documents.shape == (6, 128)
    assert not batch.documents.any() and batch.source.tolist() == [0] * 6
    for row, i in enumerate(range(4, 10)):
        tokens, mask = cut[mixture.place(i)[1]]
        expected = [token if trained else -100 for token, trained in zip(tokens[1:], mask[1:], strict=True)]
        assert batch.labels[row].tolist() == expected + [-100] * (128 - len(expected))
        assert batch.ids[row].tolist() == tokens[:-1].tolist() + [0] * (128 - len(expected))
        labels = batch.labels[row]
        assert tokenizer.decode(tokens[1:][mask[1:] == 1]) == tokenizer.decode(labels[labels >= 0])
    assert mixture.count_labels(4, 6) == (batch.labels != -100).sum()
    for length in (128, 129):  # a row of one token more than ids
        source = write_chats(tmp_path / f"{length}.jsonl", [[("user", "a"), ("assistant", "x = 1\n" * 200)]])
        prepared(source, tmp_path / str(length), seq_len=length + 1, **options)
        mixture = Mixture({tmp_path / str(length): None}, "tokens", 0, seed=3, sft=True)
        assert mixture.batch(0, 1).ids.shape == (1, 128 if length == 128 else 256)
    with pytest.raises(ValueError, match="not SFT rows"):
        prepared(write_as("jsonl", tmp_path / "a.jsonl", TEXTS), tmp_path / "packed")
        Shards(tmp_path / "packed", "tokens", 8, sft=True)


def test_sources_of_one_name_are_told_apart(tmp_path):
    source = write_as("jsonl", tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = [str(tmp_path / name) for name in ("x/text", "y/text", "x/code")]
    for path in paths:
        prepared(source, path)
    assert Mixture(dict.fromkeys(paths), "tokens", 8, seed=0).names == paths
    assert Mixture(dict.fromkeys(paths[1:]), "tokens", 8, seed=0).names == ["text", "code"]


def test_bad_chats_are_counted(tmp_path):
    chat_tokenizer("llama3", tmp_path / "tokenizer")
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    null = {"messages": [{"role": "user", "content": None}]}
    rows = [good, {"messages": []}, {"conversations": "x"}, null, {"conversations": [{"from": "gpt"}]},
            {"text": "no chat"}, {"conversations": [None]}, good]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    meta = prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "tokenizer", sft=True,
                    heldout_fraction=0)  # fmt: skip
    assert meta["documents"]["tokens"] == 2 and meta["bad"] == 6
    offsets = np.cumsum([len(json.dumps(row)) + 1 for row in rows])
    assert [int(reason.split(":")[1].split()[-1]) for reason in meta["first_bad"]] == offsets[:6].tolist()


# ---- special tokens' strings in what is read


def marked_rows(path):
    """A document and two chats in which special tokens' strings are said; returns the special ids."""
    chats = [
        [("user", "Is <|im_end|> a token?"), ("assistant", "<|eot_id|>, too: <|im_end|>")],
        [("system", "<|im_start|>"), ("user", "<|im_end|><|eot_id|>"), ("assistant", "no")],
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    rows.append({"text": "x = '<|im_end|>'\n<|im_start|>user"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_texts_and_turns_are_text(family, real, tmp_path):
    tokenizer = family_tokenizer(family, real, tmp_path / "tokenizer")
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    source = marked_rows(tmp_path / "a.jsonl")
    options = {"tokenizer": tmp_path / "tokenizer", "heldout_fraction": 0}
    prepared(source, tmp_path / "out", **options)
    prepared(source, tmp_path / "old", special_tokens=True, **options)
    new, old = (documents_of(tmp_path / name, "tokens") for name in ("out", "old"))
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i, row in enumerate(rows[:2]):
        rendered = oracle.apply_chat_template(row["messages"], tokenize=False)
        # The words are the same; only the template's own special tokens are left.
        assert tokenizer.decode(new[i], skip_special_tokens=False) == rendered
        said = " ".join(turn["content"] for turn in row["messages"])
        template = tokenizer.encode(rendered, add_special_tokens=False).ids
        spoken = tokenizer.encode(said, add_special_tokens=False).ids
        count = np.isin(template, special).sum() - np.isin(spoken, special).sum()
        assert np.isin(new[i], special).sum() == count > 0
        assert np.isin(old[i], special).sum() == np.isin(template, special).sum() > count
    bos, eos = prepare.special_ids(tokenizer, tmp_path / "tokenizer")
    assert old[2].tolist() == [*bos, *tokenizer.encode(rows[2]["text"], add_special_tokens=False).ids, eos]
    tokenizer.encode_special_tokens = True
    assert new[2].tolist() == [*bos, *tokenizer.encode(rows[2]["text"], add_special_tokens=False).ids, eos]
    with pytest.raises(ValueError, match="was begun with special_tokens = False, not True"):
        prepared(source, tmp_path / "out", special_tokens=True, **options)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_mask_is_right_where_turns_say_special_tokens(family, special_tokens, tmp_path):
    tokenizer = family_tokenizer(family, False, tmp_path / "tokenizer")
    source = marked_rows(tmp_path / "a.jsonl")
    meta = prepared(source, tmp_path / "sft", sft=True, tokenizer=tmp_path / "tokenizer", heldout_fraction=0,
                    special_tokens=special_tokens)  # fmt: skip
    assert meta["documents"]["tokens"] == 2 and meta["bad"] == 1  # the text is no chat
    rows, masks = (documents_of(tmp_path / "sft", column) for column in ("tokens", "mask"))
    end = FAMILIES[family][2]
    trained = [
        tokenizer.decode(tokens[mask == 1], skip_special_tokens=False)
        for tokens, mask in zip(rows, masks, strict=True)
    ]
    # Qwen's template opens a thought, which a prompt would have: it is not trained on.
    assert trained == [f"<|eot_id|>, too: <|im_end|>{end}", f"no{end}"]


def test_chats_are_held_out_by_what_the_template_writes(tmp_path):
    """So by nothing of how the turns are found in it."""
    chat_tokenizer("smollm2", tmp_path / "tokenizer")
    chats = [[("user", f"{i} <|im_end|>"), ("assistant", f"{i}\n")] for i in range(40)]
    source = write_chats(tmp_path / "chats.jsonl", chats)
    meta = prepared(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer", heldout_fraction=0.3)
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [
        oracle.apply_chat_template([{"role": role, "content": text} for role, text in chat], tokenize=False)
        for chat in chats
    ]
    held = [text for text in texts if prepare.split_of(text, 0.3) == "heldout"]
    assert meta["documents"] == {"tokens": 40 - len(held), "heldout": len(held)}
    rows = documents_of(tmp_path / "out", "tokens", "heldout")
    assert [oracle.decode(row, skip_special_tokens=False) for row in rows] == held != []


def test_a_template_whose_turns_do_not_end_is_refused(tmp_path):
    chat_tokenizer("llama3", tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    source = write_chats(tmp_path / "chats.jsonl", CHATS[1:2])
    with pytest.raises(ValueError, match="template ends an assistant's turn without a special token"):
        prepared(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer", sft=True, max_bad=0)


# ---- readers


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two packed corpora, of many small and of few long documents, in several shards each."""
    work = tmp_path_factory.mktemp("corpora")
    for name, texts in {
        "many": TEXTS,
        "few": ["\n".join(TEXTS[i : i + 30]) for i in range(0, 90, 30)],
    }.items():
        source = write_as("jsonl", work / f"{name}.jsonl", texts)
        prepared(source, work / name, heldout_fraction=0, unit_bytes={"many": 4000, "few": 12_000}[name])
    return work


def test_permutation_visits_everything_once():
    sizes = [
        *range(1, 301),
        *range(301, 10_000, 487),
        *(4**k + d for k in (5, 6) for d in (-1, 0, 1)),
        10_000,
    ]
    for n in sizes:
        assert sorted(permute(i, n, seed=n) for i in range(n)) == list(range(n)), n
    far = 10**12
    images = {permute(i, far, 1) for i in [*range(20_000), *range(far - 20_000, far)]}
    assert len(images) == 40_000 and min(images) >= 0 and max(images) < far
    assert abs(np.mean(list(images)) / far - 0.5) < 0.01  # six standard deviations of a uniform mean
    orders = {tuple(permute(i, 50, seed) for i in range(50)) for seed in range(100)}
    assert len(orders) == 100


def test_an_order_costs_no_time_and_no_memory(corpora):
    """Under 1% of a quickstart step of 16 blocks and 0.9 s; measured 0.0002 s."""
    mixture = Mixture(dict.fromkeys([corpora / "many", corpora / "few"]), "tokens", 16, seed=0)
    mixture.shares = [10**12, 3 * 10**11]  # as of 10**12 blocks: cycles are walked as long as they get
    mixture.starts, mixture.total = [0, 10**12, 13 * 10**11], 13 * 10**11
    begun = time.perf_counter()
    for i in range(1600):
        mixture.place(i * 10**9)
    assert (time.perf_counter() - begun) / 100 < 0.009
    tracemalloc.start()
    for i in range(2000):
        mixture.place(i)
    assert tracemalloc.get_traced_memory()[0] < 10_000
    tracemalloc.stop()


@pytest.mark.parametrize("budget", [None, 3000, 40_000])
def test_mixture_takes_each_budget_and_repeats_only_what_is_used_up(corpora, budget):
    data = {corpora / "many": budget, corpora / "few": None}
    mixture = Mixture(data, "tokens", 16, seed=5)
    blocks = [source.blocks for source in mixture.sources]
    shares = [blocks[0] if budget is None else budget // 16, blocks[1]]
    assert mixture.total == sum(shares)
    assert budget != 3000 or shares[0] < blocks[0]
    assert budget != 40_000 or shares[0] > 2 * blocks[0]
    places = [mixture.place(i) for i in range(2 * mixture.total)]
    for source in range(2):
        seen = [block for s, block in places if s == source]
        assert len(seen) == 2 * shares[source]
        for epoch in (0, 1):  # the budget is met exactly in each
            part = places[epoch * mixture.total : (epoch + 1) * mixture.total]
            assert sum(s == source for s, _ in part) == shares[source]
        times = np.bincount(seen, minlength=blocks[source])
        assert times.max() - times.min() <= 1  # over the epochs too, none comes again before all have come
    orders = [[source for source, _ in places[i : i + mixture.total]] for i in (0, mixture.total)]
    assert orders[0] != orders[1]
    first = sum(source == 0 for source, _ in places[: mixture.total // 2])
    p = shares[0] / mixture.total  # the sources are shuffled together: within five standard deviations
    assert abs(first - shares[0] / 2) < 5 * (mixture.total * p * (1 - p) / 4) ** 0.5
    batch = mixture.batch(7, 5)
    assert batch.source.tolist() == [source for source, _ in places[7:12]]
    assert all(array.dtype == np.int64 for array in batch)
    for row, i in enumerate(range(7, 12)):
        name, block = ("many", "few")[places[i][0]], places[i][1]
        for tokens in arrays_of(corpora / name, "tokens"):
            if block < (len(tokens) - 1) // 16:
                break
            block -= (len(tokens) - 1) // 16
        assert batch.ids[row].tolist() == tokens[block * 16 : block * 16 + 16].tolist()
        assert batch.labels[row].tolist() == tokens[block * 16 + 1 : block * 16 + 17].tolist()
    assert mixture.count_labels(7, 5) == 5 * 16
    other = Mixture(data, "tokens", 16, seed=6)
    assert [other.place(i) for i in range(50)] != places[:50]


def test_documents_tell_where_each_token_belongs(corpora):
    for name in ("many", "few"):
        mixture = Mixture({corpora / name: None}, "tokens", 64, seed=1)
        several = 0
        for start in range(0, mixture.total, 8):
            count = min(8, mixture.total - start)
            batch = mixture.batch(start, count)
            assert batch.documents.shape == batch.ids.shape == (count, 64)
            ended = batch.ids == 0  # the EOS is its document's last token
            assert np.array_equal(batch.documents, np.cumsum(ended, axis=1) - ended)
            several += (batch.documents[:, -1] > 0).sum()
        assert several > 0


def test_more_shards_than_a_process_may_open(tmp_path):
    """A soft limit of 400 open files, as 1024 is where FineWeb-Edu makes thousands of shards."""
    prepared(
        write_as("jsonl", tmp_path / "a.jsonl", TEXTS * 4),
        tmp_path / "out",
        unit_bytes=100,
        heldout_fraction=0,
    )
    script = f"""
import resource
from prepare import Mixture
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
mixture = Mixture({{{str(tmp_path / "out")!r}: None}}, "tokens", 16, seed=0)
print(len(mixture.sources[0].shards), sum(int(mixture.batch(i, 1).ids.sum()) for i in range(mixture.total)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arrays = arrays_of(tmp_path / "out", "tokens")
    expected = sum(int(a[: (len(a) - 1) // 16 * 16].sum(dtype=np.int64)) for a in arrays)
    assert [int(word) for word in done.stdout.split()] == [len(arrays), expected] and len(arrays) > 400


def test_shards_of_earlier_versions_are_read(corpora, tmp_path):
    """Written by hand as prepare.py wrote them before work units: a document goes on in the next shard."""
    tokens = np.arange(1, 61, dtype=np.uint16)
    entries = []
    for number, ends in enumerate(([10, 25], [15])):
        np.save(tmp_path / f"tokens_{number:05d}.npy", tokens[number * 30 : number * 30 + 30])
        np.save(tmp_path / f"ends_{number:05d}.npy", np.array(ends))
        entries.append(
            {"file": f"tokens_{number:05d}.npy", "tokens": 30, "documents": len(ends), "sha256": {}}
        )
    meta = json.loads((corpora / "many/meta.json").read_text())
    meta["splits"] = {"tokens": entries, "heldout": []}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    mixture = Mixture({tmp_path: None}, "tokens", 8, seed=0)
    assert mixture.total == 6
    batch = mixture.batch(0, 6)
    for ids, labels, documents in zip(batch.ids, batch.labels, batch.documents, strict=True):
        first = ids[0]
        assert ids.tolist() == list(range(first, first + 8)) and labels.tolist() == list(
            range(first + 1, first + 9)
        )
        changes = [token for token in ids[1:] if documents[token - first] != documents[token - first - 1]]
        assert changes == [token for token in ids[1:] if token in (11, 26, 46)]


def test_a_damaged_directory_is_named(corpora, tmp_path):
    shutil.copytree(corpora / "many", tmp_path / "many")
    done = run(f"--inspect={tmp_path}/many")
    assert done.returncode == 0, done.stderr
    assert (
        "150 documents" in done.stdout
        and f"{corpora}/many.jsonl" in done.stdout
        and "def f(x)" in done.stdout
    )
    for name in ("tokens_00001.npy", "ends_00000.npy"):
        file = tmp_path / "many" / name
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        done = run(f"--inspect={tmp_path}/many")
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
            f"error: {file} is missing or damaged"
        )
        file.write_bytes((corpora / "many" / name).read_bytes()[:-2])
        with pytest.raises(ValueError, match=f"{name} is truncated"):
            Shards(tmp_path / "many", "tokens", 16)
        shutil.copy(corpora / "many" / name, file)
    length = len(arrays_of(corpora / "many", "tokens")[0])
    np.save(tmp_path / "many/tokens_00000.npy", np.zeros(1999, np.uint16))
    with pytest.raises(
        ValueError, match=rf"tokens_00000.npy holds \(1999,\) uint16; meta.json says \({length},\)"
    ):
        Shards(tmp_path / "many", "tokens", 16)
    with pytest.raises(ValueError, match="not one block of seq_len 16"):
        Shards(corpora / "many", "heldout", 16)
    meta = json.loads((tmp_path / "many/meta.json").read_text())
    (tmp_path / "many/meta.json").write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(ValueError, match="has shard format 1, not 2: prepare it again"):
        Shards(tmp_path / "many", "tokens", 16)


# ---- tools, null fields, and what else a row's chat can have

TOOLS = [
    {
        "type": "function",
        "function": {"name": "count", "parameters": {"default": None, "note": "<|im_end|>é"}},
    }
]
CALL = {
    "type": "function",
    "function": {"name": "count", "arguments": {"of": "items", "unit": "<|im_start|>"}},
}
CALLS = {
    # A turn's calls stand behind what it says, in text; Qwen's way.
    "behind the content": (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson(ensure_ascii=True) }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson(indent=1) }}</call>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    ),
    # In place of it, behind a special token and before another end; Llama 3.1's.
    "in place of the content": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if 'tool_calls' in m %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
        "<|begin_of_text|>{{ m.tool_calls[0].function.name }}<|im_end|>"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    ),
    # Without a header, and refusing what does not alternate; Mistral's.
    "without a header": (
        "{% set turns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (turns.n % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{% set turns.n = turns.n + 1 %}{% endif %}"
        "{% if m.role == 'user' %}<|start_header_id|>{{ m.content }}<|end_header_id|>"
        "{% elif m.role == 'tool' %}<|begin_of_text|>{{ m.content }}<|end_header_id|>"
        "{% elif m.tool_calls %}<|im_start|>{{ m.tool_calls[0] | tojson }}<|eot_id|>"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    ),
}  # fmt: skip
SAID = {
    "behind the content": [
        f"<call>{json.dumps(CALL['function'], indent=1)}</call><|im_end|>",
        "seven<|im_end|>",
    ],
    "in place of the content": ["<|begin_of_text|>count<|im_end|>", "seven<|eot_id|>"],
    "without a header": ["<|im_start|>" + json.dumps(CALL) + "<|eot_id|>", "seven<|eot_id|>"],
}  # fmt: skip


def rows_with_calls(arguments=None):
    call = copy.deepcopy(CALL)
    if arguments is not None:
        call["function"]["arguments"] = arguments
    chat = [
        {"role": "user", "content": "count them"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
    empty, null = ([chat[0], chat[1] | {"content": content}, *chat[2:]] for content in ("", None))
    return [{"messages": messages, "tools": TOOLS} for messages in (chat, empty, null)]


def tokenizer_with(template, path):
    tokenizer = chat_tokenizer("llama3", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return tokenizer


@pytest.mark.parametrize("kind", CALLS)
def test_tool_calls_are_trained_on_and_what_tools_say_is_not(kind, tmp_path):
    tokenizer = tokenizer_with(CALLS[kind], tmp_path / "tokenizer")
    rows = rows_with_calls()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": tmp_path / "tokenizer", "heldout_fraction": 0}
    meta = prepared(tmp_path / "a.jsonl", tmp_path / "sft", sft=True, **options)
    assert not meta["bad"]
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rendered = [oracle.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False) for row in rows]
    found = documents_of(tmp_path / "sft", "tokens")
    assert [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in found] == rendered
    for tokens, mask in zip(found, documents_of(tmp_path / "sft", "mask"), strict=True):
        assert tokenizer.decode(tokens[mask == 1], skip_special_tokens=False) == "".join(SAID[kind])
        # What a tool or a call spells out is no special token.
        special = [tokenizer.id_to_token(i) for i in tokens if tokenizer.id_to_token(i) in SPECIAL]
        marks = re.findall(r"<\|\w+\|>", oracle.apply_chat_template(
            rows_with_calls({})[0]["messages"], tools=TOOLS[:0], tokenize=False))  # fmt: skip
        assert special == (["<|im_start|>", "<|im_end|>"] * ("behind" in kind)) + marks
    # The text is as transformers renders it where nothing is trained on, too.
    prepared(tmp_path / "a.jsonl", tmp_path / "packed", **options)
    packed = documents_of(tmp_path / "packed", "tokens")
    assert [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in packed] == rendered


def test_tools_and_arguments_can_be_json_text(tmp_path):
    tokenizer_with(CALLS["behind the content"], tmp_path / "tokenizer")
    rows = [row | {"tools": json.dumps(TOOLS)} for row in rows_with_calls()]
    rows += rows_with_calls(json.dumps(CALL["function"]["arguments"]))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "tokenizer", sft=True,
             heldout_fraction=0, special_tokens=True)  # fmt: skip
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for row, tokens in zip(rows, documents_of(tmp_path / "out", "tokens"), strict=True):
        right = oracle.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
        assert oracle.decode(tokens) == right


def test_rows_of_parquet_give_the_ids_of_the_same_rows_of_json_lines(tmp_path):
    """Arrow gives every struct of a column all keys, and null where a row had none, within tool_calls too."""
    tokenizer_with(CALLS["behind the content"], tmp_path / "tokenizer")
    rows = rows_with_calls({"of": "items"}) + rows_with_calls({"unit": "m", "deep": {"a": 1}})
    rows += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for row in rows[:6]:
        row["tools"] = [{"name": "count"}, {"name": "name", "strict": True}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = []
    for kind in ("jsonl", "parquet"):
        meta = prepared(tmp_path / f"a.{kind}", tmp_path / kind, tokenizer=tmp_path / "tokenizer", sft=True,
                        heldout_fraction=0)  # fmt: skip
        assert meta["bad"] == 0
        found.append(
            [[array.tolist() for array in documents_of(tmp_path / kind, c)] for c in ("tokens", "mask")]
        )
    assert found[0] == found[1] and len(found[0][0]) == 7


def test_chats_that_cannot_be_masked_are_refused_with_the_reason(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls[0].function.name }}\n{% endfor %}"
    )
    tokenizer_with(template, tmp_path / "tokenizer")
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        rows_with_calls()[0],
        {"messages": plain, "tools": "{"},
        {"messages": plain, "tools": {"name": "count"}},
        {"messages": plain, "tools": ["count"]},
        {"messages": [plain[0], {"role": "assistant", "content": None}]},
        {"messages": [{"role": "tool", "content": None}, plain[1]]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": plain[:1]}])))
    with pytest.raises(ValueError, match="the input holds no text to train on"):
        prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "tokenizer", sft=True)
    encoder = prepare.Encoder(
        {"tokenizer": tmp_path / "tokenizer", "sft": True, "min_score": None, "seq_len": 9}
    )
    words = ["do not show the bounds of a turn of tool calls", "Expecting", "no list", "no list",
             "without text", "without text"]  # fmt: skip
    for row, reason in zip(rows, words, strict=True):
        with pytest.raises(ValueError, match=f"^chat: .*({reason})"):
            encoder.row(row, tmp_path / "a.jsonl")


# ---- input files


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_a_byte_order_mark_is_no_content(compress, tmp_path):
    bom = b"\xef\xbb\xbf"
    rows = [{"text": text} for text in TEXTS[:3]]
    contents = {
        "array.json": bom + json.dumps(rows).encode(),
        "indented.json": bom + b" \n" + json.dumps(rows, indent=1).encode(),
        "rows.json": bom + lines(TEXTS[:3]),
        "rows.jsonl": bom + lines(TEXTS[:3]),
        "text.txt": bom + TEXTS[0].encode(),
        "code.py": bom + TEXTS[0].encode(),
    }
    ending = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(compress, "")
    for name, content in contents.items():
        (tmp_path / f"{name}{ending}").write_bytes(compress(content))
        meta = prepared(tmp_path / f"{name}{ending}", tmp_path / name.replace(".", "_"), heldout_fraction=0)
        expected = TEXTS[:1] if name in ("text.txt", "code.py") else TEXTS[:3]
        assert texts_of(tmp_path / name.replace(".", "_")) == expected and not meta["bad"]
    # Within a text it is content.
    (tmp_path / "b.txt").write_bytes(b"a" + bom + b"b")
    prepared(tmp_path / "b.txt", tmp_path / "b", heldout_fraction=0)
    assert texts_of(tmp_path / "b") == ["a\ufeffb"]


def test_what_exists_is_no_glob(tmp_path):
    directory = tmp_path / "corpus [v2]*?"
    directory.mkdir()
    (tmp_path / "corpus v").mkdir()
    write_as("jsonl", directory / "a[1].jsonl", ["brackets"])
    write_as("jsonl", directory / "a1.jsonl", ["none"])
    write_as("jsonl", tmp_path / "corpus v/a1.jsonl", ["other"])
    inputs = {
        f"{directory}/a[1].jsonl": ["brackets"],
        f"{directory}/a1.jsonl": ["none"],
        f"{directory}/*.jsonl": ["none", "brackets"],
        f"{directory}/**/a[[]1].jsonl": ["brackets"],
        f"{tmp_path}/corpus [v]/*.jsonl": ["other"],
    }
    for i, (pattern, expected) in enumerate(inputs.items()):
        prepared(pattern, tmp_path / str(i), heldout_fraction=0)
        assert texts_of(tmp_path / str(i)) == expected, pattern
    with pytest.raises(ValueError, match="matches no file"):
        prepared(str(directory), tmp_path / "none")
