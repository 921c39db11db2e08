"""Kills a training run at random moments, goes on, and compares its end with an undisturbed run's.

    python tools/kill_train.py                            # 50 kills of one process: a few minutes
    python tools/kill_train.py --processes=2 --kills=10   # under torchrun, all its processes at once

Not a part of the test run. Every resume must succeed and the final tensors be the same, bit for bit.
"""

kills = 50  # SIGKILLs
processes = 1  # of the run; more than one under torchrun
max_steps = 2500  # of the run; a checkpoint every 3 of them, so that many kills fall into a save
seed = 0  # of the moments

if __name__ == "__main__":
    import sys
    from pathlib import Path

    repository = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(repository), str(repository / "tests")]
    from configurator import configure

    configure(globals())

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time

import torch
from safetensors.torch import load_file
from test_parallel import ranks_of
from tqdm import tqdm

from convert import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def start(out_dir: Path) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    options = (
        "--student_hidden_size=24", "--seq_len=32", "--global_batch_size=2", "--micro_batch_size=1",
        "--save_every=3", "--log_every=1", "--eval_every=0", "--sample_prompt=", "--resume=True",
        f"--max_steps={max_steps}", f"--out_dir={out_dir}",
    )  # fmt: skip
    with open(out_dir.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [*launcher, "train.py", *options], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(out_dir: Path) -> dict[str, torch.Tensor]:
    if start(out_dir).wait():
        raise SystemExit(f"a resume failed:\n{out_dir.with_suffix('.log').read_text()[-2000:]}")
    last = checkpoints(out_dir)[-1]
    return {f"{file.name} {name}": tensor for file in sorted(last.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp())
    expected, moments = finish(work / "undisturbed"), random.Random(seed)
    saving = 0
    for _ in tqdm(range(kills), desc="killing"):
        process = start(work / "killed")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:  # until it trains
            if "\nstep " in (work / "killed.log").read_text():
                break
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, 1.0))
        if process.poll() is not None:
            raise SystemExit(f"it ended by itself:\n{(work / 'killed.log').read_text()[-2000:]}")
        for pid in (*ranks_of(process).values(), process.pid):  # torchrun's workers have their own sessions
            os.kill(pid, signal.SIGKILL)
        process.wait()
        saving += any(work.glob("killed/*.partial"))
    found = finish(work / "killed")
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    print(f"{kills} kills, {saving} during a save; tensors that differ at the end: {different or 'none'}")
    shutil.rmtree(work)
    raise SystemExit(bool(different or expected.keys() != found.keys()))
