"""The command line: `llm-train dataprep config.yaml`, `llm-train finetune config.yaml`.

Heavy libraries are imported inside the commands: `--help` and a config error answer at once. Exit codes: 0 done,
2 your YAML, 3 your rows, 4 your files, 130 Ctrl-C, 143 SIGTERM.
"""

import logging
import os
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
AllowCode = Annotated[
    list[str] | None,
    typer.Option("--allow-code", metavar="PACKAGE", help="Let `method: PACKAGE.module::name` run code."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also say what the libraries log.")]


@app.command()
def dataprep(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Turn rows into packed blocks of tokens and labels."""
    from llm.training.config import DataPrepConfig
    from llm.training.config_file import load_config

    with _errors_told(debug, quiet=quiet, verbose=verbose):
        settings = load_config(config, DataPrepConfig, overrides=overrides or [], allow_code=allow_code or [])
        from llm.training.dataprep import prepare

        prepare(settings)


@app.command()
def finetune(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tune a model on packed blocks."""
    from llm.training.config import FinetuneConfig
    from llm.training.config_file import load_config

    with _errors_told(debug, quiet=quiet, verbose=verbose):
        settings = load_config(config, FinetuneConfig, overrides=overrides or [], allow_code=allow_code or [])
        from llm.training.finetune import finetune as tune

        tune(settings)


@app.command()
def init(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="File, folder or s3:// URL of the rows.")],
    base_model: Annotated[str, typer.Option("--base-model", metavar="MODEL", help="Hub id or folder.")],
    folder: Annotated[str, typer.Option("--folder", help="Where the two files go.")] = ".",
    debug: Debug = False,
) -> None:
    """Write dataprep.yaml and finetune.yaml, with comments, for your rows and your model."""
    with _errors_told(debug):
        from llm.training.starter import write_starter

        for path in write_starter(rows, base_model, folder):
            typer.echo(path)


@app.command()
def schema(
    script: Annotated[str, typer.Argument(metavar="dataprep|finetune", help="Whose YAML file.")], debug: Debug = False
) -> None:
    """Print the JSON Schema of a YAML file, by which an editor completes and checks it."""
    with _errors_told(debug):
        from llm.training.config_file.json_schema import schema_text

        typer.echo(schema_text(script), nl=False)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="chunksize, lora_config.r, ...; all without.")] = "",
    debug: Debug = False,
) -> None:
    """Say what a key of the YAML files means, its type and its default; without KEY, list all."""
    with _errors_told(debug):
        from llm.training.config_file.explain import explain as explain_key
        from llm.training.config_file.explain import list_keys

        typer.echo(explain_key(key) if key else list_keys())


@contextmanager
def _errors_told(debug: bool, *, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Known errors as one text without a traceback, and their exit code; how much else is said."""
    from llm.terminal import console

    if not verbose:
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs each error that it raises
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("llm").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    console.quiet = quiet
    try:
        yield
    except LlmTrainError as error:
        console.quiet = False
        if debug:
            traceback.print_exception(error)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        console.print("stopped by Ctrl-C; nothing half-written is left")
        raise typer.Exit(130) from error
    finally:
        console.quiet = False


def main() -> None:
    """The entry point of `llm-train`."""
    app()
