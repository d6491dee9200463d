"""`fastvmt ui`: serve the web page."""

import socket
from argparse import Namespace
from pathlib import Path

from diffsynth.cli.console import Console
from diffsynth.jobs.errors import RunFailedError, UsageError
from diffsynth.jobs.models import load_options
from diffsynth.jobs.publish import check_folder
from diffsynth.webui.app import make_app, temporary_folders
from diffsynth.webui.page import Page, import_gradio
from diffsynth.webui.queue import JobQueue
from diffsynth.webui.security import is_local, read_auth
from diffsynth.webui.session import open_session, other_sessions
from diffsynth.webui.uploads import UploadLimits


def run(options: Namespace, console: Console) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        UsageError: an option is wrong, or the output folder cannot be written to.
        RunFailedError: the port is taken, or the model cannot be loaded.
        ImportError: gradio is not installed.
    """
    try:
        auth = read_auth(options.auth, options.auth_file)
    except ValueError as error:
        raise UsageError(str(error)) from error
    import_gradio()
    import uvicorn

    try:
        listening = socket.create_server((options.host, options.port))
    except (OSError, OverflowError) as error:
        where = f"{options.host}:{options.port}"
        raise RunFailedError(f"cannot listen at {where}: {error}; --port 0 takes a free one") from error
    if not is_local(options.host) and auth is None:
        console.problem(f"who reaches {options.host} may use this page; --auth USER:PASSWORD asks who")
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    check_folder(output_dir)
    held, cache = temporary_folders()
    queue = JobQueue(options.max_waiting)
    with held:
        session = open_session(
            options.model,
            options.models_dir,
            load_options(vars(options)),
            output_dir=output_dir.resolve(),
            cache=cache,
            limits=UploadLimits(megabytes=options.max_upload, frames=options.max_frames),
            max_minutes=options.max_minutes,
        )
        alone = is_local(options.host) and not options.allow_host  # otherwise a proxy serves others
        others = other_sessions(session, options.models_dir)
        page = Page(session, queue, *others, shared=options.shared or alone)
        app = make_app(page, auth, host=options.host, allowed_hosts=options.allow_host)
        address = f"http://{options.host}:{listening.getsockname()[1]}"
        console.note(f"the page is at {address}; videos go to {output_dir}; Ctrl-C ends")
        owner = f"{address}/?owner={page.owner_key}"
        console.note(f"{owner} shows and cancels the runs of all visitors")
        console.result({"address": address, "owner": owner, "output_dir": str(output_dir)})
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        try:
            server.run(sockets=[listening])
        finally:
            queue.close()
    return 0
