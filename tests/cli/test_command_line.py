"""What every command does: exit statuses, one line for an error, and odd places to print to."""

from __future__ import annotations

import errno
import json
import os
import platform
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from nxdi_expertscale import checkpoint
from nxdi_expertscale.cli import main
from nxdi_expertscale.cli.progress import LogLines
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.version import __version__
from tests.harness import checkpoints
from tests.harness.limits import PATIENCE

PROGRAM = [sys.executable, "-m", "nxdi_expertscale"]


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which ``$program`` is the command line's program."""
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "program": " ".join(PROGRAM), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    source = checkpoints.save(folder / "source")
    return checkpoint.quantize_checkpoint(source, folder / "fp8").destination


def run_here(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str, str]:
    """Run the command line in this process: its status, and what it prints."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return (end.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["quantize", "--help"], ["quantize"], ["no-command"], ["doctor"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_for_help_usage_errors_and_the_doctor(
    arguments: list[str],
) -> None:
    heavy = {"torch", "numpy", "safetensors", "matplotlib", "transformers", "tokenizers"}
    heavy |= set() if arguments == ["doctor"] else {"rich", "filelock", "blake3"}
    code = (
        "import sys\nfrom nxdi_expertscale.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        f"except SystemExit:\n    sys.exit(sorted({heavy!r} & set(sys.modules)) or 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert (result.returncode, result.stderr[:100] if arguments == ["--help"] else b"") == (0, b"")


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "/no/such", "fp8"],
        ["neuron-config", "/no/such"],
        ["verify", "/no/such"],
        ["inspect", "/no/such"],
        ["evaluate", "/no/such", "/no/other"],
    ],
)
def test_what_is_wrong_with_a_folder_is_said_without_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom nxdi_expertscale.cli import main\n"
        f"try:\n    main({command!r})\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert result.stdout.split() == [b"2", b"False"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "Missing argument 'SRC'. (see nxdi-expertscale quantize --help)"),
        (["no-command"], "No such command 'no-command'. (see nxdi-expertscale --help)"),
        (["verify", "x", "--workers", "0"], "--workers"),
        (["inspect", "x", "--bad\x1b[31m"], r"--bad\x1b[31m"),
        (["evaluate", "a", "b", "--tokens", "9999999999"], "--tokens"),
    ],
)
def test_usage_error_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_here(capsys, *arguments)

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("nxdi-expertscale: ")
    assert message in err


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys)

    assert (status, err) == (0, "")
    assert "quantize" in out and "Exit status" in out


class PanicException(BaseException):
    """As a panic of a library in Rust arrives in Python."""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TypeError("two\nlines"), 70, "unexpected TypeError: two lines; this is a defect"),
        (RecursionError(), 70, "unexpected RecursionError; this is a defect"),
        (PanicException("index"), 70, "unexpected PanicException: index"),
        (SystemExit(5), 70, "unexpected SystemExit: 5"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you…"), 2, "out of memory"),
        (RuntimeError("can't start new thread"), 2, "out of memory"),
        (CheckpointError("a\x1b[2Jb\nc"), 2, r"a\x1b[2Jb\nc"),
        (CheckpointError("x" * 10**7 + "; download it"), 2, "x; download it"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a  b"),
            2,
            "/a  b: Permission denied",
        ),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_goes_wrong_is_one_line(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "inspect_checkpoint", fail)

    found, out, err = run_here(capsys, "inspect", "folder")

    assert (found, out, err.count("\n")) == (status, "", 1)
    assert message in err
    assert len(err) < 3000
    assert all(character.isprintable() for character in err.rstrip("\n"))


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "x"], ["inspect", "x", "--debug"]])
def test_traceback_is_printed_with_debug(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(checkpoint, "inspect_checkpoint", fail)

    status, _, err = run_here(capsys, *arguments)

    assert status == 70
    assert "Traceback" in err and "in fail" in err
    assert err.splitlines()[-1].startswith("nxdi-expertscale: unexpected TypeError: a defect")


def test_handlers_of_signals_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    run_here(capsys, "no-command")

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_reader_that_has_gone_is_no_error(finished: Path) -> None:
    (finished.parent / "damaged").mkdir()
    for file in finished.iterdir():
        (finished.parent / "damaged" / file.name).write_bytes(file.read_bytes())
    (finished.parent / "damaged" / "config.json").write_text("{}")
    script = (
        '$program verify $good | true; echo "${PIPESTATUS[0]}";'
        '$program verify $bad | true; echo "${PIPESTATUS[0]}";'
        '$program --help | true; echo "${PIPESTATUS[0]}"'
    )

    result = shell(script, good=str(finished), bad=str(finished.parent / "damaged"))

    assert (result.stdout.split(), result.stderr) == (["0", "1", "0"], "")


def test_closed_stdout_and_stderr_are_no_error(finished: Path) -> None:
    result = shell(
        "$program verify $good >&-; echo $?; $program verify $good 2>&-; echo $?;"
        "$program inspect /nowhere >&- 2>&- <&-; echo $?",
        good=str(finished),
    )

    lines = result.stdout.splitlines()
    assert (lines[0], lines[-2:], result.stderr) == ("0", ["0", "2"], "")


def test_descriptors_that_are_closed_are_not_given_to_a_checkpoint(tmp_path: Path) -> None:
    """What a library prints on descriptor 2 may not land in a file of the checkpoint."""
    source = checkpoints.save(tmp_path / "source")
    code = (
        "import os, sys; from nxdi_expertscale.cli import main\n"
        "from nxdi_expertscale.checkpoint import parallel\n"
        "add = parallel.Meter.add\n"
        "parallel.Meter.add = lambda self, n: (os.write(1, b'noise'), os.write(2, b'noise'), "
        "add(self, n))\n"
        "main(sys.argv[1:])"
    )

    result = shell(
        '"$python" -c "$code" quantize $src $dst <&- >&- 2>&-; echo $?; '
        "$program verify $dst --json; echo $?",
        python=sys.executable,
        code=code,
        src=str(source),
        dst=str(tmp_path / "dst"),
    )

    assert [line for line in result.stdout.splitlines() if line.isdigit()] == ["0", "0"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_report_is_told(finished: Path, tmp_path: Path) -> None:
    source = finished.parent / "source"
    full = "cannot print the report: No space left on device"

    verified = shell("$program verify $dst > /dev/full", dst=str(finished))
    helped = shell("$program --help > /dev/full")
    made = shell(
        "$program quantize $src $dst > /dev/full", src=str(source), dst=str(tmp_path / "a")
    )
    silent = shell(
        "$program quantize $src $dst > /dev/full 2>&1", src=str(source), dst=str(tmp_path / "b")
    )

    assert (verified.returncode, verified.stderr) == (2, f"nxdi-expertscale: {full}\n")
    assert (helped.returncode, helped.stderr) == (2, f"nxdi-expertscale: {full}\n")
    assert made.returncode == 0
    assert made.stderr == f"nxdi-expertscale: {tmp_path / 'a'}: is complete, but {full}\n"
    assert silent.returncode == 0
    assert checkpoints.contents(tmp_path / "a") == checkpoints.contents(tmp_path / "b")


def test_a_terminal_that_is_closed_does_not_end_the_work(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "source")
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "quantize", str(source), str(tmp_path / "dst"), "--json"],
        stderr=stderr,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(stderr)
    assert os.read(terminal, 1)  # the bar is there, and its next write fails
    os.close(terminal)

    out, _ = process.communicate(timeout=PATIENCE)

    assert process.returncode == 0
    assert json.loads(out)["destination"] == str(tmp_path / "dst")


def test_tables_are_printed_in_any_encoding(finished: Path) -> None:
    result = subprocess.run(
        [*PROGRAM, "inspect", str(finished)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )

    assert (result.returncode, result.stderr) == (0, b"")
    assert b"qwen3_moe" in result.stdout
    assert b"\\u" not in result.stdout


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1"}, {"COLUMNS": "1"}, {"COLUMNS": "x"}])
def test_tables_have_no_codes_of_a_terminal(
    variables: Mapping[str, str],
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    status, out, err = run_here(capsys, "inspect", str(finished))

    assert (status, err) == (0, "")
    assert "\\x1b" not in out and "\x1b" not in out


@pytest.fixture
def strange_name(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint whose folder has a name that no encoding can show."""
    yield checkpoints.save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff")))


