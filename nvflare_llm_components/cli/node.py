"""The command of a site's further machines."""

import logging
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import app, one_sentence


@app.command()
def node(
    address: Annotated[str, typer.Argument(help="of this machine in the site's network: 10.0.0.2:29400")],
    secret_file: Annotated[
        Path | None,
        typer.Option(
            envvar="NVFLARE_LLM_NODES_SECRET_FILE",
            help="32 bytes or more, the same on all machines",
        ),
    ] = None,
) -> None:
    """Let this machine train for a site whose FLARE runs on another one (NVFLARE_LLM_NODES there)."""
    from nvflare_llm_components.training.node import NodeServer
    from nvflare_llm_components.training.nodes import address_of
    from nvflare_llm_components.training.secret import read_secret

    with one_sentence():
        host, port = address_of(address, "ADDRESS")
        server = NodeServer(host, port, read_secret(secret_file))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    typer.echo(f"Serving at port {server.port}. A site with this secret may start processes here.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run()
