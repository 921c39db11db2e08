"""Options of a script, from config files and the command line, in nanoGPT's manner but strict.

    python train.py                                         # the defaults at the head of train.py
    python train.py config/smollm2_135m.py                  # a config file's assignments on top of them
    python train.py config/smollm2_135m.py --max_steps=100  # and the command line on both, left to right
    python train.py --help                                  # every option, its default and its comment

A script's options are the assignments between its docstring and its call of `configure`, one a line, each
with a trailing comment. The default says what type is allowed; where that is not enough, an annotation does
(`teacher: str | None = None`). A config file assigns to the same names and may read them (`max_steps = 2 *
max_steps`). It may import and define functions; the name of a helper variable begins with an underscore.
Anything else ends in one line on stderr and exit code 2, before torch is imported or a file is written.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib
import io
import json
import os
import shutil
import sys
import time
import tokenize
import types
import typing
from pathlib import Path

FIRST = os.environ.get("RANK", "0") == "0"  # under torchrun, one process speaks for all
SECONDS_BETWEEN_LINES = 20  # of long work, where no terminal shows a bar


def read_options(source: str) -> dict[str, tuple[object, tuple, str]]:
    """The options declared in a script's source: {name: (default, what is allowed, comment)}."""
    comments = {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    options = {}
    for node in ast.parse(source).body:
        # `if __name__ == "__main__": configure(globals())` ends the options
        if isinstance(node, ast.If):
            break
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        # and so does the first computed value
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            break
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        allowed = (type(default),)
        if isinstance(node, ast.AnnAssign):
            allowed = alternatives(eval(ast.unparse(node.annotation), {"Literal": typing.Literal}))
        lines = range(node.lineno, node.end_lineno + 1)
        comment = " ".join(comments[line] for line in lines if line in comments)
        options[target.id] = (default, allowed, comment)
    return options


def alternatives(annotation) -> tuple:
    """What an annotation allows: types, and the strings of a Literal."""
    members = typing.get_args(annotation)
    if not members:
        return (annotation,)
    if typing.get_origin(annotation) is typing.Literal:
        return members
    return sum(map(alternatives, members), ())


def names_of(allowed: tuple) -> str:
    """What is allowed, as a user would write it: "int", "str or None", "linear or cosine"."""
    names = {types.NoneType: "None", bool: "True or False"}
    return " or ".join(one if isinstance(one, str) else names.get(one, one.__name__) for one in allowed)


def fits(value, allowed: tuple) -> bool:
    """Whether a value is allowed. An int is where a float is; a bool, an int to Python, is not."""
    if isinstance(value, str) and value in allowed:
        return True
    return type(value) in allowed or (type(value) is int and float in allowed)


def choose_device(name: str | None):
    """The torch.device of an option `device`; None is cuda where there is one, or cpu. ValueError where this
    machine, or its torch, has no such device."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Counted, not tried out: that would take memory on the first GPU in every process.
            found = (device.index or 0) < gpus
        else:
            found = torch.ones(1, device=device).item() == 1
    except Exception:  # what torch raises differs from device to device
        found = False
    if not found:
        allowed = "cpu, cuda" if gpus else "cpu"
        raise ValueError(f"device is {name!r}, which torch {torch.__version__} lacks here; it has {allowed}")
    return device


def lock(directory: Path) -> None:
    """Holds a directory for this process until it ends, however it does; ValueError while another has it."""
    import fcntl  # which Windows has not, where data can be read

    # Never closed, which would end the lock. A process that is forked does not have it, as by flock it would.
    file = os.open(directory / "lock", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is writing {directory}") from None
    except OSError as error:  # some file systems over a network have no locks
        print(f"{directory} cannot be locked ({error}): start no second run in it", file=sys.stderr)


def need_compiler(device_type: str) -> None:
    """ValueError where torch.compile lacks the C++ compiler that it needs on a CPU."""
    if device_type == "cpu" and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        raise ValueError("compile needs a C++ compiler on a CPU, and there is none: g++, or what CXX names")


def need(module: str, why: str | Path):
    """An optional package's module; ValueError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{why} needs the package {package}: pip install {package}") from None


def read_json(file: Path) -> dict:
    """The object in a .json file; ValueError, one line, where there is none."""
    try:
        # Some editors begin a file with a byte order mark.
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def write_json(file: Path, value: dict) -> None:
    """Whole or not at all, whenever process or machine die."""
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def read_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl file, but for one that a kill cut short; none where there is no such file."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def show(steps: typing.Sequence, desc: str, unit: str) -> typing.Iterator:
    """The steps, behind a bar where there is a terminal, or with a line now and then where there is none."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(steps, desc=desc, unit=unit, leave=False, disable=not FIRST)
        return
    since = time.monotonic()
    for done, step in enumerate(steps):
        if FIRST and time.monotonic() - since >= SECONDS_BETWEEN_LINES:
            print(f"{desc}: {unit} {done:,} of {len(steps):,} is done", file=sys.stderr, flush=True)
            since = time.monotonic()
        yield step


def fail(message: str) -> typing.NoReturn:
    if FIRST:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def print_help(description: str, options: dict) -> None:
    print(description.strip(), "\n\noptions:")
    for name, (default, allowed, comment) in options.items():
        line = f"  --{name}={default!r}"
        if len(allowed) > 1:
            line += f"  ({names_of(allowed)})"
        print(f"{line}\n        {comment}")


def read_value(text: str, allowed):
    """The value of --name=text: a Python literal where that is of the allowed type, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    # --run_name=7 is a string, and so is --prompt='"Hello"', quotes and all
    if str in allowed and (isinstance(value, str) or not fits(value, allowed)):
        return text
    return value


def run_config(file: str, values: dict) -> dict:
    """What a config file assigns, given the values so far. Helpers are left out: names with a leading
    underscore, and unknown ones that are imported, functions or classes."""
    namespace = dict(values)
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8-sig"))
        exec(compile(tree, file, "exec"), namespace)
    except Exception as error:
        fail(f"config file {file}: {type(error).__name__}: {error}")
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    assigned = {}
    for name, value in namespace.items():
        is_helper = name.startswith("_") or name in imported or callable(value)
        if name in values:
            if value is not values[name]:
                assigned[name] = value
        elif not is_helper:
            assigned[name] = value
    return assigned


def configure(script: dict, arguments: list[str] | None = None, log: typing.TextIO | None = None) -> dict:
    """Reads the command line into the options of the script whose globals() are given; returns {name: value}.

    Prints those that differ from the defaults, to `log` where stdout is for something else. Exits with code 2
    and one line for an unknown option, a value of the wrong type or a missing file.
    """
    options = read_options(Path(script["__file__"]).read_text())
    values = {name: default for name, (default, _, _) in options.items()}

    def assign(name: str, value, where: str, advice: str) -> None:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            fail(f'{where}: unknown option "{name}"{hint} ({advice})')
        allowed = options[name][1]
        if not fits(value, allowed):
            fail(f"{where}: {name} is {value!r}, but must be {names_of(allowed)}")
        if type(value) is int and int not in allowed:
            value = float(value)
        values[name] = value

    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument in ("-h", "--help"):
            print_help(script.get("__doc__") or "", options)
            raise SystemExit(0)
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals:
                fail(f'"{argument}" has no value: write --{name}=VALUE')
            allowed = options[name][1] if name in options else (str,)
            assign(name, read_value(text, allowed), "command line", "--help lists all")
        elif argument.endswith(".py"):
            advice = "--help lists all; a helper variable needs a leading underscore"
            for name, value in run_config(argument, values).items():
                assign(name, value, argument, advice)
        else:
            fail(f'"{argument}" is neither a config file (*.py) nor --key=value')
    changed = [name for name, (default, _, _) in options.items() if values[name] != default]
    if changed and FIRST:
        print("options that differ from the defaults:", file=log)
        for name in changed:
            print(f"  {name} = {values[name]!r}", file=log)
    script.update(values)
    return values
