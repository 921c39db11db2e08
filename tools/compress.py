"""A smaller model of a big one without any training: every weight by least squares, in minutes on a CPU.

    python tools/compress.py                                     # the quickstart's teacher to half its width
    python tools/compress.py --teacher=models/SmolLM2-135M-Instruct --data=data/stdlib_smollm2 \\
        --student_hidden_size=288 --seq_len=512 --out=student
    python tools/compress.py … --init=pca --out=student_pca      # another start, to compare

Takes train.py's options besides `out`, of which those of the optimizer have no effect. It writes a Hugging
Face directory and prints the held-out loss of student and teacher. train.py --init=least_squares starts here;
train.py --train=weights --init_from=student goes on from what was written.
"""

out = "student"  # directory to write; must not exist

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

DEFAULTS = ["--init=least_squares", "--train=both", "--tie_head_projection=False", "--micro_batch_size=4"]

if __name__ == "__main__":
    from configurator import configure, fail

    own = [a for a in sys.argv[1:] if a.startswith("--out=") or a in ("-h", "--help")]
    others = [a for a in sys.argv[1:] if a not in own]
    configure(globals(), own)
    options = configure({"__file__": ROOT / "train.py"}, [*DEFAULTS, *others])

import json
import shutil
import time

import torch

import convert
import train


def main() -> None:
    target = Path(out)
    if target.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    vars(train).update(options)
    train.check_options()
    if train.teacher is None:
        raise ValueError("teacher is None: compress.py makes a student of one")
    device = train.start_device()
    began = time.perf_counter()
    model = train.build_model(train.dtype_on(device)).to(device)
    train_data, heldout = train.open_data(model.config.vocab_size, train.tokenizer_directory())
    train.start_weights(model, train_data, None, device)
    seconds = time.perf_counter() - began
    values = train.evaluate(model, heldout, device) if heldout else {}

    student = model.merge()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert.save_model(student, partial, torch.float32, train.tokenizer_directory())
    partial.rename(target)
    sizes = [sum(p.numel() for p in llama.parameters()) for llama in (student, model.teacher)]
    print(f"{out}: {sizes[0]:,} parameters of {sizes[1]:,}, in {seconds:.0f} s without training")
    print(json.dumps({name: round(value, 4) for name, value in values.items() if isinstance(value, float)}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
