"""The ``genkit-demo`` command. Nothing heavy is imported until the arguments are known to be right."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

MIN_PASSWORD = 8

app = typer.Typer(
    name="genkit-demo", add_completion=False, no_args_is_help=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


class InputError(Exception):
    """Arguments that do not work together; the message says what would."""


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Besides the built-in ones: a .safetensors checkpoint, a folder, or a hub id. Repeat for several."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps.")] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on. Others than this machine's own need --public.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    public: Annotated[bool, typer.Option("--public", help="Let other machines in; needs a password.")] = False,
    share: Annotated[bool, typer.Option("--share", help="A public link through gradio.live; needs a password.")] = False,
    password: Annotated[
        str | None,
        typer.Option(envvar="GENKIT_DEMO_PASSWORD", help=f"Asked for with any user name, {MIN_PASSWORD} characters or more."),
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder whose genkit-eval runs the results tab shows.")] = None,
    max_queue: Annotated[int, typer.Option(min=1, max=1000, help="Requests that may wait; further ones are sent away.")] = 32,
) -> None:
    """Start the app: see what guidance does, in the browser."""
    check_access(host, public, share, password)
    if runs is not None and not runs.is_dir():
        raise InputError(f"--runs {runs}: there is no such folder; genkit-eval writes runs to the folder given as --out")
    if find_spec("gradio") is None:
        raise InputError("gradio is not installed; pip install 'genkit-image[demo]'")
    start(model or [], device, host, port, share, password, runs, max_queue)


def check_access(host: str, public: bool, share: bool, password: str | None) -> None:
    """Raise InputError unless those who can reach the app are meant to: others than this machine need a flag and a password."""
    if not loopback(host) and not public:
        raise InputError(f"--host {host} lets other machines in; add --public and --password, or use 127.0.0.1")
    open_to_others = share or public or not loopback(host)
    if open_to_others and password is None:
        raise InputError(f"{'--share' if share else '--public'} needs --password (or GENKIT_DEMO_PASSWORD in the environment)")
    if password is not None and len(password) < MIN_PASSWORD:
        raise InputError(f"--password has {len(password)} characters; use {MIN_PASSWORD} or more")


def loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def login(password: str) -> Callable[[str, str], bool]:
    """Whether a login is right: any user name with the password, compared in constant time."""
    return lambda user, given: hmac.compare_digest(given.encode(), password.encode())


def start(
    model: list[str], device: str, host: str, port: int, share: bool, password: str | None, runs: Path | None, max_queue: int
) -> None:
    """Load, build, serve until interrupted."""
    typer.echo("loading ...", err=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the app's folder is removed
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    from genkit_apps.app import build, serve
    from genkit_apps.models import Models

    try:
        models = Models(model, device)
        models.warm_up()
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise InputError(str(error)) from None
    access: dict[str, Any] = {}
    if password is not None:
        access = {"auth": login(password), "auth_message": "Any user name, and the password."}
    try:
        page = build(models, runs=runs)
        _, local, public_url = serve(
            page, max_queue=max_queue, server_name=host, server_port=port, share=share, prevent_thread_lock=True, **access
        )
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error}; --port 0 takes a free one") from None
    typer.echo(f"genkit-demo is at {public_url or local}  (Ctrl-C stops it)")
    page.block_thread()


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0 when done, 2 for input that does not work (one line says what would), 130 when interrupted."""
    sys.exit(invoke(sys.argv[1:] if args is None else args))


def invoke(args: list[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        outcome: Any = typer.main.get_command(app).main(args, prog_name="genkit-demo", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        # typer's usage errors: their base class has moved between versions, this method has not.
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        return _fail(text, 2) if text else 2


def _fail(message: str, code: int) -> int:
    typer.echo(f"genkit-demo: {' '.join(message.split())}", err=True)
    return code
