"""The engine as its client sees it: started from a configuration, spoken to in messages."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Protocol

from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.quantization.methods import in_words
from fuseline.engine.build import BuildModel, FindDevice
from fuseline.engine.config import EngineConfig
from fuseline.engine.engine import Engine
from fuseline.engine.memory.sizing import CacheSize, longest_context, size_cache
from fuseline.engine.memory.swap import host_blocks
from fuseline.engine.messages import (
    AbortRequests,
    Call,
    CallDone,
    CallFailed,
    CallResult,
    EngineFailed,
    EngineReady,
    EngineRequest,
    FromEngine,
    IsSleeping,
    Progress,
    ResetPrefixCache,
    Shutdown,
    Sleep,
    SleepState,
    ToEngine,
    Vocabulary,
    WakeUp,
)
from fuseline.engine.run.device import Device
from fuseline.engine.run.runner import Model, SwappingModel
from fuseline.engine.run.warm_up import warm_up
from fuseline.engine.sleep import TAGS, Sleeper

logger = logging.getLogger("fuseline.engine")

MESSAGES_SECONDS = 0.002
"""For which messages are handled between two steps, if there is something to compute; at least one of them."""
Send = Callable[[FromEngine], None]
"""From any thread."""


class Inbox(Protocol):
    def receive(self, wait: bool) -> ToEngine | None:
        """The next message; None when there is none and `wait` is false, or `wake` was called."""

    def wake(self) -> None:
        """End a `receive` that waits. From any thread."""


class EngineService:
    def __init__(self, config: EngineConfig, build_model: BuildModel, find_device: FindDevice, send: Send) -> None:
        self.config = config
        self.build_model = build_model
        self.send = send
        self.device = find_device(config)
        before = self.device.memory()
        model = self._build()
        info = model.info
        needed = warm_up(self.device, model, config, self._tell_progress)
        budget = self.device.kv_budget(info, config.cache.gpu_memory_utilization, before, needed)
        length = config.compile.max_model_len or info.max_model_len
        if config.cache.fits_context:
            length = longest_context(info, config.cache, config.scheduler, length, budget)
            config = replace(config, compile=replace(config.compile, max_model_len=length))
        self.size = size_cache(info, config.cache, config.scheduler, length, budget)
        self.host_blocks = self._count_host_blocks(model)
        self.engine = Engine(
            config, model, self.size.num_blocks, self.device, self.host_blocks, self.size.num_states
        )  # fmt: skip
        self._sleeper = Sleeper(self.engine.runner, self._build, self._open)
        self._open(model)  # last: from now on a thread may capture
        send(_ready(config, self.engine, self.size, self.host_blocks, self.device))

    def run(self, inbox: Inbox) -> None:
        """Serve until told to shut down. Without work it blocks on the inbox."""
        try:
            self.engine.grammars.on_ready = self.engine.slow_masks.on_ready = inbox.wake
            while self._take_messages(inbox):
                self.engine.admit_compiled()
                if self.engine.has_work:
                    self.send(self.engine.step())
        finally:
            self.engine.grammars.close()
            self.engine.slow_masks.close()
            # A thread that still captures would outlive the interpreter.
            self.device.stop_capture(self.engine.runner.model)

    def _take_messages(self, inbox: Inbox) -> bool:
        """Handle what has come in; wait for it when there is nothing else to do. False on shutdown.

        For MESSAGES_SECONDS at most, or while a thread computes a step, so that a thousand requests at once do not hold
        up the tokens of those that run.
        """
        begin: float | None = None
        while begin is None or perf_counter() - begin < MESSAGES_SECONDS or self.engine.is_computing:
            message = inbox.receive(wait=not self.engine.has_work)
            if isinstance(message, Shutdown):
                return False
            if message is None:
                break
            begin = begin or perf_counter()
            self._handle(message)
        return True

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, EngineRequest):
            self.engine.add(message)
        elif isinstance(message, Vocabulary):
            self.engine.grammars.set_vocabulary(message)
            if self.device.is_asynchronous:
                # A torch for CUDA takes seconds to import, and a GPU's machine has the memory.
                self.engine.grammars.warm_up()
        elif isinstance(message, AbortRequests):
            for request_id in message.request_ids:
                self.engine.abort(request_id)
            for request_id, index in message.choices:
                self.engine.abort_choice(request_id, index)
        else:
            self.send(self._answer(message))

    def _answer(self, call: Call) -> CallResult:
        try:
            if isinstance(call, IsSleeping):
                return SleepState(call.call_id, self.engine.is_asleep)
            if isinstance(call, ResetPrefixCache):
                self.engine.reset_prefix_cache()
            elif isinstance(call, Sleep):
                self._sleep(call.level)
            elif isinstance(call, WakeUp):
                self._wake_up(call.tags or TAGS)
            return CallDone(call.call_id)
        except (ValueError, MemoryError) as error:  # weights that do not fit into host memory stay where they are
            return CallFailed(call.call_id, str(error))

    def _sleep(self, level: int) -> None:
        if level not in (0, 1, 2):
            raise ValueError(f"sleep level must be 0, 1 or 2, not {level}")
        self.engine.pause(level)
        self._sleeper.deepen(level)

    def _wake_up(self, tags: tuple[str, ...]) -> None:
        """Serving goes on when everything is there."""
        if unknown := sorted(set(tags) - set(TAGS)):
            raise ValueError(f"there is no tag {unknown[0]} (tags: {', '.join(TAGS)})")
        if self.engine.is_asleep and self._sleeper.wake(tags):
            self.engine.resume()

    def _build(self) -> Model:
        return self.build_model(self.config, self._tell_progress)

    def _open(self, model: Model) -> None:
        """Give the model its caches; it may be served then."""
        model.allocate_caches([count + 1 for count in self.size.num_blocks])
        if self.host_blocks:
            model.allocate_host_blocks(self.host_blocks)
        if self.size.num_states:
            model.allocate_states(self.size.num_states)
        self.device.capture_graphs(model, self._tell_progress)

    def _tell_progress(self, phase: str, done: int, total: int) -> None:
        self.send(Progress(phase, done, total))

    def _count_host_blocks(self, model: Model) -> list[int]:
        """Per cache group; none where preempted sequences are computed anew."""
        cache = self.config.cache
        can_swap = isinstance(model, SwappingModel) and not model.info.state_specs
        if cache.preemption_mode != "swap" or cache.swap_space == 0 or not can_swap:
            return []
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return host_blocks(model.info, cache.block_size, cache.swap_space, self.size.num_blocks, memory)


def serve(config: EngineConfig, build_model: BuildModel, find_device: FindDevice, inbox: Inbox, send: Send) -> None:
    """A whole engine's life. A failed start is told in one line; a fault later on raises."""
    try:
        service = EngineService(config, build_model, find_device, send)
    except Exception as error:
        logger.debug("engine start failed", exc_info=True)
        send(EngineFailed(_one_line(error)))
        return
    service.run(inbox)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # Errors made for users say everything themselves; of others the type is half the message.
    is_for_users = isinstance(error, ValueError | OSError | CaptureError | LoadError)
    return text if text and is_for_users else f"{type(error).__name__}: {text}"


def _ready(
    config: EngineConfig, engine: Engine, size: CacheSize, host_blocks: Sequence[int], device: Device
) -> EngineReady:
    info = engine.runner.model.info
    kv_dtype = info.cache_specs[0].dtype if info.cache_specs else info.dtype
    quantized = (("quantized", ", ".join(info.quantized)),) if info.quantized else ()
    if method := in_words(config.compile):
        quantized = (("quantization", method), *quantized)
    return EngineReady(
        vocab_size=info.vocab_size,
        max_model_len=engine.max_model_len,
        num_blocks=max(size.num_blocks, default=0),
        block_size=config.cache.block_size,
        dtype=info.dtype,
        kv_cache_dtype=kv_dtype,
        eos_token_ids=info.eos_token_ids,
        architecture=info.architecture,
        table=(("device", device.name), *quantized, *size.table),
        num_host_blocks=max(host_blocks, default=0),
        wants_vocabulary=device.is_asynchronous,
    )
