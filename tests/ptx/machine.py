"""Runs a kernel: many thread blocks side by side, one numpy column a thread.

Lanes at the same place run together. Where a branch parts them, the group furthest back runs first, so that groups
meet again; a group at a barrier rests until the others have come, one that polls in vain steps back until others have
gone on. When nobody can go on, that is a deadlock. With a seed, warps run ahead of each other as chance will have it.

`late=True` lets whatever runs by itself (cp.async, TMA, wgmma, bulk stores) finish at the last moment that PTX allows,
at the wait that waits for it; `late=False` at once; with a seed, chance decides. A kernel must give the same result.
"""

from __future__ import annotations

import numpy as np

from . import fragments
from .alu import ATOMICS
from .codegen import Codegen, width_of
from .hopper import Hopper
from .memory import BASE, WRITTEN, Fault, Shared, rows
from .parse import Kernel
from .races import COPY, WARP, Races

ALL = slice(None)
POISON = 0x7FFFDEAD  # of registers: a NaN
PARAM_WINDOW = 0x5000_0000_0000  # where cvta.param puts the parameters
LOCAL_WINDOW = 0x6000_0000_0000  # and cvta.local each thread's own memory
SPEAKS = {"volatile", "relaxed", "acquire", "release"}  # of ld and st: meant for others to see


