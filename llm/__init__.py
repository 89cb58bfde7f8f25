"""llm-train: fine-tune a language model on your own rows, with two commands and two YAML files."""

__version__ = "0.1.0"
