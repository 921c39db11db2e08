"""Options from config files and the command line: what is accepted, what is refused and how it is told."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import study

import configurator
import train

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''"""What the script does."""
from typing import Literal

steps = 10  # how many
rate = 0.5  # how fast
name = "a"  # what it is called
flag = False  # whether
sizes: tuple = ()  # a tuple
source: str | None = None  # where from
data: dict | str = "d"  # one or several
schedule: Literal["linear", "cosine"] = "linear"  # which
dtype: Literal["float32", "bfloat16"] | None = None  # to compute in

computed = len("not an option")
later = 1
'''
DEFAULTS = {
    "steps": 10, "rate": 0.5, "name": "a", "flag": False, "sizes": (), "source": None, "data": "d",
    "schedule": "linear", "dtype": None,
}  # fmt: skip


@pytest.fixture
def configure(tmp_path):
    """configure(*arguments, config=text) -> values; the text becomes a config file, the first argument."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def call(*arguments, config=None):
        if config is not None:
            (tmp_path / "config.py").write_text(config)
            arguments = (str(tmp_path / "config.py"), *arguments)
        namespace = {"__file__": str(script), "__doc__": "What the script does."}
        values = configurator.configure(namespace, list(arguments))
        assert {name: namespace[name] for name in values} == values
        return values

    return call


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--steps=3", 3),
        ("--rate=2", 2.0),  # an int for a float
        ("--rate=1e-3", 1e-3),
        ("--flag=True", True),
        ("--name=b", "b"),
        ("--name=7", "7"),
        ("--name=", ""),
        ("--name=x=y", "x=y"),
        ("--sizes=(1, 'b')", (1, "b")),
        ("--source=None", None),
        ("--source=models/x", "models/x"),
        ("--data={'a': 1e9, 'b': None}", {"a": 1e9, "b": None}),
        ("--data=shards", "shards"),
        ("--schedule=cosine", "cosine"),
        ("--dtype=bfloat16", "bfloat16"),
        ("--dtype=None", None),
    ],
)
def test_command_line_values(configure, argument, expected, capsys):
    name = argument[2:].partition("=")[0]
    values = configure(argument)
    assert values == DEFAULTS | {name: expected}
    assert type(values[name]) is type(expected)
    out = capsys.readouterr().out
    assert (f"{name} = {expected!r}" in out) == (expected != DEFAULTS[name])


def test_a_config_file_reads_options_and_the_command_line_wins(configure):
    text = "import math\n_private = 3\nsteps = 2 * steps\nrate = 1\nname = 'c'\n"
    values = configure("--name=d", config=text)
    assert values == DEFAULTS | {"steps": 20, "rate": 1.0, "name": "d"}
    assert type(values["rate"]) is float


def test_a_config_file_may_import_and_define_functions(configure):
    text = """
import math, os.path
from math import pi, tau as turn
from pathlib import Path

class Shape:
    width = 2

def double(x):
    from math import e
    return 2 * x

rate = double(pi) - turn + math.floor(1.5) + Shape.width
name = Path("a/b").name
"""
    assert configure(config=text) == DEFAULTS | {"rate": 3.0, "name": "b"}


