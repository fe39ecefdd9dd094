"""The client against real engines of the fake model: in a process of their own and in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import engine_client_cases
import psutil
import pytest
from engine_client_cases import collect, greedy, make_request
from fake_model import KILL_TOKEN, build_broken, build_fake, build_lost_gpu, build_slow_fake, fake_config
from python_process import run_python

from fuseline.engine.client import EngineClient, EngineDeadError, EngineStartError
from fuseline.engine.config import EngineConfig
from fuseline.engine.messages import Vocabulary
from fuseline.engine.run.device import HostDevice
from fuseline.engine.run.grammar.compiler import GrammarCompiler
from fuseline.engine.run.sampler_reference import reference_device

MODES = pytest.mark.parametrize("own_process", [True, False], ids=["process", "thread"])


def make_client(own_process: bool, build=build_fake) -> EngineClient:
    return EngineClient(fake_config(), own_process, build, reference_device)


@contextlib.asynccontextmanager
async def running(own_process: bool, build=build_fake):
    client = make_client(own_process, build)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown(5)


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


@MODES
async def test_streams_of_several_requests(own_process: bool) -> None:
    async with running(own_process) as client:
        assert client.ready.vocab_size == 48 and client.ready.num_blocks == 64
        requests = [make_request(f"r{i}", prompt=(5, i + 1), n=1 + i % 2) for i in range(8)]
        results = await asyncio.gather(*(collect(client, request) for request in requests))
        for request, tokens in zip(requests, results, strict=True):
            expected = greedy(request.prompt_token_ids, 8)
            assert tokens == {index: expected for index in range(request.params.n)}
        assert client.stats().num_running == 0 and client.num_in_flight == 0


NUM_GRAPHS = 300


class Capturing(HostDevice):
    """Tells of its progress from a thread of its own while requests are served."""

    def capture_graphs(self, model, progress) -> None:
        def tell() -> None:
            for done in range(NUM_GRAPHS + 1):
                progress("capturing graphs", done, NUM_GRAPHS)
                time.sleep(0.001)

        threading.Thread(target=tell).start()


def find_capturing(config: EngineConfig) -> HostDevice:
    return Capturing(reference_device().ops)


@MODES
async def test_progress_from_a_thread_beside_serving(own_process: bool) -> None:
    client, seen = EngineClient(fake_config(), own_process, build_fake, find_capturing), []
    await client.start(lambda *progress: seen.append(progress))
    try:
        served = 0
        while ("capturing graphs", NUM_GRAPHS, NUM_GRAPHS) not in seen:
            assert await collect(client, make_request(f"r{served}", prompt=(4, 4))) == {0: greedy((4, 4), 8)}
            served += 1
        assert [done for phase, done, _ in seen if phase == "capturing graphs"] == list(range(NUM_GRAPHS + 1))
        assert served > 1
    finally:
        await client.shutdown(5)


class Gpu(HostDevice):
    is_asynchronous = True


@pytest.mark.parametrize("is_gpu", [False, True])
async def test_a_gpu_is_sent_the_vocabulary_before_a_request_needs_it(monkeypatch, is_gpu: bool) -> None:
    """It starts a process for grammars then; once, however often it is sent."""
    started = []
    monkeypatch.setattr(GrammarCompiler, "start", lambda self, spec: started.append(spec))
    device = (Gpu if is_gpu else HostDevice)(reference_device().ops)
    client = EngineClient(fake_config(), False, build_fake, lambda config: device)
    ready = await client.start()
    try:
        assert ready.wants_vocabulary == is_gpu
        client.vocabulary = lambda: Vocabulary(tokens=(b"a", b"b"), eos_token_ids=(0,), vocab_size=2)
        for _ in range(2):
            await client.send_vocabulary()
        assert await collect(client, make_request("r", prompt=(4, 4))) == {0: greedy((4, 4), 8)}
        assert len(started) == is_gpu
    finally:
        await client.shutdown(5)


@MODES
async def test_progress_and_failed_start(own_process: bool) -> None:
    client, seen = make_client(own_process), []
    await client.start(lambda *progress: seen.append(progress))
    assert seen == [("loading", 1, 2), ("loading", 2, 2)]
    await client.shutdown(5)
    with pytest.raises(EngineStartError) as error:
        await make_client(own_process, build_broken).start()
    assert str(error.value) == "no config.json in fake; give a checkpoint directory"


PROGRAM = """
import asyncio
from fake_model import build_fake, fake_config
from fuseline.engine.client import EngineClient, EngineStartError

async def main():
    client = EngineClient(fake_config(), True, build_fake, lambda config: None)  # nothing a process can be sent
    try:
        await client.start()
    except EngineStartError as error:
        print(error)

