"""Who may see whose bytes: a vector-clock race detector for shared memory, and for global memory between thread blocks.

The agents of a thread block are its warps and, for each warp, what it set going that finishes by itself: cp.async
copies, wgmma, bulk stores, TMA loads. `seen[p, w, a]` is how far warp w of program p knows agent a; a barrier joins
what its warps know, a release leaves it at an address or mbarrier for who acquires it. An access is a race unless the
last conflicting one is known to the warp that makes it (or starts it). Lanes of a warp count as ordered.

`proxied` is `seen` as of the warp's last fence.proxy.async: what wgmma, TMA and bulk stores may rely on in shared
memory; `proxied_global` the same for global memory. With `together`, thread blocks know of each other's agents; without
it they have nothing to say to each other, and each counts its own.
"""

from __future__ import annotations

import numpy as np

from .memory import WRITTEN, Fault

# Kinds of agent. The first three may read shared memory; BULK is the reading half of a bulk store, STORE the other.
KINDS = WARP, WGMMA, BULK, COPY, TMA, STORE = range(6)
SCOPES = ("cta", "cluster", "gpu", "sys")


class Races:
    def __init__(self, programs: int, warps: int, size: int, grain: int, hopper: bool, together: bool) -> None:
        self.warps, self.grain, self.size, self.together = warps, grain, size, together
        agents = warps * len(KINDS)
        self.stride = agents if together else 0  # between the agents of one program and the next
        self.readers = warps * (3 if hopper else 1)
        words = programs * size // grain
        self.writer = np.zeros(words, np.int32)  # agent of the last write
        self.written = np.zeros(words, np.int32)  # its clock; 0: never written
        self.strong = np.zeros(words, bool)  # it was volatile, relaxed or atomic
        self.read = np.zeros((words, self.readers), np.int32)  # clock of each agent's last read
        shape = (programs, warps, agents * (programs if together else 1))
        self.seen, self.proxied = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.proxied_global = np.zeros(shape, np.int32) if together else self.proxied
        self.views = [self.seen, self.proxied, *([self.proxied_global] if together else [])]
        self.flags: dict[
            int, tuple
        ] = {}  # address in global memory -> what was released there: (program, scope, clocks)
        self.fenced: dict[tuple[int, int], tuple] = {}  # (program, warp) -> what its last fence would release
        self.observed: dict[tuple[int, int], dict] = {}  # what its relaxed loads have seen, for its next fence
        for p in range(programs):
            self._tick(p, np.arange(warps))

    def agent(self, kind: int, program, warp):
        return program * self.stride + kind * self.warps + warp

    def clock(self, program, warp) -> np.ndarray:
        return self.seen[program, warp, self.agent(WARP, program, warp)]

    def _tick(self, program, warps) -> None:
        self.seen[program, warps, self.agent(WARP, program, warps)] += 1

    def _words(self, index: np.ndarray, width: int) -> np.ndarray:
        first = index // self.grain
        count = max(1, width // self.grain)
        return first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def _spread(self, a: np.ndarray, width: int) -> np.ndarray:
        return np.repeat(a, max(1, width // self.grain))

    # Shared memory

    def reading(self, ins, index, width, program, warp, kind=WARP, clock=None, strong=False) -> None:
        """Warp `warp` of `program` reads (or an agent of its) `width` bytes at each index."""
        words, p, w = self._words(index, width), self._spread(program, width), self._spread(warp, width)
        written, writer = self.written[words], self.writer[words]
        if not written.all():
            raise Fault(f"{ins}: reads shared memory nobody wrote, offset {self._offset(words[written == 0][0])}")
        view = self.seen if kind == WARP else self.proxied
        self._ordered(ins, "reads what", words, p, w, writer, written, view, strong)
        if strong:
            return
        own = kind * self.warps + w
        self.read[words, own] = self.clock(p, w) if kind == WARP else self._spread(clock, width)

    def writing(self, ins, index, width, program, warp, kind=WARP, clock=None, strong=False, same=None) -> None:
        """`same` tells where the bytes are what they were: warps that hold the same value may all write it."""
        words, p, w = self._words(index, width), self._spread(program, width), self._spread(warp, width)
        written, writer = self.written[words], self.writer[words]
        view = self.proxied if kind in (WGMMA, BULK, TMA) else self.seen
        self._ordered(ins, "overwrites what", words, p, w, writer, written, view, strong, same and (width, same))
        if self.together:
            known = self.seen[p[:, None], w[:, None], self.agent(WARP, p, 0)[:, None] + np.arange(self.readers)]
        else:
            known = self.seen[p, w, : self.readers]
        unread = self.read[words] > known
        if unread.any():
            self._race(ins, "overwrites what is still read by", unread.any(1), words, w, unread.argmax(1), False)
        self.writer[words] = self.agent(kind, p, w)
        self.written[words] = self.clock(p, w) if kind == WARP else self._spread(clock, width)
        self.strong[words] = strong
        self.read[words] = 0

    def _ordered(self, ins, what, words, p, w, writer, written, view, strong, same=None) -> None:
        late = written > view[p, w, writer]
        if strong:  # strong accesses do not race with each other
            late &= ~self.strong[words]
        if same and late.any():
            late &= ~self._spread(same[1](), same[0])
        if late.any():
            fence = view is self.proxied and not (written > self.seen[p, w, writer])[late].any()
            self._race(ins, what, late, words, w, writer - p * self.stride, fence)

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

    # Global memory, between thread blocks

    def knows(self, program, warp, kind: int, strong: bool):
        """For `Global`: which writes an access of this warp, or of its agent of this kind, may come after."""
        view = self.proxied_global if kind in (STORE, TMA) else self.seen

        def known(state, clock):
            known = np.abs(clock) <= view[program[:, None], warp[:, None], state - WRITTEN]
            return known | (clock < 0) if strong else known  # strong accesses do not race with each other

        return known

    def release_at(self, address: int, program: int, warp: int, releases: bool, scope: str, keeps: bool) -> None:
        """A strong write. `keeps`: a read-modify-write, which goes on with what the write before it released."""
        before = self.flags.pop(address, None)
        before = before if keeps else None
        note = (program, scope, self.release(program, warp)) if releases else self.fenced.get((program, warp))
        if note and not releases:
            note = (program, min(scope, note[1], key=SCOPES.index), note[2])
        if before and note:
            clocks = tuple(np.maximum(a, b) for a, b in zip(before[2], note[2], strict=True))
            note = (program, min(before[1], note[1], key=SCOPES.index), clocks)
        if note or before:
            self.flags[address] = note or before

    def acquire_at(self, address: int, program: int, warp: int, acquires: bool, scope: str) -> None:
        """A strong read."""
        note = self.flags.get(address)
        if note is None or (note[0] != program and {note[1], scope} & {"cta", "cluster"}):
            return
        if acquires:
            self.acquire(program, warp, note[2])
        else:
            self.observed.setdefault((program, warp), {})[address] = note[0], note[2]

    def fence(self, program: int, warp: int, scope: str) -> None:
        """fence.acq_rel: takes what relaxed reads have seen; later relaxed writes release what is known now."""
        for other, clocks in self.observed.pop((program, warp), {}).values():
            if other == program or scope in ("gpu", "sys"):
                self.acquire(program, warp, clocks)
        self.fenced[program, warp] = (program, scope, self.release(program, warp))

    # What orders agents

    def join(self, program: int, warps: np.ndarray) -> None:
        """A barrier among `warps` of one program."""
        for view in self.views:
            view[program, warps] = view[program, warps].max(0)
        self._tick(program, warps)

    def join_all(self) -> None:
        """A barrier in each program, of all its warps."""
        for view in self.views:
            view[:] = view.max(1, keepdims=True)
        for p in range(self.seen.shape[0]):
            self._tick(p, np.arange(self.warps))

    def done(self, program, warp, kind, clock, proxied: bool = True, of=None) -> None:
        """The warps know that their agents of this kind (or those of warps `of`) have come to `clock`."""
        a = self.agent(kind, program, warp if of is None else of)
        for view in self.views if proxied else (self.seen,):
            view[program, warp, a] = np.maximum(view[program, warp, a], clock)

    def fence_proxy(self, program, warp, views) -> None:
        for view in views:
            view[program, warp] = np.maximum(view[program, warp], self.seen[program, warp])

    def nothing(self) -> list[np.ndarray]:
        """What an agent of its own knows before it has done anything."""
        return [np.zeros(view.shape[2], view.dtype) for view in self.views]

    def release(self, program: int, warp: int) -> tuple:
        """What a warp knows, to be left at an mbarrier or a flag."""
        known = tuple(view[program, warp].copy() for view in self.views)
        self._tick(program, warp)
        return known

    def acquire(self, program: int, warp: int, known) -> None:
        for view, clocks in zip(self.views, known, strict=True):
            view[program, warp] = np.maximum(view[program, warp], clocks)
