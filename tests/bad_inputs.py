"""What the tables of bad inputs share: one case is one input, given to the real command line in this process.

`test_bad_dataprep.py` and `test_bad_finetune.py` hold the cases; `python tests/bad_inputs.py docs/bad_inputs.md` writes
them with the message that each gets.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from llm.cli import app

Prepare = Callable[[Path], None]
TITLE = """\
# Bad inputs

What the two commands answer to what people get wrong: 44 kinds of input for `dataprep`, 40 for `finetune`. Each is a
test, which checks the exit code, the message, that no traceback is shown, and that nothing is left half done. Exit code
0 is for what is right after all, or is counted. Written by `python tests/bad_inputs.py docs/bad_inputs.md`.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad input: its number in the list of bad inputs, what it is, what the command says and ends with.

    `changes` are laid over a right config; `text` is the whole YAML file instead; `FOLDER` in them is the folder of the
    test, which `prepare` changes first. Exit code 0 is for what is right, or is counted.
    """

    number: int
    what: str
    told: Sequence[str]
    exit_code: int = 2
    changes: Mapping[str, Any] = field(default_factory=dict)
    text: str | bytes | None = None
    prepare: Prepare | None = None
    arguments: Sequence[str] = ()

    @property
    def name(self) -> str:
        """For pytest: `17 a row of a megabyte`."""
        return f"{self.number} {self.what}"


def run_case(case: Case, command: str, folder: Path, right: Mapping[str, Any]) -> Result:
    """What the command line does with `case` in `folder`; `right` is the config that it changes."""
    path = folder / f"{command}.yaml"
    text = case.text if case.text is not None else json.dumps({**right, **case.changes}, indent=1)  # JSON is YAML
    text = text.replace("FOLDER", str(folder)) if isinstance(text, str) else text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CliRunner().invoke(app, [command, str(path), *case.arguments])


def check_told(case: Case, result: Result, folder: Path) -> None:
    """The exit code, one error in it that tells all that it should, and no traceback."""
    output = result.output.replace(f"{folder}/", "")
    assert result.exit_code == case.exit_code, f"{result.exit_code}: {output}\n{result.exception!r}"
    assert "Traceback" not in output
    assert [line.startswith("error: ") for line in output.splitlines()].count(True) == (case.exit_code != 0)
    assert [text for text in case.told if text not in output] == [], output


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its path, but for the lock that finetune holds; empty when there is no folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".llm-train.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tell(case: Case, result: Result, folder: Path) -> None:
    """A line of the table, where BAD_INPUTS_TABLE names its file."""
    if table := os.environ.get("BAD_INPUTS_TABLE"):
        output = result.output.replace(f"{folder}/", "").strip()
        message = re.split(r"(?m)^(?=error: )", output)[-1] if case.exit_code else output
        message = re.sub(r"/\S+/pytest-[^/`]+/", "", message.replace(str(Path.cwd()), "~/project"))
        message = message.replace("|", "\\|").replace("\n", "<br>")
        with open(table, "a", encoding="utf-8") as file:
            file.write(f"| {case.number} | {case.what} | {result.exit_code} | {message} |\n")


def main(table: str) -> int:
    """Runs all cases and writes the table of number, input, exit code and message to the file `table`."""
    code = 0
    Path(table).write_text(TITLE, encoding="utf-8")
    for command in ("dataprep", "finetune"):
        with open(table, "a", encoding="utf-8") as file:
            file.write(f"\n## {command}\n\n| # | input | exit code | message |\n|---|---|---|---|\n")
        tests = next(Path(__file__).parent.rglob(f"test_bad_{command}.py"))
        environment = os.environ | {"BAD_INPUTS_TABLE": table}
        code |= subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], env=environment).returncode
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
