"""A YAML file -> a checked config, or one ConfigError that holds every problem of the file.

Takes a path, a schema of `config.py` and the command line's `--set`; gives the config. The file is read by
`include.py` and `yaml_text.py`, the schema is checked by `schema.py`, the library sections by `library_keys.py`,
rules across keys by `cross_key.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from llm.errors import ConfigError
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import cross_key, include, library_keys
from llm.training.config_file.problem import Place, Problem, problem_text
from llm.training.config_file.save import path_in_config
from llm.training.config_file.schema import validate
from llm.training.config_file.secret import mask_line, secret_problems
from llm.training.config_file.yaml_text import Document, parse_yaml

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", DataPrepConfig, FinetuneConfig)


def load_config(
    path: str, schema: type[ConfigT], *, overrides: Sequence[str] = (), allow_code: Sequence[str] = ()
) -> ConfigT:
    """The config in the YAML file at `path`, as `schema`.

    `overrides` are `training_arguments.max_steps=10` (the value is YAML) and win over the file. `${env:NAME}`
    in a value becomes the text of that environment variable. `allow_code` is added to the key of this name.
    Raises one ConfigError with all problems, each with file, line, column, the line itself, what is wrong and what
    to write.
    """
    document = include.read_with_includes(path)
    for override in overrides:
        _override(document, override)
    _allow_code(document, allow_code)
    config, problems = validate(document.data, schema)
    problems = document.problems + problems + list(cross_key.code_problems(document.data, schema))
    if schema is FinetuneConfig:
        problems += _library_problems(document.data) + list(cross_key.finetune_problems(document.data))
    else:
        problems += cross_key.dataprep_problems(document.data)
    secrets = [Problem(path=at, text=text) for at, text in secret_problems(document.data)]
    secret_paths = {secret.path for secret in secrets}
    problems = secrets + [problem for problem in problems if problem.path not in secret_paths]
    if config is None or problems:
        raise ConfigError(_message(document, [_without_environment(problem, document) for problem in problems]))
    for problem in cross_key.doubts(document.data):
        logger.warning("%s", problem_text(problem, document.place(problem.path)))
    plain = config.model_dump()
    config.environment.update({path_in_config(at, plain): text for at, text in document.environment.items()})
    return config


def _message(document: Document, problems: Sequence[Problem]) -> str:
    placed = [(problem, problem.place or document.place(problem.path)) for problem in problems]
    placed.sort(key=lambda pair: (_included_file(document, pair[1]), pair[1].line_number))  # the whole file's first
    texts = list(dict.fromkeys(problem_text(problem, place) for problem, place in placed))
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    return f"{document.source} has {count}:\n\n" + "\n\n".join(texts)


def _without_environment(problem: Problem, document: Document) -> Problem:
    """`problem` without what an environment variable holds: it may be a secret."""
    given = document.environment.get(problem.path)
    if given is None:
        return problem
    value: Any = document.data
    for part in problem.path:
        value = value[part]
    text = problem.text
    for shown in (str(value), str(value)[:40]):  # as `describe` cuts it
        text = text.replace(shown, given) if len(shown) > 3 else text  # a number such as 1 is in many words
    return Problem(path=problem.path, text=text, place=problem.place)


def _included_file(document: Document, place: Place) -> str:
    return "" if place.file == document.source else place.file


def _override(document: Document, override: str) -> None:
    """Sets what `--set key.key=value` says; its problems are placed at the command line."""
    place, shown = Place(where="--set", line=override), mask_line(override)
    dotted, equals, text = override.partition("=")
    *sections, key = path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {shown}: write `--set key=value`, or `--set section.key=value`.")
    if path[0] == include.KEY:
        raise ConfigError(f"--set {shown}: files are included before `--set` is read. Write it into the file.")
    section = document.data
    for depth, name in enumerate(sections, start=1):
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            given = document.place(path[:depth]).where
            raise ConfigError(f"--set {shown}: `{name}` holds no keys in {given}. Set `{name}` itself.")
    value = parse_yaml(text, source=f"--set {dotted}")
    section[key] = value.data
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.problems[:] = [problem for problem in document.problems if problem.path[: len(path)] != path]
    for known in [known for known in document.environment if known[: len(path)] == path]:
        del document.environment[known]
    document.environment.update({(*path, *at): given for at, given in value.environment.items()})
    for item in value.problems:
        document.problems.append(Problem(path=(*path, *item.path), text=item.text, place=place))
    document.places[path] = place


def _allow_code(document: Document, packages: Sequence[str]) -> None:
    """Adds what `--allow-code` says."""
    given = document.data.get("allow_code", [])
    given = [given] if isinstance(given, str) else given
    if packages and isinstance(given, list):  # what is not a list is the schema's to refuse
        document.data["allow_code"] = list(dict.fromkeys([*given, *packages]))
        document.places.setdefault(("allow_code",), Place(where="--allow-code", line=" ".join(packages)))


def _library_problems(data: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem(path=(section, key), text=text)
        for section in library_keys.SECTIONS
        for key, text in library_keys.problems_of(section, cross_key.section_of(data, section))
    ]