def test_path_that_is_not_utf8_is_refused_by_name(
    strange_name: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_here(capsys, "quantize", str(strange_name), str(tmp_path / "dst"))

    assert (status, err.count("\n")) == (2, 1)
    assert r"a\udcff" in err and "is not a name in UTF-8" in err


def test_code_of_a_checkpoint_is_named_in_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto_map = {"auto_map": {"AutoConfig": "evil/code--x.Y"}}
    source = checkpoints.save(tmp_path / "source", config=auto_map)
    (source / "x\x1b[2J.py").touch()

    status, _, err = run_here(capsys, "quantize", str(source), str(tmp_path / "dst"))

    names = r"config.json: auto_map (of evil/code), x\x1b[2J.py"
    assert (status, err) == (0, f"nxdi-expertscale: {source}: code is not copied: {names}\n")


def test_warnings_of_the_package_are_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.save(tmp_path / "source", config={"norm_topk_prob": False})

    _, _, err = run_here(capsys, "quantize", str(source), str(tmp_path / "dst"))

    assert err.startswith(f"nxdi-expertscale: {source}/config.json: ")
    assert err.count("\n") == 1


def test_version_has_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys, "--version")

    first, *others = out.splitlines()
    assert (status, err, first) == (0, "", f"nxdi-expertscale, version {__version__}")
    assert others[0] == f"python {platform.python_version()}"
    assert f"torch {metadata.version('torch')}" in others
    assert others[-1] == platform.platform()


