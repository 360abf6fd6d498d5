"""Processes for each target, in which its tests run, and whose reports are replayed in this one.

A worker is pytest again, given the tests of one group, which are of one target. It writes every
report to a pipe, as one line of JSON; the process that started it reads them when it comes to the
same test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pytest

from tests.harness.targets import TARGET_VARIABLE

REPORTS_VARIABLE = "NXDI_EXPERTSCALE_REPORTS"


class ReportWriter:
    """The worker's side: a plugin that hands every report on."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self._config = config
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(json.dumps(data), file=self._pipe, flush=True)


class Worker:
    """The other side: starts the worker, and gives the reports of one test after the other."""

    def __init__(self, config: pytest.Config, target: str, tests: Sequence[str]) -> None:
        self._config = config
        self._target = target
        self._waiting: dict[str, list[pytest.TestReport]] = defaultdict(list)
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header"]
        command += [f"--rootdir={config.rootpath}", f"--tb={config.option.tbstyle}", *tests]
        self._process = subprocess.Popen(
            command,
            cwd=config.rootpath,
            env={**os.environ, TARGET_VARIABLE: target, REPORTS_VARIABLE: str(writing)},
            pass_fds=[writing],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(writing)
        self._pipe = os.fdopen(reading, encoding="utf-8")

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Wait for the reports of a test, up to that of its teardown."""
        while True:
            for report in self._waiting.pop(_name_of(item), ()):
                report.nodeid = item.nodeid
                yield report
                if report.when == "teardown":
                    return
            line = self._pipe.readline()
            if not line:
                yield self._lost(item)
                return
            report = self._config.hook.pytest_report_from_serializable(
                config=self._config, data=json.loads(line)
            )
            if isinstance(report.longrepr, list):
                # Where and why a test was skipped; JSON has no tuples.
                report.longrepr = tuple(report.longrepr)
            self._waiting[report.nodeid].append(report)

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        status = self._process.wait()
        self._output.seek(0)
        output = self._output.read().decode(errors="replace")
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=f"the worker of {self._target} ended with status {status}:\n{output}",
            when="call",
        )

    def stop(self) -> None:
        """End the worker, which has nothing left to do unless this run is cut short."""
        self._pipe.close()
        self._process.terminate()
        self._process.wait()
        self._output.close()


class Dispatcher:
    """A plugin that runs each test in the worker of its target, but for those of ``here``."""

    def __init__(self, here: str | None) -> None:
        self._here = here
        self._workers: dict[str, Worker] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: object) -> bool | None:
        target = _target_of(item)
        if target is None or target == self._here:
            return None
        group = _group_of(item)
        worker = self._workers.get(group)
        if worker is None:
            tests = [_name_of(other) for other in item.session.items if _group_of(other) == group]
            worker = self._workers[group] = Worker(item.config, target, tests)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in worker.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        for worker in self._workers.values():
            worker.stop()


def _target_of(item: pytest.Item) -> str | None:
    callspec: Any = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("target_name")


def _group_of(item: pytest.Item) -> str:
    """The group of tests that share a process (see ``tests/conftest.py``)."""
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    group: str = marker.args[0]
    return group


def _name_of(item: pytest.Item) -> str:
    """A test's node id, without the group that pytest-xdist appends to it."""
    return item.nodeid.removesuffix(f"@{_group_of(item)}")
