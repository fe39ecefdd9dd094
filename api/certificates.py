"""--enable-ssl-refresh: TLS files that change are read again; connections that are open stay as they are."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from fuseline.api.config import ConfigError, ServerConfig

LOG = logging.getLogger("fuseline.tls")
SECONDS = 1.0
"""Between two looks at the files."""
Stamp = tuple[tuple[float, int], ...]


def check_tls(config: ServerConfig) -> None:
    """A trial of the --ssl-* files and ciphers. Raises ConfigError that names the flag."""
    if not config.ssl_certfile:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _told("--ssl-certfile and --ssl-keyfile"):
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    with _told("--ssl-ca-certs"):
        if config.ssl_ca_certs:
            context.load_verify_locations(config.ssl_ca_certs)
    with _told("--ssl-ciphers"):
        if config.ssl_ciphers:
            context.set_ciphers(config.ssl_ciphers)


def _no_password() -> str:
    raise OSError("the key needs a password: store it without one")


@contextmanager
def _told(flags: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{flags} cannot be used: {error}") from error


async def refresh_certificates(context: ssl.SSLContext, config: ServerConfig, seconds: float = SECONDS) -> None:
    """Never ends. A file that is missing or half written is tried again when it changes; the old one serves on.

    A context of its own tries the files first: a pair that does not match would leave the server's one broken.
    """
    loaded = _stamp(config)
    while True:
        await asyncio.sleep(seconds)
        found = _stamp(config)
        if found is None or found == loaded:
            continue
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
            if config.ssl_ca_certs:
                context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            LOG.warning("the TLS files have changed and cannot be used: %s", error)
        else:
            LOG.info("the TLS files have changed and are in use")
        loaded = found


def _stamp(config: ServerConfig) -> Stamp | None:
    """Time and size of each file; None while one is missing."""
    paths = filter(None, (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs))
    try:
        return tuple((stat.st_mtime, stat.st_size) for stat in map(os.stat, paths))
    except OSError:
        return None
