"""`tep report` from a copy of the repository, whether the package is installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.commands.tep import run_command

if __name__ == "__main__":
    sys.exit(run_command("report"))
