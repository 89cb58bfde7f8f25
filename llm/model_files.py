"""The files of a model folder, looked at after a library could not load them: which one is damaged, and how."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

_LFS_POINTER = b"version https://git-lfs.github.com/"


def damaged_file(base_model: str) -> str:
    """What is wrong with the first damaged file of the folder, and the remedy; empty for a hub id, or when none is.

    Of weights only the header is read, which says how long the file is.
    """
    for path in sorted(Path(base_model).glob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"`{path}` is a pointer of Git LFS, not the file itself. Run `git lfs pull` in the folder."
        if reason := _damage(path):
            return f"`{path}` is damaged ({reason}). Copy or download it again."
    return ""


def _damage(path: Path) -> str:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                pass
    except (SafetensorError, ValueError) as error:
        return str(error).rstrip(".")
    return ""
