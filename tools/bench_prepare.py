"""Throughput and memory of prepare.py against a bare encode_batch loop over the same documents in memory.

    python tools/bench_prepare.py --tokenizer=models/Llama-3.2-3B-Instruct --megabytes=100
    python tools/bench_prepare.py --tokenizer=… --megabytes=1000 --repeats=1 --formats=jsonl   # memory

The documents are the standard library source files, again and again. Prints for each format: MB/s of both,
their ratio, and the most memory of prepare.py with its workers (RSS summed; PSS counts shared pages once).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
begun = time.perf_counter()
for i in range(0, len(texts), 256):
    tokenizer.encode_batch(texts[i : i + 256], add_special_tokens=False)
print(time.perf_counter() - begun)
"""
PREPARE = """
import sys, time, prepare
begun = time.perf_counter()
prepare.write_shards(sys.argv[1], sys.argv[3], sys.argv[2], num_workers=int(sys.argv[4]))
print(time.perf_counter() - begun)
"""


def write_inputs(directory: Path, megabytes: int, formats: list[str]) -> float:
    """The documents as data.jsonl and in the formats asked for; returns their size in MB of text."""
    sys.path.insert(0, str(ROOT))
    import prepare

    texts = [file.read_text(encoding="utf-8") for file in prepare.find_files("stdlib")]
    size, written, rows = sum(len(text.encode()) for text in texts), 0, []
    with open(directory / "data.jsonl", "w") as file:
        while written < megabytes * 1e6:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
            written += size
    if "parquet" in formats:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pa.table({"text": texts})
        with pq.ParquetWriter(directory / "data.parquet", rows.schema) as writer:
            for _ in range(round(written / size)):
                writer.write_table(rows)
    return written / 1e6


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [member for child in children for member in family(int(child))]


def memory(pid: int, field: str) -> float:
    """MB of the process and its children now; field is Rss or Pss."""
    total = 0
    for member in family(pid):
        try:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) / 1e3 if line.startswith(f"{field}:") else 0
        except OSError:
            pass
    return total


def timed(script: str, *arguments, threads: int) -> tuple[float, float, float]:
    """(seconds by its own clock, peak RSS, peak PSS in MB) of a Python script."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    rss = pss = 0.0
    while process.poll() is None:
        rss, pss = max(rss, memory(process.pid, "Rss")), max(pss, memory(process.pid, "Pss"))
        time.sleep(0.5)
    output = process.stdout.read()
    assert process.returncode == 0, output
    return float(output.split()[-1]), rss, pss


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokenizer", required=True, type=os.path.abspath)
parser.add_argument("--megabytes", type=int, default=100)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--formats", default="jsonl,parquet")
options = parser.parse_args()
with tempfile.TemporaryDirectory(dir=ROOT / "data") as directory:
    formats = options.formats.split(",")
    size = write_inputs(Path(directory), options.megabytes, formats)
    print(f"{size:.0f} MB of text, {options.threads} threads or workers")
    ratios = {kind: [] for kind in formats}
    for repeat in range(options.repeats):  # in turns, so that what else the machine does falls on both
        loop = timed(LOOP, f"{directory}/data.jsonl", options.tokenizer, threads=options.threads)[0]
        for kind in formats:
            out = f"{directory}/{kind}_{repeat}"
            arguments = (f"{directory}/data.{kind}", options.tokenizer, out, options.threads)
            seconds, rss, pss = timed(PREPARE, *arguments, threads=1)
            ratios[kind].append(loop / seconds)
            print(
                f"{kind}: {size / seconds:.2f} MB/s, encode_batch {size / loop:.2f} MB/s, "
                f"ratio {loop / seconds:.3f}, peak RSS {rss:.0f} MB, PSS {pss:.0f} MB",
                flush=True,
            )
for kind, values in ratios.items():
    print(f"{kind}: median ratio {sorted(values)[len(values) // 2]:.3f}")
