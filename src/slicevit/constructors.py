"""What the class of a timm model was constructed with, and the same construction with some of it changed.

Many of timm's entry points fix what a narrow model has to change, and refuse it as a keyword. So the entry point is
called as ever, and its arguments are changed where they arrive: at the class.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

Arguments = dict[str, Any]
_LOCK = threading.RLock()


def construct(
    make: Callable[[], nn.Module], kind: type[nn.Module], changes: Mapping[str, Any]
) -> tuple[nn.Module, Arguments]:
    """(the module that `make` gives, what its class was given), the class `kind` having got `changes` as well.

    What the class was given holds its defaults too, and is from before the changes. A change whose name is no
    argument of the class, but a field of its `cfg`, is made there.

    Raises ValueError when `make` constructs no `kind`, or the class does not take a change.
    """
    with _LOCK, _intercepted(kind, changes) as given:
        module = make()
    if not given:
        raise ValueError(f"its constructor makes a {type(module).__name__}, not a {kind.__name__}")
    return module, given[0]


def value_of(given: Arguments, name: str) -> Any:
    """The argument `name`, or that field of the argument `cfg`. Raises ValueError when there is none."""
    if name in given:
        return given[name]
    if hasattr(given.get("cfg"), name):
        return getattr(given["cfg"], name)
    raise ValueError(f"its constructor takes no {name}")


def changed(given: Arguments, changes: Mapping[str, Any]) -> Arguments:
    """`given` with `changes`, each made in its `cfg` where that alone has a field of this name."""
    config = given.get("cfg")
    inside = {field.name for field in fields(config)} if is_dataclass(config) else set()
    there = {name: value for name, value in changes.items() if name not in given and name in inside}
    arguments = given | {name: value for name, value in changes.items() if name not in there}
    return arguments | {"cfg": replace(config, **there)} if there else arguments  # type: ignore[type-var]


@contextmanager
def _intercepted(kind: type[nn.Module], changes: Mapping[str, Any]) -> Iterator[list[Arguments]]:
    """Within, the first `kind` that this thread constructs gets `changes`; yields a list for what it was given."""
    original, own, thread = kind.__init__, "__init__" in vars(kind), threading.get_ident()
    given: list[Arguments] = []

    @functools.wraps(original)
    def construct_changed(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if given or threading.get_ident() != thread:
            original(self, *args, **kwargs)
            return
        named = _named(kind, args, kwargs)
        given.append(copy_of(_defaults(kind) | named))
        original(self, **changed(copy_of(named), changes))

    kind.__init__ = construct_changed  # type: ignore[method-assign]
    try:
        yield given
    finally:
        if own:
            kind.__init__ = original  # type: ignore[method-assign]
        else:
            del kind.__init__


def copy_of(value: Any) -> Any:
    """A copy of tables and what they hold, which timm's builder of blocks takes apart."""
    if isinstance(value, dict):
        return {key: copy_of(part) for key, part in value.items()}
    return [copy_of(part) for part in value] if isinstance(value, list) else value


def _parameters(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The named parameters of a class; of its base too where it passes keywords on."""
    named: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = {parameter.name: parameter for parameter in parameters if parameter.kind not in variadic} | named
        if not passes_on:
            break
    return named


def _defaults(kind: type[nn.Module]) -> Arguments:
    parameters = _parameters(kind).values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _named(kind: type[nn.Module], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    return dict(zip(_parameters(kind), args, strict=False)) | kwargs
