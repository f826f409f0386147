"""Who may see whose bytes: a vector-clock race detector for shared memory.

The agents of a thread block are its warps and, for each warp, what it set going that finishes by itself: cp.async
copies, wgmma, bulk stores, TMA loads. `seen[w, a]` is how far warp w knows agent a; a barrier joins what its warps
know. An access is a race unless the last conflicting one is known to the warp that makes it (or starts it). Lanes of a
warp count as ordered: shared memory that only one warp uses is not examined.

`proxied` is `seen` as of the warp's last fence.proxy.async: what wgmma, TMA and bulk stores may rely on.
"""

from __future__ import annotations

import numpy as np

from .memory import Fault

WARP, WGMMA, BULK, COPY, TMA = range(5)  # kinds of agent; the first three may read shared memory


class Races:
    def __init__(self, programs: int, warps: int, size: int, grain: int, hopper: bool) -> None:
        self.warps, self.grain, self.size = warps, grain, size
        agents = warps * 5
        self.readers = warps * (3 if hopper else 1)
        words = programs * size // grain
        self.writer = np.zeros(words, np.int16)  # agent of the last write
        self.written = np.zeros(words, np.int32)  # its clock; 0: never written
        self.read = np.zeros((words, self.readers), np.int32)  # clock of each agent's last read
        self.seen = np.zeros((programs, warps, agents), np.int32)
        self.proxied = np.zeros((programs, warps, agents), np.int32)
        own = np.arange(warps)
        self.seen[:, own, own] = 1

    def agent(self, kind: int, warp):
        return warp + self.warps * kind

    def _words(self, index: np.ndarray, width: int) -> np.ndarray:
        first = index // self.grain
        count = max(1, width // self.grain)
        return first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def _spread(self, a: np.ndarray, width: int) -> np.ndarray:
        return np.repeat(a, max(1, width // self.grain))

    def reading(self, ins, index, width, program, warp, kind=WARP, clock=None) -> None:
        """Warp `warp` of `program` reads (or an agent of its) `width` bytes at each index."""
        words, p, w = self._words(index, width), self._spread(program, width), self._spread(warp, width)
        written, writer = self.written[words], self.writer[words]
        view = self.seen if kind == WARP else self.proxied
        if not written.all():
            raise Fault(f"{ins}: reads shared memory nobody wrote, offset {self._offset(words[written == 0][0])}")
        late = written > view[p, w, writer]
        if late.any():
            self._race(
                ins,
                "reads what",
                late,
                words,
                w,
                writer,
                view is self.proxied and not (written > self.seen[p, w, writer])[late].any(),
            )
        if kind == WARP:
            self.read[words, w] = self.seen[p, w, w]
        else:
            self.read[words, self.agent(kind, w)] = self._spread(clock, width)

    def writing(self, ins, index, width, program, warp, kind=WARP, clock=None) -> None:
        words, p, w = self._words(index, width), self._spread(program, width), self._spread(warp, width)
        written, writer = self.written[words], self.writer[words]
        view = self.proxied if kind in (WGMMA, BULK, TMA) else self.seen
        late = written > view[p, w, writer]
        if late.any():
            self._race(
                ins,
                "overwrites what",
                late,
                words,
                w,
                writer,
                view is self.proxied and not (written > self.seen[p, w, writer])[late].any(),
            )
        unread = self.read[words] > self.seen[p, w, : self.readers]
        if unread.any():
            late = unread.any(1)
            self._race(ins, "overwrites what is still read by", late, words, w, unread.argmax(1), False)
        agent = w if kind == WARP else self.agent(kind, w)
        self.writer[words] = agent
        self.written[words] = self.seen[p, w, w] if kind == WARP else self._spread(clock, width)
        self.read[words] = 0

    def _offset(self, word) -> int:
        return int(word) * self.grain % self.size

    def _race(self, ins, what, late, words, warp, other, fence) -> None:
        i = int(np.argmax(late))
        names = ("warp", "wgmma of warp", "bulk store of warp", "cp.async of warp", "TMA load of warp")
        kind, number = divmod(int(other[i]), self.warps)
        verb = "" if "read by" in what else " wrote"
        cause = "no fence.proxy.async" if fence else "no barrier or wait"
        raise Fault(
            f"{ins}: race: warp {int(warp[i])} {what} {names[kind]} {number}{verb}, offset {self._offset(words[i])}: "
            f"{cause} between ({int(late.sum())} places)"
        )

    # What orders agents.

    def join(self, program: int, warps: np.ndarray) -> None:
        """A barrier among `warps` of one program."""
        for view in (self.seen, self.proxied):
            view[program, warps] = view[program, warps].max(0)
        self.seen[program, warps, warps] += 1

    def join_all(self, programs: np.ndarray) -> None:
        own = np.arange(self.warps)
        for view in (self.seen, self.proxied):
            view[programs] = view[programs].max(1, keepdims=True)
        self.seen[programs[:, None], own, own] += 1

    def done(self, program, warp, kind, clock, proxied: bool = True, of=None) -> None:
        """The warps know that their agents of this kind (or those of warps `of`) have come to `clock`."""
        a = self.agent(kind, warp if of is None else of)
        for view in (self.seen, self.proxied) if proxied else (self.seen,):
            view[program, warp, a] = np.maximum(view[program, warp, a], clock)

    def fence_proxy(self, program, warp) -> None:
        self.proxied[program, warp] = np.maximum(self.proxied[program, warp], self.seen[program, warp])

    def release(self, program: int, warp: int):
        """What a warp knows, to be left at an mbarrier."""
        known = self.seen[program, warp].copy(), self.proxied[program, warp].copy()
        self.seen[program, warp, warp] += 1
        return known

    def acquire(self, program: int, warp: int, known) -> None:
        for view, clocks in zip((self.seen, self.proxied), known, strict=True):
            view[program, warp] = np.maximum(view[program, warp], clocks)
