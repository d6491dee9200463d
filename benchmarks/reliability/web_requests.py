"""Ask a running page for what it must not give: files of the server, routes, hosts and origins of others.

    python benchmarks/reliability/web_requests.py [--json table.json]

Starts `fastvmt ui` with a tiny random checkpoint in a process of its own and prints, for each kind of
attempt, how many were tried and how many held: were refused, with nothing of a secret file in the answer. At
the end the server must be up, with no file outside of its temporary folder changed. Exit 1 if one failed.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from diffsynth.testing import write_checkpoint, write_clip

SECRET = "the-secret-of-this-test"
REFUSED = (400, 401, 403, 404, 405, 411, 413, 422)
CALLS = ("call/generate", "call/inspect", "run/generate", "queue/join")
JSON = "application/json"
FORM = "multipart/form-data; boundary=x"


@dataclass(frozen=True)
class Attempt:
    """A request that must be refused."""

    kind: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def form(name: str, content: bytes) -> bytes:
    """Return the body of an upload of one file."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n"


def call(path: str, **more: object) -> bytes:
    """Return the body of a call whose reference is the file at this path."""
    reference = {"video": {"path": path, "meta": {"_type": "gradio.FileData"}}}
    rest = ["a cat", "", "exact", "AMF", 3, 0.75, 2, 1, 32, 32, 5, 0, 0, 0, "crop", None]
    return json.dumps({"data": [reference, *rest], **more}).encode()


def attempts(secret: Path, uploads: Path, port: int) -> Iterator[Attempt]:
    """Yield requests for the secret file and for what only the page's own visitors may ask."""
    link = uploads / "link.mp4"
    up = os.path.relpath(secret, uploads)
    named = [
        str(secret), "/etc/passwd", "/proc/self/environ", str(link), f"{uploads}/{up}",
        f"{uploads}-other/a.mp4", f"file://{secret}", "http://127.0.0.1:1/a.mp4", "//127.0.0.1/share/a.mp4",
        "~/secret.mp4", f"{uploads}/./../{uploads.name}/{up}", up, "", "concat:/etc/passwd|/etc/hosts",
        f"{secret}\x00.mp4",
    ]  # fmt: skip
    for path in named:
        for route in CALLS:
            more = {"fn_index": 1, "session_hash": "a"} if route == "queue/join" else {}
            yield Attempt(
                "a reference that was not uploaded",
                f"/gradio_api/{route}",
                call(path, **more),
                {"Content-Type": JSON},
            )
    for path in (*named[:5], named[10]):
        for text in (quote(path), quote(path, safe=""), quote(quote(path, safe=""), safe="")):
            yield Attempt("a file by its path", f"/gradio_api/file={text}")
    for path in (
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/static/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/openapi.json",
        "/gradio_api/openapi.json",
        "/docs",
    ):
        yield Attempt("another route", path)
    for host in (
        "evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil", "0.0.0.0",
        f"evil.example:{port}", "[::2]", "",
    ):  # fmt: skip
        for path in ("/", "/config", "/gradio_api/info"):
            yield Attempt("a foreign host", path, None, {"Host": host})
    for origin in (
        "https://evil.example", "http://localhost:9999", "http://127.0.0.1:1", "null",
        f"http://127.0.0.1:{port}.evil.example", f"http://localhost:{port}",
    ):  # fmt: skip
        for path, body, content in (
            ("/gradio_api/upload", form("a.mp4", b"abc"), FORM),
            ("/gradio_api/call/cancel", b'{"data": [null]}', JSON),
            ("/gradio_api/call/generate", call(str(uploads / "a.mp4")), JSON),
        ):
            yield Attempt("another origin", path, body, {"Origin": origin, "Content-Type": content})
    for body in (
        b'{"data": [' + b"[" * 100_000,
        b"{",
        b"\xff\xfe",
        json.dumps({"data": ["x" * 2**20]}).encode(),
    ):
        yield Attempt("a damaged or endless call", "/gradio_api/call/generate", body, {"Content-Type": JSON})


def ask(port: int, attempt: Attempt) -> tuple[int, str]:
    """Return the status and the text of the answer; paths are sent as they stand."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Host": f"127.0.0.1:{port}", **attempt.headers}
    try:
        connection.request("GET" if attempt.body is None else "POST", attempt.path, attempt.body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(100_000).decode(errors="replace")
    except (BrokenPipeError, ConnectionResetError):
        return 413, ""  # the server has closed without reading the rest
    finally:
        connection.close()


def uploads_folder(port: int, clip: Path) -> Path:
    """Upload a clip, as the page does, and return the folder where this server keeps uploads."""
    code, text = ask(
        port, Attempt("", "/gradio_api/upload", form("ref.mp4", clip.read_bytes()), {"Content-Type": FORM})
    )
    if code != 200:
        raise RuntimeError(f"the server refused an upload of its own page: {code} {text[:200]}")
    return Path(json.loads(text)[0]).parent.parent


def contents(folder: Path, but: Path) -> dict[Path, int]:
    """Return the size of each file in a folder, but for those in one of its folders."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(but))
    return {path: path.stat().st_size for path in files}


def try_all(folder: Path) -> dict[str, dict[str, int]]:
    """Start the page, try everything and return the counts of each kind."""
    secret = folder / "secret.mp4"
    secret.write_text(SECRET)
    model = write_checkpoint(folder / "tiny")
    clip = write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "diffsynth", "ui", "--model", str(model), "--port", "0", "--json"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = json.loads(server.stdout.readline())["address"]  # told once it listens
    port = int(address.rpartition(":")[2])
    table: dict[str, dict[str, int]] = {}
    try:
        uploads = uploads_folder(port, clip)
        (uploads / "link.mp4").symlink_to(secret)
        before = contents(folder, temporary)
        for attempt in attempts(secret, uploads, port):
            code, text = ask(port, attempt)
            count = table.setdefault(attempt.kind, {"tried": 0, "held": 0})
            count["tried"] += 1
            held = code in REFUSED and SECRET not in text and "root:" not in text
            count["held"] += held
            if not held:
                print(
                    "NOT HELD", attempt.kind, attempt.path, attempt.headers, code, text[:200], file=sys.stderr
                )
        after = contents(folder, temporary)
        page = ask(port, Attempt("", "/"))[0]
        table["the server afterwards: still up, no file changed"] = {
            "tried": 1,
            "held": int(page == 200 and after == before),
        }
    finally:
        server.terminate()
        server.wait(60)
    return table


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = try_all(Path(folder).resolve())
    print("| attempt | tried | held |\n| --- | --: | --: |")
    for kind, count in table.items():
        print(f"| {kind} | {count['tried']} | {count['held']} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))
    return int(any(count["tried"] != count["held"] for count in table.values()))


if __name__ == "__main__":
    sys.exit(main())
