"""Running the toolkit's commands from a script, shown as a user would type them."""

import shlex
import subprocess
import sys
from pathlib import Path


def run(command: str) -> None:
    """Show a command and run it with this Python's programs; its failure ends the script with its exit code."""
    print(f"$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    code = subprocess.call([str(Path(sys.executable).with_name(program)), *arguments])
    if code:
        sys.exit(code)