def test_shell_completes_commands_and_options() -> None:
    source = shell("$program", _NXDI_EXPERTSCALE_COMPLETE="zsh_source")
    commands = shell(
        "$program",
        _NXDI_EXPERTSCALE_COMPLETE="zsh_complete",
        COMP_WORDS="nxdi-expertscale neuron-config --moe",
        COMP_CWORD="2",
    )

    assert (source.returncode, source.stderr) == (0, "")
    assert "#compdef nxdi-expertscale" in source.stdout
    assert "--moe-ep-degree" in commands.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["verify", "nope"], "nope: there is no such folder"),
        (["verify", "original"], "it has a config.json, as an original and another tool's"),
        (["neuron-config", "original"], "run quantize with it as SRC"),
        (["verify", "empty"], "it is no checkpoint, for it has no config.json either"),
        (["verify", "file"], "it is a file; name the folder that quantize made"),
    ],
    ids=" ".join,
)
def test_wrong_kind_of_folder_is_told_what_it_is(
    command: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints.save(tmp_path / "original")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)

    status, out, err = run_here(capsys, *command)

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


class TestLinesOfALog:
    """Progress where stderr is no terminal."""

    def lines(self, steps: list[tuple[float, int]], *, in_bytes: bool = True) -> list[str]:
        """What is written of a work of 1000 that has done so much at these times."""
        written, now = list[str](), [0.0]
        show = LogLines("work", in_bytes=in_bytes, write=written.append, clock=lambda: now[0])
        for now[0], done in steps:
            show(done, 1000)
        return written

    def test_quick_work_writes_none(self) -> None:
        assert self.lines([(second, 50 * second) for second in range(20)]) == []

    def test_long_work_writes_one_for_each_tenth(self) -> None:
        steps = [(float(second), second) for second in range(1, 1001)]

        lines = self.lines(steps)

        assert len(lines) == 10
        assert lines[0] == "work: 10%, 100 bytes of 1.0 kB, 1 byte a second, 0:15:00 left"

    def test_lines_are_not_close_together(self) -> None:
        lines = self.lines([(10.0 * n, 100 * n) for n in range(1, 11)], in_bytes=False)

        assert [line.split(",")[0] for line in lines] == ["work: 30%", "work: 60%", "work: 90%"]
        assert lines[-1] == "work: 90%, 900 of 1,000, 10 a second, 0:00:10 left"


@pytest.mark.parametrize("place", ["before", "after"])
def test_messages_and_warnings_go_to_a_log_file_too(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.save(tmp_path / "source", config={"norm_topk_prob": False})
    log = tmp_path / "log"
    option = ["--log-file", str(log)]
    command = ["quantize", str(source), str(tmp_path / "dst")]

    made = run_here(capsys, *(option + command if place == "before" else command + option))
    failed = run_here(capsys, "verify", str(tmp_path / "nope\x1b[2J"), *option)

    lines = log.read_text().splitlines()
    assert (made[0], failed[0]) == (0, 2)
    assert made[2].count("\n") == failed[2].count("\n") == 1
    assert sum("NxDI ignores norm_topk_prob" in line for line in lines) == 1
    assert lines[-1].endswith(r"INFO " + failed[2].strip().removeprefix("nxdi-expertscale: "))
    assert all(line.isprintable() for line in lines)


def test_log_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_here(capsys, "verify", "x", "--log-file", str(tmp_path / "no" / "log"))

    assert (status, err.count("\n")) == (2, 1)
    assert "No such file or directory" in err
