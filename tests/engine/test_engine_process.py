"""What the engine's process does before it serves."""

from __future__ import annotations

from python_process import run_python

IMPORT = """
import gc
from fuseline.engine.process import _import_serve

_import_serve()
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_what_is_imported_is_no_garbage_to_look_for():
    assert run_python(IMPORT) == "True True"
