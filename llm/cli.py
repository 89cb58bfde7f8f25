"""The command line: `llm-train dataprep config.yaml`, `llm-train finetune config.yaml`, `llm-train sync config.yaml`.

Heavy libraries are imported inside the commands: `--help` and a config error answer at once. Exit codes: 0 done,
2 your YAML, 3 your rows, 4 your files, 130 Ctrl-C, 143 SIGTERM.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from llm.errors import LlmTrainError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.YAML", help="What to do: see llm/training/README.md.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training_arguments.max_steps=10."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def dataprep(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Turn rows into packed blocks of tokens and labels."""
    from llm.training.config import DataPrepConfig
    from llm.training.config_file import load_config

    with _errors_told(debug):
        settings = load_config(config, DataPrepConfig, overrides=overrides or [])
        from llm.training.dataprep import prepare

        prepare(settings)


@app.command()
def finetune(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Tune a model on packed blocks."""
    from llm.training.config import FinetuneConfig
    from llm.training.config_file import load_config

    with _errors_told(debug):
        settings = load_config(config, FinetuneConfig, overrides=overrides or [])
        from llm.training.finetune import finetune as tune

        tune(settings)


@app.command()
def sync(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Complete the copies of a run at its output paths: the same file as for finetune."""
    from llm.training.config import FinetuneConfig
    from llm.training.config_file import load_config

    with _errors_told(debug):
        settings = load_config(config, FinetuneConfig, overrides=overrides or [])
        from llm.terminal import console
        from llm.training.tune.output_sync import complete_copies

        for report in complete_copies(settings):
            console.print(f"{report.url}: {report.text}", markup=False, soft_wrap=True)


@contextmanager
def _errors_told(debug: bool) -> Iterator[None]:
    """Known errors as one text without a traceback, and their exit code."""
    from llm.terminal import console

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llm").setLevel(logging.INFO)
    try:
        yield
    except LlmTrainError as error:
        if debug:
            traceback.print_exception(error)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        console.print("stopped by Ctrl-C; nothing half-written is left")
        raise typer.Exit(130) from error


def main() -> None:
    """The entry point of `llm-train`."""
    app()
