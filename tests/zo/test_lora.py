"""Adapters on quantized layers: their equation under noise, their update, and what a replay makes of it."""

import math
from hashlib import sha256

import numpy as np
import pytest
import torch
from qzo_kernels.pack import tile_codes
from qzo_kernels.reference_codes import quantized_normal
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy, silu

from qzo.checkpoint import newest_snapshot, write_snapshot
from qzo.model.gptq_format import LayerTensors
from qzo.model.linear import QuantLinear
from qzo.zo import quantized
from qzo.zo.estimator import Clip
from qzo.zo.noise import tensor_uid, variants
from qzo.zo.optimizer import ZO
from qzo.zo.targets.lora import Lora, initial, replay_
from qzo.zo.targets.scales import Scales

CPU = torch.device("cpu")
SEED = -3 << 40 | 5
GAINS = {8: 1.00, 4: 1.05, 3: 1.30, 2: 3.19}  # E[(4u/L)²] by noise bits, two decimals
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ESTIMATORS = pytest.mark.parametrize("estimator", ["rge1", "rge2"])
A_OF_Q_PROJ = "89bedbb07dacd573"  # frozen: other initial values break every journal


def make_layer(rows: int, cols: int, seed: int = 0, ordered: bool = True) -> QuantLinear:
    g = torch.Generator().manual_seed(seed)
    codes = tile_codes(torch.randint(0, 16, (rows, cols), generator=g, dtype=torch.uint8), 4)
    scales = 0.02 + 0.02 * torch.rand(rows, -(-cols // 32), generator=g)
    perm = None if ordered else torch.randperm(cols, generator=g)
    return QuantLinear("", LayerTensors(codes, scales, None, perm), 4, 32, cols)


class Net(nn.Module):
    """q_proj -> k_proj -> v_proj, of odd sizes; the columns of v_proj are in order of activation size."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = make_layer(48, 80), make_layer(37, 48, 1), make_layer(10, 37, 2, ordered=False)

    def forward(self, x):
        return self.v_proj(silu(self.k_proj(silu(self.q_proj(x)))))

    def layers(self) -> dict[str, QuantLinear]:
        return {f"model.{name}": layer for name, layer in self.named_children()}


@pytest.fixture
def net() -> Net:
    return Net()


def make(net: Net, eps: float = 0.05, lr: float = 0.02, r: int = 3, moved: bool = True, **options) -> Lora:
    """Adapters; `moved`: with a B that is not 0."""
    target = Lora(net.layers(), SEED, eps, lr, r, 4.5, **options)
    g = torch.Generator().manual_seed(3)
    for name, value in target.state().items():
        if moved and ".lora_B" in name:
            value.copy_(0.2 * torch.randn(value.shape, generator=g))
    return target


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(5)
    return torch.randn(32, 2, 80, generator=g), torch.randint(0, 10, (64,), generator=g)


def closure_of(net, data):
    x, y = data

    def closure(count: int = 1):
        out = net(x.repeat(count, 1, 1)).view(count, len(y), -1)
        return torch.stack([cross_entropy(o, y) for o in out])

    return closure


def bytes_of(*tensors: torch.Tensor) -> bytes:
    return b"".join(t.detach().numpy().tobytes() for t in tensors)


def everything(net: Net, target: Lora) -> bytes:
    return bytes_of(*net.state_dict().values(), *target.state().values())


def u_of(name: str, shape, step: int, direction: int, stream: int, noise_bits: int) -> torch.Tensor:
    return quantized_normal(shape, SEED, step, direction, tensor_uid(name), stream, noise_bits).float()


def test_initial_values_are_a_pure_function_of_seed_and_name():
    name, shape = "model.layers.0.self_attn.q_proj.lora_A/lora", (8, 500)
    random = torch.get_rng_state()
    a = initial(name, shape, 7)
    assert torch.equal(torch.get_rng_state(), random), "the global generator is left alone"
    assert sha256(a.numpy().tobytes()).hexdigest()[:16] == A_OF_Q_PROJ
    torch.manual_seed(1)
    assert torch.equal(initial(name, shape, 7), a)
    others = [initial(name, shape, 8), initial(name, shape, 7 | 1 << 40), initial(name.replace("q_proj", "v_proj"), shape, 7)]
    assert all(not torch.equal(other, a) for other in others)
    assert not initial(name.replace("lora_A", "lora_B"), (500, 8), 7).any()


def test_initial_values_are_distributed_as_in_peft():
    """Uniform within ±bound: both ends are reached; mean and variance within 5 sigma of those of 10⁵ values."""
    shape = (8, 12500)
    a = initial("x.lora_A/lora", shape, 0)
    reference = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    bound, count = 1 / math.sqrt(shape[1]), a.numel()
    for values in (a, reference):
        values = values.double() / bound
        assert 0.999 < values.max() <= 1 and -1 <= values.min() < -0.999
        assert abs(values.mean()) < 5 / math.sqrt(3 * count)
        assert abs((values**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / count)


def test_new_adapters_change_nothing(net, data):
    before = net(data[0])
    target = make(net, moved=False)
    assert torch.equal(net(data[0]), before)
    assert [(i.name, i.shape) for i in target.info()] == [
        ("model.q_proj.lora_A/lora", (3, 80)), ("model.q_proj.lora_B/lora", (48, 3)),
        ("model.v_proj.lora_A/lora", (3, 37)), ("model.v_proj.lora_B/lora", (10, 3)),
    ]  # fmt: skip
    assert net.k_proj.adapter is None
    for info in target.info():
        assert torch.equal(target.state()[info.name], initial(info.name, info.shape, SEED))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("noise_bits", [4, 8])
@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_forward_is_the_equation(net, dtype, noise_bits, name):
    """y = x (W + alpha/r B A)ᵀ with A, B + sign eps 4/L u, columns in the order of the model's channels."""
    target, layer = make(net, noise_bits=noise_bits), net.layers()[f"model.{name}"]
    x = torch.randn(6, 5, layer.in_features, dtype=dtype)
    pairs = [(2, 1), (2, -1), (0, -1)]
    with target.entered(variants(SEED, 7, pairs, CPU)):
        seen = layer(torch.cat([x] * 3)).chunk(3)
    seen = [(direction, sign, y) for (direction, sign), y in zip(pairs, seen, strict=True)]
    for direction, sign, y in [*seen, (0, 0, layer(x))]:
        a, b = (
            value + sign * 0.05 * 4 / (2 ** (noise_bits - 1) - 1) * u_of(key, value.shape, 7, direction, 1, noise_bits)
            for key, value in target.state().items() if name in key
        )  # fmt: skip
        expected = x.float() @ (layer.weight(torch.float32) + 4.5 / 3 * b @ a).t()
        assert y.dtype == dtype and y.shape == (6, 5, layer.out_features)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_rows_that_are_no_multiple_of_the_variants_are_refused(net):
    target = make(net)
    with target.entered(variants(0, 0, [(0, 1), (0, -1)], CPU)), pytest.raises(ValueError, match="x: 3 along dim 0.*2 variants"):
        net.q_proj.adapter(torch.zeros(3, 80))


@pytest.mark.parametrize("stacked", [False, True])
def test_zero_eps_gives_equal_losses(net, data, stacked):
    quiet = closure_of(net, data)()[0]
    target = make(net)
    tuned = closure_of(net, data)()[0]
    target.eps = 0.0
    losses = ZO([target], SEED, stacked=stacked).losses(closure_of(net, data), 0, [(0, 1), (0, -1), (1, 1)])
    assert losses.tolist() == [tuned.item()] * 3 and tuned != quiet


def test_stacked_measures_what_separate_forwards_do(net, data):
    pairs, targets = [(0, 1), (0, -1), (1, 1), (1, -1)], [make(net), Scales(net.layers(), 0.03, 0.0)]
    results = [ZO(targets, SEED, 2, stacked=stacked).losses(closure_of(net, data), 3, pairs) for stacked in (False, True)]
    assert torch.equal(*results) and len(set(results[0].tolist())) == 4


def test_no_tensor_is_written_in_a_forward(net, data):
    target = make(net)
    before, quiet = everything(net, target), net(data[0])
    with pytest.raises(RuntimeError, match="stop"), target.entered(variants(SEED, 0, [(0, 1)], CPU)):
        assert not torch.equal(net(data[0]), quiet)
        assert everything(net, target) == before
        raise RuntimeError("stop")
    assert torch.equal(net(data[0]), quiet) and everything(net, target) == before


@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_in_a_step_is_read_by_the_host(stacked):
    with FakeTensorMode():
        net = Net()
        optimizer = ZO([make(net)], SEED, 2, stacked=stacked)
        loss = optimizer.step(closure_of(net, (torch.randn(32, 2, 80), torch.zeros(64, dtype=torch.int64))))
        with pytest.raises(DataDependentOutputException):
            loss.item()


@ESTIMATORS
def test_lr_zero_changes_no_bit(net, data, estimator):
    """Not even a -0."""
    target = make(net, lr=0.0, estimator=estimator)
    for value in target.state().values():
        value[0, 0] = -0.0
    before = everything(net, target)
    optimizer = ZO([target], SEED, 2)
    for _ in range(3):
        optimizer.step(closure_of(net, data))
    assert everything(net, target) == before and optimizer.last.projected.all()


@ESTIMATORS
def test_learns(net, data, estimator):
    """From adapters that change nothing; what is quantized stays."""
    optimizer = ZO([make(net, 0.01, 0.15, moved=False, estimator=estimator)], SEED, clip=Clip(multiple=2.0))
    base, first = bytes_of(*net.state_dict().values()), closure_of(net, data)().item()
    for _ in range(120):
        optimizer.step(closure_of(net, data))
    assert closure_of(net, data)().item() < 0.93 * first
    assert bytes_of(*net.state_dict().values()) == base


@ESTIMATORS
def test_the_sign_of_an_update_lowers_a_quadratic(net, estimator):
    target = make(net, 1e-3, 1e-3, estimator=estimator)
    goals = [value + 0.1 for value in target.state().values()]
    seen = lambda: [value[0] for layer in (net.q_proj, net.v_proj) for value in (layer.adapter.a, layer.adapter.b)]  # noqa: E731
    distance = lambda: sum((v - g).square().sum() for v, g in zip(seen(), goals, strict=True))  # noqa: E731
    optimizer, first = ZO([target], SEED), distance().item()
    for _ in range(40):
        optimizer.step(distance)
    assert distance().item() < 0.95 * first


@ESTIMATORS
def test_replay_equals_the_run_bit_for_bit(net, data, estimator):
    """All steps at once, padded with zeros as a replay is, from the initial values and the recorded coefficients alone."""
    targets = [Scales(net.layers(), 0.03, 0.01), make(net, 0.02, 0.05, moved=False, noise_bits=4, estimator=estimator)]
    optimizer, coefs = ZO(targets, SEED, 3), torch.zeros(8, 3)
    for step in range(6):
        optimizer.step(closure_of(net, data))
        coefs[step] = torch.from_numpy(optimizer.last.coefs[1])
    assert bool(coefs[:6].all())
    for info in targets[1].info():
        values = initial(info.name, info.shape, SEED)
        start = values.clone()
        replay_(values, torch.tensor([SEED, 0]), coefs, info.uid, 4, {"rge1": 1, "rge2": 2}[estimator])
        assert torch.equal(values, targets[1].state()[info.name]) and not torch.equal(values, start)


def test_an_update_is_the_equation_in_the_order_of_directions(net):
    """In numpy's fp32, one rounding per operation."""
    target = make(net, estimator="rge2")
    coefs = torch.tensor([[0.013, -1.7, 3e-5], [0.0, 0.31, -2.9]])
    expected = {name: value.numpy().copy() for name, value in target.state().items()}
    target.apply(torch.tensor([SEED, 41]), coefs)
    for name, value in expected.items():
        for s in range(2):
            total = np.zeros_like(value)
            for i in range(3):
                total = total + coefs[s, i].numpy() * u_of(name, value.shape, 41 + s, i, 2, 4).numpy()
            value -= total
        assert target.state()[name].numpy().tobytes() == value.tobytes()


@ESTIMATORS
def test_coefficients_are_in_value_units_per_level(net, data, estimator):
    """lr d eps0/eps times 4/L, which of rge1 is divided by the gain."""
    scales, lora = Scales(net.layers(), 0.03, 0.01), make(net, 0.02, 0.05, noise_bits=3, estimator=estimator)
    optimizer = ZO([scales, lora], SEED)
    optimizer.step(closure_of(net, data))
    d = float(optimizer.last.projected[0])
    level = 4 / 3 / (quantized.gain(3) if estimator == "rge1" else 1)
    assert optimizer.last.coefs[:, 0].tolist() == pytest.approx([0.01 * d, 0.05 * 0.03 / 0.02 * level * d], rel=1e-6)
    assert lora.unit == level and scales.unit == 1.0


@pytest.mark.parametrize("noise_bits", GAINS)
def test_gain_is_that_of_the_noise(noise_bits):
    """Two decimals of the closed form, and 5·10⁵ draws within 5 sigma."""
    q = (quantized_normal((500, 1000), 11, 3, 0, 99, 1, noise_bits).double() * 4 / (2 ** (noise_bits - 1) - 1)) ** 2
    assert quantized.gain(noise_bits) == pytest.approx(GAINS[noise_bits], abs=0.006)
    assert abs(q.mean() - quantized.gain(noise_bits)) < 5 * q.std() / q.numel() ** 0.5


@ESTIMATORS
def test_the_expected_update_is_the_gradient(net, estimator):
    """A linear loss <g, w>, 2-bit noise, 20 steps of 20 directions: the mean of <g, move> is lr |g|² within 5 sigma, less than a gain of 3.19 adds."""
    target = make(net, 1.0, 0.5, r=1, noise_bits=2, estimator=estimator, modules=["v_proj"])
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(info.shape, generator=generator) for info in target.info()]
    along = lambda values: sum((v * g).sum((-2, -1)) for v, g in zip(values, gradients, strict=True))  # noqa: E731
    optimizer = ZO([target], SEED, stacked=True)
    pairs, moves = [(0, 0), *((direction, 1) for direction in range(20))], []
    for step in range(20):
        quiet, *losses = optimizer.losses(lambda _: along((net.v_proj.adapter.a, net.v_proj.adapter.b)), step, pairs)
        before = along(target.state().values())
        target.apply(torch.tensor([SEED, step]), 0.5 * target.unit / 20 * (torch.stack(losses) - quiet)[None])
        moves.append(before - along(target.state().values()))
    moves, wanted = torch.stack(moves), 0.5 * float(sum(g.square().sum() for g in gradients))
    bound = 5 * float(moves.std()) / 20**0.5
    assert abs(float(moves.mean()) - wanted) < bound < 2.19 * wanted


def test_a_snapshot_holds_the_state(net, tmp_path):
    target = make(net)
    write_snapshot(tmp_path, 4, target.state(), {})
    expected = everything(net, target)
    for value in target.state().values():
        value.zero_()
    target.load_state(newest_snapshot(tmp_path)[1])
    assert everything(net, target) == expected


@pytest.mark.parametrize(
    "change,message",
    [
        ({"noise_bits": 1}, "noise_bits = 1"), ({"noise_bits": 9}, "noise_bits = 9"), ({"estimator": "rge3"}, "estimator: 'rge3'"),
        ({"r": 0}, "r = 0"), ({"modules": ["proj"]}, "0 of 3 layers named proj"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(net, change, message):
    with pytest.raises(ValueError, match=message):
        Lora(net.layers(), **{"seed": 0, "eps": 0.1, "lr": 0.1, **change})
