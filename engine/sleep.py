"""Memory that a sleeping engine gives back, and how it gets it again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection

from fuseline.engine.run.runner import Model, Runner, SleepingModel

TAGS = ("weights", "kv_cache")


class Sleeper:
    """Gives back the memory of a paused engine, and gets it again.

    Level 0 keeps everything, 1 gives the KV memory back and moves a GPU's weights to the host, 2 discards the weights.
    A deeper level may follow a lighter one. `build` makes the model anew, `open_caches` gives it all that it needs to
    be served.
    """

    def __init__(self, runner: Runner, build: Callable[[], Model], open_caches: Callable[[Model], None]) -> None:
        self._runner, self._build, self._open_caches = runner, build, open_caches
        self._gone: set[str] = set()

    def deepen(self, level: int) -> None:
        model, num_groups = self._runner.model, len(self._runner.model.info.cache_groups)
        if level >= 1 and "kv_cache" not in self._gone:
            model.allocate_caches([1] * num_groups)
            if model.info.state_specs:
                model.allocate_states(1)
            self._gone.add("kv_cache")
        if level == 1 and "weights" not in self._gone:
            if isinstance(model, SleepingModel):
                model.move_weights_to_host()
            self._gone.add("weights")
        if level == 2 and not isinstance(model, _Discarded):
            if isinstance(model, SleepingModel):
                model.discard_weights()
            self._runner.model = _Discarded(model)
            self._gone.add("weights")
            del model
            gc.collect()

    def wake(self, tags: Collection[str]) -> bool:
        """Brings back what the tags name. True when nothing is missing any more.

        Caches come last: they are allocated when the weights are there, whatever was asked for first.
        """
        if "weights" in tags and "weights" in self._gone:
            if isinstance(self._runner.model, _Discarded):
                self._runner.model = self._build()
            elif isinstance(self._runner.model, SleepingModel):
                self._runner.model.move_weights_back()
        was_open, self._gone = not self._gone, self._gone - set(tags)
        if not self._gone and not was_open:
            self._open_caches(self._runner.model)
        return not self._gone


class _Discarded:
    """Keeps the facts of a model whose weights are gone."""

    def __init__(self, model: Model) -> None:
        self.info = model.info

    def stop_capture(self) -> None:
        """Nothing is captured in its sleep."""
