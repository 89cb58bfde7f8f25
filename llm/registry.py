"""`method` + `kwargs` -> an object: how YAML names Python code.

A method is a registered name (`DefaultPrompt`) or a reference `path.to.module::name`. Entries of a registry are
such references, so that naming a method imports its library and listing the names imports nothing.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llm.errors import ConfigError, did_you_mean

Registry = Mapping[str, str]


def resolve_method(method: str, registry: Registry, *, key: str) -> Callable[..., Any]:
    """The callable that `method` names.

    `key` is the YAML key, for the error. Raises ConfigError for a name that is not registered, a module that
    cannot be imported, or a name that the module lacks.
    """
    reference = method if "::" in method else registry.get(method)
    if reference is None:
        raise ConfigError(
            f"{key}: no method `{method}`. {did_you_mean(method, registry)} "
            "Your own code is named as `path.to.module::name`."
        )
    module_name, _, name = reference.partition("::")
    if not module_name or not name or module_name.startswith("."):
        raise ConfigError(f"{key}: `{method}` is no reference. Write `path.to.module::name`.")
    try:
        target = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except ImportError as error:
        raise ConfigError(f"{key}: cannot import `{module_name}` of `{method}`: {error}.") from error
    except AttributeError as error:
        names = [known for known in vars(importlib.import_module(module_name)) if not known.startswith("_")]
        raise ConfigError(f"{key}: module `{module_name}` has no `{name}`. {did_you_mean(name, names)}") from error
    if not callable(target):
        raise ConfigError(f"{key}: `{method}` is not callable.")
    return target


def call_method(method: Callable[..., Any], *args: Any, kwargs: Mapping[str, Any], key: str) -> Any:
    """What `method(*args, **kwargs)` returns; ConfigError when the kwargs do not fit its signature."""
    title = getattr(method, "__name__", repr(method))
    try:
        signature = inspect.signature(method)
    except ValueError as error:  # some built-in types tell none
        raise ConfigError(f"{key}.method: `{title}` does not say which arguments it takes.") from error
    parameters = signature.parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    for name in kwargs:
        if name not in names and not takes_any:
            raise ConfigError(f"{key}.kwargs: `{title}` takes no `{name}`. {did_you_mean(name, names)}")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{key}.kwargs: `{title}`: {error}.") from error
    return method(*args, **kwargs)
