"""Options of a script, from config files and the command line, in nanoGPT's manner but strict.

    python train.py                                         # the defaults at the head of train.py
    python train.py config/smollm2_135m.py                  # a config file's assignments on top of them
    python train.py config/smollm2_135m.py --max_steps=100  # and the command line on both, left to right
    python train.py --help                                  # every option, its default and its comment

A script's options are the assignments between its docstring and its call of `configure`, one a line, each
with a trailing comment. The default says what type is allowed; where that is not enough, an annotation does
(`teacher: str | None = None`). A config file assigns to the same names and may read them (`max_steps = 2 *
max_steps`). Anything else ends in one line on stderr and exit code 2, before torch is imported or a file is
written.
"""

import ast
import difflib
import io
import os
import shutil
import sys
import tokenize
import types
import typing
from pathlib import Path

FIRST = os.environ.get("RANK", "0") == "0"  # under torchrun, one process speaks for all


def read_options(source: str) -> dict[str, tuple[object, object, str]]:
    """The options declared in a script's source: {name: (default, allowed type, comment)}."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    options = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, annotation = node.targets[0].id, None
        elif isinstance(node, ast.If):
            break  # `if __name__ == "__main__": configure(globals())` ends the options
        else:
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            break  # so does the first computed value
        allowed = eval(annotation, {"Literal": typing.Literal}) if annotation else type(default)
        options[name] = (
            default,
            allowed,
            " ".join(comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments),
        )
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


def need_compiler(device_type: str) -> None:
    """ValueError where torch.compile lacks the C++ compiler that it needs on a CPU."""
    if device_type == "cpu" and not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        raise ValueError("compile needs a C++ compiler on a CPU, and there is none: g++, or what CXX names")


def fail(message: str) -> typing.NoReturn:
    if FIRST:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def configure(script: dict, arguments: list[str] | None = None) -> dict:
    """Reads the command line into the options of the script whose globals() are given; returns {name: value}.

    Exits with code 2 and one line for an unknown option, a value of the wrong type or a missing file.
    """
    path = script["__file__"]
    options = read_options(Path(path).read_text())
    values = {name: default for name, (default, _, _) in options.items()}

    def assign(name: str, value, where: str) -> None:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            fail(f'{where}: unknown option "{name}"{hint} (--help lists all)')
        try:
            values[name] = accept(value, options[name][1])
        except TypeError:
            fail(f"{where}: {name} is {value!r}, but must be {type_name(options[name][1])}")

    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument in ("-h", "--help"):
            print((script.get("__doc__") or "").strip(), "\n\noptions:")
            for name, (default, allowed, comment) in options.items():
                shown = type_name(allowed) if default is None or typing.get_args(allowed) else ""
                print(
                    f"  --{name}={default!r}", f"  ({shown})" if shown else "", f"\n        {comment}", sep=""
                )
            raise SystemExit(0)
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals:
                fail(f'"{argument}" has no value: write --{name}=VALUE')
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            allowed = options[name][1] if name in options else str
            try:
                accept(value, allowed)
            except TypeError:
                value = (
                    text if str in (allowed, *typing.get_args(allowed)) else value
                )  # --run_name=7 is a string
            assign(name, value, "command line")
        elif not argument.endswith(".py"):
            fail(f'"{argument}" is neither a config file (*.py) nor --key=value')
        else:
            if not Path(argument).is_file():
                fail(f"config file {argument} does not exist")
            namespace = dict(values)
            try:
                exec(compile(Path(argument).read_text(), argument, "exec"), namespace)
            except Exception as error:
                fail(f"config file {argument}: {type(error).__name__}: {error}")
            for name, value in namespace.items():
                private = name.startswith("_") or isinstance(value, types.ModuleType)
                if not private and not (name in values and value is values[name]):
                    assign(name, value, argument)
    changed = [name for name, (default, _, _) in options.items() if values[name] != default]
    if changed and FIRST:
        print("options that differ from the defaults:")
        for name in changed:
            print(f"  {name} = {values[name]!r}")
    script.update(values)
    return values
