"""A YAML file -> a checked config, or one error that holds every problem of the file with its line; and back."""

from llm.training.config_file.load import load_config
from llm.training.config_file.save import saved_data, saved_text

__all__ = ["load_config", "saved_data", "saved_text"]
