"""How long training takes, on a device that works on after it was asked to."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds from one lap to the next, with the device's queued work waited for."""

    def __init__(self, device: torch.device):
        self.device, self._then = device, 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the clock was made or this was last called."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed, self._then = now - self._then, now
        return passed
