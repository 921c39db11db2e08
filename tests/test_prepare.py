"""prepare.py: input formats, what is bad in them, kill -9, chats with their loss masks, and the readers."""

import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import BUNDLED, ROOT, run
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import prepare
import sample
from prepare import Mixture, Shards, permute, write_shards

TOKENIZER = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
TEXTS = [
    f"# {i}: {'ünï 日本 🙂 ' * (i % 3)}\ndef f(x):\n    return {i} * x\n" * (1 + i % 5) for i in range(150)
]
SETTINGS = {
    "input": "rows", "text_key": "text", "min_score": None, "score_key": "int_score", "special_tokens": False,
    "sft": False, "seq_len": 2048, "heldout_fraction": 0, "unit_bytes": 4000,
}  # fmt: skip
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


def prepared(input, out, **options):
    """The meta.json of shards; of many units even where the input is small, and nothing held out."""
    options = {"tokenizer": BUNDLED, "num_workers": 1, "unit_bytes": 4000, "heldout_fraction": 0, **options}
    if isinstance(input, Path):
        input = str(input)
    write_shards(input, out, str(options.pop("tokenizer")), **options)
    return json.loads((Path(out) / "meta.json").read_text())


def read(*files, **settings):
    """The rows of files as workers read them: bytes, objects or errors."""
    settings = SETTINGS | settings
    units = prepare.plan_units(list(files), settings)
    return [row for unit in units for part in unit for _, row in prepare.read_part(part, settings)]


def encoded(tokenizer, rows, **settings):
    """[ids, loss mask] of each row, by a tokenizer's directory."""
    encoder = prepare.Encoder({**SETTINGS, "tokenizer": str(tokenizer), **settings})
    documents = [encoder.row(json.dumps(row).encode(), Path("a.jsonl")) for row in rows]
    return [[np.array(values, int) for values in document[1:]] for document in documents]


def is_held_out(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def arrays_of(directory, column, split="tokens"):
    shards = json.loads((directory / "meta.json").read_text())["splits"][split]
    arrays = [np.load(directory / shard["file"].replace("tokens", column)) for shard in shards]
    count = "documents" if column == "ends" else "tokens"
    assert [len(array) for array in arrays] == [shard[count] for shard in shards]
    return arrays


def documents_of(directory, column, split="tokens"):
    """The column's values, tokens or mask, of each document in turn."""
    documents = []
    columns = (arrays_of(directory, name, split) for name in (column, "ends"))
    for values, ends in zip(*columns, strict=True):
        assert len(values) == ends[-1]  # no document goes from one shard into the next
        documents += np.split(values, ends[:-1])
    return documents


def texts_of(directory, split="tokens"):
    """The documents without their EOS."""
    documents = documents_of(directory, "tokens", split)
    assert all(document[-1] == 0 for document in documents)
    return [TOKENIZER.decode(document[:-1]) for document in documents]


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}


