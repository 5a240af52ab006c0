"""A trial, in a process of Ray Tune's: the training that jobs/train.py does, told of after each validation.

A trial of one worker trains right here, on the loop that Ray's workers run; as Tune uses a process for one trial after
the other, such a trial costs a second to start. One of several starts workers by Ray Train, half a minute.

Whatever ends it short of the process itself is told as a sentence, and is no error to Tune, which starts a trial anew
that has lost its process or its node: it goes on from its newest checkpoint.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.runtime.console import LogFile, log
from pipeline.runtime.outcome import JobError, alone_in
from pipeline.storage.path import StoragePath
from pipeline.training.checkpoints import TrainState
from pipeline.training.tracking.tracker import VALIDATION, Metrics
from pipeline.tuning.slots import Slots
from pipeline.tuning.terms import Terms, trial_config

LONGEST_REASON = 500
WAIT_S = 120.0  # for a process of a driver that was killed, which notices within a minute


@dataclass(frozen=True)
class Errand:
    """What all trials are sent: the sweep's config, its terms, its room, and the data set that all train on."""

    config: Config
    terms: Terms
    slots: Slots
    folder: StoragePath
    manifest: Manifest


class Teller:
    """Tells Ray Tune of validations, and learns from it when to stop."""

    def __init__(self, terms: Terms, whole_steps: int) -> None:
        self.name, self.whole_steps = VALIDATION + terms.metric, whole_steps
        self.started, self.step, self.stopped = time.monotonic(), 0, False

    def tell(self, metrics: Metrics) -> None:
        """Wait for Tune's answer. Raises SystemExit, by Tune's own hand, where the trial is to end."""
        self.step = int(metrics["step"])
        if self.name not in metrics:
            return
        try:
            self.report(value=float(metrics[self.name]), last=self.step >= self.whole_steps)
        except SystemExit:
            self.stopped = True
            raise

    def report(self, **found: Any) -> None:
        from ray import tune

        seconds = time.monotonic() - self.started
        tune.report({"step": self.step, "whole_steps": self.whole_steps, "seconds": seconds, **found})


def run_trial(suggested: dict[str, Any], errand: Errand) -> None:
    """What Ray Tune calls, in a thread of its own. `suggested`: the trial's number, and its values as JSON."""
    teller = Teller(errand.terms, 0)
    try:
        config = trial_config(errand.config, errand.terms, suggested["number"], json.loads(suggested["values"]))
        with _logged(config), _held(config):
            state = _train(config, errand, teller)
    except Exception as error:
        teller.report(failed=f"{' '.join(str(error).split())[:LONGEST_REASON] or type(error).__name__}")
        return
    if teller.stopped:
        sys.exit(0)
    if state.metrics:  # of a trial that was at its end already, nobody may have heard
        teller.tell({"step": state.step, **state.metrics})
    teller.report(ended=True)


def _train(config: Config, errand: Errand, teller: Teller) -> TrainState:
    from pipeline.training.assembly import Task, train_here

    teller.whole_steps = Task.of(config, errand.folder, errand.manifest).total_steps
    if errand.slots.in_process:
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # of the trial that this process had before: others may share the GPU
        torch.set_num_threads(errand.slots.threads)
        return train_here(config, errand.folder, errand.manifest, teller.tell)
    from pipeline.runtime.session import Progress
    from pipeline.training.fit import fit

    progress = Progress()

    def tell(metrics: Metrics) -> None:
        """In the thread that follows the progress: the workers are asked to stop, with a checkpoint."""
        try:
            if not teller.stopped:
                teller.tell(metrics)
        except SystemExit:
            progress.ask_to_stop()

    return fit(config, errand.folder, errand.manifest, progress, tell, errand.slots.trials)


@contextmanager
def _logged(config: Config) -> Iterator[None]:
    """The log of this process is the trial's own training.log, for as long as the trial has it."""
    file = LogFile(config.log_dir, config.logging.format)
    log.handlers[:], log.propagate = [file], False
    log.setLevel(config.logging.level)
    try:
        yield
    except Exception as error:
        file.write_traceback(error)
        raise
    finally:
        log.handlers.clear()
        file.close()


@contextmanager
def _held(config: Config) -> Iterator[None]:
    """The trial's folder, once nobody else has it: processes outlive a driver that was killed by some seconds."""
    deadline = time.monotonic() + WAIT_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(alone_in(config.run_dir))
                break
            except JobError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield
