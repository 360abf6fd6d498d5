"""Qwen3-30B-A3B on a Trainium: bfloat16, FP8 with one scale per expert, FP8 with averaged ones.

On a trn2.3xlarge with the Neuron SDK, its vLLM-Neuron (0.2.0 to 0.5.0), ``lm_eval[ifeval,api]``
and this package installed, from a checkout of the project::

    python -m benchmarks.trainium.run Qwen3-30B-A3B WORK

It quantizes, then for each of the three compiles and serves with vLLM, asks ``lm_eval``'s
questions, measures the throughput, and prints one table beside the seed's. What is done is not
done again: cut off, it goes on when it is run again. ``--dry-run`` checks what can be checked
without a device and prints every command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.trainium.checks import Needs, Outcome, examine
from benchmarks.trainium.plan import (
    LIMIT,
    PROMPTS,
    TASKS,
    TOKENS,
    Server,
    Setup,
    Step,
    steps,
    variants,
)
from nxdi_expertscale.errors import ExpertScaleError

START_SECONDS = 3 * 3600
"""How long a server may take to compile and load."""

_POLL_SECONDS = 0.2

DEVICE_HOST = Needs()

SEED: Mapping[str, tuple[str, str, str]] = {
    "bfloat16": ("-", "-", "-"),
    "expert-wise": ("0.405", "0.45", "58.7"),
    "averaged": ("0.00", "0.03", "unchanged"),
}
"""What the seed's pull request measured: IFEval, TruthfulQA, tokens a second."""


class RunError(Exception):
    """A command failed, or a server did not answer."""


def run(setup: Setup) -> None:
    """Do every step that is not done yet, one after the other.

    Raises:
        RunError: A command failed, or a server did not answer.
    """
    todo = [step for step in steps(setup) if not step.done.exists()]
    for server, group in groupby(todo, key=lambda step: step.server):
        if server is None:
            _run_all(group)
            continue
        with _serving(server):
            _run_all(group)


def _run_all(group: Iterator[Step]) -> None:
    for step in group:
        print(f"{step.name}: {shlex.join(step.command)}", flush=True)
        step.done.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | step.environment
        status = subprocess.run(step.command, check=False, env=environment).returncode
        if status != 0 or not step.output.exists():
            raise RunError(f"{step.name}: status {status}, and {step.output} is what it writes")
        step.done.touch()


@contextmanager
def _serving(server: Server) -> Iterator[None]:
    server.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"serving: {shlex.join(server.command)}", flush=True)
    with server.log.open("ab") as log:
        process = subprocess.Popen(
            server.command,
            env=os.environ | server.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(process, server)
        yield
    finally:
        _stop(process)


def _wait_until_it_answers(process: subprocess.Popen[bytes], server: Server) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"the server ended with status {process.returncode}; see {server.log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    raise RunError(f"the server does not answer after {START_SECONDS} s; see {server.log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers, which hold the device."""
    for number, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def figures(setup: Setup, variant: str) -> tuple[float | None, float | None, float | None]:
    """IFEval, TruthfulQA and tokens a second of a variant; None for what is not measured yet."""
    folder = setup.work / variant
    results = _newest_results(folder / "lm_eval")
    throughput = folder / "throughput.json"
    return (
        _figure(results, "ifeval", "inst_level_strict_acc,none"),
        _figure(results, "truthfulqa_gen", "bleu_acc,none"),
        json.loads(throughput.read_text())["output_throughput"] if throughput.exists() else None,
    )


def _newest_results(folder: Path) -> dict[str, Any]:
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results: dict[str, Any] = json.loads(files[-1].read_text())["results"] if files else {}
    return results


def _figure(results: Mapping[str, Any], task: str, metric: str) -> float | None:
    return results[task][metric] if task in results else None


def table(setup: Setup) -> Table:
    """What was measured beside what the seed measured."""
    found = Table(title="measured / the seed's", title_justify="left")
    for column in ("", "IFEval inst_level_strict_acc", "TruthfulQA bleu_acc", "output tokens/s"):
        found.add_column(column, justify="right")
    for variant in variants(setup):
        pairs = zip(figures(setup, variant.name), SEED[variant.name], strict=True)
        found.add_row(variant.name, *(f"{_shown(own)} / {seed}" for own, seed in pairs))
    return found


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _check(setup: Setup, needs: Needs, console: Console) -> set[Outcome]:
    found = Table(box=None, show_header=False)
    outcomes = set()
    for check in examine(setup, needs):
        found.add_row(check.outcome.value, check.name, check.detail)
        outcomes.add(check.outcome)
    console.print(found)
    return outcomes


def _print_commands(setup: Setup) -> None:
    for server, group in groupby(steps(setup), key=lambda step: step.server):
        if server is not None:
            switches = " ".join(f"{name}={value}" for name, value in server.environment.items())
            print(f"\n{switches} {shlex.join(server.command)} &")
        for step in group:
            note = "  # done" if step.done.exists() else ""
            print(f"{shlex.join(step.command)}{note}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(arguments: list[str] | None = None, needs: Needs = DEVICE_HOST) -> int:
    """Run the command line; its status.

    Args:
        arguments: The command's, by default those of the process.
        needs: What the runs need of this host.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the folder of Qwen3-30B-A3B in bfloat16")
    parser.add_argument("work", type=Path, help="folder for everything that is made")
    parser.add_argument("--tp-degree", type=int, default=4)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--port", type=int, default=8000, help="where the server answers")
    parser.add_argument("--tasks", type=_names, default=TASKS, help="what lm_eval asks: A,B")
    parser.add_argument("--include-path", type=Path, help="folder of tasks of your own")
    parser.add_argument("--limit", type=int, default=LIMIT, help="questions of each task")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts to measure with")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of each, and its answer")
    parser.add_argument("--dry-run", action="store_true", help="check, and print every command")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    options = parser.parse_args(arguments)
    setup = Setup(
        options.model.absolute(),
        options.work.absolute(),
        options.tp_degree,
        options.max_model_len,
        options.port,
        options.tasks,
        options.include_path and options.include_path.absolute(),
        options.limit,
        options.prompts,
        options.tokens,
    )
    console = Console(soft_wrap=True)
    try:
        outcomes = _check(setup, needs, console)
        if options.dry_run:
            _print_commands(setup)
            return 1 if Outcome.BAD in outcomes else 0
        if outcomes != {Outcome.GOOD}:
            print("not everything that is needed is here; see above", file=sys.stderr)
            return 1
        run(setup)
    except (ExpertScaleError, OSError) as error:
        print(f"benchmarks.trainium: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"benchmarks.trainium: {error}; run it again to go on", file=sys.stderr)
        return 1
    console.print(table(setup))
    if options.json is not None:
        found = {variant.name: figures(setup, variant.name) for variant in variants(setup)}
        options.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
