"""`method` + `kwargs` -> an object: how YAML names Python code.

A method is a registered name (`DefaultPrompt`) or a reference `path.to.module::name`. Entries of a registry are
such references, so that naming a method imports its library and listing the names imports nothing. A reference of
the user's own runs code, so `config_file.load_config` lets it through only where `allow_code` names its package.
"""

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from llm.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)
Registry = Mapping[str, str]

# What our registries hold: such a reference runs no code but ours, whether YAML gives it by name or in full.
_REGISTERED = re.compile(
    r"llm\.(prompt::\w*(Prompt|QA|Question|Summarization)|(prompt_format|named_formats|chat_template)::\w+Format)"
    r"|llm\.training\.prep\.(dataset::load_path|write::to_csv)"
    r"|datasets::(load_dataset|load_from_disk|Dataset\.(save_to_disk|to_parquet|to_json))"
)


def own_package(method: str) -> str | None:
    """The top package of a `module::name` that is the user's own code; None for a registered name or reference."""
    module_name, colons, _ = method.partition("::")
    is_own = bool(colons) and not _REGISTERED.fullmatch(method)
    return module_name.split(".")[0] if is_own else None


def is_ours(*things: object) -> bool:
    """Whether the classes of all `things` are of this package, none a user's own."""
    return all(type(one).__module__.partition(".")[0] == __name__.partition(".")[0] for one in things)


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
        raise ConfigError(
            f"{key}: cannot import `{module_name}` of `{method}`: {error}. "
            "Is it installed, or its folder in PYTHONPATH?"
        ) from error
    except AttributeError as error:
        names = [known for known in vars(importlib.import_module(module_name)) if not known.startswith("_")]
        raise ConfigError(f"{key}: module `{module_name}` has no `{name}`. {did_you_mean(name, names)}") from error
    if not callable(target):
        raise ConfigError(f"{key}: `{method}` is not callable.")
    if own_package(method):
        _tell_import(method, module_name)
    return target


@functools.cache  # once a reference, however often it is resolved
def _tell_import(method: str, module_name: str) -> None:
    file = getattr(importlib.import_module(module_name), "__file__", None)
    logger.info("Your own code: `%s`, from %s.", method, file or "Python itself")


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
