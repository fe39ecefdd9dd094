"""A trial of the chat template when the server starts, in a process that can be ended.

A template that has passed is remembered in the cache, as the start of such a process takes longer than all else that
the server's own process does meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import fuseline
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import ApiError
from fuseline.api.prompt.template import ChatTemplate
from fuseline.api.prompt.worker_process import start_context
from fuseline.compile.cache.files import CacheError, read_file, write_file
from fuseline.compile.target import default_cache_dir
from fuseline.engine.memory.limit_memory import limit_memory

LOG = logging.getLogger("fuseline.prompts")
TRIAL = [{"role": "user", "content": "Hi"}]
PASSED = b"passed"


def check_template(config: ServerConfig, text: str, special_tokens: Mapping[str, str]) -> None:
    """Raises ConfigError for a template that does not compile, or that one short message keeps busy without end."""
    root = Path(config.engine.compile.cache_dir or default_cache_dir())
    path = root / "templates" / _key(config, text, special_tokens)
    with suppress(OSError, CacheError):
        if read_file(path) == PASSED:
            return
    _try_apart(config, text, special_tokens)
    try:
        write_file(path, PASSED)
    except OSError as error:
        LOG.debug("the trial of the chat template is not remembered: %s", error)


def _key(config: ServerConfig, text: str, special_tokens: Mapping[str, str]) -> str:
    """SHA-256 of everything the outcome depends on, other than the machine."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    known = (
        text, sorted(special_tokens.items()), config.default_chat_template_kwargs, config.chat_template_content_format,
        config.prompt_timeout, config.prompt_memory, config.max_prompt_bytes, version("jinja2"), fuseline.__version__,
    )  # fmt: skip
    return hashlib.sha256(repr(known).encode() + b"".join(sources)).hexdigest()


def _try_apart(config: ServerConfig, text: str, special_tokens: Mapping[str, str]) -> None:
    receiver, sender = start_context().Pipe(duplex=False)
    with receiver:
        process = start_context().Process(target=_try, args=(sender, config, text, dict(special_tokens)), daemon=True)
        process.start()
        sender.close()
        try:
            problem = receiver.recv() if receiver.poll(config.prompt_timeout) else None
        except EOFError:
            problem = "the process that tried the chat template ended; the template may take too much memory"
        finally:
            process.kill()
            process.join()
    if problem is None:
        limit = f"{config.prompt_timeout:g} seconds (--prompt-timeout)"
        problem = f"the chat template takes more than {limit} to render one short message"
    if problem:
        raise ConfigError(problem)


def _try(sender: Connection, config: ServerConfig, text: str, special_tokens: dict[str, str]) -> None:
    """Sends a line of what is wrong, empty if nothing is. The template may refuse the message."""
    limit_memory(config.prompt_memory)
    variables = {**special_tokens, **dict(config.default_chat_template_kwargs), "add_generation_prompt": True}
    problem = ""
    try:
        template = ChatTemplate(text, config.chat_template_content_format)
        template.render(template.shape(TRIAL), variables, config.max_prompt_bytes)
    except ConfigError as error:
        problem = str(error)
    except (MemoryError, RecursionError):
        limit = f"{config.prompt_memory} bytes of memory (--prompt-memory)"
        problem = f"the chat template takes more than {limit}, or endless recursion, to render one short message"
    except ApiError:
        pass
    sender.send(problem)
