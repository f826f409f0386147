"""What sm_90 adds: mbarriers, TMA, bulk stores and wgmma, each of which goes on while the warp does other things."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from . import fragments
from .memory import Fault
from .races import BULK, STORE, TMA, WGMMA

POISON = np.uint32(0x7FFFDEAD)
addresses = lru_cache(maxsize=4096)(fragments.operand_addresses)


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map, dimensions innermost first as cuTensorMapEncodeTiled takes them."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, the first is itemsize
    box: tuple[int, ...]
    swizzle: int  # 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes: CUtensorMapSwizzle, and the bits exchanged
    shared_align = 128

    def __post_init__(self) -> None:
        inner = self.box[0] * self.itemsize
        if self.address % 16 or any(s % 16 for s in self.strides[1:]):
            raise Fault(f"tensor map: address {self.address:#x} and strides {self.strides} must be multiples of 16")
        if any(b > 256 or b < 1 for b in self.box) or inner % 16:
            raise Fault(f"tensor map: box {self.box} of {self.itemsize}-byte elements")
        if self.swizzle and inner > 16 << self.swizzle:
            raise Fault(f"tensor map: {inner} bytes in a row, {16 << self.swizzle} to swizzle")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def elements(self, coords) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the box's elements, and which lie within the tensor; the innermost runs fastest."""
        if self.itemsize == 1 and int(coords[0]) % 16:  # an H100 stopped with an illegal instruction at 8
            raise Fault(f"a box begins {int(coords[0])} bytes into a row, no multiple of 16")
        where, inside = np.zeros((1,) * len(self.box), np.int64), np.ones((1,) * len(self.box), bool)
        for d, (c, n, stride, b) in enumerate(zip(coords, self.shape, self.strides, self.box, strict=True)):
            axis = len(self.box) - 1 - d
            i = (int(c) + np.arange(b)).reshape([-1 if a == axis else 1 for a in range(len(self.box))])
            where = where + i * stride
            inside = inside & (i >= 0) & (i < n)
        return self.address + where.ravel(), inside.ravel()


@dataclass(frozen=True)
class Run:
    """Bytes in a row, for cp.async.bulk without a tensor map."""

    address: int
    bytes: int
    itemsize, swizzle, shared_align = 8, 0, 16

    def elements(self, coords) -> tuple[np.ndarray, np.ndarray]:
        where = self.address + np.arange(0, self.bytes, self.itemsize)
        return where, np.ones(where.size, bool)


@dataclass
class Mbarrier:
    count: int
    pending: int
    tx: int = 0
    phase: int = 0
    loads: list = field(default_factory=list)  # TMA loads that will report here
    knowledge: list = field(default_factory=list)  # what arrived with this phase
    done: tuple | None = None  # what the phase before brought
    asked: set = field(default_factory=set)  # warps that have tried this phase: the first try may fail


@dataclass
class BulkStore:
    lane: int
    group: int
    clock: int
    ins: object
    tma: TensorMap
    coords: list
    index: np.ndarray  # in shared memory
    data: np.ndarray | None = None  # once it has been read
    written: bool = False


