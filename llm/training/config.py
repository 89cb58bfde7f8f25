"""What the two YAML files may say: every key with its type, default and meaning, in one place.

Takes the plain data of a YAML file (`config_file.load_config`), gives a `DataPrepConfig` or a `FinetuneConfig`.
Building one has no side effect and imports nothing heavy; the key tables of `README.md` are made from here.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from llm.prompt_format import TrainOn

DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
}


# nf4 with double quantization and bfloat16 compute: the QLoRA recipe (https://arxiv.org/abs/2305.14314). The
# library's own defaults are fp4 and float32.
FOUR_BIT_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
KeyPath = tuple[str | int, ...]


class StrictModel(BaseModel):
    """A section of a YAML file: unknown keys are errors, values are never converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _top_packages(names: list[str]) -> list[str]:
    for name in names:
        if not re.fullmatch(r"[^\W\d]\w*", name):
            top = re.split(r"\W", name)[0] or "my_package"
            raise ValueError(f"`allow_code` takes names of top packages: write `{top}`, not `{name}`")
    return names


PackageNames = Annotated[list[str], BeforeValidator(_a_list), AfterValidator(_top_packages)]
ALLOW_CODE = (
    "Packages whose code a `method: package.module::name` may run, as `--allow-code package` does; registered names "
    "need none."
)
INCLUDE = "A YAML file, or a list of them, relative to this one: this file's keys win over theirs, key by key."


class MethodConfig(StrictModel):
    """Code named from YAML: a registered name or `path.to.module::name`, and its arguments."""

    method: str = Field(description="A registered name, or `path.to.module::name` of a package in `allow_code`.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the method.")


def kwargs_of(config: MethodConfig | None) -> dict[str, Any]:
    """The arguments of a method; none where none is named."""
    return config.kwargs if config else {}


class DatasetConfig(StrictModel):
    """Where rows or blocks come from. A bare path (`rows.jsonl`, `output/train`) is short for it."""

    method: str = Field(
        default="load_dataset",
        description="`load_dataset`, `load_from_disk`, or `path.to.module::name` of a package in `allow_code`.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the method.")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"method": "load_path", "kwargs": {"path": value}} if isinstance(value, str) else value


class ScriptConfig(StrictModel):
    """A whole YAML file, which remembers where it named an environment variable."""

    _environment: dict[KeyPath, str] = PrivateAttr(default_factory=dict)

    @property
    def environment(self) -> dict[KeyPath, str]:
        """The text, such as `${env:NAME}/rows.jsonl`, of each value that came from the environment."""
        return self._environment


OnTooLong = Literal["drop", "error", "truncate_contexts"]
OnBadRow = Literal["error", "drop"]
RowFormat = Literal["auto", "input_response", "messages", "sharegpt", "alpaca", "dolly"]
ColumnName = Literal["input", "response", "contexts", "messages", "system", "tools"]


class SourceConfig(StrictModel):
    """One of several sources that are mixed into one data set."""

    source_config: DatasetConfig = Field(description="The rows, as the key of this name outside of `sources`.")
    columns: dict[ColumnName, str] = Field(default_factory=dict, description="What its columns are called.")
    row_format: RowFormat = Field(default="auto", description="The format of its rows.")
    weight: float = Field(
        default=1,
        gt=0,
        description="How often its rows are seen: 2 = each twice, 0.5 = a random half; with `mix_by` its share.",
    )


