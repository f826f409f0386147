"""The Triton kernels. Importing this package imports no Triton; importing a kernel file does.

| file         | computes                                                                   |
| ------------ | -------------------------------------------------------------------------- |
| `s.py`       | S = scaling · drop(x) Aᵀ                                                   |
| `gemm.py`    | y = x Wᵀ + bias + S Bᵀ, and dx = dy W + drop(dS A): the heart               |
| `grads.py`   | dS with dB in one read of dy; dA with the mask made again                   |
| `onepass.py` | y and S from one read of x                                                 |
| `dropout.py` | the mask, a function of (seed, row, column)                                |
| `tiles.py`, `tiles_small.py` | which tile runs on which GPU                               |
| `matrix.py`  | a command: compile every kernel and tile for every target, with no GPU      |
"""
