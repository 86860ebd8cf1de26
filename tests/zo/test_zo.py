"""Estimator, targets and optimizer: the properties that define them, on one small layer."""

from hashlib import blake2s

import numpy as np
import pytest
import torch
from qzo_kernels import reference
from qzo_kernels.pack import tile_codes
from torch import nn

from qzo.model.linear import QuantLinear
from qzo.model.uniform import LayerTensors
from qzo.zo.estimator import Clip, coefficients, projected_gradients
from qzo.zo.noise import check_unique, tensor_name, tensor_uid, variants
from qzo.zo.optimizer import ZO
from qzo.zo.targets.dense import Dense
from qzo.zo.targets.scales import Scales, floor_of

CPU = torch.device("cpu")
UID_OF_Q_PROJ = 1684783974  # frozen: another value breaks every journal


def make_layer(rows=24, cols=80, group=32, bits=4, seed=0, name="layer") -> QuantLinear:
    g = torch.Generator().manual_seed(seed)
    codes = tile_codes(torch.randint(0, 1 << bits, (rows, cols), generator=g, dtype=torch.uint8), bits)
    groups = -(-cols // group)
    scales = 0.02 + 0.02 * torch.rand(rows, groups, generator=g)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8)
    return QuantLinear(name, LayerTensors(codes, scales, zeros, None), bits, group, cols)


def bytes_of(*tensors: torch.Tensor) -> bytes:
    return b"".join(t.detach().numpy().tobytes() for t in tensors)


