"""The command line: `llm-train dataprep config.yaml`, `llm-train finetune config.yaml`, `llm-train quickstart`, ...

Heavy libraries are imported inside the commands: `--help` and a config error answer at once. How a command ends is in
`llm/events.py`, its exit codes in `llm/errors.py`.
"""

import atexit
import gc
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llm.errors import EXIT_CODES, ConfigError
from llm.events import libraries_told_here, run_told, tell_event
from llm.terminal import console

if TYPE_CHECKING:
    from llm.training.config import DataPrepConfig

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on your own rows. Begin with `quickstart`, or with `init` for rows of yours.",
    epilog=f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
)

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
AsJson = Annotated[bool, typer.Option("--json", help="Tell everything as JSON, one object a line.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also say what the libraries log.")]


def _scripts(incomplete: str) -> list[str]:
    return [name for name in ("dataprep", "finetune") if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    from llm.training.config_file.explain import known_keys

    return [key for key in known_keys() if key.startswith(incomplete)]


@app.command()
def dataprep(  # noqa: PLR0913  (each is an argument of the command line)
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn rows into packed blocks of tokens and labels."""
    _collect_garbage_rarely()
    from llm.training.config import DataPrepConfig
    from llm.training.config_file import load_config

    with run_told(debug=debug, quiet=quiet, verbose=verbose, as_json=as_json):
        settings = load_config(config, DataPrepConfig, overrides=overrides or [], allow_code=allow_code or [])
        from llm.training.dataprep import prepare

        libraries_told_here()
        prepare(settings)


@app.command()
def finetune(  # noqa: PLR0913  (each is an argument of the command line)
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tune a model on packed blocks."""
    from llm.training.config import FinetuneConfig
    from llm.training.config_file import load_config

    with run_told(debug=debug, quiet=quiet, verbose=verbose, as_json=as_json):
        settings = load_config(config, FinetuneConfig, overrides=overrides or [], allow_code=allow_code or [])
        from llm.training.finetune import finetune as tune

        libraries_told_here()
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
    allow_code: AllowCode = None,
    debug: Debug = False,
) -> None:
    """Show rows as tokens: prompt, trained, stop token, padding."""
    with run_told(debug=debug):
        config = _row_config(target, base_model, overrides or [], allow_code or [])
        from llm.training.prep.preview import block_views, row_views
        from llm.training.prep.token_view import print_views

        if config:
            views = row_views(config, first=first, num_rows=num_shown)
        else:
            views = block_views(target, first=first, num_blocks=num_shown, base_model=base_model)
        print_views(views, has_ids=has_ids, max_tokens=max_tokens)


def _row_config(
    target: str, base_model: str | None, overrides: list[str], allow_code: list[str]
) -> "DataPrepConfig | None":
    """The config where `target` is one; None where it is a prepared data set."""
    from llm.training.config import DataPrepConfig
    from llm.training.config_file import load_config

    if target.endswith((".yaml", ".yml")):
        if base_model is not None:
            raise ConfigError(f"--base-model: `{target}` names its own. Write --set base_model={base_model}.")
        return load_config(target, DataPrepConfig, overrides=overrides, allow_code=allow_code)
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put a trained adapter into its base model: one whole model, as servers read it."""
    with run_told(debug=debug, as_json=as_json):
        from llm.training.tune.merge import merge_adapter

        libraries_told_here()
        tell_event("merged", result=merge_adapter(final_output, target, base_model=base_model))


@app.command()
def quickstart(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="A new folder for the example.")] = "quickstart",
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="MODEL", help="Hub id or folder; default: SmolLM2-135M.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write an example that trains in minutes without a GPU: rows, YAML files, evaluation."""
    with run_told(debug=debug):
        from llm.training.quickstart import BASE_MODEL, write_quickstart

        typer.echo(write_quickstart(folder, base_model=base_model or BASE_MODEL), nl=False)


@app.command()
def init(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="File, folder or s3:// URL of the rows.")],
    base_model: Annotated[str, typer.Option("--base-model", metavar="MODEL", help="Hub id or folder.")],
    folder: Annotated[str, typer.Option("--folder", help="Where the two files go.")] = ".",
    debug: Debug = False,
) -> None:
    """Write dataprep.yaml and finetune.yaml, with comments, for your rows and your model."""
    with run_told(debug=debug):
        from llm.training.starter import write_starter

        paths = write_starter(rows, base_model, folder)
        typer.echo("\n".join(paths))
        dataprep_yaml, finetune_yaml = paths
        console.print("Look them through, then:", markup=False)
        for command in (f"inspect {dataprep_yaml}", f"dataprep {dataprep_yaml}", f"finetune {finetune_yaml}"):
            console.print(f"  llm-train {command}", markup=False)


@app.command()
def schema(
    script: Annotated[
        str, typer.Argument(metavar="dataprep|finetune", help="Whose YAML file.", autocompletion=_scripts)
    ],
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a YAML file, by which an editor completes and checks it."""
    with run_told(debug=debug):
        from llm.training.config_file.json_schema import schema_text

        typer.echo(schema_text(script), nl=False)


@app.command()
def explain(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="chunksize, lora_config.r, ...; all without.", autocompletion=_keys)
    ] = "",
    debug: Debug = False,
) -> None:
    """Say what a key of the YAML files means, its type and its default; without KEY, list all."""
    with run_told(debug=debug):
        from llm.training.config_file.explain import explain as explain_key
        from llm.training.config_file.explain import list_keys

        typer.echo(explain_key(key) if key else list_keys())


@app.command()
def sync(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Complete the copies of a run at its output paths: the same file as for finetune."""
    from llm.training.config import FinetuneConfig
    from llm.training.config_file import load_config

    with run_told(debug=debug, as_json=as_json):
        settings = load_config(config, FinetuneConfig, overrides=overrides or [], allow_code=allow_code or [])
        from llm.training.tune.output_sync import complete_copies

        for report in complete_copies(settings):
            tell_event("copied", **asdict(report))
            console.print(f"{report.url}: {report.text}", markup=False, soft_wrap=True)


def _collect_garbage_rarely() -> None:
    """Python looks through all that libraries made, again and again as they are imported, and at the end: 0.2 s."""
    gc.set_threshold(50_000, 100)
    atexit.register(_collect_nothing_more)


def _collect_nothing_more() -> None:
    if "torch" not in sys.modules:  # whose Triton tells at the end what was not collected, in 30 lines
        gc.freeze()


def main() -> None:
    """The entry point of `llm-train`."""
    app()
