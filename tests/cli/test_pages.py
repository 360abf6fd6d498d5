"""``--html``: one page that a real browser shows as it is meant, and that asks no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.cli.commands import cli
from tests.harness import checkpoints
from tests.harness.limits import PATIENCE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """What ``inspect`` writes of a folder whose name is markup."""
    pytest.importorskip("matplotlib")
    source = checkpoints.save(tmp_path / "<b onclick=x>&amp;")
    file = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["inspect", str(source), "--html", str(file)])
    assert done.exit_code == 0, done.output
    return file


def test_page_needs_nothing_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert set(re.findall(r'(?:src|href)="(.{0,14})', text)) == {"data:image/png"}
    assert "<script" not in text and "<b onclick" not in text
    assert "&lt;b onclick=x&gt;&amp;amp;" in text


@pytest.mark.parametrize(
    ("file", "says"), [("page.txt", "has to end in .html"), ("no/page.html", "no is not a folder")]
)
def test_file_that_cannot_be_a_page_is_refused_before_the_work(
    file: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(cli, ["inspect", "nothing", "--html", file])

    assert says in str(done.exception)


class Asked(ThreadingHTTPServer):
    """A server that notes what it is asked for."""

    paths: list[str]


@pytest.fixture
def server() -> Iterator[Asked]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    served = Asked(("127.0.0.1", 0), Handler)
    served.paths = []
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium: apt-get install chromium")
def test_browser_shows_it_and_fetches_nothing(page: Path, server: Asked, tmp_path: Path) -> None:
    # Whatever is fetched by any scheme would come by this proxy.
    proxy = f"http://127.0.0.1:{server.server_port}"
    # What a name could smuggle in if it were markup, and if the page's policy let it.
    smuggled = page.read_text(encoding="utf-8").replace(
        "</body>", f'<img src="{proxy}/picture"><script>document.title = "run"</script></body>'
    )
    page.write_text(smuggled, encoding="utf-8")

    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--proxy-server={proxy}",
            "--proxy-bypass-list=<-loopback>",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    # What the browser has made of it, written down again.
    assert "<h1>&lt;b onclick=x&gt;&amp;amp;: how far" in done.stdout
    assert done.stdout.count("<tr>") == page.read_text(encoding="utf-8").count("<tr>")
    assert "<title>run" not in done.stdout
    assert [path for path in server.paths if "picture" in path or "file:" in path] == []
