"""The files that a YAML file names under `include`, laid under it key by key.

First step of `config_file.load_config`: takes a path, gives one `Document` in which every key keeps the file and line
that it comes from. Paths are relative to the file that names them; of several files, the later wins.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import ConfigError, did_you_mean
from llm.training.config import KeyPath
from llm.training.config_file.problem import Place, Problem, problem_text, wrong_type
from llm.training.config_file.yaml_text import Document, read_yaml

KEY = "include"
MAX_DEPTH = 8
MAX_FILES = 100  # eight files that each name two others would be 256


def read_with_includes(path: str) -> Document:
    """The YAML file at `path`, over what it includes; ConfigError when one of the files cannot be read at all."""
    return _IncludeReader().read(path, [])


class _IncludeReader:
    """Reads a file and, first, those that it includes; counts them."""

    def __init__(self) -> None:
        self._num_files = 0

    def read(self, path: str, chain: list[str]) -> Document:
        """`chain`: the files that led here."""
        document, chain = read_yaml(path), [*chain, path]
        self._num_files += 1
        base = Document(source=path, data={}, places={})
        for name, place in _names(document):
            included = _included_path(name, chain, place)
            if self._num_files >= MAX_FILES:
                raise _fatal(place, f"More than {MAX_FILES} files are included. Put what is needed into fewer.")
            base = _laid_over(self.read(included, chain), base)
        return _laid_over(document, base)


def _names(document: Document) -> Iterator[tuple[str, Place]]:
    """The paths under `include`, which is taken out, and their places."""
    given = document.data.pop(KEY, [])
    for path in [path for path in document.environment if path[0] == KEY]:
        del document.environment[path]
    for index, name in enumerate(given if isinstance(given, list) else [given]):
        place = document.place((KEY, index) if isinstance(given, list) else (KEY,))
        if isinstance(name, str) and name:
            yield name, place
        else:
            text = wrong_type(KEY, "a path or a list of paths", name)
            document.problems.append(Problem(path=(KEY,), text=text, place=place))


def _included_path(name: str, chain: list[str], place: Place) -> str:
    """Where `name` lies; ConfigError, placed at the line that names it, when it is no file or led here."""
    path = os.path.normpath(os.path.join(os.path.dirname(chain[-1]), name))
    if "://" in name:
        raise _fatal(place, f"`{name}`: a config is read from a local file only. Copy it here first.")
    if not os.path.isfile(path):
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, os.listdir(folder)) if folder.is_dir() else ""
        raise _fatal(place, f"There is no file `{path}`.{f' {near}' if near.startswith('Did') else ''}")
    for number, known in enumerate(chain):
        if os.path.samefile(known, path):
            circle = " -> ".join([*chain[number:], path])
            raise _fatal(place, f"These files include one another: {circle}. Take one `include` out.")
    if len(chain) > MAX_DEPTH:
        raise _fatal(place, f"Files include one another more than {MAX_DEPTH} deep. Include them side by side.")
    return path


def _laid_over(top: Document, base: Document) -> Document:
    """`top` with the keys of `base` that it does not give itself; sections of both are joined."""
    replaced = set(_replaced(top.data, base.data))

    def is_kept(path: KeyPath) -> bool:
        return not any(path[:length] in replaced for length in range(1, len(path) + 1))

    return Document(
        source=top.source,
        data=_joined(top.data, base.data),
        places={path: place for path, place in base.places.items() if is_kept(path)} | top.places,
        problems=[
            Problem(path=problem.path, text=problem.text, place=problem.place or base.place(problem.path))
            for problem in base.problems
            if is_kept(problem.path)
        ]
        + top.problems,
        environment={path: text for path, text in base.environment.items() if is_kept(path)} | top.environment,
    )


def _joined(top: Any, base: Any) -> Any:
    if not isinstance(top, dict) or not isinstance(base, dict):
        return top
    return {**base, **{key: _joined(value, base[key]) if key in base else value for key, value in top.items()}}


def _replaced(top: Mapping[str, Any], base: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths at which `top` gives something else than a section over a key of `base`."""
    for key in top.keys() & base.keys():
        if isinstance(top[key], dict) and isinstance(base[key], dict):
            yield from _replaced(top[key], base[key], (*path, key))
        else:
            yield (*path, key)


def _fatal(place: Place, text: str) -> ConfigError:
    return ConfigError(problem_text(Problem(path=(KEY,), text=text), place))
