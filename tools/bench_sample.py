"""Decoding speed: sample.py's generate against transformers' on the same model, greedy, float32.

    python tools/bench_sample.py                                       # the bundled teacher
    python tools/bench_sample.py models/SmolLM2-135M-Instruct --compile

Rounds of the two alternate and the fastest of each counts, so that a busy machine slows both alike.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import convert
from sample import generate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(ROOT / "data/quickstart/teacher"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours = convert.load_model(options.model)
    if options.compile:
        ours.run_block = torch.compile(ours.run_block, dynamic=True)
    theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # every row runs to its end
    print(f"{options.model}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in (1, 8):
        ids = torch.randint(ours.config.vocab_size, (batch, 32), generator=torch.Generator().manual_seed(0))

        def sample(new, ids=ids):
            return list(zip(*generate(ours, ids.tolist(), new), strict=True))

        def transformers_generate(new, ids=ids):
            return theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )[:, 32:].tolist()

        seconds, tokens = {}, {}
        for _ in range(options.rounds):
            for run in (sample, transformers_generate):
                run(4)  # compiles, and touches memory
                started = time.perf_counter()
                tokens[run] = [list(row) for row in run(options.tokens)]
                taken = time.perf_counter() - started
                seconds[run] = min(seconds.get(run, taken), taken)
        equal = tokens[sample] == tokens[transformers_generate]
        rate, reference = (batch * options.tokens / seconds[run] for run in (sample, transformers_generate))
        print(
            f"batch {batch}: sample.py {rate:.1f} tokens/s, transformers {reference:.1f}, "
            f"ratio {rate / reference:.2f}; tokens {'equal' if equal else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