class Net(nn.Module):
    """norm -> quantized linear -> quantized linear, all small."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(80)
        self.a, self.b = make_layer(48, 80, name="a"), make_layer(10, 48, seed=1, name="b")
        self.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.nn.functional.silu(self.a(self.norm(x))))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(5)
    return torch.randn(64, 80, generator=g), torch.randint(0, 10, (64,), generator=g)


def closure_of(net, data):
    x, y = data

    def closure(count: int = 1):
        out = net(x.repeat(count, 1)).view(count, len(x), -1)
        return torch.stack([torch.nn.functional.cross_entropy(o, y) for o in out])

    return closure


def test_uid_is_the_documented_hash():
    name = "model.layers.0.self_attn.q_proj/scales"
    assert tensor_uid(name) == int.from_bytes(blake2s(name.encode()).digest()[:4], "little") == UID_OF_Q_PROJ


@pytest.mark.parametrize("wrapped", ["module.x.y", "_orig_mod.x.y", "base_model.model.x.y", "module._orig_mod.x.y", "x.y"])
def test_wrappers_do_not_change_a_name(wrapped):
    assert tensor_name(wrapped, "scales") == "x.y/scales"


def test_uid_collision_is_an_error():
    check_unique(["a/scales", "b/scales", "a/scales"])
    seen: dict[int, str] = {}
    for number in range(400_000):
        name = f"{number}/scales"
        other = seen.setdefault(tensor_uid(name), name)
        if other != name:
            with pytest.raises(ValueError, match="share the noise uid"):
                check_unique([other, name])
            return
    pytest.fail("400,000 names of a 32-bit hash without a collision")


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_projected_gradient_and_coefficients():
    d = projected_gradients(f32(1.5, 1.0, 0.25, 0.75).view(2, 2), f32(0.25))
    assert d.tolist() == [2.0, -2.0] and d.dtype == torch.float32
    assert coefficients(d, f32(1.0)[0], f32(0.5, 0.25), f32(2.0)).tolist() == [[0.25, -0.25], [0.125, -0.125]]
    assert coefficients(f32(0.0), f32(np.inf)[0], f32(1.0), f32(1.0)).tolist() == [[0.0]]
    for bad in (np.nan, np.inf, -np.inf):
        assert coefficients(f32(bad, 1.0), f32(1.0)[0], f32(1.0), f32(2.0)).tolist() == [[0.0, 0.0]]


def test_coefficients_have_the_bits_of_numpy():
    rng = np.random.default_rng(0)
    losses = (rng.standard_normal((997, 2)) * np.exp(rng.standard_normal((997, 1)) * 8)).astype(np.float32)
    width, limit, rate = np.float32(2 * 0.003), np.float32(41.7), np.float32(1e-4)
    d = (losses[:, 0] - losses[:, 1]) / width
    expected = rate * (np.clip(d, -limit, limit) / np.float32(997))
    found = projected_gradients(torch.from_numpy(losses), f32(width))
    assert found.numpy().tobytes() == d.tobytes()
    assert coefficients(found, f32(limit)[0], f32(rate), f32(997))[0].numpy().tobytes() == expected.tobytes()


def test_clip_by_running_median_waits_and_then_acts():
    clip = Clip(multiple=3.0)
    for _ in range(Clip.WARMUP - 1):
        clip.observe(f32(2.0))
    assert clip.limit() == float("inf")
    clip.observe(f32(-2.0))
    assert clip.limit() == 6.0
    for _ in range(Clip.WINDOW):
        clip.observe(f32(0.0))
    assert clip.limit() == float("inf"), "a median of 0 would freeze the run"
    assert Clip(bound=100.0).limit() == 100.0 and Clip().limit() == float("inf")


@pytest.mark.parametrize("at_once", [1, 3, 250])
def test_the_median_is_that_of_the_last_finite_values(at_once):
    rng = np.random.default_rng(at_once)
    values = rng.standard_normal(400).astype(np.float32)
    broken = rng.random(400) < 0.2
    values[broken] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), broken.sum())
    clip, other = Clip(multiple=1.7), Clip(multiple=1.7)
    for start in range(0, len(values), at_once):
        clip.observe(torch.from_numpy(values[start : start + at_once]))
        known = np.abs(values[: start + at_once])
        known = known[np.isfinite(known)][-Clip.WINDOW :]
        assert clip.recent() == known.tolist()
        if len(known) >= Clip.WARMUP:
            assert clip.limit().numpy() == np.float32(1.7 * float(np.median(known)))
    other.restore(clip.recent())
    assert other.recent() == clip.recent() and len(clip.recent()) == Clip.WINDOW
    other.restore([])
    assert other.recent() == [] and other.limit() == float("inf")


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("gaussian", [True, False])
def test_forward_under_noise_is_the_equation(relative, gaussian):
    layer = make_layer()
    target = Scales({"layer": layer}, eps=0.01, lr=0.0, relative=relative, gaussian=gaussian)
    x = torch.randn(6, 80)
    before = bytes_of(layer.scales, layer.codes, layer.zeros)
    with target.entered(variants(3, 7, [(2, 1), (2, -1)], CPU)):
        plus, minus = layer(torch.cat([x, x])).chunk(2)
    uid = tensor_uid("layer/scales")
    z = (reference.gaussian if gaussian else reference.rademacher)(layer.scales.shape, 3, 7, 2, uid)
    for sign, out in ((1, plus), (-1, minus)):
        s = layer.scales * (1 + sign * 0.01 * z) if relative else layer.scales + sign * 0.01 * z
        expected = x @ layer.weight(torch.float32, s.clamp(min=floor_of(layer.scales))).t()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert bytes_of(layer.scales, layer.codes, layer.zeros) == before
    assert layer.noise is None


@pytest.mark.parametrize("stacked", [False, True])
def test_zero_eps_gives_equal_losses(net, data, stacked):
    for eps_mode in (True, False):
        optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.1, 0.1, eps_mode)], stacked=stacked)
        optimizer.targets[0].eps = 0.0
        losses = optimizer.losses(closure_of(net, data), 0, [(0, 1), (0, -1)])
        assert losses[0].item() == losses[1].item() == closure_of(net, data)()[0].item()


def test_stacked_measures_what_separate_forwards_do(net, data):
    pairs = [(0, 1), (0, -1), (1, 1), (1, -1)]
    results = []
    for stacked in (False, True):
        optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.05, 0.1)], seed=1, directions=2, stacked=stacked)
        results.append(optimizer.losses(closure_of(net, data), 3, pairs))
    assert torch.equal(*results)
    assert len(set(results[0].tolist())) == 4


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("directions", [1, 3])
def test_lr_zero_changes_no_byte(net, data, relative, directions):
    targets = [Scales({"a": net.a, "b": net.b}, 1e-2, 0.0, relative), Dense(net, dict(net.named_parameters()).__getitem__, 1e-3, 0.0)]
    everything = lambda: bytes_of(*net.state_dict().values(), *targets[1].state().values())  # noqa: E731
    before = everything()
    optimizer = ZO(targets, directions=directions)
    for _ in range(5):
        optimizer.step(closure_of(net, data))
    assert everything() == before
    assert optimizer.last.projected.any() and not optimizer.last.skipped


@pytest.mark.parametrize("stacked", [False, True])
def test_learns(net, data, stacked):
    optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.03, 0.02)], clip=Clip(multiple=5), stacked=stacked)
    first = closure_of(net, data)().item()
    for _ in range(150):
        optimizer.step(closure_of(net, data))
    assert closure_of(net, data)().item() < 0.85 * first
    assert all(bool((layer.scales > 0).all()) for layer in (net.a, net.b))


def test_dense_learns_and_is_out_of_place(net, data):
    read = dict(net.named_parameters()).__getitem__
    target = Dense(net, read, eps=1e-2, lr=0.02)
    assert sorted(i.name for i in target.info()) == ["norm.bias/dense", "norm.weight/dense"]
    weight = net.norm.weight
    with target.entered(variants(0, 0, [(0, 1)], CPU)):
        assert net.norm.weight is not weight and not torch.equal(net.norm.weight, weight)
    assert net.norm.weight is weight
    optimizer, first = ZO([target]), closure_of(net, data)().item()
    for _ in range(100):
        optimizer.step(closure_of(net, data))
    assert closure_of(net, data)().item() < first
    with pytest.raises(ValueError, match="one variant per forward"), target.entered(variants(0, 0, [(0, 1), (0, -1)], CPU)):
        pass


def test_the_sign_of_an_update_lowers_a_quadratic():
    layer = make_layer()
    goal = layer.weight(torch.float32, layer.scales * 1.3)
    distance = lambda: (layer(torch.eye(80)).t() - goal).square().sum()  # noqa: E731
    optimizer, first = ZO([Scales({"layer": layer}, 1e-3, 1e-4)]), distance().item()
    for _ in range(50):
        optimizer.step(distance)
    assert distance().item() < first


def test_a_loss_that_is_not_finite_changes_nothing(net):
    optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.03, 0.1)])
    before = bytes_of(net.a.scales, net.b.scales)
    optimizer.step(lambda: torch.tensor(float("nan")))
    assert optimizer.last.skipped and np.isnan(optimizer.last.loss) and optimizer.steps == 1
    assert bytes_of(net.a.scales, net.b.scales) == before


def test_floor_keeps_scales_positive(net):
    target = Scales({"a": net.a, "b": net.b}, 1e-3, 1.0, relative=False)
    target.apply(torch.tensor([0, 0]), torch.tensor([[10.0]]))
    for info, layer in zip(target.info(), (net.a, net.b), strict=True):
        assert layer.scales.min().item() == pytest.approx(info.floor) and info.floor > 0
    assert floor_of(torch.tensor([[1.0, 2.0, 0.0]])) == 0.0


def test_seeds_steps_and_directions_differ_and_seed_zero_is_a_seed(net, data):
    drawn = set()
    for seed in (0, 1, 2**63 - 1):
        for step in (0, 1):
            for direction in (0, 1):
                optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.05, 0.1)], seed=seed)
                drawn.add(optimizer.losses(closure_of(net, data), step, [(direction, 1)]).item())
    assert len(drawn) == 12


def test_state_dict_resumes(net, data):
    def run(steps, optimizer):
        for _ in range(steps):
            optimizer.step(closure_of(net, data))

    start = net.a.scales.data.clone(), net.b.scales.data.clone()
    make = lambda: ZO([Scales({"a": net.a, "b": net.b}, 0.03, 0.02)], clip=Clip(multiple=2))  # noqa: E731
    whole = make()
    run(30, whole)
    expected = bytes_of(net.a.scales, net.b.scales)
    net.a.scales.data.copy_(start[0]), net.b.scales.data.copy_(start[1])
    first = make()
    run(17, first)
    second = make()
    second.load_state_dict(first.state_dict())
    run(13, second)
    assert bytes_of(net.a.scales, net.b.scales) == expected


def test_torch_schedulers_drive_the_learning_rate(net, data):
    optimizer = ZO([Scales({"a": net.a, "b": net.b}, 0.03, 0.5)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = bytes_of(net.a.scales)
    optimizer.step(closure_of(net, data))
    scheduler.step()
    assert bytes_of(net.a.scales) == before
