"""The engine as one asyncio object, in a process of its own or in a thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing

from fuseline.engine.build import BuildModel, FindDevice, build_compiled_model, find_device
from fuseline.engine.config import EngineConfig
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
    Output,
    PooledOutput,
    Progress,
    ResetPrefixCache,
    Sleep,
    SleepState,
    StepExpander,
    StepOutputs,
    StepStats,
    Vocabulary,
    WakeUp,
)
from fuseline.engine.params import SamplingParams
from fuseline.engine.transport import EngineSetup, ProcessTransport, ThreadTransport, Transport

MAX_DEATHS = 3
DEATHS_WINDOW_SECONDS = 600.0

OnProgress = Callable[[str, int, int], None]


class EngineDeadError(Exception):
    """The engine is gone; requests in flight are lost."""


class EngineStartError(Exception):
    """The engine could not start; the message is one line with cause and cure."""


class EngineClient:
    """`start` first; after `EngineDeadError`, `restart`. All methods belong to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        own_process: bool = True,
        build_model: BuildModel = build_compiled_model,
        find_device: FindDevice = find_device,
    ) -> None:
        """`own_process`: whether the engine gets a process of its own; else it runs in a thread of this one."""
        self.ready: EngineReady | None = None
        self.is_alive = False
        self.on_step: list[Callable[[StepOutputs], None]] = []
        self.on_death: list[Callable[[], None]] = []
        self._setup = EngineSetup(config, build_model, find_device)
        self._make_transport = ProcessTransport if own_process else ThreadTransport
        self._transport: Transport | None = None
        self._mailboxes: dict[str, _Mailbox] = {}
        self._calls: dict[int, asyncio.Future[CallResult]] = {}
        self._num_calls = 0
        self._stats = StepStats()
        self.vocabulary: Callable[[], Vocabulary] | None = None
        """Makes what the engine must know before the first request with a grammar; takes a while for a large one."""
        self._has_vocabulary = False
        self._expander = StepExpander()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._is_stopping = False
        self._starting: asyncio.Future[EngineReady] | None = None
        self._on_progress: OnProgress | None = None

    @property
    def num_in_flight(self) -> int:
        """Requests that have been sent and not finished."""
        return len(self._mailboxes)

    def stats(self) -> StepStats:
        """Counts of the newest step."""
        return self._stats

    async def start(self, on_progress: OnProgress | None = None) -> EngineReady:
        """Raises EngineStartError."""
        self._on_progress = on_progress
        self._is_stopping = False
        self._has_vocabulary = False
        self._expander = StepExpander()
        self._starting = asyncio.get_running_loop().create_future()
        try:
            self._transport = self._make_transport(self._setup, self._take, self._end)
        except Exception as error:  # no memory for a process, no room for its sockets' folder
            self._starting = None
            raise EngineStartError(f"the engine's process cannot be started: {error}") from error
        try:
            self.ready = await self._starting
        except (asyncio.CancelledError, EngineStartError):
            await self.shutdown(1)
            raise
        finally:
            self._starting = None
        self.is_alive = True
        return self.ready

    async def restart(self, on_progress: OnProgress | None = None) -> EngineReady:
        """Start anew after a death. Raises EngineStartError, also when it died too often."""
        deaths = self._deaths
        if len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < DEATHS_WINDOW_SECONDS:
            raise EngineStartError(f"the engine died {MAX_DEATHS} times in ten minutes; see the log for the cause")
        return await self.start(on_progress)

    async def generate(self, request: EngineRequest) -> AsyncIterator[Output]:
        """Outputs of all choices as they come, until each has finished. Closing the iterator aborts the request.

        Raises EngineDeadError when the engine dies, ValueError for an id in use.
        """
        if request.request_id in self._mailboxes:
            raise ValueError(f"request id {request.request_id} is in use")
        mailbox = _Mailbox()
        num_unfinished = request.params.n
        if isinstance(request.params, SamplingParams) and request.params.has_masks:
            await self.send_vocabulary()
        self._send(request)
        self._mailboxes[request.request_id] = mailbox
        try:
            while num_unfinished:
                output = await mailbox.get()
                num_unfinished -= output.finish_reason is not None
                yield output
        finally:
            self._mailboxes.pop(request.request_id, None)
            if num_unfinished and self.is_alive:
                self._send(AbortRequests(request_ids=(request.request_id,)))

    async def send_vocabulary(self) -> None:
        """Once for each engine, before the first request that has masks."""
        if self.vocabulary is not None and not self._has_vocabulary:
            vocabulary = await asyncio.to_thread(self.vocabulary)
            if not self._has_vocabulary:
                self._send(vocabulary)
                self._has_vocabulary = True

    async def pool(self, request: EngineRequest) -> PooledOutput:
        """The vector of a request with PoolingParams. Cancelling aborts it. Raises like `generate`."""
        async with aclosing(self.generate(request)) as outputs:
            return await anext(outputs)

    async def abort(self, request_ids: Iterable[str]) -> None:
        """The choices of these requests end with finish_reason "abort"; unknown ids are ignored."""
        self._send(AbortRequests(request_ids=tuple(request_ids)))

    def abort_choice(self, request_id: str, index: int) -> None:
        """One choice of a request ends with finish_reason "abort", the others go on; unknown ones are ignored."""
        if self.is_alive:
            self._send(AbortRequests(choices=((request_id, index),)))

    async def reset_prefix_cache(self) -> None:
        """Forget all cached blocks."""
        await self._call(ResetPrefixCache)

    async def sleep(self, level: int) -> None:
        """Stop serving and give back memory, as messages.Sleep says. Raises ValueError in the engine's words."""
        await self._call(Sleep, level)

    async def wake_up(self, tags: Iterable[str] = ()) -> None:
        """Bring back what the tags ("weights", "kv_cache") name; without any, all. Raises ValueError likewise."""
        await self._call(WakeUp, tuple(tags))

    async def is_sleeping(self) -> bool:
        state = await self._call(IsSleeping)
        return isinstance(state, SleepState) and state.is_sleeping

    async def _call(self, kind: Callable[..., Call], *arguments: object) -> CallDone | SleepState:
        self._num_calls += 1
        future: asyncio.Future[CallResult] = asyncio.get_running_loop().create_future()
        self._send(kind(self._num_calls, *arguments))
        self._calls[self._num_calls] = future
        return await future

    async def shutdown(self, timeout: float) -> None:
        """End the engine; requests in flight raise EngineDeadError. By force after `timeout` seconds."""
        self._is_stopping = True
        self.is_alive = False
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.stop(timeout)
        self._fail_all(EngineDeadError("the engine has been shut down"))

    def _send(self, message: EngineRequest | AbortRequests | Vocabulary | Call) -> None:
        if not self.is_alive or self._transport is None:
            raise EngineDeadError("the engine is not running")
        self._transport.send(message)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self._take_step(message)
        elif isinstance(message, CallResult):
            self._take_result(message)
        elif isinstance(message, Progress):
            if self._on_progress is not None:
                self._on_progress(message.phase, message.done, message.total)
        elif self._starting is not None and not self._starting.done():
            if isinstance(message, EngineFailed):
                self._starting.set_exception(EngineStartError(message.message))
            else:
                self._starting.set_result(message)

    def _take_step(self, step: StepOutputs) -> None:
        step = self._expander.expand(step)
        self._stats = step.stats
        for output in step.outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.put(output)
        for callback in self.on_step:
            callback(step)

    def _take_result(self, result: CallResult) -> None:
        future = self._calls.pop(result.call_id, None)
        if future is None or future.done():
            return
        if isinstance(result, CallFailed):
            future.set_exception(ValueError(result.error))
        else:
            future.set_result(result)

    def _end(self) -> None:
        """The engine is gone, whether asked to or not."""
        self.is_alive = False
        self._take_step(StepOutputs())  # nothing runs or waits any more; counts begin anew
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(EngineStartError("the engine's process died while starting; see the log"))
            return
        if self._is_stopping or self._transport is None:
            return
        self._transport = None
        self._deaths.append(time.monotonic())
        self._fail_all(EngineDeadError("the engine died; the server restarts it"))
        for callback in self.on_death:
            callback()

    def _fail_all(self, error: EngineDeadError) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()


class _Mailbox:
    """Outputs on their way to one generate(). Cheaper than a queue: one reader, never bounded."""

    def __init__(self) -> None:
        self._outputs: deque[Output] = deque()
        self._error: EngineDeadError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._wake()

    async def get(self) -> Output:
        while not self._outputs:
            if self._error is not None:
                raise EngineDeadError(str(self._error))
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
