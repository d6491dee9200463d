"""The page's server under many visitors at once, over its own protocol."""

import asyncio
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from diffsynth.configs.options import LoadOptions
from diffsynth.testing import write_checkpoint, write_clip
from diffsynth.webui import queue as queue_module
from diffsynth.webui.queue import JobQueue
from diffsynth.webui.security import make_room
from diffsynth.webui.uploads import UploadLimits

pytestmark = pytest.mark.slow

pytest.importorskip("gradio", reason="needs gradio, the extra ui")
gradio_client = pytest.importorskip("gradio_client", reason="needs gradio, the extra ui")

MOST_WAITING = 6
VISITORS, REQUESTS = 4, 20
WHOLE = (0, 0, 0, "crop")  # start, end and rate of the reference, and its fit
PATIENCE = 600  # seconds until a test that waits gives up


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, its session) of a page with a tiny model."""
    import uvicorn

    from diffsynth.webui.app import make_app, temporary_folders
    from diffsynth.webui.page import Page
    from diffsynth.webui.session import open_session

    folder = tmp_path_factory.mktemp("server")
    held, cache = temporary_folders()
    session = open_session(
        str(write_checkpoint(folder / "tiny")),
        "models",
        LoadOptions(device="cpu"),
        output_dir=folder / "videos",
        cache=cache,
        limits=UploadLimits(megabytes=1),
    )
    queue = JobQueue(MOST_WAITING)
    app = make_app(Page(session, queue))
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.05)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", session
    uvicorn_server.should_exit = True
    thread.join(PATIENCE)
    queue.close()
    held.cleanup()


def request_of(client, clip, prompt, steps=2):
    video = gradio_client.handle_file(str(clip))
    asked = (video, prompt, "", "exact", "effi_AMF", 3, 0.75, steps, 1, 32, 32, 5, *WHOLE, None)
    return client.submit(*asked, api_name="/generate")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "ref.mp4", num_frames=5, height=32, width=32)


def answer_of(job):
    """Return the panel of a finished run, or the error that a program sees."""
    try:
        return job.result(PATIENCE)[0]
    except gradio_client.exceptions.AppError as error:
        return f"error: {error}"


@pytest.mark.slow
def test_many_requests_of_several_visitors_are_served_or_refused_clearly(server, clip):
    address, session = server

    def visit(number):
        client = gradio_client.Client(address, verbose=False)
        jobs = [request_of(client, clip, f"cat {number} {i}") for i in range(REQUESTS // VISITORS)]
        return [answer_of(job) for job in jobs]

    with ThreadPoolExecutor(VISITORS) as visitors:
        said = [text for texts in visitors.map(visit, range(VISITORS)) for text in texts]
    made = [text for text in said if "fv-result" in text]
    refused = [text for text in said if f"error: {MOST_WAITING} runs are waiting already" in text]
    assert [text for text in said if text not in made + refused] == []
    assert len(made) + len(refused) == REQUESTS
    assert len(made) > MOST_WAITING
    assert len(list(session.output_dir.glob("*.mp4"))) == len(made)


@pytest.mark.slow
def test_the_server_goes_on_after_a_cancelled_and_a_failed_run(server, clip):
    address, session = server
    client = gradio_client.Client(address, verbose=False)
    before = len(list(session.output_dir.glob("*.mp4")))
    running = request_of(client, clip, "a cat", steps=200)
    while not any("guided" in str(output[0]) for output in running.outputs()):
        time.sleep(0.05)
    client.predict(api_name="/cancel")
    assert answer_of(running) == "error: cancelled; no video was written"
    assert "error: prompt is empty" in answer_of(request_of(client, clip, " "))
    assert "fv-result" in request_of(client, clip, "a cat").result(PATIENCE)[0]
    assert len(list(session.output_dir.glob("*.mp4"))) == before + 1


def test_the_motion_is_shown_whatever_the_mode(server, clip):
    address, _shop = server
    client = gradio_client.Client(address, verbose=False)
    video = gradio_client.handle_file(str(clip))
    for mode in ("AMF", "No_transfer"):
        said, shown = client.predict(
            video, "", "", "exact", mode, 3, 0.75, 2, 1, 32, 32, 5, *WHOLE, api_name="/inspect"
        )
        assert "where it moves" in said
        assert shown["video"].endswith(".mp4") if isinstance(shown, dict) else shown.endswith(".mp4")
    with pytest.raises(gradio_client.exceptions.AppError, match="choose or upload a reference video first"):
        client.predict(
            None, "", "", "exact", "AMF", 3, 0.75, 2, 1, 0, 0, 0, 0, 0, 0, "crop", api_name="/inspect"
        )


def status(address, path):
    try:
        return urllib.request.urlopen(address + path, timeout=PATIENCE).status
    except urllib.error.HTTPError as error:
        return error.code


def test_files_of_other_folders_are_not_served(server, clip):
    address, session = server
    assert status(address, "/") == 200
    for path in (clip, "/etc/passwd", session.folder / "config.json", f"{session.cache}/../../passwd"):
        assert status(address, f"/gradio_api/file={quote(str(path))}") in (403, 404)
    assert status(address, "/gradio_api/proxy=http://127.0.0.1:1/") == 403


def asked(address, path, content=None, **headers):
    """(status, headers, text) of a GET, or of a POST of JSON or bytes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content is not None and not isinstance(content, bytes):
        content, named["Content-Type"] = json.dumps(content).encode(), "application/json"
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(address + path, content, named), timeout=PATIENCE
        )
        return answer.status, dict(answer.headers), answer.read(10_000).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode(errors="replace")


