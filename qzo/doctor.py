"""`qzo doctor`: versions, devices, what is missing, and a self-test of noise, kernels and one tuning step."""

import importlib.util
import time

import torch
from qzo_kernels import ops, reference

from qzo.errors import RunFailed
from qzo.memory import gigabytes
from qzo.model.load import pick_device, pick_dtype
from qzo.run import device_name, versions
from qzo.zo.noise import tensor_uid

# First words of noise version 1 for seed 0, step 0, direction 0 of the tensor "doctor/scales".
_WORDS = (922913453, 530588520, 149038540, 3582886296)
EXTRAS = {"triton": "GPU kernels: pip install 'qzo[gpu]'", "datasets": "data from the hub: pip install 'qzo[hub]'"}


def doctor() -> None:
    """Print what is there. Raises RunFailed when the self-test finds something wrong."""
    for name, version in versions().items():
        print(f"{name:<14}{version}")
    device = pick_device("auto")
    print(f"{'device':<14}{device_name(device)}, computing in {str(pick_dtype('auto', device))[6:]}")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        print(f"{'memory':<14}{gigabytes(free)} free of {gigabytes(total)}")
    for module, use in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{'missing':<14}{module} ({use})")
    started = time.monotonic()
    for name, check in (("noise", _check_noise), ("kernels", _check_kernels), ("tuning", _check_tuning)):
        problem = check(device)
        print(f"{'self-test':<14}{name}: {problem or 'ok'}")
        if problem:
            raise RunFailed(f"self-test, {name}", problem, "equal results", "Reinstall torch and triton in the tested versions.")
    print(f"{'self-test':<14}{time.monotonic() - started:.1f} s")


def _check_noise(device: torch.device) -> str:
    words = reference.philox(0, torch.tensor([0]), tensor_uid("doctor/scales"), 0, 0)
    got = tuple(int(w) for w in words)
    return "" if got == _WORDS else f"words {got}, expected {_WORDS}"


def _check_kernels(device: torch.device) -> str:
    """The device's own path against the reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (64, 32), generator=generator, dtype=torch.int64).to(torch.int32)
    scales = torch.rand(64, 4, generator=generator) + 0.5
    zeros = torch.randint(0, 16, (64, 4), generator=generator, dtype=torch.uint8)
    state, eps = torch.tensor([[7, 3, 0]]), torch.tensor([0.1])
    results = []
    for where in (torch.device("cpu"), device):
        noise = ops.Noise(state.to(where), eps.to(where), 5, 0.0, True, False)
        results.append(ops.dequantize(codes.to(where), scales.to(where), zeros.to(where), 4, 64, 200, torch.float32, noise=noise).cpu())
    return "" if torch.equal(*results) else f"the {device.type} kernels differ from the reference"


def _check_tuning(device: torch.device) -> str:
    """Twenty steps on a quadratic of the scales of one layer must lower it."""
    from qzo_kernels.pack import tile_codes

    from qzo.model.linear import QuantLinear
    from qzo.model.uniform import LayerTensors
    from qzo.zo.optimizer import ZO
    from qzo.zo.targets.scales import Scales

    generator = torch.Generator().manual_seed(0)
    codes = tile_codes(torch.randint(0, 16, (8, 64), generator=generator, dtype=torch.uint8), 4).to(device)
    tensors = LayerTensors(codes, torch.full((8, 2), 0.1, device=device), None, None)
    layer = QuantLinear("doctor", tensors, 4, 32, 64)
    x = torch.randn(16, 64, generator=generator).to(device)
    optimizer = ZO([Scales({"doctor": layer}, eps=1e-2, lr=0.01)])
    losses = [float(optimizer.step(lambda: layer(x).square().mean())) for _ in range(20)]
    return "" if losses[-1] < losses[0] else f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
