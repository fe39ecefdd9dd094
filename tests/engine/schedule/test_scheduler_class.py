"""--scheduler-cls: a scheduler of the user's own."""

from __future__ import annotations

import importlib

import pytest
from served_fake import served_fake

from fuseline.engine.client import EngineStartError
from fuseline.engine.schedule.scheduler import Scheduler, scheduler_class

PATH = "fuseline.engine.schedule.scheduler.Scheduler"
MODULE = """
from fuseline.engine.schedule.scheduler import Scheduler


class Patient(Scheduler):
    num_steps = 0

    def schedule(self):
        Patient.num_steps += 1
        return super().schedule()
"""


def test_classes_by_their_path() -> None:
    assert scheduler_class("") is scheduler_class(PATH) is Scheduler
    for bad, words in (("no.such.Class", "cannot be imported"), ("Class", "cannot be imported"),
                       ("collections.deque", "is no subclass of"), ("os.path", "is no subclass of")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^--scheduler-cls {bad} {words}"):
            scheduler_class(bad)


async def test_a_scheduler_of_the_users_own_decides(tmp_path, monkeypatch) -> None:
    (tmp_path / "patient_scheduler.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    async with served_fake(scheduler_cls="patient_scheduler.Patient") as served:
        await served.collect([3, 4], max_tokens=3)
    assert importlib.import_module("patient_scheduler").Patient.num_steps >= 3
    with pytest.raises(EngineStartError, match="is no subclass"):
        async with served_fake(scheduler_cls="collections.deque"):
            pass
