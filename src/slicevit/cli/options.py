"""What the sub-commands share: options parsed from a dataclass, refusals as one sentence, who speaks."""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import os
import re
from dataclasses import fields
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], command: str, **options: Any) -> T:
    """tyro's parser, with what it refuses as one sentence. Raises ValueError."""
    known = {f"--{field.name.replace('_', '-')}" for field in fields(kind)} | {"--help"}  # type: ignore[arg-type]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = ", ".join(difflib.get_close_matches(flag, known, 2))
            raise ValueError(f"{flag} is no option of slicevit {command}" + (f"; near it: {near}" if near else ""))
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            return tyro.cli(kind, args=arguments, prog=f"slicevit {command}", **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    said = [line.strip("│╭╰─╯╮ ") for line in refused.getvalue().splitlines()[1:]]  # in a box, after its title
    said = [line for line in said if line.strip("-")]  # where the terminal has no box, rules are dashes
    end = next((index for index, line in enumerate(said) if line.startswith("For full helptext")), len(said))
    sentence = re.sub(r"^Error parsing \w+: ", "", " ".join(said[:end])) or "its options cannot be read"
    raise ValueError(f"{sentence} (slicevit {command} --help lists the options)")


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the arguments without it."""
    for index, argument in enumerate(arguments):
        if argument == name:
            if index + 1 == len(arguments):
                raise ValueError(f"{name} needs a value")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(name + "="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def gives(arguments: list[str], flag: str) -> bool:
    """Whether `flag` is among the arguments."""
    return any(argument == flag or argument.startswith(flag + "=") for argument in arguments)


def speaks() -> bool:
    """Whether this process is the one of a run's to say what all of them could."""
    return os.environ.get("RANK", "0") == "0"


def take_model_args(arguments: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """What follows --model-args up to the next flag, as key=value pairs, and the arguments without it."""
    if "--model-args" not in arguments:
        return None, arguments
    start = end = arguments.index("--model-args") + 1
    while end < len(arguments) and not arguments[end].startswith("--"):
        end += 1
    try:
        return _key_values(arguments[start:end]), arguments[: start - 1] + arguments[end:]
    except ValueError as error:
        raise ValueError(f"--model-args: {error}") from None


def take_backbone(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The --model-args of a backbone, and the other arguments. Raises ValueError for --model beside a folder."""
    model_args, arguments = take_model_args(arguments)
    init, _ = take_option(arguments, "--init")
    if gives(arguments, "--model") and init not in (None, "scratch", "pretrained"):
        raise ValueError(f"--model is for --init scratch or pretrained: {init} has its own")
    return model_args or {}, arguments


def _key_values(text: list[str]) -> dict[str, Any]:
    pairs = {}
    for pair in text:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"{pair!r} is not key=value")
        pairs[key] = _literal(value)
    return pairs


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
