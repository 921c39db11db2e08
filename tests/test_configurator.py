"""Options from config files and the command line: what is accepted, what is refused and how it is told."""

import functools
import subprocess
import sys

import pytest
import study
from conftest import ROOT

import configurator
import train

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

    def call(*arguments, config=None, log=None):
        if config is not None:
            (tmp_path / "config.py").write_text(config)
            arguments = (str(tmp_path / "config.py"), *arguments)
        namespace = {"__file__": str(script)}
        values = configurator.configure(namespace, list(arguments), log)
        assert {name: namespace[name] for name in values} == values
        return values

    return call


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--steps=3", 3), ("--rate=1e-3", 1e-3), ("--rate=2", 2.0), ("--flag=True", True), ("--name=", ""),
        ("--name=7", "7"), ("--name=x=y", "x=y"), ("--sizes=(1, 'b')", (1, "b")), ("--source=None", None),
        ("--source=models/x", "models/x"), ("--data={'a': 1e9, 'b': None}", {"a": 1e9, "b": None}),
        ("--data=shards", "shards"), ("--schedule=cosine", "cosine"), ("--dtype=bfloat16", "bfloat16"),
        ("--dtype=None", None), ("--name='b'", "'b'"), ("--schedule='cosine'", "cosine"),
    ],
)  # fmt: skip
def test_command_line_values(configure, argument, expected, capsys):
    """Printed where they differ from the defaults, to another stream where the script says so."""
    name = argument[2:].partition("=")[0]
    values = configure(argument)
    assert values == DEFAULTS | {name: expected}
    assert type(values[name]) is type(expected)
    out = capsys.readouterr().out
    assert (f"{name} = {expected!r}" in out) == (expected != DEFAULTS[name])
    configure(argument, log=sys.stderr)
    assert capsys.readouterr() == ("", out)


IMPORTS = """
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


@pytest.mark.parametrize(
    "config, more, expected",
    [
        (
            "_a = 3\nsteps = 2 * steps\nrate = 1\nname = 'c'",
            ["--name=d"],
            {"steps": 20, "rate": 1.0, "name": "d"},
        ),
        (IMPORTS, [], {"rate": 3.0, "name": "b"}),
        ("from shared_by_runs import steps", [], {"steps": 5}),
    ],
)
def test_config_files(configure, config, more, expected, tmp_path, monkeypatch):
    """They read options, import and define functions; the command line behind one wins."""
    (tmp_path / "shared_by_runs.py").write_text("steps = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = configure(*more, config=config)
    assert values == DEFAULTS | expected and type(values["rate"]) is float


@pytest.mark.parametrize(
    "gpus, given, refused",
    [
        (0, {None: "cpu", "cpu": "cpu"}, ["cuda", "cuda:1", "gpu", "meta", "mps", "xla", ""]),
        (2, {None: "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu"}, ["cuda:2"]),
    ],
)
def test_devices_are_those_that_are_here(gpus, given, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for name, chosen in given.items():
        assert str(configurator.choose_device(name)) == chosen
    here = "cpu, cuda" if gpus else "cpu"
    for name in refused:
        with pytest.raises(
            ValueError, match=f"^device is '{name}', which torch .* lacks here; it has {here}$"
        ):
            configurator.choose_device(name)


@pytest.mark.parametrize(
    "arguments, config, words",
    [
        (["--step=3"], None, ["command line", '"step"', 'did you mean "steps"', "--help"]),
        (["--qqqqqq=3"], None, ['unknown option "qqqqqq"', "--help"]),
        (["--later=3"], None, ['unknown option "later"']),
        (["--steps=1.5"], None, ["steps is 1.5", "must be int"]),
        (["--steps=True"], None, ["steps is True", "must be int"]),
        (["--steps=None"], None, ["steps is None", "must be int"]),
        (["--rate=fast"], None, ["rate is 'fast'", "must be float"]),
        (["--flag=1"], None, ["flag is 1,", "must be True or False"]),
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
    told = run.stderr.splitlines()
    imported = [line.split("|")[-1].strip() for line in told if line.startswith("import time:")]
    (error,) = [line for line in told if not line.startswith("import time:")]
    assert run.returncode == 2 and run.stdout == "" and 'unknown option "bogus"' in error
    assert imported and not {"torch", "numpy"} & set(imported)


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


@pytest.mark.parametrize("seconds, first, told", [(0, True, [0, 1, 2]), (60, True, []), (0, False, [])])
def test_long_work_says_how_far_it_is_where_there_is_no_terminal(seconds, first, told, monkeypatch, capsys):
    monkeypatch.setattr(configurator, "SECONDS_BETWEEN_LINES", seconds)
    monkeypatch.setattr(configurator, "FIRST", first)
    assert list(configurator.show("abc", desc="fitting", unit="layer")) == ["a", "b", "c"]
    expected = [f"fitting: layer {done} of 3 is done" for done in told]
    assert capsys.readouterr().err.splitlines() == expected
