"""What a command tells on standard error while it runs, and how it ends: text, or with `--json` one object a line.

    {"time": "2026-11-24T13:40:02.118+00:00", "event": "log", "level": "info", "logger": "llm.training.tune.adapter",
     "message": "LoRA trains 4,884,480 of 139,399,488 weights (3.50%)."}
    {"time": "...", "event": "error", "class": "ConfigError", "exit_code": 2, "text": "`chunksize` must be ..."}
    {"time": "...", "event": "end", "exit_code": 2, "seconds": 0.2}

Events are log records that carry facts: `--quiet` and `--verbose` choose among both by their level, and a program that
imports us sees them with a logging handler of its own.
"""

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import typer

from llm.errors import LlmTrainError
from llm.terminal import console

logger = logging.getLogger(__name__)
_LIBRARIES = ("huggingface_hub", "datasets", "transformers")  # those that have handlers
_FACTS, _HANDLER = "facts", "llm-train"


def tell_event(event: str, **facts: Any) -> None:
    """Tells with `--json` what happened, as plain values; as text it is told otherwise, or not at all."""
    _tell(logging.INFO, event, facts)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: an event with its facts, or a `log`. Under torchrun with its `rank`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time_text = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        rank = {"rank": int(os.environ["RANK"])} if os.environ.get("WORLD_SIZE", "1") != "1" else {}
        return json.dumps({"time": time_text} | rank | self._facts(record), default=str)

    def _facts(self, record: logging.LogRecord) -> dict[str, Any]:
        if _is_event(record):
            facts: dict[str, Any] = getattr(record, _FACTS)
            return {"event": record.getMessage()} | {name: _json_value(value) for name, value in facts.items()}
        named = {"event": "log", "level": record.levelname.lower(), "logger": record.name}
        error = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return named | {"message": record.getMessage()} | error


class ConsoleHandler(logging.Handler):
    """Log records as text above the bars of the console, which they would else be written into."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = sys.stderr
        self.addFilter(lambda record: not _is_event(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the record; a warning also on a console that is quiet."""
        text = self.format(record)
        if console.quiet:
            print(text, file=self._stream)
        else:
            console.print(text, markup=False)


def libraries_told_here() -> None:
    """From here on the log records of the libraries come to our handler, where there is one, instead of their own.

    Call it once they are imported: then they make their handlers. With `--verbose` all is told that they log of level
    info, not just what they think matters.
    """
    root = logging.getLogger()
    if not any(handler.name == _HANDLER for handler in root.handlers):
        return
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        if root.level <= logging.INFO:
            library.setLevel(logging.NOTSET)


@contextmanager
def run_told(
    *, debug: bool = False, quiet: bool = False, verbose: bool = False, as_json: bool = False
) -> Iterator[None]:
    """Known errors as one text without a traceback (unless `debug`), and their exit code; how much else is said."""
    with _logging(quiet=quiet, verbose=verbose, as_json=as_json):
        started, exit_code = time.monotonic(), 1
        try:
            yield
            exit_code = 0
        except LlmTrainError as error:
            exit_code = error.exit_code
            _tell_error(error, exit_code, has_traceback=debug, as_json=as_json)
            raise typer.Exit(exit_code) from error
        except KeyboardInterrupt as error:
            exit_code = 130
            console.print("stopped by Ctrl-C; nothing half-written is left")
            raise typer.Exit(exit_code) from error
        except SystemExit as stop:
            exit_code = stop.code if isinstance(stop.code, int) else 1
            raise
        except Exception as error:  # a bug, with `--json` told as one line, too
            if not as_json:
                raise
            _tell_error(error, exit_code, has_traceback=True, as_json=True)
            raise typer.Exit(exit_code) from error
        finally:
            seconds = round(time.monotonic() - started, 3)
            level = logging.ERROR if exit_code else logging.INFO
            _tell(level, "end", {"exit_code": exit_code, "seconds": seconds})


@contextmanager
def _logging(*, quiet: bool, verbose: bool, as_json: bool) -> Iterator[None]:
    """Python's logging and warnings go to standard error in our form, inside."""
    if not verbose:
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs each error that it raises
    if quiet or as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    root, ours = logging.getLogger(), logging.getLogger("llm")
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    ours.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    handler: logging.Handler = ConsoleHandler()
    if as_json:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
    handler.name = _HANDLER
    root.addHandler(handler)
    logging.captureWarnings(True)
    console.quiet = quiet or as_json
    try:
        yield
    finally:
        console.quiet = False
        logging.captureWarnings(False)
        root.removeHandler(handler)


def _tell(level: int, event: str, facts: dict[str, Any]) -> None:
    logger.log(level, event, extra={_FACTS: facts})


def _tell_error(error: Exception, exit_code: int, *, has_traceback: bool, as_json: bool) -> None:
    trace = {"traceback": "".join(traceback.format_exception(error))} if has_traceback else {}
    facts = {"class": type(error).__name__, "exit_code": exit_code, "text": str(error)}
    _tell(logging.ERROR, "error", facts | trace)
    if not as_json:
        console.quiet = False
        console.print(trace.get("traceback", ""), end="", markup=False)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False)


def _is_event(record: logging.LogRecord) -> bool:
    return hasattr(record, _FACTS)


def _json_value(value: Any) -> Any:
    """JSON knows no NaN: it is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