class Program:
    """A kernel made ready: its blocks compiled to Python."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.shared = dict(kernel.shared)
        if kernel.dynamic_shared:
            self.shared[kernel.dynamic_shared] = -(-kernel.static_shared // 1024) * 1024
        self.functions = Codegen(kernel, self.shared).functions()
        instructions = list(kernel.instructions())
        self.hopper = any(ins.op.startswith(("wgmma", "cp.async.bulk", "mbarrier")) for ins in instructions)
        self.together = any(self._speaks(ins) for ins in instructions)  # blocks may wait for each other
        self.grain = min([4, *(self._width(ins) for ins in instructions)])

    @staticmethod
    def _speaks(ins) -> bool:
        if any(p.startswith("shared") for p in ins.parts):
            return False
        return ins.parts[0] in ("atom", "red") or (ins.parts[0] in ("ld", "st") and bool(SPEAKS & set(ins.parts)))

    @staticmethod
    def _width(ins) -> int:
        """Bytes of an access to shared memory; a large number for other instructions."""
        parts = ins.parts
        if parts[0] not in ("ld", "st", "atom", "red") or any(p in ("global", "param", "local") for p in parts):
            return 99
        vector = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
        return vector * width_of(parts[-1]) // 8


class Machine(Hopper):
    def __init__(self, program, memory, parameters, maps, grid, threads, shared, options) -> None:
        self.program, self.memory, self.parameters, self.maps = program, memory, parameters, maps
        self.grid, self.threads, self.shared_size, self.options = grid, threads, shared, options
        self.rng = None if options.seed is None else np.random.default_rng(options.seed)
        self.wgmma_by_warp = options.wgmma_by_warp
        self.param_window, self.local_window = PARAM_WINDOW, LOCAL_WINDOW
        if threads % 32:
            raise Fault("thread blocks of whole warps only")

    @property
    def late(self) -> bool:
        """Whether what was just set going takes as long as it may."""
        return self.options.late if self.rng is None else bool(self.rng.integers(2))

    # One batch of thread blocks

    def run(self, first: int, count: int) -> None:
        """Thread blocks first .. first + count - 1, x running fastest."""
        kernel, threads = self.program.kernel, self.threads
        lanes = self.lanes = count * threads
        base = self.program.shared.get(kernel.dynamic_shared, kernel.static_shared)
        self.shared = Shared(count, base + self.shared_size)
        self.warps = threads // 32
        self.together = self.program.together
        self.races = Races(
            count, self.warps, self.shared.size, self.program.grain, self.program.hopper, self.together
        )  # fmt: skip
        lane = self.lane = np.arange(lanes)
        self.block = lane // threads  # within the batch
        self.thread = lane % threads
        self.warp = self.thread // 32
        self.program_id = first + self.block  # of the whole grid
        u16 = np.full((kernel.registers["16"], lanes), 0x7FFF, np.uint16)
        u32 = np.full((kernel.registers["32"], lanes), POISON, np.uint32)
        u64 = np.full((kernel.registers["64"], lanes), 0xDEAD_0000_0000_0000, np.uint64)
        self.views = (
            np.zeros((kernel.registers["p"], lanes), bool),
            u16, u16.view(np.int16), u16.view(np.float16), u32, u32.view(np.int32), u32.view(np.float32),
            u64, u64.view(np.int64), u64.view(np.float64),
        )  # fmt: skip
        self.predicates, self.u32 = self.views[0], u32
        self.local = np.full(lanes * kernel.local_bytes, 0xFF, np.uint8)
        self.local_written = np.zeros(lanes * kernel.local_bytes, bool)
        gx, gy, _ = self.grid
        p = self.program_id
        self.specials = {
            "%tid.x": self.thread, "%tid.y": 0 * lane, "%tid.z": 0 * lane, "%laneid": lane % 32, "%warpid": self.warp,
            "%ntid.x": 0 * lane + threads, "%ntid.y": 0 * lane + 1, "%ntid.z": 0 * lane + 1,
            "%ctaid.x": p % gx, "%ctaid.y": p // gx % gy, "%ctaid.z": p // (gx * gy),
            "%nctaid.x": 0 * lane + gx, "%nctaid.y": 0 * lane + gy, "%nctaid.z": 0 * lane + self.grid[2],
            "%cluster_ctarank": 0 * lane, "%cluster_nctarank": 0 * lane + 1, "%smid": p,
        }  # fmt: skip
        self.copies: list = []  # cp.async under way: (lanes, their groups, shared index, data, width)
        self.copy_group = np.zeros(lanes, np.int64)  # groups committed by each lane
        self.ready: dict[tuple[int, int], list] = {}  # (turn, place) -> groups of lanes
        self.turn = np.zeros(lanes // 32, np.int64)  # of each warp: the lowest runs first
        self.resting: dict = {}  # (block, barrier) -> [arrived, [(next, lanes, only arriving), ...]]
        self.gathering: dict[int, np.ndarray] = {}  # place -> lanes that wait for the rest of their warp group
        self.spinning: list = []
        self.spun = np.zeros(lanes, bool)
        self.any_spun = False
        self.polled = np.zeros((3, lanes), np.int64)  # each lane's last poll: instruction, address, value
        self.progress = self.progress_then = 0
        self.left = np.zeros(count, np.int64)  # lanes of each block that have returned
        self.resident = self.options.resident or count
        self.started = min(count, self.resident)
        self.reset_hopper()
        self._put(0, ALL if self.started == count else lane[: self.started * threads])
        with np.errstate(all="ignore"):
            self._schedule()
        self.check_exit()

    def _schedule(self) -> None:
        blocks, functions = self.program.kernel.blocks, self.program.functions
        for _ in range(self.options.steps):
            if self.rng is not None and self.rng.integers(24) == 0:
                self._shuffle()
            if not self.ready:
                if not self.spinning:
                    break
                if self.progress == self.progress_then:
                    self._deadlock()
                self.progress_then = self.progress
                spinning, self.spinning = self.spinning, []
                for place, S in spinning:
                    self._put(place, S)
            at = min(self.ready)
            S, place = self._merge(self.ready.pop(at)), at[1]
            if place == len(blocks):
                raise Fault(f"{self.program.kernel.name}: ran past its end")
            if blocks[place].gathers > 1:
                S = self._gather(place, S, blocks[place].gathers)
                if S is None:
                    continue
            functions[place](self, S)
            self._end(blocks[place], place, S)
        else:
            raise Fault(f"{self.program.kernel.name}: no end after {self.options.steps} basic blocks")
        if self.resting or self.gathering:
            self._deadlock()

    def _put(self, place: int, S) -> None:
        """The lanes of S can go on at `place`."""
        if self.rng is None:
            self.ready.setdefault((0, place), []).append(S)
            return
        lanes = self.all(S)
        turn = self.turn[lanes // 32]
        for t in np.unique(turn):
            self.ready.setdefault((int(t), place), []).append(lanes[turn == t])

    def _shuffle(self) -> None:
        """Other warps run first from now on; who polls may poll again."""
        self.turn = self.rng.integers(0, self.rng.integers(1, 5), self.turn.size)
        groups = [(place, S) for (_, place), found in self.ready.items() for S in found] + self.spinning
        self.ready, self.spinning = {}, []
        for place, S in groups:
            self._put(place, S)

    def _gather(self, place: int, S, size: int):
        """The lanes of S whose whole warp or warp group has come to this place, with those that were here before."""
        if S is ALL:
            return S
        if place in self.gathering:
            S = np.sort(np.concatenate([S, self.gathering.pop(place)]))
        group = self.block[S] * -(-self.threads // size) + self.thread[S] // size
        here = np.bincount(group)[group] == size
        first = next(iter(self.program.kernel.blocks[place].body), None)
        if first and first.parts[0] == "setmaxnreg":  # Triton lets warps one by one ask for what they have
            here |= self.maxnreg[S] == first.args[0].value
        if not here.all():
            self.gathering[place] = S[~here]
        return self._merge([S[here]]) if here.any() else None

    def _merge(self, groups):
        if len(groups) == 1:
            return groups[0]
        S = np.sort(np.concatenate(groups))
        return ALL if S.size == self.lanes else S

    def _deadlock(self) -> None:
        blocks = self.program.kernel.blocks
        where = []
        for (block, number), (arrived, groups) in self.resting.items():
            for place, S, _ in groups:
                where.append(
                    f"{S.size} threads of block {block} at barrier {number}, before PTX line "
                    f"{self._line(blocks, place)}; {arrived} of {self.threads} arrived"
                )
        for place, S in self.gathering.items():
            where.append(
                f"{S.size} threads without the rest of their warp (group) at PTX line {self._line(blocks, place)}"
            )
        for place, S in self.spinning:
            line = self._line(blocks, place)
            where.append(f"{self.all(S).size} threads waiting for an mbarrier or a flag near PTX line {line}")
        raise Fault(f"{self.program.kernel.name}: deadlock: " + "; ".join(where[:6]))

    @staticmethod
    def _line(blocks, place) -> str:
        if place >= len(blocks):
            return "end"
        first = blocks[place].body[0] if blocks[place].body else blocks[place].end
        return str(first.line) if first else "?"

    def _go(self, place: int, S) -> None:
        if self.any_spun:
            lanes = self.all(S)
            spun = self.spun[lanes]
            if spun.any():
                self.spun[lanes] = False
                self.any_spun = bool(self.spun.any())
                self.spinning.append((place, lanes[spun]))
                S = lanes[~spun]
                if not S.size:
                    return
        self._put(place, S)

    def _end(self, block, place: int, S) -> None:
        """Where the lanes of S go from the end of a basic block."""
        end = block.end
        if end is None:
            self._go(place + 1, S)
            return
        if end.guard is not None:
            taken = self.predicates[end.guard.index, S] ^ end.negated
            if not taken.all():
                if not taken.any():
                    self._go(place + 1, S)
                    return
                lanes = self.all(S)
                self._go(place + 1, lanes[~taken])
                S = lanes[taken]
        name = end.parts[0]
        if name == "bra":
            self._go(block.target, S)
        elif name in ("ret", "exit"):
            lanes = self.all(S)
            self.left += np.bincount(self.block[lanes], minlength=self.left.size)
            self.progress += 1
            while self.started < self.left.size and self.started - (self.left == self.threads).sum() < self.resident:
                self._put(0, self.lane[self.started * self.threads :][: self.threads])  # in the place of one that ended
                self.started += 1
        elif name in ("bar", "barrier"):
            self._barrier(end, place + 1, S)
        else:
            raise Fault(f"{end}: reached")

    def _barrier(self, ins, place: int, S) -> None:
        if "warp" in ins.parts:
            self.aligned(ins, S)
            self._go(place, S)
            return
        self.aligned(ins, S)
        arrive_only = "arrive" in ins.parts
        number, count = (self._operand_of(a, S) for a in [*ins.args, None][:2])
        if count is None:
            count = np.array([self.threads])
        if (
            S is ALL
            and number.size == count.size == 1
            and count[0] == self.threads
            and not (arrive_only or self.resting)
        ):
            self.races.join_all()
            self.progress += 1
            self._go(place, S)
            return
        lanes = self.all(S)
        which = np.broadcast_to(number << 32 | count, lanes.size)
        if (which.reshape(-1, 32) != which[::32, None]).any():
            raise Fault(f"{ins}: lanes of one warp name different barriers")
        for key in np.unique(self.block[lanes] << 48 | which):
            own = lanes[(self.block[lanes] << 48 | which) == key]
            self._arrive(ins, place, own, int(key) >> 48, int(key) >> 32 & 0xFFFF, int(key) & 0xFFFF, arrive_only)

    def _arrive(self, ins, place, lanes, block: int, number: int, count: int, arrive_only: bool) -> None:
        if number > 15 or count % 32:
            raise Fault(f"{ins}: barrier {number} of {count} threads")
        entry = self.resting.setdefault((block, number), [0, []])
        entry[0] += lanes.size
        entry[1].append((place, lanes, arrive_only))
        if entry[0] > count:
            raise Fault(f"{ins}: {entry[0]} threads at a barrier of {count}")
        if arrive_only:
            self._go(place, lanes)
        if entry[0] == count:
            del self.resting[block, number]
            everyone = np.concatenate([group for _, group, _ in entry[1]])
            self.races.join(block, np.unique(self.warp[everyone]))
            self.progress += 1
            for where, group, arrived in entry[1]:
                if not arrived:
                    self._go(where, group)

    def _operand_of(self, operand, S):
        """The values of a barrier's operand: one, or one for each lane."""
        if operand is None or hasattr(operand, "value"):
            return None if operand is None else np.array([operand.value])
        values = self.u32[operand.index, S].astype(np.int64)
        return values[:1] if (values == values[0]).all() else values

    # Lanes

    def all(self, S) -> np.ndarray:
        return self.lane if S is ALL else S

    def narrow(self, S, mask):
        """The lanes of S where mask holds; None when there are none."""
        if mask.all():
            return S
        if not mask.any():
            return None
        return self.all(S)[mask]

    def everywhere(self, value: int, S) -> np.ndarray:
        return np.full(self.all(S).size, value, np.int64)

    def special(self, name: str, S):
        if name not in self.specials:
            raise Fault(f"special register {name}")
        return self.specials[name][S]

    def parameter(self, offset: int, dtype):
        return self.parameters[offset : offset + np.dtype(dtype).itemsize].view(dtype)

    def aligned(self, ins, S) -> None:
        """.aligned: all lanes of a warp execute it together."""
        if S is ALL:
            return
        if S.size % 32 or (S.reshape(-1, 32) != S[::32, None] + np.arange(32)).any() or (S[::32] % 32).any():
            raise Fault(f"{ins}: not all lanes of a warp are here")

    def shfl(self, ins, S, a, b, c, mode: str):
        self.aligned(ins, S)
        n = self.all(S).size
        a, b, c = (np.broadcast_to(x, n).astype(np.int64) for x in (a, b, c))
        lane = np.arange(n) % 32
        b, bound, segment = b & 31, c & 31, c >> 8 & 31
        low, high = lane & segment, (lane & segment) | (bound & ~segment)
        if mode == "up":
            j = lane - b
            inside = j >= high
        elif mode == "down":
            j = lane + b
            inside = j <= high
        elif mode == "bfly":
            j = lane ^ b
            inside = j <= high
        else:
            j = low | (b & ~segment)
            inside = j <= high
        j = np.where(inside, j, lane)
        return a[np.arange(n) - lane + j].astype(np.uint32), inside

    def everyone(self, ins, S, mask) -> None:
        if (mask != 0xFFFFFFFF).any():
            raise Fault(f"{ins}: not supported for a part of a warp")
        self.aligned(ins, S)

    def elect(self, ins, S):
        n = self.all(S).size
        return np.zeros(n, np.uint32), np.arange(n) % 32 == 0

    def active(self, S) -> np.ndarray:
        lanes = self.all(S)
        masks = np.zeros(self.lanes // 32, np.uint32)
        np.bitwise_or.at(masks, lanes // 32, np.uint32(1) << (lanes % 32).astype(np.uint32))
        return masks[lanes // 32]

    def vote(self, ins, S, p, mode: str):
        votes = np.broadcast_to(p, self.all(S).size).reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32), 32)
        result = {"any": votes.any(1), "all": votes.all(1), "uni": votes.all(1) | ~votes.any(1)}[mode]
        return np.repeat(result, 32)

    def redux(self, ins, S, a, mode: str):
        a = np.broadcast_to(a, self.all(S).size).reshape(-1, 32)
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                    "xor": np.bitwise_xor}[mode]  # fmt: skip
        return np.repeat(function.reduce(a, axis=1, dtype=a.dtype), 32)

    # Memory

    def warps_of(self, S) -> tuple[np.ndarray, np.ndarray]:
        """Block and number of each warp that has lanes in S."""
        found = np.unique(self.all(S) // 32)
        return found // self.warps, found % self.warps

    def known(self, lanes: np.ndarray, kind: int = WARP, strong: bool = False):
        """Whose writes to global memory an access of these lanes may come after."""
        if self.together:
            return self.races.knows(self.block[lanes], self.warp[lanes], kind, strong)
        own = (WRITTEN + self.program_id[lanes])[:, None]
        return lambda state, clock: state == own

    def store_global(self, ins, lanes, address, width, data, kind=WARP, clock=None, strong=False) -> None:
        if self.together:
            block, warp = self.block[lanes], self.warp[lanes]
            agent = self.races.agent(kind, block, warp)
            clock = self.races.clock(block, warp) if clock is None else clock
        else:
            agent, clock = self.program_id[lanes], np.zeros(lanes.size, np.int32)
        known = self.known(lanes, kind, strong)
        self.memory.store(ins, address, width, data, known, agent, -clock if strong else clock)

    def ld(self, ins, S, space: str, address, width: int, sem: str | None, scope: str) -> np.ndarray:
        """(n, words); `sem`: None, relaxed or acquire."""
        if space == "generic":
            return self._split(S, address, lambda s, S, a, i: self.ld(ins, S, s, a, width, sem, scope), width)
        lanes = self.all(S)
        if space == "global":
            data = self.memory.load(ins, address, width, self.known(lanes, WARP, sem is not None))
        elif space == "param":
            if ((address < 0) | (address + width > self.parameters.size)).any():
                raise Fault(f"{ins}: outside the parameters")
            data = rows(self.parameters[address[:, None] + np.arange(width)].ravel(), width)
        elif space == "local":
            index = self._local(ins, lanes, address, width)
            if not rows(self.local_written.view(np.uint8), width)[index].all():
                raise Fault(f"{ins}: reads local memory nobody wrote")
            data = rows(self.local, width)[index]
        else:
            index = self.shared.index(ins, address, width, self.block[S])
            self.races.reading(ins, index, width, self.block[S], self.warp[S], strong=sem is not None)
            data = self.shared.load(index, width)
        if sem:
            for key, block, warp in self._flags(lanes, space, address):
                self.races.acquire_at(key, block, warp, sem == "acquire", scope)
            self._poll(ins, lanes, address, data)
        return data

    def st(self, ins, S, space: str, address, width: int, sem: str | None, scope: str, dtype, values) -> None:
        data = self._rows(address.size, width, dtype, values)
        if space == "generic":
            self._split(S, address, lambda s, S, a, i: self._st(ins, S, s, a, width, sem, scope, data[i]), width)
        else:
            self._st(ins, S, space, address, width, sem, scope, data)

    def _st(self, ins, S, space, address, width, sem, scope, data) -> None:
        lanes = self.all(S)
        if space == "param":
            raise Fault(f"{ins}: parameters are not to be written")
        if space == "local":
            index = self._local(ins, lanes, address, width)
            rows(self.local, width)[index] = data
            rows(self.local_written.view(np.uint8), width)[index] = 0x0101010101010101 & (1 << 8 * min(width, 8)) - 1
            return
        if sem:
            for key, block, warp in self._flags(lanes, space, address):
                self.races.release_at(key, block, warp, sem == "release", scope, False)
        if space == "global":
            self.store_global(ins, lanes, address, width, data, strong=sem is not None)
        else:
            index = self.shared.index(ins, address, width, self.block[S])
            self._write_shared(ins, index, width, self.block[S], self.warp[S], data, sem is not None)
        self.progress += 1

    def _write_shared(self, ins, index, width, block, warp, data, strong=False) -> None:
        same = None if strong else lambda: (self.shared.load(index, width) == data).all(1)
        self.races.writing(ins, index, width, block, warp, strong=strong, same=same)
        self.shared.store(index, width, data)

    def _split(self, S, address, access, width: int):
        """A generic access: `access(space, lanes, address, which)` for each space that addresses lie in."""
        lanes, result = self.all(S), None
        spaces = np.searchsorted([PARAM_WINDOW, LOCAL_WINDOW, BASE], address, side="right")
        for number in np.unique(spaces):
            space = ("shared", "param", "local", "global")[number]
            which = spaces == number
            window = {"param": PARAM_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
            data = access(space, lanes[which], address[which] - window, which)
            if data is not None:
                result = np.zeros((lanes.size, data.shape[1]), data.dtype) if result is None else result
                result[which] = data
        return result

    def _local(self, ins, lanes, address, width: int) -> np.ndarray:
        size = self.program.kernel.local_bytes
        if ((address < 0) | (address + width > size) | (address % width != 0)).any():
            raise Fault(f"{ins}: local address outside {size} bytes, or not a multiple of {width}")
        return (lanes * size + address) // width

    def _flags(self, lanes, space: str, address):
        """Address (of shared memory: a negative number), block and warp of each strong access."""
        for lane, a in zip(lanes, address, strict=True):
            block = int(self.block[lane])
            yield (int(a) if space == "global" else -(block << 32) - int(a)), block, int(self.warp[lane])

    def _poll(self, ins, lanes, address, data) -> None:
        """Who reads the same at the same place again gets no further by itself."""
        now = np.stack([np.full(lanes.size, id(ins)), address, data[:, 0].astype(np.int64)])
        vain = (self.polled[:, lanes] == now).all(0)
        self.polled[:, lanes] = now
        if vain.any():
            self.spun[lanes[vain]] = True
            self.any_spun = True
        if not vain.all():
            self.progress += 1

    def atom(self, ins, S, space, address, op: str, dtype, operands, sem: str, scope: str) -> np.ndarray:
        """Lane after lane, in any order; what was there before."""
        lanes, width = self.all(S), np.dtype(dtype).itemsize
        if space == "generic":
            space = "shared" if (address < PARAM_WINDOW).all() else "global"
        old = np.zeros(lanes.size, dtype)
        operands = [np.broadcast_to(o, lanes.size) for o in operands]
        order = range(lanes.size) if self.rng is None else self.rng.permutation(lanes.size)
        flags = list(self._flags(lanes, space, address))
        word = {4: np.uint32, 8: np.uint64}[width]
        for i in order:
            one, where, (key, block, warp) = lanes[i : i + 1], address[i : i + 1], flags[i]
            if space == "global":
                before = self.memory.load(ins, where, width, self.known(one, WARP, True))
            else:
                index = self.shared.index(ins, where, width, self.block[one])
                self.races.reading(ins, index, width, self.block[one], self.warp[one], strong=True)
                before = self.shared.load(index, width)
            self.races.acquire_at(key, block, warp, sem in ("acquire", "acq_rel"), scope)
            old[i] = before.view(dtype)[0, 0]
            data = np.array([[ATOMICS[op](old[i], *(o[i] for o in operands))]], dtype).view(word)
            self.races.release_at(key, block, warp, sem in ("release", "acq_rel"), scope, True)
            if space == "global":
                self.store_global(ins, one, where, width, data, strong=True)
            else:
                self.races.writing(ins, index, width, self.block[one], self.warp[one], strong=True)
                self.shared.store(index, width, data)
            if data[0, 0] == before[0, 0]:
                self._poll(ins, one, where, before)
            else:
                self.progress += 1
        return old

    def fence(self, S, scope: str) -> None:
        for block, warp in zip(*self.warps_of(S), strict=True):
            self.races.fence(int(block), int(warp), scope)

    @staticmethod
    def _rows(n: int, width: int, dtype, values) -> np.ndarray:
        data = np.empty((n, len(values)), dtype)
        for i, value in enumerate(values):
            data[:, i] = value
        word = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(width, np.uint64)
        return data.view(word)

    def ldmatrix(self, ins, S, address, count, trans):
        self.aligned(ins, S)
        block, warp = self.block[S], self.warp[S]
        address = address.reshape(-1, 32)[:, : 8 * count]
        n = address.shape[0]
        owner = block[::32].repeat(8 * count)
        index = self.shared.index(ins, address.ravel(), 16, owner)
        self.races.reading(ins, index, 16, owner, warp[::32].repeat(8 * count))
        data = np.ascontiguousarray(self.shared.load(index, 16)).view(np.uint16).reshape(n, count, 8, 8)
        return [fragments.spread_rows(data[:, i], trans) for i in range(count)]

    def stmatrix(self, ins, S, address, values, trans):
        self.aligned(ins, S)
        block, warp = self.block[S], self.warp[S]
        count = len(values)
        address = address.reshape(-1, 32)[:, : 8 * count]
        owner = block[::32].repeat(8 * count)
        index = self.shared.index(ins, address.ravel(), 16, owner)
        data = np.stack([fragments.gather_rows(v, trans) for v in values], 1)
        data = np.ascontiguousarray(data).reshape(-1, 8).view(np.uint64)
        self._write_shared(ins, index, 16, owner, warp[::32].repeat(8 * count), data)

    def mma(self, ins, S, a, b, c, kind):
        self.aligned(ins, S)
        n = self.all(S).size
        a, b, c = ([np.broadcast_to(r, n) for r in registers] for registers in (a, b, c))
        d = fragments.matmul(fragments.fragment_a(a, kind), fragments.fragment_b(b, kind), fragments.accumulator(c))
        return fragments.accumulator_registers(d)

    # cp.async

    def cp_async(self, ins, S, target, source, width, size):
        lanes, block, warp = self.all(S), self.block[S], self.warp[S]
        index = self.shared.index(ins, target, width, block)
        group = self.copy_group[lanes] + 1
        self.races.writing(ins, index, width, block, warp, COPY, group)
        size = np.broadcast_to(width if size is None else size, lanes.size)
        if ((size != 0) & (size != width)).any():
            raise Fault(f"{ins}: copies a part of {width} bytes")
        word = min(width, 8)
        data = np.zeros((lanes.size, width // word), {4: np.uint32, 8: np.uint64}[word])
        full = size == width
        data[full] = self.memory.load(ins, source[full], width, self.known(lanes[full]))
        if self.late:
            self.copies.append((lanes, group, index, data, width))
        else:
            self.shared.store(index, width, data)

    def cp_commit(self, S):
        self.copy_group[S] += 1

    def cp_wait(self, S, most: int):
        lanes = self.all(S)
        done = np.full(self.lanes, -1)
        done[lanes] = self.copy_group[lanes] - most
        rest = []
        for who, group, index, data, width in self.copies:
            now = group <= done[who]
            if now.any():
                self.shared.store(index[now], width, data[now])
            if not now.all():
                rest.append((who[~now], group[~now], index[~now], data[~now], width))
        self.copies = rest
        first = lanes[::32]  # groups are counted alike in all lanes of a warp
        self.races.done(self.block[first], self.warp[first], COPY, done[first], proxied=False)
