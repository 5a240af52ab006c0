"""DeepSpeed's three batch sizes: what follows from those that are given, and whether they agree.

    global batch = micro-batch x accumulation steps x workers

    batch_parts(batch=64, micro=4, steps=None, workers=(2, 2))      # (64, 8, None): 64 = 4 x 8 x 2
    batch_parts(batch=64, micro=4, steps=8, workers=None)           # (64, 8, 2): the workers follow
    batch_parts(batch=None, micro=4, steps=8, workers=(2, 2))       # (64, 8, None)

Ours are the global batch, the steps and the workers: a micro-batch is what they leave.
"""

from __future__ import annotations

from pipeline.config.deepspeed_keys import BATCH, MICRO, STEPS


def batch_parts(
    batch: int | None, micro: int | None, steps: int | None, workers: tuple[int, int] | None
) -> tuple[int | None, int | None, int | None]:
    """The global batch, the accumulation steps and the workers; None where it is left to us.

    `workers` are the fewest and the most that there may be, and None where any number may: only then is it the result's
    affair. Raises ValueError with a sentence on the key that does not fit.
    """
    if micro is None:
        return batch, steps, None
    exact = workers[0] if workers and workers[0] == workers[1] else None
    if batch is None and exact is not None:
        return micro * (steps or 1) * exact, steps or 1, None  # 1 is DeepSpeed's default
    if batch is None or (steps is None and exact is None):
        raise ValueError(
            f"{MICRO}: found {micro} while the number of workers is open; allowed is it beside both {BATCH} and "
            f"{STEPS}, or with a number as scaling.num_workers"
        )
    if steps is None:
        found, rest = divmod(batch, micro * (exact or 1))
        fits = found > 0
    else:
        found, rest = divmod(batch, micro * steps)
        fewest, most = workers or (1, found)
        fits = fewest <= found <= most
    if rest or not fits:
        raise ValueError(
            f"{BATCH}: found {batch}, which is not {micro} x {steps or 'any number of steps'} x {_counted(workers)} "
            "workers; allowed is micro-batch x accumulation steps x workers"
        )
    if steps is None:
        return batch, found, None
    return batch, steps, found if workers is None else None


def _counted(workers: tuple[int, int] | None) -> str:
    if workers is None:
        return "any number of"
    fewest, most = workers
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"
