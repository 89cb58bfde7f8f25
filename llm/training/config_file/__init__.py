"""A YAML file -> a checked config, or one error that holds every problem of the file with its line."""

from llm.training.config_file.load import load_config

__all__ = ["load_config"]
