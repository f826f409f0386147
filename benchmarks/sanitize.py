"""A small ragged case of each path, to be run under compute-sanitizer: `python -m benchmarks.sanitize`."""

from __future__ import annotations

import torch

from fastlora import accuracy
from fastlora.dispatch import Problem, registry

SHAPES = ((37, 53, 41, 3), (64, 128, 96, 16))  # no size a multiple of a tile; then one that descriptors take


def main() -> None:
    device = torch.device("cuda")
    for name in registry.NAMES:
        path = registry.load(name)
        for M, N, K, R in SHAPES:
            problem = Problem(M, N, K, R, torch.float16, torch.float16, device, True)
            reason = path.unavailable(device) or path.unsupported(problem)
            if reason:
                print(f"{name}: {reason}")
                break
            t = accuracy.draw(M, N, K, R, torch.float16, device=device)
            for p in (0.0, 0.25):
                seed = path.draw(t.x, p) if p else None
                _, S = path.forward(t.x, t.weight, t.lora_A, t.lora_B, t.bias, 2.0, p, seed)
                path.backward(t.dy, t.x, t.weight, t.lora_A, t.lora_B, S, 2.0, p, seed, True)
            torch.cuda.synchronize()
            print(f"{name}: {M}x{K}x{N} r{R} ran")


if __name__ == "__main__":
    main()
