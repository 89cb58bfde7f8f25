"""The script that tries the invariants over real tokenizers runs, on a made one."""

import subprocess
import sys
from pathlib import Path

from conftest import byte_level_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_invariants_script_finds_no_violation_with_a_byte_level_tokenizer(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks/invariants.py"), "--rows", "100", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last.split(";")[0]) == (0, "0 violations"), done.stdout + done.stderr
    assert len(lines) > 15 and "ChatMLFormat" in done.stdout  # the heading, and a line for each format
