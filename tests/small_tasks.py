"""`python -m tests.small_tasks embed --config c.yaml …`: a job that reads, shards and writes in many small tasks."""

import runpy
import sys

from pipeline.core.session import set_environment

if __name__ == "__main__":
    set_environment()

    from pipeline.data import prepare, sources
    from pipeline.index import embed

    prepare.SHARD_BYTES, sources.TASK_BYTES, embed.MIN_FRAGMENT_ROWS = 1 << 17, 1 << 16, 512
    del sys.argv[0]
    runpy.run_path(f"jobs/{sys.argv[0]}.py", run_name="__main__")
