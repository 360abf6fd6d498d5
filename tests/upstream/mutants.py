"""A mutated upstream in a process of its own: what comes of a model there, step by step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import models, processes, targets
from tests.harness.limits import PATIENCE
from tests.upstream.mutations import Mutation


@dataclass(frozen=True)
class Scenario:
    """What a user does.

    Attributes:
        name: Of the scenario.
        checkpoint: Which of the prepared checkpoints is loaded.
        flag: Whether ``expert_wise_scale=True`` is set; None where it is not named at all.
        reloaded: Whether the config goes to JSON and back, as that of a compiled model does.
    """

    name: str
    checkpoint: str
    flag: bool | None = None
    reloaded: bool = False


@dataclass(frozen=True)
class Outcome:
    """What comes of a scenario: logits, or an error.

    Attributes:
        logits: Of the last token; empty where there was an error.
        error: Names of the error's class and of those that it is made of.
        message: The error's.
        late: Whether it came when the weights were converted or loaded, after a compilation.
        log: Our own lines in the log.
    """

    logits: tuple[float, ...] = ()
    error: tuple[str, ...] = ()
    message: str = ""
    late: bool = False
    log: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether the error is one of this package."""
        return "ExpertScaleError" in self.error


class Mutants:
    """Runs scenarios on mutated upstreams, each in a fresh process that is quick to start."""

    def __init__(
        self, target: targets.Target, settings: Mapping[str, dict[str, Any]], moe: Path, work: Path
    ) -> None:
        self._target, self._settings, self._moe, self._work = target, settings, moe, work
        # Torch and transformers once; NxD and NxDI are imported anew in each process.
        self._context = processes.context_of(target)
        self._runs = 0

    def run(
        self, mutation: Mutation | None, scenarios: Sequence[Scenario], *, active: bool
    ) -> dict[str, Outcome]:
        """What comes of each scenario, by its name.

        Args:
            mutation: The mutation; None for upstream as it is.
            scenarios: What to do, one after the other.
            active: Whether this package is active there.
        """
        self._runs += 1
        store = self._work / f"store-{self._runs}"
        with ProcessPoolExecutor(1, self._context, initializer=self._target.prepare) as pool:
            call = pool.submit(_run, mutation, scenarios, active, self._settings, self._moe, store)
            return call.result(PATIENCE)


def _run(
    mutation: Mutation | None,
    scenarios: Sequence[Scenario],
    active: bool,
    settings: Mapping[str, dict[str, Any]],
    moe: Path,
    store: Path,
) -> dict[str, Outcome]:
    if mutation is not None:
        mutation.apply()
    import nxdi_expertscale
    from nxdi_expertscale.testing import ranks

    if active:
        nxdi_expertscale.activate()
    else:
        nxdi_expertscale.deactivate()
    with ranks.parallel_state(0, 1, store):
        return {
            scenario.name: _outcome(scenario, moe, dict(settings[scenario.checkpoint]))
            for scenario in scenarios
        }


def _outcome(scenario: Scenario, moe: Path, settings: dict[str, Any]) -> Outcome:
    from tests.harness import running

    if scenario.flag is not None:
        settings["expert_wise_scale"] = scenario.flag
    log = _Log()
    logging.getLogger("nxdi_expertscale").addHandler(log)
    try:
        config = running.inference_config(moe, **settings)
        if scenario.reloaded:
            config = type(config).from_json_string(config.to_json_string())
        application = running.application_cls(moe)(str(moe), config)
        loaded = running.load_application(application)
        return Outcome(tuple(loaded.logits(models.prompt()).flatten().tolist()), log=log.lines)
    except Exception as error:
        classes = tuple(kind.__name__ for kind in type(error).__mro__)
        return Outcome(error=classes, message=str(error), late=_is_late(error), log=log.lines)
    finally:
        logging.getLogger("nxdi_expertscale").removeHandler(log)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def _is_late(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name in ("checkpoint_loader_fn", "_load_weights"):
            return True
        trace = trace.tb_next
    return False
