"""Quantizing a checkpoint from S3 on loopback, beside the same from a folder.

    python -m benchmarks.streaming [--gigabytes 1] [--repeat 3] [--folder FOLDER]

The server is a process of its own on the same cores, and gives ranges of the folder's files from
the page cache. Both ways take turns; the best of the repetitions counts, of the time and of the
work of all cores, which tells more on a machine that is busy. Needs the extra ``[s3]``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from benchmarks.quantize import make_checkpoint

STEP = """
import sys, time
from nxdi_expertscale.checkpoint import quantize_checkpoint
started = time.process_time()
seconds = quantize_checkpoint(sys.argv[1], sys.argv[2]).seconds
print(seconds, time.process_time() - started)
"""


class _Objects(BaseHTTPRequestHandler):
    """Lists a folder as a bucket, and gives ranges of its files."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_GET(self) -> None:
        key = unquote(urlsplit(self.path).path).strip("/").partition("/")[2]
        if key:
            self._give(self.folder / key.rpartition("/")[2])
        else:
            self._list()

    def _list(self) -> None:
        contents = "".join(
            f"<Contents><Key>model/{escape(path.name)}</Key><Size>{path.stat().st_size}</Size>"
            "<ETag>&quot;0&quot;</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            "</Contents>"
            for path in sorted(self.folder.iterdir())
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def _give(self, path: Path) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with path.open("rb") as file:
            left = min(last + 1, path.stat().st_size) - first
            self.send_response(206)
            self.send_header("Content-Length", str(left))
            self.end_headers()
            self.wfile.flush()
            while left:
                count = os.sendfile(self.connection.fileno(), file.fileno(), first, left)
                first, left = first + count, left - count


def _serve(folder: Path, ready: Connection) -> None:
    _Objects.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Objects)
    ready.send(server.server_address[1])
    server.serve_forever()


def measure(source: str, folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds that it takes to quantize a source, and seconds of work, in a process of its own."""
    destination = folder / "made"
    command = [sys.executable, "-c", STEP, source, str(destination)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(destination)
    elapsed, work = map(float, done.stdout.split())
    return elapsed, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = folder / "source"
        make_checkpoint(source, arguments.gigabytes)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.Process(target=_serve, args=(source, sender), daemon=True)
        server.start()
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{receiver.recv()}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        ways = {"folder": str(source), "S3 on loopback": "s3://bucket/model"}
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        for _ in range(arguments.repeat):
            for way, place in ways.items():
                elapsed, work = measure(place, folder, environment)
                best[way] = min(best[way][0], elapsed), min(best[way][1], work)
        server.terminate()
        server.join()
    for way, (elapsed, work) in best.items():
        ratios = f"{elapsed / best['folder'][0]:.2f} and {work / best['folder'][1]:.2f} of a folder"
        print(f"{way:16} {elapsed:6.2f} s, {work:6.2f} s of work: {ratios}")


if __name__ == "__main__":
    main()
