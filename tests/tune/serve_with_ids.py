"""The `transformers` command, which also writes down every list of ids that the model embeds.

    python serve_with_ids.py IDS.jsonl serve --port 8000 ...

One line a call of the embedding: the whole prompt, then each generated id but the last (which is never read). The
server's code and the served folder stay as they are: the hook is torch's own, for all modules of a process.
"""

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def write_ids(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if isinstance(module, nn.Embedding):
        with IDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(inputs[0].flatten().tolist()) + "\n")


IDS = Path(sys.argv.pop(1))
register_module_forward_pre_hook(write_ids)
(command,) = entry_points(group="console_scripts", name="transformers")
sys.exit(command.load()())