def call_with(path):
    reference = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    return {"data": [{"video": reference}, "a cat", "", "exact", "AMF", 3, 0.75, 2, 1, 32, 32, 5, *WHOLE]}


def test_only_uploads_are_read_whatever_a_request_names(server, clip):
    address, session = server
    uploads = session.cache.parent / "uploads"
    link = uploads / "link.mp4"
    link.symlink_to(clip)
    paths = [
        clip,
        "/etc/passwd",
        link,
        f"{uploads}/../../{clip.name}",
        f"file://{clip}",
        "http://127.0.0.1:1/a.mp4",
    ]
    paths += [
        session.output_dir / "x.mp4",
        session.folder / "config.json",
        "~/secret.mp4",
        f"{uploads}-other/a.mp4",
    ]
    before = sorted(map(str, session.references.rglob("*"))) if session.references.exists() else []
    for path in paths:
        for route in ("/gradio_api/call/generate", "/gradio_api/call/inspect", "/gradio_api/run/generate"):
            code, _, text = asked(address, route, call_with(path))
            assert (code, text) == (403, "the request names a file that was not uploaded here"), (route, path)
        code, _, _ = asked(
            address, "/gradio_api/queue/join", {**call_with(path), "fn_index": 1, "session_hash": "a"}
        )
        assert code == 403
    link.unlink()
    after = sorted(map(str, session.references.rglob("*"))) if session.references.exists() else []
    assert after == before
    assert asked(address, "/gradio_api/call/generate", {"data": ["x" * 2**20]})[0] == 413


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil"]
)
def test_foreign_hosts_are_refused(server, host):
    for path in ("/", "/config", "/gradio_api/info"):
        code, _, text = asked(server[0], path, Host=host)
        assert (code, "--allow-host" in text) == (403, True)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST"])
def test_own_hosts_are_served(server, host):
    assert asked(server[0], "/config", Host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:9999", "http://127.0.0.1:1", "null"]
)
def test_another_origin_changes_nothing_and_reads_nothing(server, origin):
    address, session = server
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\nabc\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    uploads = session.cache.parent / "uploads"
    before = len(list(uploads.rglob("*")))
    code, headers, _ = asked(address, "/gradio_api/upload", form, Origin=origin, Content_Type=kind)
    assert code == 403
    assert len(list(uploads.rglob("*"))) == before
    assert asked(address, "/gradio_api/call/cancel", {"data": [None]}, Origin=origin)[0] == 403
    _, headers, _ = asked(address, "/config", Origin=origin)
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    assert asked(address, "/gradio_api/upload", form, Origin=address, Content_Type=kind)[0] == 200


def test_the_routes_are_not_described(server):
    assert asked(server[0], "/gradio_api/openapi.json")[0] == 403
    assert asked(server[0], "/openapi.json")[0] == 403