def lines(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_as(kind, path, texts):
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=40)
    elif kind == "json":
        path.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=2))
    elif kind == "jsonl.gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(lines(texts[:50])) + gzip.compress(lines(texts[50:])))
    else:  # .json.zst has objects one after another, not an array
        path.write_bytes(COMPRESS.get(kind.split(".")[-1], bytes)(lines(texts)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """TEXTS as .jsonl."""
    return write_as("jsonl", tmp_path_factory.mktemp("source") / "a.jsonl", TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.zst", "parquet"])
def test_every_format_gives_the_same_documents_and_bytes_for_any_number_of_workers(
    kind, tmp_path, monkeypatch
):
    """What is held out is by the text alone, and so does not depend on format or order."""
    monkeypatch.setattr(prepare, "BLOCK", 1000)  # objects and lines that go over several blocks
    path = write_as(kind, tmp_path / f"data.{kind}", TEXTS)
    for workers in (1, 3):
        meta = prepared(path, tmp_path / str(workers), heldout_fraction=0.2, num_workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(meta["splits"]["tokens"]) == {"jsonl": 16, "parquet": 4}.get(kind, 1)
    held = [text for text in TEXTS if is_held_out(text, 0.2)]
    assert texts_of(tmp_path / "1", "heldout") == held != []
    assert texts_of(tmp_path / "1") == [text for text in TEXTS if text not in held]
    shards = [*meta["splits"]["tokens"], *meta["splits"]["heldout"]]
    names = {name for shard in shards for name in shard["sha256"]}
    assert {file.name for file in (tmp_path / "1").iterdir()} == {"meta.json", *names}
    assert not list(tmp_path.glob("*.partial"))


def test_small_files_are_packed_into_units_whole(tmp_path):
    """As the quickstart's: one document a file, in the order of their names, and few shards."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:03d}.py").write_text(text)
    units = sum(len(text.encode()) for text in TEXTS) / 10_000
    for unit_bytes, least, most in ((10_000, units, 2 * units + 1), (64_000_000, 0, 1)):
        meta = prepared(f"{tmp_path}/*.py", tmp_path / str(unit_bytes), unit_bytes=unit_bytes)
        assert texts_of(tmp_path / str(unit_bytes)) == TEXTS
        assert least < len(meta["splits"]["tokens"]) <= most


def test_byte_ranges_share_no_line_and_leave_none_out(tmp_path):
    """Lines of every length around the unit's, so that some begin and end exactly where a range does."""
    texts = [str(i) * (1 + 7 * i % 40) for i in range(60)] + ["x" * (100 - len('{"text": ""}') - 1)] * 5
    (tmp_path / "a.jsonl").write_bytes(lines(texts) + b"\n\n" + lines(["no newline"])[:-1])
    for unit_bytes in (1, 7, *range(16 * 95, 16 * 105, 7), 10_000):
        rows = read(tmp_path / "a.jsonl", unit_bytes=unit_bytes)
        assert [json.loads(row)["text"] for row in rows] == [*texts, "no newline"], unit_bytes


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_a_long_text_is_several_documents(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 100)
    for i, row in enumerate(["y" * (i * 37 % 130) for i in range(60)] + ["z" * 99] * 4):
        text = (row + "\n") * 20 + "日本" * i
        data = text.encode()
        (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind == "txt.gz" else data)
        rows = read(tmp_path / f"a.{kind}")
        assert b"".join(rows).split() == data.split(), i
        # At most 100 bytes and what is left of the line.
        assert all(len(row) <= 100 + 131 + 6 * i for row in rows)


def test_a_long_document_is_cut_where_tokens_end(monkeypatch):
    text = "".join(TEXTS) + "function" * 100 + "日本" * 500  # at its end no line to cut at
    whole = TOKENIZER.encode(text).ids
    monkeypatch.setattr(prepare, "PIECE", 300)
    found = prepare.encode_text(TOKENIZER, text)
    assert TOKENIZER.decode(found) == text and found != whole
    length = len(TOKENIZER.encode("".join(TEXTS)).ids)
    assert found[: length - 100] == whole[: length - 100]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "json"])
def test_a_line_or_object_too_long_is_one_bad_row(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_ROW", 5000)
    monkeypatch.setattr(prepare, "BLOCK", 700)
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 1000)
    long = "x" * 20_000
    data = f"first\n{long}\nlast\n".encode() if kind == "txt" else lines(["first", long, "last"])
    (tmp_path / f"a.{kind}").write_bytes(COMPRESS.get(kind.split(".")[-1], bytes)(data))
    *first, bad, last = read(tmp_path / f"a.{kind}")
    assert isinstance(bad, ValueError) and str(bad) == "a line over 5,000 bytes"
    assert (first, last) == (([], b"last\n") if kind == "txt" else ([lines(["first"])], lines(["last"])))


@pytest.mark.parametrize("kind, open_file", [("gz", gzip.open), ("zst", zstandard.open)])
def test_half_a_gigabyte_in_one_line_takes_little_memory(kind, open_file, tmp_path):
    """Under 4 x the longest row of 64 MB, with all that is imported; measured in a process of its own."""
    with open_file(tmp_path / f"a.jsonl.{kind}", "wb", *([1] * (kind == "gz"))) as file:
        file.write(lines(["first"]) + b'{"text": "')
        for _ in range(500):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + lines(["last"]))
    script = f"""
import resource, prepare
paths = {[str(tmp_path / f"a.jsonl.{kind}"), str(tmp_path / "out"), str(BUNDLED)]}
prepare.write_shards(*paths, heldout_fraction=0)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 400
    assert texts_of(tmp_path / "out") == ["first", "last"]
    assert json.loads((tmp_path / "out/meta.json").read_text())["bad"] == 1


def test_an_array_is_read_whole_and_so_has_a_limit(tmp_path, monkeypatch):
    """Before any work where the file tells; as a bad file where it grows when decompressed."""
    monkeypatch.setattr(prepare, "LONGEST_ROW", 5000)
    array = write_as("json", tmp_path / "a.json", TEXTS)
    packed, objects = tmp_path / "a.json.gz", tmp_path / "lines.json"
    packed.write_bytes(gzip.compress(array.read_bytes()))
    objects.write_bytes(lines(TEXTS))
    advice = "a JSON array over 64 MB; give its rows as .jsonl or .parquet"
    with pytest.raises(ValueError, match=f"a.json is {advice}"):
        prepared(array, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (bad,) = read(packed)
    assert isinstance(bad, ValueError) and advice in str(bad)
    # An object a line has no limit but the lines' own.
    assert b"".join(read(objects)) == lines(TEXTS)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_no_content(ending, tmp_path):
    bom = b"\xef\xbb\xbf"
    rows = [{"text": text} for text in TEXTS[:3]]
    for name, data, expected in (
        ("array.json", bom + json.dumps(rows).encode(), rows),
        ("indented.json", bom + b" \n" + json.dumps(rows, indent=1).encode(), rows),
        ("rows.json", bom + lines(TEXTS[:3]), lines(TEXTS[:3]).splitlines(keepends=True)),
        ("rows.jsonl", bom + lines(TEXTS[:3]), lines(TEXTS[:3]).splitlines(keepends=True)),
        ("text.txt", bom + TEXTS[0].encode(), [TEXTS[0].encode()]),
        ("code.py", bom + TEXTS[0].encode(), [TEXTS[0].encode()]),
        ("within.txt", b"a" + bom + b"b", [b"a" + bom + b"b"]),  # within a text it is content
    ):
        (tmp_path / f"{name}{ending}").write_bytes(COMPRESS.get(ending[1:], bytes)(data))
        assert read(tmp_path / f"{name}{ending}") == expected, name


def test_what_exists_is_no_glob(tmp_path):
    directory, other = tmp_path / "corpus [v2]*?", tmp_path / "corpus v"
    for path in (directory, other):
        path.mkdir()
        (path / "a1.jsonl").touch()
    plain, brackets = directory / "a1.jsonl", directory / "a[1].jsonl"
    brackets.touch()
    for pattern, expected in (
        (f"{brackets}", [brackets]),
        (f"{plain}", [plain]),
        (f"{directory}/*.jsonl", [plain, brackets]),
        (f"{directory}/**/a[[]1].jsonl", [brackets]),
        (f"{tmp_path}/corpus [v]/*.jsonl", [other / "a1.jsonl"]),
        ((str(plain), str(brackets)), [plain, brackets]),
    ):
        assert prepare.find_files(pattern) == expected, pattern
    with pytest.raises(ValueError, match="is a directory; name its files"):
        prepare.find_files(str(directory))


def test_scores_filter_rows_by_a_dotted_key(tmp_path):
    rows = [{"body": {"text": text}, "metadata": {"int_score": i % 6}} for i, text in enumerate(TEXTS)]
    rows[7]["metadata"] = None
    options = {"text_key": "body.text", "min_score": 4, "score_key": "metadata.int_score"}
    kept = [text for i, text in enumerate(TEXTS) if i % 6 >= 4]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_rows(tmp_path / "a.jsonl", rows)
    for kind in ("parquet", "jsonl"):
        meta = prepared(tmp_path / f"a.{kind}", tmp_path / kind, **options)
        assert texts_of(tmp_path / kind) == kept
        assert meta["filtered"] == 150 - 1 - len(kept) and meta["bad"] == 1
    offset = sum(len(json.dumps(row)) + 1 for row in rows[:7])
    assert f"a.jsonl: byte {offset}: no number under metadata.int_score" in meta["first_bad"][0]


def test_bad_lines_are_told_counted_and_skipped(tmp_path, capfd):
    bad = {
        0: (b'{"other": 1}', "no text under text"),
        2: (b'{"text": "cut', "not JSON: "),
        8: (rb'{"text": "\ud83d"}', "'utf-8' codec can't encode character"),
        76: (b'["text"]', "not a JSON object"),
        148: (b'{"text": null}', "no text under text"),
        149: (b'{"text": "caf\xe9"}', "not JSON: 'utf-8' codec can't decode byte 0xe9"),
    }
    rows = lines(TEXTS).splitlines(keepends=True)
    for i, (line, _) in bad.items():
        rows[i] = line + b"\n"
    (tmp_path / "bad.jsonl").write_bytes(b"".join(rows))
    meta = prepared(tmp_path / "bad.jsonl", tmp_path / "out")
    assert texts_of(tmp_path / "out") == [text for i, text in enumerate(TEXTS) if i not in bad]
    assert meta["bad"] == len(meta["first_bad"]) == len(bad)
    printed = capfd.readouterr().err
    for reason, (i, (_, words)) in zip(meta["first_bad"], bad.items(), strict=True):
        offset = sum(map(len, rows[:i]))
        assert reason.startswith(f"{tmp_path}/bad.jsonl: byte {offset}: {words}")
        assert f"skipped {reason}" in printed


def parquet_of(path, texts, flip=False):
    """Bytes of three row groups, of which the second has, by flip, a byte that its checksum tells."""
    table = pa.table({"text": pa.array(texts).view(pa.string())})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 255 * flip
    return bytes(data)


def test_what_a_damaged_file_still_has_is_kept(tmp_path):
    noise = random.Random(0)  # hard to compress, so that the cut is far from the start
    long = [noise.randbytes(500).hex() for _ in range(1000)]
    packed, zstd = gzip.compress(lines(long)), zstandard.compress(lines(long))
    packed, zstd = packed[: len(packed) * 3 // 4], zstd[: len(zstd) * 3 // 4]
    texts = [text.encode() for text in TEXTS]
    latin = [*texts[:69], b"caf\xe9", *texts[70:]]
    rows = [{"text": text} for text in TEXTS]
    null, string = (json.dumps([*rows[:3], row, *rows[4:]]).encode() for row in ({"text": None}, "text"))
    two_groups, but_one = TEXTS[:50] + TEXTS[100:], TEXTS[:3] + TEXTS[4:]
    in_group, made = "unreadable behind row group 1: ", tmp_path / "made"
    write_as("jsonl", tmp_path / "good.jsonl", ["the next file"])
    for name, data, good, words in (
        ("a.jsonl.gz", packed, long, "unreadable behind byte N: Compressed file ended"),
        ("b.jsonl.zst", zstd, long, "unreadable behind byte N: Truncated"),
        ("c.parquet", parquet_of(made, texts, flip=True), two_groups, f"{in_group}could not verify"),
        ("d.parquet", parquet_of(made, latin), two_groups, f"{in_group}'utf-8' codec"),
        ("e.json", json.dumps(rows)[:-9].encode(), [], "unreadable behind its start: "),
        ("f.json", null, but_one, "row 4: no text under text"),
        ("g.json", string, but_one, "row 4: not a JSON object"),
        ("h.txt", b"one\ntwo\ncaf\xe9\n", [], "byte 0: 'utf-8' codec can't decode byte 0xe9 in position 11"),
    ):
        (tmp_path / name).write_bytes(data)
        meta = prepared((f"{tmp_path}/{name}", f"{tmp_path}/good.jsonl"), tmp_path / name[0])
        *found, last = texts_of(tmp_path / name[0])
        if good is long:  # every line that is whole in what is left of the file
            assert 500 < len(found) < 900
            good = good[: len(found)]
        assert (found, last) == (good, "the next file"), name
        assert meta["bad"] == len(meta["first_bad"]) == 1
        told = re.sub(r"behind byte \d+", "behind byte N", meta["first_bad"][0])
        assert told.startswith(f"{tmp_path}/{name}: {words}")


def test_an_error_of_the_disk_is_no_damage(source, monkeypatch):
    """It ends the run, which would otherwise leave out what can be read the next time."""
    monkeypatch.setattr(prepare, "read_rows", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        read(source)


def test_more_than_max_bad_stops_and_a_higher_limit_goes_on(tmp_path):
    """Units that are done are not made again."""
    rows = lines(TEXTS).splitlines(keepends=True)
    rows[10:10], rows[80:80] = [b"bad\n"], [b"bad\n", b"bad\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    made = {}
    for limit, line in ((0, 10), (2, 81)):
        offset = sum(map(len, rows[:line]))
        wrong = f"more than max_bad = {limit}, the last .*a.jsonl: byte {offset}: not JSON"
        with pytest.raises(ValueError, match=wrong):
            prepared(tmp_path / "a.jsonl", tmp_path / "out", max_bad=limit)
        done = [file.stem.split("_")[1] for file in (tmp_path / "out.partial").glob("unit_*.json")]
        now = {}
        for number in done:
            for file in (tmp_path / "out.partial/shards").glob(f"*_{number}.npy"):
                now[file.name] = file.stat().st_mtime_ns
        assert made.items() <= now.items() and len(now) >= len(made)
        made = now
    assert prepared(tmp_path / "a.jsonl", tmp_path / "out", max_bad=3)["bad"] == 3
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.npy")}
    assert len(made) > 10 and made.items() < now.items()
    prepared(tmp_path / "a.jsonl", tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    # Of the units that nobody waits for, nothing is printed.
    options = ("--unit_bytes=500", "--num_workers=2", "--max_bad=0")
    done = run("prepare.py", f"--input={tmp_path}/a.jsonl", f"--out={tmp_path}/told", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_refusals_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    for name, text in (("a.txt", "text"), ("empty.txt", ""), ("empty.json", ""), ("blank.jsonl", "\n\n")):
        (tmp_path / name).write_text(text)
    write_as("parquet", tmp_path / "a.parquet", TEXTS)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more than that")
    before = set(tmp_path.iterdir())
    here, no_text = str(tmp_path), "the input holds no text to train on: "
    for input, options, words in (
        ("/nowhere/*.jsonl", {}, "/nowhere/*.jsonl matches no file"),
        (here, {}, f"input {here} is a directory; name its files: "),
        ((1, 2), {}, "input has 1 in it, which is no file or glob"),
        ((), {}, f"{no_text}0 files"),
        (f"{here}/empty.txt", {}, f"{no_text}1 files"),
        (f"{here}/empty.json", {}, f"{no_text}1 files"),
        (f"{here}/blank.jsonl", {}, f"{no_text}1 files"),
        (f"{here}/blank.jsonl", {"sft": True}, "has no chat template"),
        (f"{ROOT}/README.md", {}, "README.md: input must be .parquet, or .txt .py .jsonl .json"),
        (f"{here}/bad.parquet", {}, "bad.parquet is not Parquet: "),
        (f"{here}/a.parquet", {"text_key": "body"}, "no column body, messages or conversations"),
        (f"{here}/a.*", {"min_score": 1.0}, "a.txt is plain text: it has no scores"),
        (f"{here}/a.*", {"sft": True}, "a.txt is plain text: it has no chats"),
        (f"{here}/a.txt", {"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        (f"{here}/a.txt", {"seq_len": 1}, "seq_len is 1; it must be at least 2"),
        (f"{here}/a.txt", {"heldout_fraction": 1.0}, "must be from 0 to below 1"),
        (f"{here}/a.txt", {"tokenizer": "/nowhere"}, "/nowhere/tokenizer.json is no tokenizer.json of a"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as refusal:
            prepared(input, tmp_path / "out", **options)
        assert "\n" not in str(refusal.value)
        assert set(tmp_path.iterdir()) == before  # neither out nor out.partial
    for arguments in ([f"--input={tmp_path}/empty.txt", f"--out={tmp_path}/out"], [f"--inspect={tmp_path}"]):
        done = run("prepare.py", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for module, kind in (("pyarrow", "jsonl.zst"), ("pyarrow.parquet", "parquet")):
        write_as(kind, tmp_path / f"b.{kind}", TEXTS)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match="needs the package pyarrow: pip install pyarrow"):
                prepared(tmp_path / f"b.{kind}", tmp_path / "out")


def test_killed_at_ten_moments_ends_with_the_same_bytes(tmp_path):
    texts = [text * 10 for text in TEXTS]
    files = [write_as(kind, tmp_path / f"data.{kind}", texts) for kind in ("jsonl.gz", "json", "parquet")]
    files.append(tmp_path / "data.jsonl")
    files[-1].write_bytes(lines(texts[:70]) + b"bad\n" + lines(texts[70:]))

    def start(out, units=None):
        """A run in a process group of its own: at its end, or killed when so many units are done."""

        def work():
            os.setsid()
            prepared([*map(str, files)], out, heldout_fraction=0.2, unit_bytes=20_000, num_workers=2)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        begun = Path(f"{out}.partial/settings.json")
        # A moment by the clock depends on the machine's load.
        while units is not None and process.is_alive():
            if begun.exists() and len(list(begun.parent.glob("unit_*.json"))) >= units:
                process.kill()
            time.sleep(0.002)
        process.join()
        return process

    assert start(tmp_path / "straight").exitcode == 0
    expected = contents(tmp_path / "straight")
    assert len(expected) > 20
    units, gone_on = 29, 0
    for i in range(10):  # from the first unit to the joining of all
        out = tmp_path / f"out{i}"
        process = start(out, i * units // 9)
        gone_on += bool(list(Path(f"{out}.partial").glob("unit_*.json")))
        assert start(out).exitcode == 0 and contents(out) == expected
        with pytest.raises(ProcessLookupError):  # its workers have noticed
            for _ in range(100):
                os.killpg(process.pid, signal.SIG_DFL)
                time.sleep(0.1)
    assert gone_on >= 3


def test_going_on_with_other_settings_or_input_is_refused(tmp_path, capsys):
    """And so it is where all is done; the same settings are then told to have been there."""
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    whole = lines([*TEXTS, "last"]) + b"bad\n"
    path.write_bytes(whole)
    made = path.stat().st_mtime_ns
    with pytest.raises(ValueError, match="more than max_bad"):
        prepared(path, out, max_bad=0)
    shutil.copytree(BUNDLED, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
    begun = contents(tmp_path / "out.partial")
    for name, value in {
        "heldout_fraction": 0.5, "unit_bytes": 5000, "text_key": "body", "min_score": 1.0,
        "special_tokens": True, "tokenizer": tmp_path / "tokenizer",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"out.partial was begun with {name} = "):
            prepared(path, out, **{name: value})
    for changed in (whole + lines(["more"]), whole.replace(b'"last"', b'"tsal"')):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="was begun with input_files = "):
            prepared(path, out)
    assert contents(tmp_path / "out.partial") == begun

    path.write_bytes(whole)
    os.utime(path, ns=(made, made))
    prepared(path, out)
    done = contents(out)
    prepared(path, out, num_workers=2, max_bad=7)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"{out} is there already, made with the same settings"
    with pytest.raises(ValueError, match=r"/out was begun with heldout_fraction = 0, not 0.5; remove it"):
        prepared(path, out, heldout_fraction=0.5)
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match="else exists and is no shard directory"):
        prepared(path, tmp_path / "else")
    assert contents(out) == done and not list((tmp_path / "else").iterdir())


def test_nothing_held_out_is_said(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("\n".join(TEXTS))
    words = "nothing is held out of 1 documents, so train.py cannot evaluate"
    for fraction, is_said in ((0.02, True), (0, False)):
        prepared(tmp_path / "one.txt", tmp_path / str(fraction), heldout_fraction=fraction)
        assert (words in capsys.readouterr().out) == is_said


def test_killed_before_the_last_rename_and_after_it(source, tmp_path, monkeypatch):
    prepared(source, tmp_path / "straight")
    for name, owner, is_there in (("rename", Path, False), ("rmtree", shutil, True)):
        out = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(owner, name, lambda *_: 1 / 0)
            prepared(source, out)
        assert Path(f"{out}.partial").is_dir() and out.exists() == is_there
        prepared(source, out)
        assert contents(out) == contents(tmp_path / "straight") and not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 200)])
def test_a_unit_whose_shard_is_damaged_is_made_anew(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS) + b"bad\n")
    prepared(path, tmp_path / "straight")
    with pytest.raises(ValueError, match="more than max_bad"):
        prepared(path, tmp_path / "out", max_bad=0)
    damage(tmp_path / "out.partial/shards/tokens_00000.npy")
    prepared(path, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_file_that_two_patterns_match_is_read_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    twice = (f"{tmp_path}/*.jsonl", f"{tmp_path}/a.*")
    assert prepared(twice, tmp_path / "out")["documents"]["tokens"] == len(TEXTS)


def test_a_json_file_of_lines_is_read_side_by_side(tmp_path):
    made = {}
    for kind in ("json", "jsonl"):
        (tmp_path / f"a.{kind}").write_bytes(lines(TEXTS))
        prepared(tmp_path / f"a.{kind}", tmp_path / kind)
        made[kind] = contents(tmp_path / kind)
        del made[kind]["meta.json"]
    assert len(made["json"]) > 20 and made["json"] == made["jsonl"]


def test_two_writers_are_refused(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", holder, str(tmp_path / "out.partial/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"another process is writing .*out.partial"):
            prepared(source, tmp_path / "out")
        process.communicate(b"\n")
    prepared(source, tmp_path / "out")


LLAMA3 = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif -%}
<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
QWEN = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- set thought, mark, answer = m.content.rpartition('</think>') %}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + thought.split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- (answer.lstrip('\\n') if mark else answer) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are SmolLM.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}
{{- m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FAMILIES = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen": (QWEN, None, "<|im_end|>"),
    "smollm2": (SMOLLM2, "<|im_start|>", "<|im_end|>"),
}
NAMES = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "im_start", "im_end")
SPECIAL = [f"<|{name}|>" for name in NAMES]
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
    if template is QWEN:  # the thought of the last answer only, which has one in any case
        last = turns.pop()
        last = last if last.startswith("<think>") else f"<think>\n\n</think>\n\n{last}"
        turns = [turn.split("</think>\n\n")[-1] for turn in turns] + [last]
    return "".join(turn + end for turn in turns)


def chat_tokenizer(path, family="llama3", template=None):
    """The bundled one with SPECIAL; its chat template the family's, or another."""
    family_template, bos, eos = FAMILIES[family]
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    if family == "smollm2":
        (path / "chat_template.jinja").write_text(family_template)
    else:
        config["chat_template"] = template or family_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def family_tokenizer(family, real, path):
    """One with a template like the family's, or the family's own from TOKENIZERS/llama3, qwen or smollm2."""
    if not real:
        return chat_tokenizer(path, family)
    directory = Path(os.environ.get("TOKENIZERS", "tokenizers")) / family
    if not directory.is_dir():
        pytest.skip(f"no {directory}: give the families' own tokenizers as TOKENIZERS")
    shutil.copytree(directory, path)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


def rows_of(chats):
    """The first as `messages`, the next as `conversations`, and so on, in the two data sets' own shapes."""
    rows = []
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    for i, chat in enumerate(chats):
        if i % 2:
            rows.append({"conversations": [{"from": names[r], "value": c} for r, c in chat], "source": None})
        else:
            rows.append({"messages": messages_of(chat), "prompt": chat[0][1]})
    return rows


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trains_on_the_assistants_turns_and_nothing_else(family, real, tmp_path):
    """With templates like the families', and with their own, from TOKENIZERS/llama3, qwen and smollm2."""
    tokenizer = family_tokenizer(family, real, tmp_path / "tokenizer")
    rows = encoded(tmp_path / "tokenizer", rows_of(CHATS), sft=True)
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    template = prepare.chat_template(tmp_path / "tokenizer")
    for i, (chat, (tokens, mask)) in enumerate(zip(CHATS, rows, strict=True)):
        rendered = oracle.apply_chat_template(messages_of(chat), tokenize=False)
        assert text_of(tokenizer, tokens) == rendered
        assert text_of(tokenizer, tokens[mask == 1]) == said(family, chat)
        if i < 3:  # no token of the whole text's reaches over the edge of a turn
            assert tokens.tolist() == tokenizer.encode(rendered, add_special_tokens=False).ids
            # What is trained on goes on behind the prompt that the template has for a reply.
            prompt = sample.encode_chat(tokenizer, template, messages_of(chat[:-1]))
            assert tokens[: len(prompt)].tolist() == prompt and mask[len(prompt)] == 1
    # Without a mask it is the whole text's tokens.
    for chat, (tokens, mask) in zip(CHATS, encoded(tmp_path / "tokenizer", rows_of(CHATS)), strict=True):
        whole = oracle.apply_chat_template(messages_of(chat), return_dict=True)["input_ids"]
        assert tokens.tolist() == whole and not len(mask)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_trained_on_under_each_of_its_names(name, tmp_path):
    """As transformers takes them; with a template that looks for the first."""
    template = QWEN.replace("m.content.rp", "(m.reasoning_content ~ '</think>' ~ m.content).rp")
    assert template != QWEN
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "qwen", template)
    chat = messages_of([("user", "a"), ("assistant", "b")])
    chat[1][name] = "so"
    ((tokens, mask),) = encoded(tmp_path / "tokenizer", [{"messages": chat}], sft=True)
    assert text_of(tokenizer, tokens[mask == 1]) == "<think>\nso\n</think>\n\nb<|im_end|>"


