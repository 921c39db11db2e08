"""The scripts end to end, through their command lines: a random two-layer teacher and generated text."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import model as models
from sample import generate, pick

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "data/quickstart/teacher"
SHAPE = {
    "vocab_size": 4096, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
DOCUMENTS = [
    f"def f{i}(x):\n    # {'ünï 日本 🙂 ' * (i % 3)}\n    return x ** {i} + {i * i}\n" * (1 + i % 7)
    for i in range(120)
]


def run(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def succeed(script, *arguments):
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def in_parallel(calls):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda call: run(*call), calls))


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def transformers_model(path):
    """The directory as transformers loads it, which must find every weight and nothing else."""
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def ids_of(*shape):
    return torch.randint(1, 4096, shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def teacher(work):
    torch.manual_seed(0)
    # ten times the usual deviation: logits far enough apart that rounding does not decide what is likeliest
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).save_pretrained(work / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, work / "teacher")
    return work / "teacher"


@pytest.fixture(scope="module")
def text(work):
    """DOCUMENTS in order of their file names: two .txt, a .jsonl and a .jsonl.gz."""
    (work / "text").mkdir()
    lines = [json.dumps({"body": document}) + "\n" for document in DOCUMENTS]
    for i in range(2):
        (work / f"text/{i}.txt").write_text(DOCUMENTS[i], encoding="utf-8")
    (work / "text/2.jsonl").write_text("".join(lines[2:60]) + "\n")
    with gzip.open(work / "text/3.jsonl.gz", "wt") as file:
        file.write("".join(lines[60:]))
    return work / "text"


@pytest.fixture(scope="module")
def corpus(work, text, teacher):
    out = work / "corpus"
    done = succeed("prepare.py", f"--input={text}/*", f"--out={out}", f"--tokenizer={teacher}",
                   "--text_key=body", "--heldout_fraction=0.2", "--shard_tokens=2000")  # fmt: skip
    out.with_name("corpus.log").write_text(done.stdout)
    return out


def read_split(corpus, split):
    shards = json.loads((corpus / "meta.json").read_text())["splits"][split]
    arrays = [np.load(corpus / shard["file"]) for shard in shards]
    assert [len(array) for array in arrays] == [shard["tokens"] for shard in shards]
    return arrays


def documents_of(corpus, split, eos=0):
    """The documents of a split as lists of ids, each without its EOS."""
    ids = np.concatenate(read_split(corpus, split))
    assert ids[-1] == eos
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]]


def clone_options(teacher, corpus, out_dir, *more):
    return (
        f"--teacher={teacher}", f"--data={corpus}", f"--out_dir={out_dir}", "--student_hidden_size=24",
        "--seq_len=32", "--global_batch_size=4", "--micro_batch_size=2", "--max_steps=20", "--save_every=10",
        "--keep_last=2", "--log_every=5", "--eval_every=10", "--eval_blocks=3", "--sample_prompt=", *more,
    )  # fmt: skip


def plain_options(teacher, corpus, out_dir, *more):
    shape = SHAPE | {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": False}
    return (
        "--teacher=None", f"--model_config={shape}", f"--tokenizer={teacher}", f"--data={corpus}",
        f"--out_dir={out_dir}", "--seq_len=32", "--global_batch_size=2", "--micro_batch_size=2",
        "--max_steps=4", "--save_every=2", "--log_every=1", "--eval_blocks=2", "--weight_decay=0.1", *more,
    )  # fmt: skip


RUNS = {"clone": clone_options, "plain": plain_options}


@pytest.fixture(scope="module")
def runs(work, teacher, corpus):
    """{"clone": out_dir, "plain": out_dir}, both trained straight to their end."""
    outs = {name: work / f"run_{name}" for name in RUNS}
    done = in_parallel([("train.py", *RUNS[name](teacher, corpus, out)) for name, out in outs.items()])
    for name, result in zip(outs, done, strict=True):
        assert result.returncode == 0, result.stderr
        outs[name].with_name(f"{name}.log").write_text(result.stdout)
    return outs


@pytest.fixture(scope="module")
def exported(work, runs):
    """The clone's checkpoint as convert.py writes it, in float32 and in bfloat16."""
    outs = {dtype: work / f"student_{dtype}" for dtype in ("float32", "bfloat16")}
    done = in_parallel(
        [("convert.py", f"--checkpoint={runs['clone']}", f"--out={out}", f"--dtype={dtype}")
         for dtype, out in outs.items()]
    )  # fmt: skip
    for result in done:
        assert result.returncode == 0, result.stderr
    return outs


# ---- prepare


def test_prepare_keeps_every_document_once(corpus, teacher):
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    found = {split: documents_of(corpus, split) for split in ("tokens", "heldout")}
    texts = {split: [tokenizer.decode(ids[:-1]) for ids in found[split]] for split in found}
    held = set(texts["heldout"])
    assert texts["tokens"] == [document for document in DOCUMENTS if document not in held]
    assert texts["heldout"] == [document for document in DOCUMENTS if document in held]
    assert 10 <= len(held) <= 40  # 0.2 of 120, give or take four standard deviations

    meta = json.loads((corpus / "meta.json").read_text())
    assert meta["documents"] == {split: len(texts[split]) for split in texts}
    assert meta["vocab_size"] == 4096 and meta["eos_id"] == 0 and meta["bos_ids"] == []
    arrays = read_split(corpus, "tokens")
    assert all(array.dtype == np.uint16 for array in arrays)
    assert [len(array) for array in arrays[:-1]] == [2000] * (len(arrays) - 1) and len(arrays) > 2
    log = corpus.with_name("corpus.log").read_text()
    for split in found:
        assert f"{len(texts[split]):,} documents, {sum(map(len, found[split])):,} tokens" in log


def test_prepare_puts_bos_first_and_splits_by_content(work, corpus, teacher):
    """A tokenizer that adds a BOS, and the documents in another order and format: the same split."""
    shutil.copytree(teacher, work / "bos_teacher")
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    bos = tokenizer.token_to_id("!")
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", bos)])
    tokenizer.save(str(work / "bos_teacher/tokenizer.json"))
    (work / "back.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in reversed(DOCUMENTS))
    )
    succeed("prepare.py", f"--input={work}/back.jsonl", f"--out={work}/back",
            f"--tokenizer={work}/bos_teacher", "--heldout_fraction=0.2")  # fmt: skip
    for split in ("tokens", "heldout"):
        expected = [[bos, *document] for document in reversed(documents_of(corpus, split))]
        assert documents_of(work / "back", split) == expected