class Hopper:
    def reset_hopper(self) -> None:
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}
        self.maxnreg = np.zeros(self.lanes, np.int64)  # what each thread was last granted
        self.tma_clock = np.zeros((self.left.size, self.warps), np.int64)
        self.bulk_group = np.zeros(self.lanes, np.int64)
        self.bulk_clock = np.zeros((self.left.size, self.warps), np.int64)
        self.stores: list[BulkStore] = []
        self.wgmma_group = np.zeros(self.lanes // 32, np.int64)  # groups committed by each warp of the batch
        self.wgmma_queue: list = []
        self.flying: dict = {}  # (first lane, registers) -> [accumulator, how many products are under way]

    def check_exit(self) -> None:
        name = self.program.kernel.name
        if unread := sum(item.data is None for item in self.stores):
            raise Fault(f"{name}: returned while {unread} bulk stores still read shared memory")
        for item in self.stores:
            self._write_store(item)
        if self.wgmma_queue:
            raise Fault(f"{name}: returned without waiting for {len(self.wgmma_queue)} wgmma")
        if any(b.loads for b in self.mbarriers.values()):
            raise Fault(f"{name}: returned while TMA loads were under way")

    def fence_proxy(self, S, space: str) -> None:
        races = self.races
        views = {"": races.views[1:], "shared": [races.proxied], "global": races.views[2:]}[space]
        races.fence_proxy(*self.warps_of(S), views)

    # mbarriers

    def _mbarrier(self, ins, lane: int, address: int) -> Mbarrier:
        found = self.mbarriers.get((int(self.block[lane]), int(address)))
        if found is None:
            raise Fault(f"{ins}: no mbarrier at {int(address):#x}")
        return found

    def _touch(self, ins, S, address, write: bool) -> None:
        """An mbarrier is made and ended by writes of its eight bytes; all else counts as reading them."""
        index = self.shared.index(ins, address, 8, self.block[S])
        (self.races.writing if write else self.races.reading)(ins, index, 8, self.block[S], self.warp[S])

    def mbarrier_init(self, ins, S, address, count) -> None:
        lanes = self.all(S)
        self._touch(ins, S, address, True)
        for lane, a, n in zip(lanes, address, np.broadcast_to(count, lanes.size), strict=True):
            self.mbarriers[int(self.block[lane]), int(a)] = Mbarrier(int(n), int(n))

    def mbarrier_inval(self, ins, S, address) -> None:
        self._touch(ins, S, address, True)
        for lane, a in zip(self.all(S), address, strict=True):
            if self._mbarrier(ins, lane, a).loads:
                raise Fault(f"{ins}: TMA loads are under way")
            del self.mbarriers[int(self.block[lane]), int(a)]

    def mbarrier_arrive(self, ins, S, address, tx, count, arrives: bool) -> np.ndarray:
        """The phase that each lane arrived in."""
        lanes = self.all(S)
        phases = np.zeros(lanes.size, np.uint64)
        self._touch(ins, S, address, False)
        tx = np.broadcast_to(0 if tx is None else tx, lanes.size)
        count = np.broadcast_to(1 if count is None else count, lanes.size)
        for i, (lane, a, t, n) in enumerate(zip(lanes, address, tx, count, strict=True)):
            barrier = self._mbarrier(ins, lane, a)
            barrier.tx += int(t)
            phases[i] = barrier.phase
            if arrives:
                block, warp = int(self.block[lane]), int(self.warp[lane])
                if barrier.pending < n:
                    raise Fault(f"{ins}: more arrivals than the {barrier.count} of the mbarrier's count")
                barrier.pending -= int(n)
                barrier.knowledge.append(self.races.release(block, warp))
                self._advance(barrier)
        self.progress += 1
        return phases

    def _advance(self, barrier: Mbarrier) -> None:
        if barrier.pending == 0 and barrier.tx == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            barrier.done = tuple(np.maximum.reduce(views) for views in zip(*barrier.knowledge, strict=True))
            barrier.knowledge = []
            self.progress += 1

    def mbarrier_wait(self, ins, S, address, parity) -> np.ndarray:
        lanes = self.all(S)
        self._touch(ins, S, address, False)
        parity = np.broadcast_to(parity, lanes.size)
        key = (self.block[lanes] << 40) + (self.warp[lanes] << 34) + (address << 1) + parity
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        result = np.zeros(first.size, bool)
        for i, at in enumerate(first):
            lane = lanes[at]
            barrier = self._mbarrier(ins, lane, address[at])
            asker = int(self.warp[lane]), int(parity[at])
            if asker not in barrier.asked and self.late:  # try_wait may return false at any time
                barrier.asked = {a for a in barrier.asked if a[0] != asker[0]} | {asker}
                self.progress += 1
                continue
            if barrier.phase & 1 == parity[at] and barrier.pending == 0:
                loads, barrier.loads = barrier.loads, []
                for load in loads:
                    load()
                self._advance(barrier)
            result[i] = barrier.phase & 1 != parity[at]
            if result[i] and barrier.done is not None:
                self.races.acquire(int(self.block[lane]), int(self.warp[lane]), barrier.done)
        passed = result[inverse.ravel()]
        if not passed.all():
            self.spun[lanes[~passed]] = True
            self.any_spun = True
        return passed

    # TMA

    def maps_at(self, ins, addresses) -> list[TensorMap]:
        found = [self.maps.get(int(a) - self.param_window) for a in addresses]
        if None in found:
            raise Fault(f"{ins}: no tensor map at {int(addresses[found.index(None)]):#x}")
        return found

    def runs_at(self, ins, addresses, sizes) -> list[Run]:
        sizes = np.broadcast_to(sizes, len(addresses))
        if ((addresses | sizes) & 15).any():
            raise Fault(f"{ins}: address or size is not a multiple of 16")
        return [Run(int(a), int(n)) for a, n in zip(addresses, sizes, strict=True)]

    def setmaxnreg(self, ins, S, count: int) -> None:
        self.aligned(ins, S)
        self.maxnreg[S] = count
        if count % 8 or not 24 <= count <= 256:
            raise Fault(f"{ins}: {count} registers")

    def _box(self, ins, lane, tma: TensorMap, address) -> tuple[np.ndarray, np.ndarray]:
        """Indices into shared memory of a box's elements, and of its pieces of 16 bytes."""
        if int(address) % tma.shared_align:
            raise Fault(f"{ins}: shared address {int(address):#x} is not a multiple of {tma.shared_align}")
        found = []
        for width in (tma.itemsize, 16):
            where = fragments.swizzle(int(address) + np.arange(0, tma.bytes, width), tma.swizzle)
            found.append(self.shared.index(ins, where, width, np.full(where.size, self.block[lane])))
        return tuple(found)

    def tma_load(self, ins, S, target, maps, coords, barrier) -> None:
        lanes = self.all(S)
        coords = [np.broadcast_to(c, lanes.size) for c in coords]
        for i, lane in enumerate(lanes):
            tma = maps[i]
            index, pieces = self._box(ins, lane, tma, target[i])
            block, warp = int(self.block[lane]), int(self.warp[lane])
            self.tma_clock[block, warp] += 1
            clock = int(self.tma_clock[block, warp])
            self.races.writing(
                ins, pieces, 16, *(np.full(pieces.size, v) for v in (block, warp)), TMA, np.full(pieces.size, clock)
            )
            reports = self._mbarrier(ins, lane, barrier[i])
            where, inside = tma.elements([c[i] for c in coords])

            known = self.known(np.full(int(inside.sum()), lane), TMA)
            self.memory.load(ins, where[inside], tma.itemsize, known)  # what may not be read now is a fault now

            def finish(
                tma=tma,
                index=index,
                where=where,
                inside=inside,
                known=known,
                reports=reports,
                clock=clock,
                at=(block, warp),
            ):
                data = np.zeros((index.size, 1), {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[tma.itemsize])
                data[inside] = self.memory.load(ins, where[inside], tma.itemsize, known)
                self.shared.store(index, tma.itemsize, data)
                reports.tx -= tma.bytes
                brings = self.races.nothing()
                for clocks in brings:
                    clocks[self.races.agent(TMA, *at)] = clock
                reports.knowledge.append(tuple(brings))

            if self.late:
                reports.loads.append(finish)
            else:
                finish()
                self._advance(reports)
        self.progress += 1

    def tma_store(self, ins, S, maps, coords, source) -> None:
        lanes = self.all(S)
        coords = [np.broadcast_to(c, lanes.size) for c in coords]
        for i, lane in enumerate(lanes):
            tma = maps[i]
            index, pieces = self._box(ins, lane, tma, source[i])
            block, warp = int(self.block[lane]), int(self.warp[lane])
            self.bulk_clock[block, warp] += 1
            clock = int(self.bulk_clock[block, warp])
            spread = (np.full(pieces.size, v) for v in (block, warp))
            self.races.reading(ins, pieces, 16, *spread, BULK, np.full(pieces.size, clock))
            item = BulkStore(lane, int(self.bulk_group[lane]) + 1, clock, ins, tma, [int(c[i]) for c in coords], index)
            self.stores.append(item)
            if not self.late:
                self._read_store(item)
                self._write_store(item)

    def _read_store(self, item: BulkStore) -> None:
        if item.data is None:
            item.data = self.shared.load(item.index, item.tma.itemsize)

    def _write_store(self, item: BulkStore) -> None:
        if item.written:
            return
        item.written = True
        where, inside = item.tma.elements(item.coords)
        lanes, clock = np.full(int(inside.sum()), item.lane), np.full(int(inside.sum()), item.clock, np.int32)
        self.store_global(item.ins, lanes, where[inside], item.tma.itemsize, item.data[inside], STORE, clock)
        self.progress += 1

    def bulk_commit(self, S) -> None:
        self.bulk_group[S] += 1

    def bulk_wait(self, S, most: int, read: bool) -> None:
        """`read`: shared memory may be used again, but what was written is not to be seen yet."""
        lanes = self.all(S)
        done = np.full(self.lanes, -1)
        done[lanes] = self.bulk_group[lanes] - most
        for item in self.stores:
            if item.group <= done[item.lane]:
                self._read_store(item)
                if not read:
                    self._write_store(item)
        block, warp = self.warps_of(S)
        for b, w in zip(block, warp, strict=True):
            own = [item for item in self.stores if self.block[item.lane] == b and self.warp[item.lane] == w]
            unread = [item.clock for item in own if item.group > done[item.lane]]
            clock = min(unread, default=self.bulk_clock[b, w] + 1) - 1
            for kind in (BULK,) if read else (BULK, STORE):
                self.races.done(int(b), int(w), kind, clock)
        if not read:
            self.stores = [item for item in self.stores if item.group > done[item.lane]]

    # wgmma

    def _groups(self, ins, S) -> np.ndarray:
        """(warp groups, 128) lanes."""
        self.aligned(ins, S)
        lanes = self.all(S)
        if lanes.size % 128 or (self.thread[lanes[::128]] % 128).any() or (np.diff(lanes.reshape(-1, 128)) != 1).any():
            raise Fault(f"{ins}: not all warps of a warp group are here")
        return lanes.reshape(-1, 128)

    def wgmma_fence(self, ins, S) -> None:
        self._groups(ins, S)

    def wgmma(self, ins, S, d, a, b, scale, n, k, kind, trans) -> None:
        groups = self._groups(ins, S)
        count = groups.size
        b = np.broadcast_to(b, count).reshape(-1, 128)
        a_descriptors = None if isinstance(a, tuple) else np.broadcast_to(a, count).reshape(-1, 128)
        scale = np.broadcast_to(scale, count).reshape(-1, 128)
        size = 4 if kind == "tf32" else 2
        for i, lanes in enumerate(groups):
            for values in (b[i], scale[i], *([] if a_descriptors is None else [a_descriptors[i]])):
                if (values != values[0]).any():
                    raise Fault(f"{ins}: descriptors differ within a warp group")
            block = int(self.block[lanes[0]])
            clock = int(self.wgmma_group[lanes[0] // 32]) + 1
            b_index = self._operand(ins, int(b[i, 0]), n, k, size, bool(trans[1]), block)
            a_index = None
            if a_descriptors is not None:
                a_index = self._operand(ins, int(a_descriptors[i, 0]), 64, k, size, bool(trans[0]), block)
            piece = 16 // size  # elements of 16 bytes side by side
            b_pieces = (b_index[::piece] if trans[1] else b_index[:, ::piece]).ravel()
            pieces = b_pieces
            if a_index is not None:
                a_pieces = (a_index[::piece] if trans[0] else a_index[:, ::piece]).ravel()
                pieces = np.concatenate([b_pieces, a_pieces])
            first = int(self.warp[lanes[0]])
            for warp in range(first, first + (4 if self.wgmma_by_warp else 1)):
                spread = (np.full(pieces.size, v) for v in (block, warp))
                self.races.reading(ins, pieces, 16, *spread, WGMMA, np.full(pieces.size, clock))
            before = None if a_index is not None else [self.u32[r, lanes] for r in a]
            operand = (a, before) if a_index is None else a_index
            key = (int(lanes[0]), d)
            item = (ins, key, clock, lanes, operand, b_index, bool(scale[i, 0]), kind)
            flight = self.flying.get(key)
            if flight is None:
                flight = self.flying[key] = [[self.u32[r, lanes] for r in d], 0]
                late = self.late
                if late:
                    self.u32[np.ix_(d, lanes)] = POISON
            else:
                late = True
            flight[1] += 1
            if late:
                self.wgmma_queue.append(item)
            else:
                self._finish_wgmma(item, False)

    def _operand(self, ins, descriptor, outer, inner, size, transposed, block) -> np.ndarray:
        where = addresses(descriptor, outer, inner, size, transposed)
        flat = where.ravel()
        return self.shared.index(ins, flat, size, np.full(flat.size, block)).reshape(where.shape)

    def _matrix(self, index: np.ndarray, kind: str) -> np.ndarray:
        size = 4 if kind == "tf32" else 2
        return fragments.element(self.shared.load(index.ravel(), size).reshape(index.shape), kind)

    def _finish_wgmma(self, item, queued: bool) -> None:
        ins, key, _, lanes, a, b_index, scale, kind = item
        b = self._matrix(b_index, kind).T
        if isinstance(a, tuple):
            registers, before = a
            now = [self.u32[r, lanes] for r in registers]
            if any((x != y).any() for x, y in zip(now, before, strict=True)):
                raise Fault(f"{ins}: registers of A were changed before the wgmma.wait_group that waits for it")
            a = fragments.fragment_a(now, kind).reshape(64, -1)
        else:
            a = self._matrix(a, kind)
        flight = self.flying[key]
        if queued and (self.u32[np.ix_(key[1], lanes)] != POISON).any():
            raise Fault(f"{ins}: accumulators were changed before the wgmma.wait_group that waits for it")
        c = fragments.accumulator(flight[0]).reshape(64, -1) if scale else 0.0
        result = fragments.matmul(a, b, c).reshape(4, 16, -1)
        flight[0] = list(fragments.accumulator_registers(result).T)
        flight[1] -= 1
        if flight[1] == 0:
            for r, values in zip(key[1], flight[0], strict=True):
                self.u32[r, lanes] = values
            del self.flying[key]

    def wgmma_commit(self, ins, S) -> None:
        groups = self._groups(ins, S)
        self.wgmma_group[groups[:, ::32].ravel() // 32] += 1

    def wgmma_wait(self, ins, S, most: int) -> None:
        groups = self._groups(ins, S)
        done = np.full(self.lanes // 32, -1)
        warps = groups[:, ::32].ravel() // 32
        done[warps] = self.wgmma_group[warps] - most
        rest = []
        for item in self.wgmma_queue:
            if item[2] <= done[item[3][0] // 32]:
                self._finish_wgmma(item, True)
            else:
                rest.append(item)
        self.wgmma_queue = rest
        block, warp = warps // self.warps, warps % self.warps
        self.races.done(block, warp, WGMMA, done[warps], of=warp if self.wgmma_by_warp else warp // 4 * 4)
