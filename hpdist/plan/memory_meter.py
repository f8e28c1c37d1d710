"""Counts the bytes of tensors on a device, phase by phase, on GPU and CPU."""

from __future__ import annotations

from typing import Any, cast

import torch

_MARK = "hpdist.plan.memory_meter/"


class MemoryMeter:
    """Counts the bytes of tensors that are made between entering and leaving it.

    `mark` begins a phase. After leaving, `levels` has the bytes held at the last mark of each name,
    and `peaks` the most in its phases; both relative to entering. On a CPU it reads torch's
    profiler, which slows small operations down and only sees this thread and autograd's: what
    NumPy or Arrow allocate is not counted, and a tensor that a thread of gloo frees stays counted.
    On a GPU it resets torch's peak.

    Args:
        device: The device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.levels: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._phase = "start"
        self._base = 0
        self._profile: torch.profiler.profile | None = None

    @property
    def peak(self) -> int:
        """The most bytes in any phase."""
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the most bytes."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def __enter__(self) -> MemoryMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            # Only the events are needed; shapes and stacks would cost time.
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        """Begin a phase."""
        if self._profile is not None:
            with torch.profiler.record_function(_MARK + name):
                pass
            return
        self._end_phase()
        self._phase = name
        self.levels[name] = torch.cuda.memory_allocated(self.device) - self._base
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *error: object) -> None:
        if self._profile is None:
            self._end_phase()
            return
        self._profile.__exit__(*error)
        if error[0] is None:
            self._replay()

    def _end_phase(self) -> None:
        most = torch.cuda.max_memory_allocated(self.device) - self._base
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), most)

    def _replay(self) -> None:
        """Add up the profiler's events, in the order of time."""
        assert self._profile is not None
        assert self._profile.profiler is not None
        results = self._profile.profiler.kineto_results
        assert results is not None
        level = 0
        for event in sorted(results.events(), key=lambda event: event.start_ns()):
            name = event.name()
            if name == "[memory]":
                level += cast(Any, event).nbytes()
            elif name.startswith(_MARK):
                self._phase = name.removeprefix(_MARK)
                self.levels[self._phase] = level
            else:
                continue
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), level)