asyncio.run(main())
"""


def test_a_process_that_cannot_be_started_leaves_nothing_that_holds_the_program() -> None:
    told = run_python(PROGRAM)
    assert told.startswith("the engine's process cannot be started: Can't pickle local object")


@MODES
async def test_closing_a_stream_aborts(own_process: bool) -> None:
    async with running(own_process, build_slow_fake) as client:
        reasons = []
        client.on_step.append(lambda step: reasons.extend(o.finish_reason for o in step.outputs if o.finish_reason))
        stream = client.generate(make_request("r", max_tokens=60))
        await anext(stream)
        assert client.stats().num_running == 1
        await stream.aclose()
        await until(lambda: client.stats().num_running == 0)
        assert reasons == ["abort"] and client.stats().kv_usage == 0 and client.num_in_flight == 0


@MODES
async def test_abort_ends_the_stream(own_process: bool) -> None:
    async with running(own_process, build_slow_fake) as client:
        outputs = []
        async for output in client.generate(make_request("r", n=2, temperature=1.0, seed=1, max_tokens=60)):
            outputs.append(output)
            if len(outputs) == 3:
                await client.abort(["r", "unknown"])
        assert [o.index for o in outputs if o.finish_reason == "abort"] == [0, 1]


@MODES
async def test_ids_in_use_and_bad_requests(own_process: bool) -> None:
    async with running(own_process, build_slow_fake) as client:
        stream = client.generate(make_request("r", max_tokens=40))
        await anext(stream)
        with pytest.raises(ValueError, match="in use"):
            await anext(client.generate(make_request("r")))
        outputs = [output async for output in client.generate(make_request("bad", prompt=(99,), n=2))]
        assert [(o.index, o.finish_reason) for o in outputs] == [(0, "error"), (1, "error")]
        assert "out of vocabulary" in outputs[0].error
        assert (await anext(stream)).finish_reason is None
        await stream.aclose()


@MODES
async def test_sleep_and_wake_keep_running_requests(own_process: bool) -> None:
    async with running(own_process, build_slow_fake) as client:
        for level in range(3):
            stream = client.generate(make_request(f"r{level}", max_tokens=20))
            tokens = list((await anext(stream)).token_ids)
            await client.sleep(level)
            assert await client.is_sleeping() is True
            await client.wake_up()
            assert await client.is_sleeping() is False
            async for output in stream:
                tokens += output.token_ids
            assert tokens == greedy((5, 6, 7), 20)
        await client.reset_prefix_cache()
        with pytest.raises(ValueError, match="level must be 0, 1 or 2, not 7"):
            await client.sleep(7)
        with pytest.raises(ValueError, match="no tag food"):
            await client.wake_up(["food"])


async def test_killed_engine_fails_streams_and_restarts() -> None:
    client = make_client(True, build_slow_fake)
    await client.start()
    deaths = []
    client.on_death.append(lambda: deaths.append(1))
    streams = [client.generate(make_request(f"r{i}", max_tokens=60)) for i in range(2)]
    for stream in streams:
        await anext(stream)
    folder = client._transport._folder
    assert os.stat(folder).st_mode & 0o777 == 0o700
    os.kill(client._transport.process.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDeadError):
            while True:
                await asyncio.wait_for(anext(stream), 1)
    assert not client.is_alive and deaths == [1] and not Path(folder).exists()
    with pytest.raises(EngineDeadError):
        await collect(client, make_request("late"))
    await client.restart()
    assert await collect(client, make_request("r")) == {0: greedy((5, 6, 7), 8)}
    await client.shutdown(5)


async def test_third_death_in_ten_minutes_gives_up() -> None:
    client = make_client(True)
    await client.start()
    for count in range(3):
        with pytest.raises(EngineDeadError):
            await collect(client, make_request("r", prompt=(KILL_TOKEN,)))
        if count < 2:
            await client.restart()
    with pytest.raises(EngineStartError, match="died 3 times"):
        await client.restart()


async def test_a_lost_gpu_ends_the_engine_with_its_cause(capfd) -> None:
    """At once: what destructors and handlers at exit would do to a GPU that takes no more calls is left out."""
    client = make_client(True, build_lost_gpu)
    await client.start()
    process = client._transport.process
    with pytest.raises(EngineDeadError):
        await collect(client, make_request("r"))
    assert process.exitcode == 1
    lines = capfd.readouterr().err.splitlines()
    assert "the engine died: RuntimeError: CUDA error: an illegal memory access was encountered" in lines
    await client.shutdown(5)


async def test_interrupts_are_the_parents_to_handle() -> None:
    async with running(True) as client:
        os.kill(client._transport.process.pid, signal.SIGINT)
        os.kill(client._transport.process.pid, signal.SIGTERM)
        assert await collect(client, make_request("r")) == {0: greedy((5, 6, 7), 8)}


async def test_idle_engine_uses_no_time() -> None:
    async with running(True) as client:
        await collect(client, make_request("r"))
        process = psutil.Process(client._transport.process.pid)
        await asyncio.sleep(0.1)
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before <= 0.02


PARENT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from fake_model import build_fake, fake_config
from fuseline.engine.client import EngineClient
from fuseline.engine.run.sampler_reference import reference_device

async def main():
    client = EngineClient(fake_config(), True, build_fake, reference_device)
    await client.start()
    print(client._transport.process.pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_engine_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(engine_client_cases.__file__).parent)))
    parent = subprocess.Popen([sys.executable, "-P", str(script)], stdout=subprocess.PIPE, text=True)
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    engine.wait(timeout=10)
