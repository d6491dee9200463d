"""The page's server under many visitors at once, over its own protocol."""

import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsynth.configs.options import LoadOptions
from diffsynth.testing import write_checkpoint, write_clip
from diffsynth.webui.queue import JobQueue
from diffsynth.webui.uploads import UploadLimits

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

    from diffsynth.webui.app import Page, make_app, temporary_folders
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
    config = uvicorn.Config(make_app(Page(session, queue)), port=0, log_level="error")
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
    asked = (video, prompt, "", "exact", "effi_AMF", 3, 0.75, steps, 1, 32, 32, 5, *WHOLE)
    return client.submit(*asked, api_name="/generate")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "ref.mp4", num_frames=5, height=32, width=32)


@pytest.mark.slow
def test_many_requests_of_several_visitors_are_served_or_refused_clearly(server, clip):
    address, session = server

    def visit(number):
        client = gradio_client.Client(address, verbose=False)
        jobs = [request_of(client, clip, f"cat {number} {i}") for i in range(REQUESTS // VISITORS)]
        return [job.result(PATIENCE)[0] for job in jobs]

    with ThreadPoolExecutor(VISITORS) as visitors:
        said = [text for texts in visitors.map(visit, range(VISITORS)) for text in texts]
    made = [text for text in said if "fv-result" in text]
    refused = [text for text in said if f"{MOST_WAITING} runs are waiting already" in text]
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
    assert "Cancelled; nothing was written" in running.result(PATIENCE)[0]
    assert "prompt is empty" in request_of(client, clip, " ").result(PATIENCE)[0]
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
    said, _shown = client.predict(
        None, "", "", "exact", "AMF", 3, 0.75, 2, 1, 0, 0, 0, 0, 0, 0, "crop", api_name="/inspect"
    )
    assert "choose or upload a reference video first" in said


def status(address, path):
    try:
        return urllib.request.urlopen(address + path, timeout=PATIENCE).status
    except urllib.error.HTTPError as error:
        return error.code


def test_files_of_other_folders_are_not_served(server, clip):
    address, session = server
    assert status(address, "/") == 200
    for path in (clip, "/etc/passwd", session.folder / "config.json", f"{session.cache}/../../passwd"):
        assert status(address, f"/gradio_api/file={path}") in (403, 404)
    assert status(address, "/gradio_api/proxy=http://127.0.0.1:1/") == 403