def test_a_config_file_may_import_an_option(configure, tmp_path, monkeypatch):
    (tmp_path / "shared_by_runs.py").write_text("steps = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert configure(config="from shared_by_runs import steps") == DEFAULTS | {"steps": 5}


def test_options_end_at_the_first_computed_value_and_are_printed_where_the_script_says(tmp_path, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = {"__file__": str(tmp_path / "script.py")}
    assert configurator.configure(script, ["--steps=3"], log=sys.stderr) == DEFAULTS | {"steps": 3}
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("  steps = 3\n")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu", "meta", "mps", "xla", ""])
def test_a_device_that_is_not_here(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert str(configurator.choose_device(None)) == str(configurator.choose_device("cpu")) == "cpu"
    with pytest.raises(ValueError, match=f"^device is '{name}', which torch .* lacks here; it has cpu$"):
        configurator.choose_device(name)


def test_a_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, chosen in ((None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert str(configurator.choose_device(name)) == chosen
    with pytest.raises(ValueError, match=r"device is 'cuda:2'.* it has cpu, cuda"):
        configurator.choose_device("cuda:2")


@pytest.mark.parametrize(
    "arguments, config, words",
    [
        (["--step=3"], None, ["command line", '"step"', 'did you mean "steps"', "--help"]),
        (["--qqqqqq=3"], None, ['unknown option "qqqqqq"', "--help"]),
        (["--later=3"], None, ['unknown option "later"']),
        (["--steps=1.5"], None, ["steps is 1.5", "must be int"]),
        (["--steps=True"], None, ["steps is True", "must be int"]),
        (["--steps=many"], None, ["steps is 'many'", "must be int"]),
        (["--steps=None"], None, ["steps is None", "must be int"]),
        (["--rate=fast"], None, ["rate is 'fast'", "must be float"]),
        (["--flag=1"], None, ["flag is 1", "must be bool"]),
        (["--sizes=3"], None, ["sizes is 3", "must be tuple"]),
        (["--schedule=cos"], None, ["schedule is 'cos'", "linear or cosine"]),
        (["--dtype=float64"], None, ["dtype is 'float64'", "float32 or bfloat16 or None"]),
        (["--flag"], None, ['"--flag" has no value', "--flag=VALUE"]),
        (["flag=True"], None, ['"flag=True"', "neither a config file"]),
        (["no/such.py"], None, ["config file no/such.py: FileNotFoundError"]),
        ([], "stepz = 3", ["config.py", '"stepz"', 'did you mean "steps"']),
        ([], "helper = 3", ["config.py", '"helper"', "a helper variable needs a leading underscore"]),
        ([], "def steps():\n    pass", ["config.py", "steps is <function steps", "must be int"]),
        ([], "steps = '3'", ["config.py", "steps is '3'", "must be int"]),
        ([], "data = 3", ["data is 3", "must be dict or str"]),
        ([], "source = 3", ["source is 3", "must be str or None"]),
        ([], "steps = 1 / 0", ["config.py", "ZeroDivisionError"]),
        ([], "steps = = 1", ["config.py", "SyntaxError"]),
    ],
)
def test_refusals_are_one_line_and_exit_2(configure, arguments, config, words, capsys):
    with pytest.raises(SystemExit) as exit:
        configure(*arguments, config=config)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [word for word in words if word not in error] == []


def test_a_script_refuses_before_it_imports_torch():
    command = [sys.executable, "-X", "importtime", "train.py", "--bogus=1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    other = [line for line in run.stderr.splitlines() if line not in imported]
    assert run.returncode == 2 and run.stdout == ""
    assert len(other) == 1 and 'unknown option "bogus"' in other[0]
    assert imported and not [line for line in imported if line.split("|")[-1].strip() in ("torch", "numpy")]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "convert.py", "prepare.py"])
def test_help_prints_every_option(script, capsys):
    options = configurator.read_options((ROOT / script).read_text())
    with pytest.raises(SystemExit) as exit:
        configurator.configure({"__file__": str(ROOT / script), "__doc__": "Docs."}, ["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith("Docs.")
    assert len(options) > 3
    for name, (default, _, comment) in options.items():
        assert f"  --{name}={default!r}" in out
        assert comment, f"{name} has no trailing comment"
        assert comment in out


STUDY = ("study/base.py", "study/long.py", "study/smollm2.py")
CONFIGS = [
    *((path.name,) for path in sorted((ROOT / "config").glob("*.py")) if "bench_" not in path.name),
    *((f"bench_{name}.py",) for name in ("tiny", "smollm2")),
    *(("bench_tiny.py", f"bench_{name}.py") for name in ("vocab_x3", "ordinary")),
    *((base,) for base in STUDY),
    *((STUDY[0], *study.arguments_of(name)[1:]) for name in study.VARIANTS),
]
READ_OPTIONS = functools.cache(configurator.read_options)  # train.py is parsed once, not for every config


def test_every_config_is_checked():
    listed = {name for paths in CONFIGS for name in paths if name.endswith(".py")}
    files = {str(path.relative_to(ROOT / "config")) for path in (ROOT / "config").rglob("*.py")}
    assert listed == files - {"study/variants.py"}


@pytest.mark.parametrize("names", CONFIGS, ids=" ".join)
def test_shipped_configs_fit_train(names, monkeypatch):
    """They have no option that train.py refuses before it loads anything, nor a term that there is not."""
    monkeypatch.setattr(configurator, "read_options", READ_OPTIONS)
    paths = [str(ROOT / "config" / name) if name.endswith(".py") else name for name in names]
    values = configurator.configure({"__file__": str(ROOT / "train.py"), "__doc__": ""}, paths)
    for name, value in values.items():
        monkeypatch.setattr(train, name, value)
    assert values["global_batch_size"] % values["micro_batch_size"] == 0
    if values["data"] is not None:  # None is for tools/bench.py
        train.check_options()
    train.loss_config()


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(configurator, "SECONDS_BETWEEN_LINES", 0)
    assert list(configurator.show("abc", desc="fitting", unit="layer")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[1] == "fitting: 1 of 3 layers are done"
    monkeypatch.setattr(configurator, "SECONDS_BETWEEN_LINES", 60)
    assert list(configurator.show("abc", desc="fitting", unit="layer")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(configurator, "FIRST", False)
    monkeypatch.setattr(configurator, "SECONDS_BETWEEN_LINES", 0)
    assert list(configurator.show("abc", desc="fitting", unit="layer")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
