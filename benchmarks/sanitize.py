"""A small ragged case of each path, to be run under compute-sanitizer: `python -m benchmarks.sanitize`."""

from __future__ import annotations

import torch

from fastlora import accuracy, lora_linear
from fastlora.paths import Problem, registry

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
            inputs = accuracy.draw(M, N, K, R, torch.float16, device=device)
            for dropout_p in (0.0, 0.25):
                y = lora_linear(
                    inputs.x.requires_grad_(),
                    inputs.weight,
                    inputs.lora_A.requires_grad_(),
                    inputs.lora_B.requires_grad_(),
                    inputs.bias,
                    2.0,
                    dropout_p,
                    path=name,
                )
                torch.autograd.grad(y, (inputs.x, inputs.lora_A, inputs.lora_B), inputs.dy)
            torch.cuda.synchronize()
            print(f"{name}: {M}x{K}x{N} r{R} ran")


if __name__ == "__main__":
    main()