def test_a_row_can_have_options_of_its_template(tmp_path):
    """As TRL and the hub's data sets name them; a block that the prompt has is not trained on."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", "qwen", QWEN.replace("You are Qwen.", "{{ who }}"))
    chat = messages_of([("user", "a"), ("assistant", "b")])
    options = {"enable_thinking": False, "who": "<|im_end|>"}
    rows = [{"messages": chat, "chat_template_kwargs": options}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for found in (rows, read(tmp_path / "a.parquet")):
        for sft in (True, False):
            ((tokens, mask),) = encoded(tmp_path / "tokenizer", found, sft=sft)
            assert text_of(tokenizer, tokens) == oracle.apply_chat_template(chat, tokenize=False, **options)
            assert sum(tokens == tokenizer.token_to_id("<|im_end|>")) == 3  # one of each turn
            assert not sft or text_of(tokenizer, tokens[mask == 1]) == "b<|im_end|>"


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
    rows = encoded(tmp_path / "tokenizer", rows_of(chats), sft=True)
    render = prepare.chat_template(tmp_path / "tokenizer")
    for (tokens, mask), chat in zip(rows, chats, strict=True):
        messages = messages_of(chat)
        whole = tokenizer.encode(render(messages), add_special_tokens=False).ids
        assert tokens.tolist() == whole
        # What is generated goes on behind the prompt's last token.
        prompt = sample.encode_chat(tokenizer, render, messages[:1])
        assert tokens[: len(prompt)].tolist() == prompt
        assert not mask[: len(prompt)].any() and mask[len(prompt)] == 1
    tokens, mask = rows[0]
    assert [tokenizer.id_to_token(i) for i in tokens[mask == 1]][:2] == ["▁Hi", "▁y"]

    text = "Hi you\n" * 40
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(prepare, "PIECE", 50)
    assert prepare.encode_text(tokenizer, text) == expected

    streamer = sample.Streamer(tokenizer, tokenizer.encode("Hi", add_special_tokens=False).ids)
    assert "".join(map(streamer.add, tokenizer.encode("y Hi", add_special_tokens=False).ids)) == " y Hi"


def test_sft_rows_are_cut_at_seq_len_and_stay_in_one_shard(source, tmp_path):
    chat_tokenizer(tmp_path / "tokenizer")
    never = [[("user", "long " * 200), ("assistant", "no")], [("user", "nobody answers")]]
    chats = write_rows(tmp_path / "a.jsonl", [*rows_of([*CHATS, *never] * 5), {"text": "no chat"}])
    options = {"tokenizer": tmp_path / "tokenizer", "sft": True, "unit_bytes": 2000}
    meta = prepared(chats, tmp_path / "cut", seq_len=30, **options)
    assert meta["filtered"] == 10 and meta["bad"] == 1 and len(meta["splits"]["tokens"]) > 5
    whole = encoded(tmp_path / "tokenizer", rows_of(CHATS), sft=True)
    rows, masks = (documents_of(tmp_path / "cut", column) for column in ("tokens", "mask"))
    for tokens, mask, (whole_tokens, whole_mask) in zip(rows, masks, whole * 5, strict=True):
        assert np.array_equal(tokens, whole_tokens[:30]) and np.array_equal(mask, whole_mask[:30])

    mixture = Mixture({tmp_path / "cut": None}, "tokens", 0, seed=3, sft=True)
    assert sorted(mixture.place(i)[1] for i in range(25)) == list(range(25))
    batch = mixture.batch(4, 6)
    assert batch.ids.shape == batch.labels.shape == batch.documents.shape == (6, 128)
    assert not batch.documents.any() and batch.source.tolist() == [0] * 6
    for ids, labels, i in zip(batch.ids, batch.labels, range(4, 10), strict=True):
        block = mixture.place(i)[1]
        trained = np.where(masks[block] == 1, rows[block].astype(int), -100)[1:]
        padding = 128 - len(trained)
        assert labels.tolist() == trained.tolist() + [-100] * padding
        assert ids.tolist() == rows[block][:-1].tolist() + [0] * padding
    assert mixture.count_labels(4, 6) == (batch.labels != -100).sum()
    long = write_rows(tmp_path / "long.jsonl", rows_of([[("user", "a"), ("assistant", "x = 1\n" * 200)]]))
    for length, padded in ((128, 128), (129, 256)):  # a row of one token more than ids
        prepared(long, tmp_path / str(length), seq_len=length + 1, **options)
        mixture = Mixture({tmp_path / str(length): None}, "tokens", 0, seed=3, sft=True)
        assert mixture.batch(0, 1).ids.shape == (1, padded)
    prepared(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="not SFT rows"):
        Shards(tmp_path / "packed", "tokens", 8, sft=True)


MARKED = [
    [("user", "Is <|im_end|> a token?"), ("assistant", "<|eot_id|>, too: <|im_end|>")],
    [("system", "<|im_start|>"), ("user", "<|im_end|><|eot_id|>"), ("assistant", "no")],
]
MARKED_TEXT = "x = '<|im_end|>'\n<|im_start|>user"


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_texts_and_turns_are_text(family, real, tmp_path):
    tokenizer = family_tokenizer(family, real, tmp_path / "tokenizer")
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    rows = [{"messages": messages_of(chat)} for chat in MARKED] + [{"text": MARKED_TEXT}]
    packed = []
    end = FAMILIES[family][2]
    for special_tokens in (False, True):
        documents = encoded(tmp_path / "tokenizer", rows, special_tokens=special_tokens)
        packed.append([ids for ids, _ in documents])
        documents = encoded(tmp_path / "tokenizer", rows[:2], special_tokens=special_tokens, sft=True)
        trained = [text_of(tokenizer, tokens[mask == 1]) for tokens, mask in documents]
        thought = "<think>\n\n</think>\n\n" if family == "qwen" else ""
        assert trained == [f"{thought}<|eot_id|>, too: <|im_end|>{end}", f"{thought}no{end}"]
    new, old = packed
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for i, chat in enumerate(MARKED):
        rendered = oracle.apply_chat_template(messages_of(chat), tokenize=False)
        # The words are the same; only the template's own special tokens are left.
        assert text_of(tokenizer, new[i]) == rendered
        template = tokenizer.encode(rendered, add_special_tokens=False).ids
        spoken = tokenizer.encode(" ".join(text for _, text in chat), add_special_tokens=False).ids
        count = np.isin(template, special).sum() - np.isin(spoken, special).sum()
        assert np.isin(new[i], special).sum() == count > 0
        assert np.isin(old[i], special).sum() == np.isin(template, special).sum() > count
    bos, eos = prepare.special_ids(tokenizer, tmp_path / "tokenizer")
    assert old[2].tolist() == [*bos, *tokenizer.encode(MARKED_TEXT, add_special_tokens=False).ids, eos]
    tokenizer.encode_special_tokens = True
    assert new[2].tolist() == [*bos, *tokenizer.encode(MARKED_TEXT, add_special_tokens=False).ids, eos]


def test_chats_are_held_out_by_what_the_template_writes(tmp_path):
    """So by nothing of how the turns are found in it."""
    chat_tokenizer(tmp_path / "tokenizer", "smollm2")
    chats = [[("user", f"{i} <|im_end|>"), ("assistant", f"{i}\n")] for i in range(40)]
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [oracle.apply_chat_template(messages_of(chat), tokenize=False) for chat in chats]
    encoder = prepare.Encoder(SETTINGS | {"tokenizer": tmp_path / "tokenizer", "heldout_fraction": 0.3})
    splits = [encoder.row(row, Path("a.jsonl"))[0] for row in rows_of(chats)]
    assert splits == ["heldout" if is_held_out(text, 0.3) else "tokens" for text in texts]
    assert 0 < splits.count("heldout") < 40


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two packed corpora, of many small and of few long documents, in several shards each."""
    work = tmp_path_factory.mktemp("corpora")
    few = ["\n".join(TEXTS[i : i + 30]) for i in range(0, 90, 30)]
    for name, texts, unit_bytes in (("many", TEXTS, 4000), ("few", few, 12_000)):
        prepared(write_as("jsonl", work / f"{name}.jsonl", texts), work / name, unit_bytes=unit_bytes)
    return work


