"""A trial of the chat template when the server starts, in a process that can be ended."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.connection import Connection

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import ApiError
from fuseline.api.prompt.template import ChatTemplate
from fuseline.api.prompt.worker import limit_memory
from fuseline.api.prompt.worker_process import start_context

TRIAL = [{"role": "user", "content": "Hi"}]


def check_template(config: ServerConfig, text: str, special_tokens: Mapping[str, str]) -> None:
    """Raises ConfigError for a template that does not compile, or that one short message keeps busy without end."""
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