def test_old_uploads_make_room(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}").mkdir()
        file = tmp_path / f"{index}" / "a.mp4"
        file.write_bytes(bytes(1000))
        os.utime(file, (index, index if index < 4 else time.time()))
    make_room(tmp_path, 2500)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.mp4")) == ["3", "4"]
    make_room(tmp_path, 0)
    assert [path.parent.name for path in tmp_path.rglob("*.mp4")] == ["4"]  # it may be in use


def test_uploads_over_the_quota_are_refused(server):
    address, session = server
    uploads, quota = session.cache.parent / "uploads", 10 * 2**20
    kind = {"Content_Type": "multipart/form-data; boundary=x"}

    def form(*files):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
        return b"".join(head + content + b"\r\n" for content in files) + b"--x--\r\n"

    def sent(*files):
        return asked(address, "/gradio_api/upload", form(*files), **kind)[0]

    before = set(uploads.rglob("*"))
    try:
        assert sent(*(bytes([i]) * 2**19 for i in range(30))) == 507
        codes = [sent(bytes([i]) * 900_000) for i in range(14)]
        assert codes[0] == 200
        assert codes[-1] == 507
        assert sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file()) <= quota
        for path in set(uploads.rglob("*.mp4")) - before:
            os.utime(path, (0, 0))  # as if they had been copied for runs
        assert sent(bytes([99]) * 900_000) == 200
    finally:
        for path in set(uploads.rglob("*.mp4")) - before:
            path.unlink()


def test_wrong_passwords_have_to_wait_longer_and_longer(server, monkeypatch):
    from diffsynth.webui import security

    now = [0.0]
    monkeypatch.setattr(security.time, "monotonic", lambda: now[0])
    answers, tried = [], []

    async def app(_scope, _receive, send):
        tried.append(now[0])
        await send({"type": "http.response.start", "status": 400, "headers": []})

    guard = security.Guard(app, uploads=server[1].cache, cache=server[1].cache)

    async def send(message):
        answers.append(message)

    async def receive():
        return {"type": "http.request", "body": b"username=a&password=b"}

    def log_in():
        headers = [(b"host", b"localhost")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/login",
            "headers": headers,
            "client": ("1.2.3.4", 1),
        }
        asyncio.run(guard(scope, receive, send))
        return next(m["status"] for m in answers[::-1] if m["type"] == "http.response.start")

    for second in range(120):
        now[0] = float(second)
        assert {log_in() for _ in range(20)} <= {400, 429}
    assert tried == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0] or len(tried) <= 10
    assert len(tried) >= 7


def test_a_refused_request_is_an_error_for_programs_and_a_budget_is_kept(server, clip):
    address, session = server
    client = gradio_client.Client(address, verbose=False)
    with pytest.raises(gradio_client.exceptions.AppError, match="prompt is empty"):
        request_of(client, clip, "").result(PATIENCE)
    object.__setattr__(session, "max_minutes", 1e-9)
    object.__setattr__(session, "pace", 1e9)
    try:
        with pytest.raises(gradio_client.exceptions.AppError, match="1e-09 are the limit here"):
            request_of(client, clip, "a cat").result(PATIENCE)
        look = (gradio_client.handle_file(str(clip)), "", "", "exact", "AMF", 3, 0.75, 2, 1, 32, 32, 5)
        with pytest.raises(gradio_client.exceptions.AppError, match="1e-09 are the limit here"):
            client.predict(*look, *WHOLE, api_name="/inspect")
    finally:
        object.__setattr__(session, "max_minutes", None)
    assert request_of(client, clip, "a cat").result(PATIENCE)


def test_a_run_whose_visitor_has_gone_ends(server, clip, monkeypatch):
    address, session = server
    monkeypatch.setattr(queue_module, "MOST_ABSENT", 1.0)
    client = gradio_client.Client(address, verbose=False)
    before = set(session.output_dir.glob("*.mp4"))
    gone = request_of(client, clip, "a dog", steps=200)
    while not gone.outputs():
        time.sleep(0.05)
    gone.cancel()
    begun = time.monotonic()
    assert request_of(client, clip, "a cat").result(PATIENCE)
    # 200 steps would take longer, and their video is not written.
    assert len(set(session.output_dir.glob("*.mp4")) - before) == 1
    assert time.monotonic() - begun < PATIENCE