class DataPrepConfig(ScriptConfig):
    """The YAML file of `dataprep`: rows -> rendered prompts -> tokens and labels -> packed blocks."""

    source_config: DatasetConfig | None = Field(
        default=None,
        description="The rows: columns `input`, `response` (str) and, if you like, `contexts` (list of str). "
        "A path to a json, jsonl, csv or parquet file, or `method` and `kwargs`.",
    )
    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="Instead of `source_config`: several sources, each with `source_config`, `columns`, `row_format` "
        "and `weight`, mixed into one data set.",
    )
    mix_by: Literal["rows", "tokens"] | None = Field(
        default=None,
        description="`weight` of `sources` is a share of all `rows`, or `tokens`; default: how often rows are seen.",
    )
    columns: dict[ColumnName, str] = Field(
        default_factory=dict,
        description="What the columns are called in the data, e.g. `{input: question, response: answer}`; also "
        "`contexts`, `messages`, `system` (its own system message for a row), `tools`.",
    )
    row_format: RowFormat = Field(
        default="auto",
        description="`input_response`, `messages`, `sharegpt`, `alpaca` or `dolly`; `auto` finds it by the columns and "
        "says so.",
    )
    train_on: TrainOn = Field(
        default="all", description="Of a conversation, `all` answers are trained, or the `last` one only."
    )
    base_model: str = Field(
        min_length=1,
        description="Hub id or folder of the model to be tuned: its tokenizer is used, and its prompt format.",
    )
    prompt_config: MethodConfig | None = Field(
        default=None,
        description="The task: system message, few-shot examples, templates; default: `DefaultPrompt`, and `Prompt` "
        "(nothing but the text itself) for rows of another format than `input_response`.",
    )
    prompt_format_config: MethodConfig | None = Field(
        default=None,
        description="The model's role marks; default: what the model registry knows for `base_model`, else the "
        "tokenizer's own chat template, else plain text.",
    )
    dataset_writer_config: MethodConfig = Field(
        description="Where the blocks go: `save_to_disk` (`dataset_path`), `to_parquet`, `to_json` or `to_csv` "
        "(`path_or_buf`); on disk or `s3://`.",
    )
    chunksize: int = Field(default=2048, gt=0, description="Tokens in a block: examples are packed up to this length.")
    ignore_index: int = Field(default=-100, lt=0, description="Label of a token that is not trained (prompt, padding).")
    num_proc: int | None = Field(
        default=None, gt=0, description="Threads that tokenize; default: one a core, up to 10."
    )
    reuse_tokens: bool = Field(
        default=True,
        description="Keep tokenized rows in the cache (`LLM_TRAIN_CACHE`, else below `HF_HOME`; 14 days), and use them "
        "again where nothing that shaped them changed, e.g. after a stop.",
    )
    fast_tokenizer: bool = Field(
        default=True,
        description="Of 10 MB of rows and more, `fastokens` makes the ids, if it is installed (extra `fast`) and gives "
        "the same as the model's tokenizer: compared on odd texts, the first of the data, and one in a hundred.",
    )
    pack: bool = Field(default=True, description="`false` writes one example a block.")
    share_prefixes: Literal["auto"] | bool = Field(
        default="auto",
        description="Within a block, what prompts have in common from the start (system message, few-shot examples, "
        "contexts, earlier turns) is stored and computed once; `auto`: when that saves at least 5 % of the tokens.",
    )
    pad_to_chunksize: bool = Field(
        default=True, description="Pad every block to `chunksize`; `false` keeps blocks as long as they are."
    )
    seed: int | None = Field(
        default=None, description="Shuffles the blocks; default: blocks in the order of their first row."
    )
    on_too_long: OnTooLong = Field(
        default="drop",
        description="A row longer than `chunksize`: `drop` counts and leaves it out, `error` stops, "
        "`truncate_contexts` takes away whole contexts from the end, then the end of the input; never the response.",
    )
    on_bad_row: OnBadRow = Field(
        default="error",
        description="A row with a null where text belongs, messages that are none, or bytes that are no UTF-8: `error` "
        "stops and says what is wrong, `drop` counts it and leaves it out.",
    )
    allow_special_tokens_in_data: bool = Field(
        default=False,
        description="`true` lets text such as `<|im_end|>` in a row become the control token; else it stays text.",
    )
    dedupe: bool = Field(
        default=False,
        description="`true` drops and counts rows whose prompt and response an earlier row has, token by token.",
    )
    eval_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Holds out this share of the rows, whole prompts, for evaluation: a second data set, `..._eval`.",
    )
    eval_rows: int | None = Field(
        default=None, gt=0, description="Holds out about so many rows, instead of a share: see `eval_fraction`."
    )
    overwrite: bool = Field(default=False, description="Replace a data set that is already there.")
    allow_code: PackageNames = Field(default_factory=list, description=ALLOW_CODE)
    # Read by `config_file.include`, so that a loaded config has none left and is saved without it.
    include: Annotated[list[str], BeforeValidator(_a_list)] = Field(
        default_factory=list, exclude=True, description=INCLUDE
    )

    @property
    def has_eval_split(self) -> bool:
        """Whether rows are held out for evaluation."""
        return self.eval_fraction is not None or self.eval_rows is not None

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources, each under its YAML key."""
        if self.source_config is None:
            return {f"sources[{number}].source_config": source for number, source in enumerate(self.sources)}
        source = SourceConfig(source_config=self.source_config, columns=self.columns, row_format=self.row_format)
        return {"source_config": source}

    @model_validator(mode="after")
    def _is_consistent(self) -> "DataPrepConfig":
        if self.source_config is not None and self.sources:
            raise ValueError("`sources` and `source_config` exclude each other: move that one into the list")
        if self.sources and (self.columns or self.row_format != "auto"):
            name = "columns" if self.columns else "row_format"
            raise ValueError(f"`{name}` is said of each source: move it into the list of `sources`")
        if self.mix_by and not self.sources:
            raise ValueError("`mix_by` says how `sources` are mixed, and there are none")
        if self.eval_fraction is not None and self.eval_rows is not None:
            raise ValueError("`eval_fraction` and `eval_rows` exclude each other: keep one")
        return self


def _canonical_dtype(value: Any) -> Any:
    return DTYPES.get(value, value) if isinstance(value, str) else value


def _can_be_resumed(arguments: dict[str, Any]) -> dict[str, Any]:
    if "output_dir" in arguments:
        raise ValueError("`output_dir` is set by the key `local_output`")
    if arguments.get("save_only_model") is True:
        raise ValueError(
            "`save_only_model: true` saves no optimizer, scheduler and random state: no run could go on from such a "
            "checkpoint. Delete it; `final_output` holds the model alone"
        )
    return arguments


def _auto_if_true(value: bool | str) -> bool | str:
    return "auto" if value is True else value


Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(_canonical_dtype)]


class FinetuneConfig(ScriptConfig):
    """The YAML file of `finetune`: packed blocks -> adapter or full model, checkpoints, `final_output`."""

    base_model: str = Field(
        min_length=1, description="Hub id or folder of the model to be tuned (any causal language model)."
    )
    train_dataset_config: DatasetConfig = Field(description="The prepared blocks: a path, or `method` and `kwargs`.")
    eval_dataset_config: DatasetConfig | None = Field(
        default=None, description="Prepared blocks for the evaluation loss; default: none."
    )
    local_output: str = Field(
        min_length=1,
        description="Folder of checkpoints (`output_dir` of the Trainer); the result is in its `final_output`.",
    )
    additional_output_paths: list[str] = Field(
        default_factory=list,
        description="fsspec URLs that `local_output` is copied to at every checkpoint and at the end.",
    )
    training_arguments: Annotated[dict[str, Any], AfterValidator(_can_be_resumed)] = Field(
        default_factory=dict,
        description="Anything that Hugging Face `TrainingArguments` takes, over `default_training_arguments`.",
    )
    lora_config: dict[str, Any] | None = Field(
        default_factory=dict,
        description="Arguments of peft `LoraConfig`, over the model's defaults; `null` trains all weights.",
    )
    torch_dtype: Dtype = Field(
        default="auto",
        description="`bfloat16`, `float16`, `float32`, or `auto`: bfloat16 where the processor has it, else float32.",
    )
    load_in_4bit: bool = Field(
        default=False, description="QLoRA: 4-bit base (nf4, double quantization, bfloat16 compute)."
    )
    load_in_8bit: bool = Field(default=False, description="8-bit base.")
    quantization_config: dict[str, Any] | None = Field(
        default=None, description="Arguments of `BitsAndBytesConfig`, over those of the two keys above."
    )
    resume_from_checkpoint: Annotated[bool | str, AfterValidator(_auto_if_true)] = Field(
        default="auto",
        description="`auto` (or `true`): the newest whole checkpoint of `local_output` and the output paths, if any; "
        "`false`: start anew, older checkpoints are kept aside; or a path.",
    )
    allow_changed: list[str] = Field(
        default_factory=list,
        description="Settings that may differ from those of the checkpoint that is resumed, such as `max_steps`; the "
        "error that refuses them names them.",
    )
    experiment_tracking_config: MethodConfig | None = Field(
        default=None,
        description="A tracker (`tensorboard`, `wandb`, `comet_ml`, `mlflow`, `trackio`) and its settings.",
    )
    report_to: Annotated[list[str] | None, BeforeValidator(_a_list)] = Field(
        default=None,
        description="Trackers by name, or `none`; default: that of `experiment_tracking_config`, else TensorBoard "
        "when it is installed.",
    )
    fail_on_leak: bool = Field(
        default=False,
        description="`true`: training rows whose prompt is in the evaluation data are an error, not a warning.",
    )
    allow_tokenizer_mismatch: bool = Field(default=False, description="Train on blocks that another tokenizer made.")
    allow_code: PackageNames = Field(default_factory=list, description=ALLOW_CODE)
    # Read by `config_file.include`, so that a loaded config has none left and is saved without it.
    include: Annotated[list[str], BeforeValidator(_a_list)] = Field(
        default_factory=list, exclude=True, description=INCLUDE
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> "FinetuneConfig":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other: keep one")
        if self.is_quantized and self.lora_config is None:
            raise ValueError(
                "a quantized base cannot be trained in full: leave out `lora_config: null`, or the quantization"
            )
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether the base weights are loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit or self.quantization_config is not None


TORCH_COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Each of these `training_arguments`, where set, has the model compiled."""


def default_training_arguments(
    *, has_eval_dataset: bool = False, is_lora: bool = True, is_cuda: bool = False
) -> dict[str, Any]:
    """Our defaults of `TrainingArguments`; what the user sets under `training_arguments` wins over each."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 1,
        # 2 x 2 blocks of 2,048 tokens a step: fits a 7B QLoRA run into 16 GB, as in the 2023 original.
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        # LoRA needs about ten times the rate of full fine-tuning (https://thinkingmachines.ai/blog/lora/).
        "learning_rate": 2e-4 if is_lora else 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps; a fresh optimizer's first steps are its noisiest
        "optim": "adamw_torch",
        # Trades a quarter of the speed for memory: on a GPU memory is the limit, on a CPU time is.
        "gradient_checkpointing": is_cuda,
        "logging_strategy": "steps",
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 30,
        "save_total_limit": 3,  # each holds optimizer state: three times the size of what is trained
        # A NaN loss must be seen, not replaced by 0.0 in the log.
        "logging_nan_inf_filter": False,
    }
    if has_eval_dataset:
        defaults |= {"eval_strategy": "steps", "eval_steps": 30}  # with every checkpoint
    return defaults
