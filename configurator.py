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


def read_options(source: str) -> dict[str, tuple[object, object, str]]:
    """The options declared in a script's source: {name: (default, allowed type, comment)}."""
    comments = {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    options = {}
    for node in ast.parse(source).body:
        # `if __name__ == "__main__": configure(globals())` ends the options
        if isinstance(node, ast.If):
            break
        annotation = None
        if isinstance(node, ast.AnnAssign):
            target = node.target
            annotation = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            continue
        # and so does the first computed value
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            break
        allowed = type(default)
        if annotation:
            allowed = eval(annotation, {"Literal": typing.Literal})
        lines = range(node.lineno, node.end_lineno + 1)
        comment = " ".join(comments[line] for line in lines if line in comments)
        options[target.id] = (default, allowed, comment)
    return options


def type_name(allowed) -> str:
    """An allowed type as a user would write it: "int", "str or None", "linear | cosine"."""
    if typing.get_origin(allowed) in (types.UnionType, typing.Union):
        return " or ".join(type_name(member) for member in typing.get_args(allowed))
    if typing.get_origin(allowed) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(allowed))
    return {types.NoneType: "None"}.get(allowed) or getattr(allowed, "__name__", str(allowed))


def accept(value, allowed):
    """`value` as one of the allowed type (an int becomes a float where a float is wanted), or raises
    TypeError.
    """
    if typing.get_origin(allowed) in (types.UnionType, typing.Union):
        members = typing.get_args(allowed)
        # bool is an int to Python and an int a float to the reader: the exact type first
        for member in sorted(members, key=lambda member: type(value) is not member):
            try:
                return accept(value, member)
            except TypeError:
                pass
        raise TypeError
    if typing.get_origin(allowed) is typing.Literal:
        if value in typing.get_args(allowed):
            return value
    elif allowed is float and type(value) is int:
        return float(value)
    elif type(value) is allowed:
        return value
    raise TypeError


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


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def show(steps: typing.Iterable, desc: str, unit: str, total: int | None = None) -> typing.Iterator:
    """The steps, behind a bar where there is a terminal, or with a line now and then where there is none."""
    if not FIRST:
        yield from steps
        return
    if total is None:
        total = len(steps)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(steps, total=total, desc=desc, unit=unit, leave=False)
        return
    since = time.monotonic()
    for done, step in enumerate(steps):
        if time.monotonic() - since >= SECONDS_BETWEEN_LINES:
            print(f"{desc}: {done:,} of {total:,} {unit}s are done", file=sys.stderr, flush=True)
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
        if default is None or typing.get_args(allowed):
            line += f"  ({type_name(allowed)})"
        print(f"{line}\n        {comment}")


def read_value(text: str, allowed):
    """The value of --name=text: a Python literal where that is of the allowed type, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    try:
        accept(value, allowed)
    except TypeError:
        # --run_name=7 is a string
        if allowed is str or str in typing.get_args(allowed):
            return text
    return value


def run_config(file: str, values: dict) -> dict:
    """What a config file assigns, given the values so far. Helpers are left out: names with a leading
    underscore, and unknown ones that are imported, functions or classes."""
    if not Path(file).is_file():
        fail(f"config file {file} does not exist")
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
        try:
            values[name] = accept(value, allowed)
        except TypeError:
            fail(f"{where}: {name} is {value!r}, but must be {type_name(allowed)}")

    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument in ("-h", "--help"):
            print_help(script.get("__doc__") or "", options)
            raise SystemExit(0)
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals:
                fail(f'"{argument}" has no value: write --{name}=VALUE')
            allowed = options[name][1] if name in options else str
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
