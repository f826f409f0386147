"""The Triton kernels. Importing this package imports no Triton; importing a kernel file does.

| file          | computes                                                                           |
| ------------- | ---------------------------------------------------------------------------------- |
| `gemm.py`     | y = x Wᵀ + bias + S Bᵀ, and dx = dy W + drop(dS A): the heart                       |
| `gemm_ws.py`  | the same for sm_90 with specialised warps, in Gluon: tried beside it by the tuner   |
| `s.py`        | S = scaling · drop(x) Aᵀ                                                           |
| `grads.py`    | dS with dB in one read of dy; dA with the mask made again                           |
| `up.py`       | S Bᵀ + bias, and keep * (dS A): what ATen's GEMM adds to                            |
| `onepass.py`  | y and S from one read of x                                                         |
| `cuda.py`     | all of it in CUDA C++ for Hopper (csrc/cuda), through ctypes                        |
| `shared.py`   | S, and dA with dx, of several projections of one x                                 |
| `grouped.py`  | what else they have beside the GEMMs, in one launch; `gemm_each.py`: the GEMMs      |
| `bank.py`     | factors and thresholds of each row, where several adapters share a launch          |
| `partials.py` | sums of partial results, in order                                                   |
| `product.py`  | products, in tf32 of operands that are rounded to it                                |
| `dequantise.py` | the 4-bit weights of bitsandbytes made dense                                      |
| `dropout.py`  | the mask, a function of (seed, row, column)                                        |
| `tiles.py`    | which tile runs on which GPU                                                       |
| `launch.py`   | a launch as data: run it, compile it for any GPU, record it                         |
| `ahead.py`    | kernels compiled before they are needed, by helper processes                        |
| `matrix.py`   | a command: compile every launch for every target, with no GPU                       |

To add a kernel: write its file as formula, `@triton.jit` kernel, a function that makes its `Launch`es, an entry that
runs them. Take its tile from `tiles.py` (a row of RANK_TILES); scratch memory is a plain tensor among the arguments.
Yield its launches in `matrix.py`, from tensors on the meta device, once for each tile, dtype and flag.
Test it in `tests/kernels` with `judge`: every rank, ragged sizes, LAYOUTS, float32 adapters, bitwise repetition.
Run `python -m fastlora.kernels.matrix --kernel NAME`: no claim may fail on any target; commit the result file.
"""
