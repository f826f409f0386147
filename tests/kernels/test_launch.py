"""A launch as data: recorded in order, named by what it compiles to, made without memory."""

from __future__ import annotations

import threading

import pytest
import torch
from judge import draw

from fastlora.kernels.grads import ds_db
from fastlora.kernels.s import s_forward, s_launches
from fastlora.kernels.tiles import Target, Tile
from fastlora.record import recording

AMPERE = Target("cuda", 80)


def test_a_recording_has_every_launch_of_its_thread_in_order_and_scratch_memory_among_the_arguments():
    x, A, S = (draw(*size, dtype=torch.float32) for size in ((20, 700), (4, 700), (20, 4)))
    with recording() as seen:
        s_forward(x, A, 1.0, None)
        other = threading.Thread(target=s_forward, args=(x, A, 1.0, None))
        other.start()
        other.join()
        ds_db(x, A.t(), S, 1.0)
    s_forward(x, A, 1.0, None)
    launches = [launch for launch, _ in seen]
    assert [launch.fn.__name__ for launch in launches] == ["s_kernel", "sum_kernel", "ds_db_kernel", "sum_kernel"]
    assert launches[0].args["out_ptr"] is launches[1].args["partials0_ptr"]
    assert all(list(launch.args) == launch.fn.arg_names for launch in launches)


def test_a_tile_given_is_the_tile_that_runs():
    x, A = (draw(*size, dtype=torch.float32) for size in ((20, 70), (4, 70)))
    with recording() as seen:
        s_forward(x, A, 1.0, None, Tile(16, 0, 32, 4, 1))
    assert seen[0][0].label == "s/f32/r16/ragged 16x32 w4 s1"


@pytest.mark.parametrize(
    ("dtype", "adapter", "start", "label"),
    [
        (torch.bfloat16, torch.bfloat16, 0, "s/bf16/r32/aligned 32x128 w4 s4"),
        (torch.bfloat16, torch.float32, 0, "s/bf16/a:f32/r32/aligned 32x128 w4 s4"),
        (torch.float16, torch.float16, 1, "s/f16/r32/ragged 32x128 w4 s4"),
    ],
)
def test_a_label_tells_dtypes_rank_alignment_and_tile(dtype, adapter, start, label):
    x = torch.empty((1 << 20) + start, dtype=dtype, device="meta")[start:].view(1 << 13, 128)
    A, S = torch.empty(20, 128, dtype=adapter, device="meta"), torch.empty(1 << 13, 20, dtype=dtype, device="meta")
    (launch,) = s_launches(AMPERE, x, A, 2.0, None, S)
    assert launch.label == label and launch.grid == (256, 1)
