"""A sweep from its first trial, or from where it was left, to its report."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.runtime.cluster import connected_cluster
from pipeline.runtime.console import Stage, log
from pipeline.runtime.outcome import Result
from pipeline.runtime.session import Progress
from pipeline.storage.path import StoragePath
from pipeline.training.assembly import Task
from pipeline.tuning.report import describe, report, tidy
from pipeline.tuning.slots import slots
from pipeline.tuning.sweep import Row, Sweep
from pipeline.tuning.terms import Terms, trial_config
from pipeline.tuning.trial import Errand


def sweep(config: Config, folder: StoragePath, manifest: Manifest, progress: Callable[[], Progress]) -> Result:
    """Run the trials that are left, and report on all. `progress` starts Ray, which a finished sweep does without."""
    terms = _terms(config, folder, manifest)
    with Sweep.open(config, terms) as found:
        left = found.goal - found.done
        if left > 0:
            progress()
            _run(found, left, config, folder, manifest)
        else:
            log.info("tune: nothing to do, all %d trials have ended", found.done)
        tidy(config, found)
        return report(config, found, track=left > 0)


def _terms(config: Config, folder: StoragePath, manifest: Manifest) -> Terms:
    """The budget is the length of a trial with the config's own values."""
    draft = trial_config(config, Terms("", True, 1, 1), 0, {})
    return Terms.of(config, Task.of(draft, folder, manifest).total_steps, manifest.fingerprint)


def _run(found: Sweep, left: int, config: Config, folder: StoragePath, manifest: Manifest) -> None:
    from pipeline.tuning.drive import drive

    wanted, terms = config.tune.max_concurrent_trials, found.terms
    room = slots(
        config.scaling,
        config.training.strategy,
        connected_cluster().with_labels(config.scaling.labels.train).capacity(),
        left if wanted == "auto" else min(left, wanted),
    )
    log.info(
        "tune: %d of %d trials are left, %d at the same time, of %d workers %s; a whole one takes %s steps%s",
        left,
        found.goal,
        room.trials,
        room.workers,
        "in the trial's own process" if room.in_process else "beside it",
        f"{terms.total_steps:,}",
        "" if config.tune.scheduler == "none" else f", each at least {terms.grace_steps:,}",
    )
    with Stage("tune", found.goal, "trials", found.done) as stage:

        def done(row: Row) -> None:
            log.info("%s", describe(row, found))
            tidy(config, found, spared=row.number)
            stage.advance(1)

        drive(found, Errand(config, terms, room, folder, manifest), done)
