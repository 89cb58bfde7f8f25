"""The command line: `llm-train dataprep config.yaml`, `llm-train finetune config.yaml`.

Heavy libraries are imported inside the commands: `--help` and a config error answer at once. Exit codes: 0 done,
2 your YAML, 3 your rows, 4 your files, 130 Ctrl-C, 143 SIGTERM.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from llm.errors import ConfigError, LlmTrainError

if TYPE_CHECKING:
    from llm.training.config import DataPrepConfig

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
def inspect(  # noqa: PLR0913  (each is an argument of the command line)
    target: Annotated[
        str, typer.Argument(metavar="DATASET|DATAPREP.YAML", help="A prepared data set; or rows before preparing.")
    ],
    num_shown: Annotated[int, typer.Option("--rows", min=1, help="How many blocks (of a YAML: rows) to show.")] = 3,
    first: Annotated[int, typer.Option(min=0, help="The first to show, counted from 0.")] = 0,
    has_ids: Annotated[bool, typer.Option("--ids", help="Show each token's id below it.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Most tokens to show of a prompt or response; 0: all.")
    ] = 200,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the tokenizer; default: that of the manifest.")
    ] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Show rows as tokens: prompt, trained, stop token, padding."""
    with _errors_told(debug):
        config = _row_config(target, base_model, overrides or [])
        from llm.training.prep.preview import block_views, row_views
        from llm.training.prep.token_view import print_views

        if config:
            views = row_views(config, first=first, num_rows=num_shown)
        else:
            views = block_views(target, first=first, num_blocks=num_shown, base_model=base_model)
        print_views(views, has_ids=has_ids, max_tokens=max_tokens)


def _row_config(target: str, base_model: str | None, overrides: list[str]) -> "DataPrepConfig | None":
    """The config where `target` is one; None where it is a prepared data set."""
    from llm.training.config import DataPrepConfig
    from llm.training.config_file import load_config

    if target.endswith((".yaml", ".yml")):
        if base_model is not None:
            raise ConfigError(f"--base-model: `{target}` names its own. Write --set base_model={base_model}.")
        return load_config(target, DataPrepConfig, overrides=overrides)
    if overrides:
        raise ConfigError(f"--set {overrides[0]}: `{target}` is a data set, which has no keys. Give a .yaml file.")
    return None


@app.command()
def merge(
    final_output: Annotated[str, typer.Argument(metavar="FINAL_OUTPUT", help="The folder of a trained adapter.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write; it must not exist.")],
    base_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the base model is now; default: where training found it.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Put a trained adapter into its base model: one whole model, as servers read it."""
    with _errors_told(debug):
        from llm.training.tune.merge import merge_adapter

        merge_adapter(final_output, target, base_model=base_model)


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
