"""`LLM`: the engine from Python, without a server. Requests take the server's own path, so answers are the same."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from fuseline.api.config import ServerConfig, read_environment
from fuseline.api.config_resolve import resolve
from fuseline.api.llm_asgi import App, exchange, post, post_stream
from fuseline.api.llm_beams import BeamSearchOutput, beam_fields, beam_output
from fuseline.api.llm_values import (
    Prompt,
    RequestOutput,
    Sampling,
    as_list,
    conversations,
    per_prompt,
    prompt_fields,
    request_fields,
    request_output,
)
from fuseline.api.progress import StartupProgress
from fuseline.api.save_shards import MAX_FILE_SIZE, save_shards
from fuseline.compile.load_format import SHARD_PATTERN
from fuseline.engine.messages import EngineReady

T = TypeVar("T")


class LLM:
    """An engine in this process.

    Keywords are the flags of `fuseline serve` with underscores: `LLM("MODEL", max_model_len=4096, dtype="bfloat16")`.
    Raises ConfigError for a configuration that cannot run and EngineStartError when the model cannot be loaded.
    Use it as a context manager or call `close`.
    """

    def __init__(self, model: str = "demo", *, show_progress: bool = True, **fields: Any) -> None:
        environment = replace(read_environment(), api_key="")
        defaults = {"disable_frontend_multiprocessing": True, "disable_log_requests": True, "prompt_workers": 0}
        values = {**defaults, **fields, "model": model}
        self.config = resolve(values, environment)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fuseline-llm", daemon=True)
        self._thread.start()
        self._is_closed = False
        try:
            progress = StartupProgress() if show_progress else None
            self._app, self._stop, self.ready = self._call(start_app(self.config, progress))
        except BaseException:
            self._end_loop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, token ids or a mapping with them), all of them in one batch.

        sampling_params: request fields of /v1/completions as a mapping or an object with such attributes, one for all
        prompts or one for each. Raises ValueError with the server's message for a request it refuses.
        """
        many = as_list(prompts)
        settings = per_prompt(sampling_params, len(many))
        bodies = [{**fields, **prompt_fields(prompt)} for prompt, fields in zip(many, settings, strict=True)]
        answers = self._call(self._post_all("/v1/completions", bodies, use_tqdm))
        return [request_output(body["prompt"], answer) for body, answer in zip(bodies, answers, strict=True)]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: Sampling, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first.

        params: `beam_width` and `max_tokens`, and where they are to differ `temperature` (0), `ignore_eos` (False),
        `length_penalty` (1.0) and `include_stop_str_in_output` (False), as a mapping or an object with such attributes.
        Raises ValueError like `generate`.
        """
        fields = beam_fields(params)
        bodies = [{**fields, **prompt_fields(prompt)} for prompt in as_list(prompts)]
        answers = self._call(self._post_all("/v1/completions", bodies, use_tqdm))
        keeps_eos = bool(request_fields(params).get("include_stop_str_in_output"))
        return [beam_output(answer, keeps_eos) for answer in answers]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. Fields of /v1/chat/completions; one output a conversation."""
        many = conversations(messages)
        settings = per_prompt(sampling_params, len(many))
        bodies = [{**fields, "messages": turns} for turns, fields in zip(many, settings, strict=True)]
        answers = self._call(self._post_all("/v1/chat/completions", bodies, use_tqdm))
        return [request_output(None, answer) for answer in answers]

    def encode(self, prompts: Prompt | Sequence[Prompt], **fields: Any) -> list[Any]:
        """`data` of POST /pooling for each prompt. Raises ValueError with the server's message for other models."""
        bodies = [{**fields, "input": prompt_fields(prompt)["prompt"]} for prompt in as_list(prompts)]
        return [answer["data"] for answer in self._call(self._post_all("/pooling", bodies, False))]

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: Sampling | None = None
    ) -> Iterator[str]:
        """Text of the answer as it comes; closing the iterator aborts the request."""
        for delta in self.stream_deltas(messages, sampling_params):
            yield delta.get("content") or ""

    def stream_deltas(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: Sampling | None = None
    ) -> Iterator[dict[str, Any]]:
        """The answer's deltas (content, reasoning, tool_calls) as they come; closing the iterator aborts it."""
        fields = request_fields(sampling_params)
        body = {**fields, "messages": list(messages), "model": self.config.served_model_name[0]}
        for event in self._iterate(post_stream(self._app, "/v1/chat/completions", body)):
            for choice in event["choices"]:
                yield choice["delta"]

    def run_batch(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        """(status, answer) of each (path, body), in order; at most as many in flight as the engine runs at a time."""

        async def run_all() -> list[tuple[int, dict[str, Any]]]:
            places = asyncio.Semaphore(self.config.engine.scheduler.max_num_seqs)

            async def one(path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
                async with places:
                    return await exchange(self._app, path, body)

            return await asyncio.gather(*(one(path, body) for path, body in requests))

        return self._call(run_all())

    def save_sharded_state(self, path: str, pattern: str = SHARD_PATTERN, max_size: int = MAX_FILE_SIZE) -> None:
        """Write the checkpoint for --load-format sharded_state, as the command of that name. Raises ConfigError."""
        save_shards(self.config, Path(path), pattern, max_size)

    def close(self) -> None:
        """Stop the engine; further calls fail. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._call(self._stop())
        finally:
            self._end_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _post_all(self, path: str, bodies: list[dict[str, Any]], use_tqdm: bool) -> list[dict[str, Any]]:
        """Answers in order; at most as many sequences in flight as the engine runs at a time."""
        counts = (body.get(name) for body in bodies for name in ("n", "best_of"))
        most = max((count for count in counts if isinstance(count, int)), default=1)
        places = asyncio.Semaphore(max(self.config.engine.scheduler.max_num_seqs // max(most, 1), 1))
        common = {"model": self.config.served_model_name[0]}
        if path != "/pooling":
            common["return_token_ids"] = True
        with tqdm(total=len(bodies), desc="requests", disable=not use_tqdm) as bar:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with places:
                    answer = await post(self._app, path, {**common, **body})
                bar.update()
                return answer

            tasks = [asyncio.create_task(one(body)) for body in bodies]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the engine's loop and wait; Ctrl-C cancels it there. Raises RuntimeError once it is closed."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this LLM is closed: make a new one")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _iterate(self, events: AsyncIterator[T]) -> Iterator[T]:
        """The events, made on the engine's loop; leaving early cancels what makes them."""
        made: queue.SimpleQueue = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for event in events:
                    made.put((event, None))
                made.put((None, StopIteration()))
            except Exception as error:
                made.put((None, error))
            finally:
                await events.aclose()

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while True:
                event, error = made.get()
                if isinstance(error, StopIteration):
                    return
                if error:
                    raise error
                yield event
        finally:
            future.cancel()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def start_app(
    config: ServerConfig, progress: StartupProgress | None
) -> tuple[App, Callable[[], Awaitable[None]], EngineReady]:
    """The started app of the server, what stops its engine, and what the engine told of itself."""
    from fuseline.api.app import build_app
    from fuseline.engine.client import EngineClient

    client = EngineClient(config.engine, own_process=not config.disable_frontend_multiprocessing)
    try:
        ready = await client.start(progress)
    finally:
        if progress:
            progress.close()
    app = build_app(config, client, ready)

    async def stop() -> None:
        app.state.served.close()
        await client.shutdown(config.shutdown_timeout)

    return app, stop, ready
