"""The page: one tab for each file in ``tabs/``."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from genkit_apps.cli import loopback
from genkit_apps.guard import Guard
from genkit_apps.limits import Limits
from genkit_apps.models import Models
from genkit_apps.style import CSS, HEAD, THEME

TABS = ("compare", "trajectory", "autoregressive", "results")


@dataclass(frozen=True)
class Context:
    """What a tab is given.

    Attributes:
        models: the models of the app.
        limits: bounds of a request.
        runs: the folder whose run folders the results tab may open; None: there is none.
        page: the page, for ``page.load``.
        folder: the app's own folder for files to download; nothing outside it is served.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
    runs: Path | None = None
    page: Any = None
    folder: Path = Path()


def build(models: Models, *, runs: Path | None = None, limits: Limits | None = None) -> gr.Blocks:
    """The app as ``gr.Blocks``; :func:`serve` starts it.

    Args:
        models: those a user can choose from.
        runs: a folder with run folders of ``genkit-eval`` for the results tab.
        limits: bounds of a request.
    """
    folder = own_folder()
    with gr.Blocks(title="genkit", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        app = Context(models, limits or Limits(), runs, page, folder)
        gr.HTML("<h1>genkit <span>see what guidance does</span></h1>", elem_id="header", js_on_load=None)
        with gr.Tabs(elem_id="tabs"):
            for name in TABS:
                if importlib.util.find_spec(f"genkit_apps.tabs.{name}") is None:
                    continue
                tab = importlib.import_module(f"genkit_apps.tabs.{name}")
                with gr.Tab(tab.TITLE, id=name, elem_id=f"tab-{name}"):
                    tab.build(app)
    return page


@functools.cache
def own_folder() -> Path:
    """The one folder from which files are served, removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="genkit-demo-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")  # served, too; by default below the working directory
    return folder


def serve(page: gr.Blocks, *, max_queue: int = 32, **launch: Any) -> Any:
    """Queue and launch with the settings that keep the app to itself.

    Args:
        max_queue: events that may wait; further ones are told that the queue is full.
        launch: further arguments of ``gr.Blocks.launch``: ``server_name``, ``server_port`` (0 takes a free one), ``auth``...
    """
    page.queue(max_size=max_queue, default_concurrency_limit=1)
    local = "auth" not in launch and loopback(launch.get("server_name", "127.0.0.1"))
    settings: dict[str, Any] = {
        "theme": THEME,
        "css": CSS,
        "head": HEAD,
        "footer_links": ["api"],
        "server_name": "127.0.0.1",
        "share": False,
        "quiet": True,
        "show_error": False,
        "allowed_paths": [],
        "max_file_size": 1,  # see Guard: there are no uploads
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "pwa": False,
        "state_session_capacity": 200,
        "app_kwargs": {"middleware": [Middleware(Guard, local=local)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    }
    settings.update(launch)
    if settings.get("server_port") == 0:
        settings["server_port"] = _free_port(settings["server_name"])
    return page.launch(**settings)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        port: int = found.getsockname()[1]
        return port


__all__ = ["TABS", "Context", "build", "own_folder", "serve"]
