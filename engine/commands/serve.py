"""svdengine serve: OpenAI's interface over HTTP, and a chat page."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from svdengine.commands.arguments import Number, check_extra
from svdengine.commands.help_pages import Command, option
from svdengine.commands.options import (
    kept_kv,
    kv_save_option,
    model_label,
    model_options,
    open_shared_model,
    prefill_rows_option,
    verbosity_options,
)

_LONGEST = 1e8  # seconds, three years: what the system's clocks and locks can wait for


EXAMPLES = (
    "svdengine serve smollm2.svdp                           then open http://127.0.0.1:8080",
    "svdengine serve smollm2.svdp --host 0.0.0.0 --api-key-file keys.txt --log-file serve.log",
)


@click.command("serve", cls=Command, examples=EXAMPLES)
@model_options
@option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all networks.")
@option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@option("--name", metavar="NAME", help="Name of the model in requests; by default that of its file.")
@option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    help="A key that clients must show. Repeatable. A file is safer: others on this machine see command lines.",
)
@option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="API keys, one a line.")
@option("--cors-origin", multiple=True, metavar="URL", help="Web pages of this origin may use the server.")
@option(
    "--embeddings",
    is_flag=True,
    help="Answer /v1/embeddings, by the mean of the model's last hidden states. It is no trained embedding model.",
)
@option(
    "--max-requests",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    metavar="N",
    help="Completions that may run or wait; further ones get status 429.",
)
@option(
    "--max-body", type=click.IntRange(1, 1 << 20), default=4, show_default=True, metavar="MIB", help="Largest request."
)
@option(
    "--request-seconds",
    type=Number(0, _LONGEST, min_open=True),
    default=600.0,
    show_default=True,
    metavar="S",
    help="An answer that takes longer ends there.",
)
@option(
    "--drain-seconds",
    type=Number(0, _LONGEST),
    default=30.0,
    show_default=True,
    metavar="S",
    help="On SIGTERM, SIGHUP or Ctrl-C, time for running answers to end.",
)
@option(
    "--max-connections",
    type=click.IntRange(1, 65536),
    default=1024,
    show_default=True,
    metavar="N",
    help="Open connections; one that has no request gives way to a new one.",
)
@option(
    "--address-connections",
    type=click.IntRange(1, 65536),
    default=256,
    show_default=True,
    metavar="N",
    help="Of these, connections of one address.",
)
@option(
    "--head-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Time for a client to send the head of a request.",
)
@option(
    "--body-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="S",
    help="Time for a client to send the body of a request.",
)
@option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the log to FILE, not to standard error. It has a line for each request: who, what, status, time.",
)
@option("--log-prompts", is_flag=True, help="Write what was asked to the log as well. By default it never is.")
@prefill_rows_option
@kv_save_option
@verbosity_options
def command(
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    kv_save: Path | None,
    log_file: Path | None,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve MODEL, a .svdp file or a name on a hub, to programs that speak OpenAI's interface, and to browsers.

    API keys are also read from the environment variable SVDENGINE_API_KEY. The log has a line for each request; -q
    leaves only what went wrong, and -v adds what monitors and the chat page ask for.
    """
    check_extra("serve", "starlette", "uvicorn")
    from svdengine.server.http_server import HttpServer, listen, url_of
    from svdengine.server.request_log import set_up_log
    from svdengine.server.service import Service
    from svdengine.server.settings import Settings, read_api_keys

    settings = Settings(
        name=options["name"] or model_label(options),
        host=options["host"],
        port=options["port"],
        api_keys=read_api_keys(api_key, api_key_file),
        cors_origins=options["cors_origin"],
        embeddings=options["embeddings"],
        capacity=options["max_requests"],
        max_body=options["max_body"] << 20,
        max_connections=options["max_connections"],
        address_connections=options["address_connections"],
        head_seconds=options["head_seconds"],
        body_seconds=options["body_seconds"],
        request_seconds=options["request_seconds"],
        drain_seconds=options["drain_seconds"],
        log_prompts=options["log_prompts"],
    )
    set_up_log(verbose=verbose, quiet=quiet, file=log_file)
    with listen(settings) as listening, open_shared_model(options) as llm, kept_kv(llm, kv_save):
        service = Service(llm, settings)
        server = HttpServer(service, lambda: _say("\nending; a second signal ends at once"))
        click.echo(f"{settings.name} on {llm.executor.name} at {url_of(listening)}", err=True)
        if not settings.loopback and not settings.api_keys:
            click.echo("warning: whoever reaches this machine may use the server; --api-key restricts it", err=True)
        server.run(listening)


def _say(text: str) -> None:
    """Print to standard error, unless the terminal went."""
    with suppress(OSError):
        click.echo(text, err=True)
