"""Turns a checkpoint into an ordinary Hugging Face model directory.

    python convert.py --checkpoint=out/quickstart --out=student                    # a clone's last checkpoint
    python convert.py --checkpoint=out/lrc_1_5b/step_00208000 --out=student --dtype=bfloat16

The student's weights are composed in float32 and written in `dtype` with the teacher's tokenizer files. What
was written is loaded again and its logits compared with the checkpoint's before the directory gets its name.
"""

from typing import Literal

checkpoint = "out/quickstart"  # a checkpoint, an out_dir (its last checkpoint) or a Hugging Face directory
out = "student"  # directory to write; must not exist
teacher: str | None = None  # directory of a clone's teacher, where it is not where the checkpoint says
dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights written

if __name__ == "__main__":
    from configurator import configure

    configure(globals())

import shutil
from pathlib import Path

import torch

import model as models


def largest_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """max |found - expected| over max |expected|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def main() -> None:
    target = Path(out)
    if target.exists():
        raise ValueError(f"{out} exists; remove it or choose another --out")
    source = models.resolve(checkpoint)
    if models.is_clone(source):
        original = models.load_clone(source, teacher=teacher)
        student, tokenizer = original.merge(), models.read_json(source / "config.json")["tokenizer"]
    else:
        original = student = models.load_model(source)
        tokenizer = str(source)
    ids = torch.randint(student.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = original.logits(ids)  # of a clone: by its own composition, not by the merged weights
    del original

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    stored = getattr(torch, dtype)
    models.save_model(student, partial, stored, tokenizer)
    rounded = student.to(stored).to(torch.float32).logits(ids)
    written = models.load_model(partial).logits(ids)
    exact, rounding = largest_difference(rounded, written), largest_difference(expected, written)
    limit = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype]
    if exact > 1e-4 or rounding > limit:
        shutil.rmtree(partial)
        raise ValueError(
            f"the logits of what was written differ by {max(exact, rounding):.1e}; {out} is not kept"
        )
    partial.rename(target)
    count = sum(weight.numel() for weight in student.parameters())
    print(f"{out}: {count:,} parameters in {dtype}; logits within {rounding:.1e} (relative) of {source}'s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