def test_permutation_visits_everything_once():
    sizes = [*range(1, 129), *(4**k + d for k in (4, 5, 6) for d in (-1, 0, 1)), 10_000]
    for n in sizes:
        assert sorted(permute(i, n, seed=n) for i in range(n)) == list(range(n)), n
    far = 10**12
    images = {permute(i, far, 1) for i in [*range(20_000), *range(far - 20_000, far)]}
    assert len(images) == 40_000 and min(images) >= 0 and max(images) < far
    assert abs(np.mean(list(images)) / far - 0.5) < 0.01  # six standard deviations of a uniform mean
    orders = {tuple(permute(i, 50, seed) for i in range(50)) for seed in range(100)}
    assert len(orders) == 100


def test_an_order_costs_no_memory(corpora):
    mixture = Mixture(dict.fromkeys([corpora / "many", corpora / "few"]), "tokens", 16, seed=0)
    mixture.shares = [10**12, 3 * 10**11]  # as of 10**12 blocks: cycles are walked as long as they get
    mixture.starts, mixture.total = [0, 10**12, 13 * 10**11], 13 * 10**11
    mixture.place(0)
    tracemalloc.start()
    for i in range(500):
        mixture.place(i * 10**9)
    assert tracemalloc.get_traced_memory()[0] < 10_000
    tracemalloc.stop()


def test_a_budget_that_is_none_is_refused(corpora):
    for budget in (0.5, 15, 0, -5, True, "1e6", math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"data has {budget!r} tokens of .*many; it must be None, or"):
            Mixture({corpora / "many": budget}, "tokens", 16, seed=5)
    with pytest.raises(ValueError, match=r"data is {}; it must name a shard directory"):
        Mixture({}, "tokens", 16, seed=5)
    assert Mixture({corpora / "many": 16}, "tokens", 16, seed=5).total == 1


@pytest.mark.parametrize("budget", [None, 3000, 40_000])
def test_mixture_takes_each_budget_and_repeats_only_what_is_used_up(corpora, budget):
    data = {corpora / "many": budget, corpora / "few": None}
    mixture = Mixture(data, "tokens", 16, seed=5)
    blocks = [source.blocks for source in mixture.sources]
    assert blocks[0] > 3000 // 16 and blocks[0] < 40_000 // 32
    shares = [blocks[0] if budget is None else budget // 16, blocks[1]]
    total = mixture.total
    assert total == sum(shares)
    places = [mixture.place(i) for i in range(2 * total)]
    orders = [[source for source, _ in part] for part in (places[:total], places[total:])]
    for source in range(2):
        assert [order.count(source) for order in orders] == [shares[source]] * 2  # in each epoch exactly
        times = np.bincount([block for s, block in places if s == source], minlength=blocks[source])
        assert times.max() - times.min() <= 1  # over the epochs too, none comes again before all have come
    assert orders[0] != orders[1]
    first = orders[0][: total // 2].count(0)
    p = shares[0] / total  # the sources are shuffled together: within five standard deviations
    assert abs(first - shares[0] / 2) < 5 * (total * p * (1 - p) / 4) ** 0.5
    batch = mixture.batch(7, 5)
    assert batch.source.tolist() == orders[0][7:12]
    assert all(array.dtype == np.int64 for array in batch)
    for ids, labels, (source, block) in zip(batch.ids, batch.labels, places[7:12], strict=True):
        for tokens in arrays_of(corpora / ("many", "few")[source], "tokens"):
            if block < (len(tokens) - 1) // 16:
                break
            block -= (len(tokens) - 1) // 16
        assert [*ids, labels[-1]] == tokens[block * 16 : block * 16 + 17].tolist()
        assert labels[:-1].tolist() == ids[1:].tolist()
    assert mixture.count_labels(7, 5) == 5 * 16
    other = Mixture(data, "tokens", 16, seed=6)
    assert [other.place(i) for i in range(50)] != places[:50]


def test_sources_of_one_name_are_told_apart(corpora, tmp_path):
    paths = [str(tmp_path / name) for name in ("x/text", "y/text", "x/code")]
    for path in paths:
        shutil.copytree(corpora / "few", path)
    assert Mixture(dict.fromkeys(paths), "tokens", 8, seed=0).names == paths
    assert Mixture(dict.fromkeys(paths[1:]), "tokens", 8, seed=0).names == ["text", "code"]


def test_documents_tell_where_each_token_belongs(corpora):
    for name in ("many", "few"):
        mixture = Mixture({corpora / name: None}, "tokens", 64, seed=1)
        batch = mixture.batch(0, mixture.total)
        assert batch.documents.shape == batch.ids.shape == (mixture.total, 64)
        ended = batch.ids == 0  # the EOS is its document's last token
        assert np.array_equal(batch.documents, np.cumsum(ended, axis=1) - ended)
        assert (batch.documents[:, -1] > 0).any()


def test_more_shards_than_a_process_may_open(corpora, tmp_path):
    """As of FineWeb-Edu's thousands and 1024 open files; and a document can go on in the next shard, as
    prepare.py wrote them before work units."""
    entries = []
    for number, tokens in enumerate(np.split(np.arange(1, 6001, dtype=np.uint16), 200)):
        ends = np.array([[10, 25], [15]][number % 2])
        for column, values in (("tokens", tokens), ("ends", ends)):
            np.save(tmp_path / f"{column}_{number:05d}.npy", values)
        name = f"tokens_{number:05d}.npy"
        entries.append({"file": name, "tokens": 30, "documents": len(ends), "sha256": {}})
    meta = json.loads((corpora / "many/meta.json").read_text())
    meta["splits"] = {"tokens": entries, "heldout": []}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (380, limit[1]))
    try:
        mixture = Mixture({tmp_path: None}, "tokens", 8, seed=0)
        batch = mixture.batch(0, mixture.total)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert mixture.total == 600
    assert np.array_equal(batch.ids, batch.ids[:, :1] + np.arange(8))
    assert np.array_equal(batch.labels, batch.ids + 1)
    begun = np.isin(batch.ids[:, 1:] % 60, [11, 26, 46])  # behind the ends in every 60 tokens
    assert np.array_equal(np.diff(batch.documents, axis=1) == 1, begun)


def test_a_damaged_directory_is_named(corpora, tmp_path):
    path = tmp_path / "many"
    shutil.copytree(corpora / "many", path)
    done = run("prepare.py", f"--inspect={path}")
    assert done.returncode == 0, done.stderr
    for words in ("150 documents", f"{corpora}/many.jsonl", "def f(x)"):
        assert words in done.stdout
    for name in ("tokens_00001.npy", "ends_00000.npy"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(ValueError, match=f"^{path / name} is missing or damaged"):
            prepare.describe(path)
        (path / name).write_bytes(whole[:-2])
        with pytest.raises(ValueError, match=f"{name} is truncated"):
            Shards(path, "tokens", 16)
        (path / name).write_bytes(whole)
        prepare.map_array.cache_clear()
    length = len(arrays_of(path, "tokens")[0])
    np.save(path / "tokens_00000.npy", np.zeros(1999, np.uint16))
    wrong = rf"tokens_00000.npy holds \(1999,\) uint16; meta.json says \({length},\)"
    with pytest.raises(ValueError, match=wrong):
        Shards(path, "tokens", 16)
    with pytest.raises(ValueError, match="not one block of seq_len 16"):
        Shards(corpora / "many", "heldout", 16)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(ValueError, match="has shard format 1, not 2: prepare it again"):
        Shards(path, "tokens", 16)


TOOL = {"name": "count", "parameters": {"default": None, "note": "<|im_end|>é"}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"name": "count", "arguments": {"of": "items", "unit": "<|im_start|>"}}
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
    "behind the content": f"<call>{json.dumps(CALL, indent=1)}</call><|im_end|>seven<|im_end|>",
    "in place of the content": "<|begin_of_text|>count<|im_end|>seven<|eot_id|>",
    "without a header": "<|im_start|>"
    + json.dumps({"type": "function", "function": CALL})
    + "<|eot_id|>seven<|eot_id|>",
}


def rows_with_calls(arguments=None):
    call = {"type": "function", "function": CALL if arguments is None else CALL | {"arguments": arguments}}
    chat = [
        {"role": "user", "content": "count them"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
    empty, null = ([chat[0], chat[1] | {"content": content}, *chat[2:]] for content in ("", None))
    return [{"messages": messages, "tools": TOOLS} for messages in (chat, empty, null)]


@pytest.mark.parametrize("kind", CALLS)
def test_tool_calls_are_trained_on_and_what_tools_say_is_not(kind, tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template=CALLS[kind])
    rows = rows_with_calls()
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rendered = [oracle.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False) for row in rows]
    found = encoded(tmp_path / "tokenizer", rows, sft=True)
    assert [text_of(tokenizer, tokens) for tokens, _ in found] == rendered
    plain = oracle.apply_chat_template(rows_with_calls({})[0]["messages"], tools=[], tokenize=False)
    marks = ["<|im_start|>", "<|im_end|>"] * ("behind" in kind) + re.findall(r"<\|\w+\|>", plain)
    for tokens, mask in found:
        assert text_of(tokenizer, tokens[mask == 1]) == SAID[kind]
        # What a tool or a call spells out is no special token.
        assert [name for name in map(tokenizer.id_to_token, tokens) if name in SPECIAL] == marks
    # The text is as transformers renders it where nothing is trained on, too.
    assert [text_of(tokenizer, ids) for ids, _ in encoded(tmp_path / "tokenizer", rows)] == rendered


def test_calls_that_a_template_leaves_out_are_refused(tmp_path):
    """An empty turn would be trained on in their place."""
    chat_tokenizer(tmp_path / "tokenizer", "smollm2")
    empty = rows_with_calls()[1]
    with pytest.raises(ValueError, match=r"^chat: the template does not write tool calls$"):
        encoded(tmp_path / "tokenizer", [empty], sft=True)


def test_tools_and_arguments_can_be_json_text(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template=CALLS["behind the content"])
    rows = [row | {"tools": json.dumps(TOOLS)} for row in rows_with_calls()]
    rows += rows_with_calls(json.dumps(CALL["arguments"]))
    oracle = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    found = encoded(tmp_path / "tokenizer", rows, sft=True, special_tokens=True)
    for row, (tokens, _) in zip(rows, found, strict=True):
        right = oracle.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
        assert text_of(tokenizer, tokens) == right


def test_rows_of_parquet_give_the_ids_of_the_same_rows_of_json_lines(tmp_path):
    """Arrow gives every struct of a column all keys, and null where a row had none, within tool_calls too."""
    chat_tokenizer(tmp_path / "tokenizer", template=CALLS["behind the content"])
    rows = rows_with_calls({"of": "items"}) + rows_with_calls({"unit": "m", "deep": {"a": 1}})
    for row in rows:
        row["tools"] = [{"name": "count"}, {"name": "name", "strict": True}]
    rows.append({"messages": messages_of([("user", "a"), ("assistant", "b")])})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = encoded(tmp_path / "tokenizer", rows, sft=True)
    found = encoded(tmp_path / "tokenizer", read(tmp_path / "a.parquet"), sft=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_chats_that_cannot_be_read_or_masked_are_refused_with_the_reason(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls[0].function.name }}\n{% endfor %}"
    )
    chat_tokenizer(tmp_path / "tokenizer", template=template)
    user, assistant = plain = messages_of([("user", "a"), ("assistant", "b")])
    for row, reason in (
        ({"messages": plain + plain}, "chat: the template ends an assistant's turn without a special token"),
        (rows_with_calls()[0], "chat: .*do not show the bounds of a turn of tool calls"),
        ({"messages": plain, "tools": "{"}, "chat: Expecting"),
        ({"messages": plain, "tools": {"name": "count"}}, "chat: .*no list"),
        ({"messages": plain, "tools": ["count"]}, "chat: .*no list"),
        ({"messages": plain, "tools": 5}, "chat: 'int' object is not iterable"),
        ({"messages": [user, {"role": "assistant", "content": None}]}, "chat: .*without text"),
        ({"messages": [{"role": "tool", "content": None}, assistant]}, "chat: .*without text"),
        ({"conversations": [{"from": "gpt"}]}, "chat: .*without text"),
        ({"conversations": [{"from": "observation", "value": "7"}]}, "chat: a turn is from 'observation'"),
        ({"messages": messages_of([("user", "a\ufdd0")])}, "chat: it has '.ufdd0' or '.ufdd1' in it"),
        ({"messages": messages_of([("assistant", "\ufdd1")])}, "chat: it has '.ufdd0' or '.ufdd1' in it"),
        ({"messages": plain, "chat_template_kwargs": ["x"]}, "chat: .*must be a mapping"),
        ({"conversations": [None]}, "chat: 'NoneType' object has no"),
        ({"conversations": "x"}, "chat: 'str' object has no"),
        ({"messages": []}, "not a chat"),
        ({"text": "no chat"}, "not a chat"),
    ):
        with pytest.raises(ValueError, match=f"^{reason}"):
            encoded(tmp_path / "tokenizer", [row], sft=True)
