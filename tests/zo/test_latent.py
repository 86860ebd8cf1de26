"""Latent weights and their quantizer as targets: unbiased directions, equal losses at eps 0, replay to the bit, and updates that descend."""

import math

import pytest
import torch
from qzo_kernels.reference_noise import rademacher
from qzo_kernels.reference_qat import grid_codes, smoothed
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qzo.conflicts import QUANTIZER
from qzo.model.qat import FakeQuantLinear, Precision
from qzo.model.smoothing import Channels, Site
from qzo.zo.noise import variants
from qzo.zo.optimizer import ZO
from qzo.zo.targets.latent import Latent, move_
from qzo.zo.targets.quantizer import PARTS, Quantizer, moves_relative, shift_quantizer_

CPU = torch.device("cpu")
SEED = -3 << 40 | 5


class Net(nn.Module):
    """Two fake-quantized Linears with a site between them and one before: each stage of smoothing, odd sizes, a bias."""

    def __init__(self, precision: Precision = Precision(4, 16, 8)):
        super().__init__()
        torch.manual_seed(0)
        first, middle = Site(40, True, CPU), Site(24, True, CPU)
        for site in first, middle:
            site.scale.data.uniform_(0.6, 1.6)
            site.shift.data.normal_(std=0.3)
        self.layer = nn.Module()
        self.layer.sites = nn.ModuleDict({"first": first, "middle": middle})
        self.layer.a_proj = FakeQuantLinear(nn.Linear(40, 24).requires_grad_(False), precision, Channels(first), Channels(middle), True)
        self.layer.b_proj = FakeQuantLinear(nn.Linear(24, 10, bias=False).requires_grad_(False), precision, Channels(middle), None, False)
        self.base = {name: value.data.clone() for name, value in self.named_parameters()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.b_proj(self.layer.a_proj(x))

    def fakes(self) -> dict[str, FakeQuantLinear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, FakeQuantLinear)}

    def latent(self, eps: float = 0.4, lr: float = 0.05, **options) -> Latent:
        return Latent(self.fakes(), self.base.__getitem__, eps, lr, **options)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(5)
    return torch.randn(16, 40, generator=g), torch.randn(16, 10, generator=g)


def closure_of(net, data):
    """A quadratic in what the net puts out."""
    x, y = data

    def closure(count: int = 1):
        return (net(x.repeat(count, 1)).view(count, *y.shape) - y).square().mean((1, 2))

    return closure


def bytes_of(*tensors: torch.Tensor) -> bytes:
    return b"".join(t.detach().numpy().tobytes() for t in tensors)


def everything(net: Net) -> bytes:
    grids = [t for fake in net.fakes().values() for t in (fake.step, fake.zero, fake.offset)]
    return bytes_of(*net.parameters(), *grids)


TARGETS = {
    "latent": lambda net: [net.latent()],
    "absolute": lambda net: [net.latent(eps=0.02, relative=False)],
    "gaussian": lambda net: [net.latent(gaussian=True)],
    "realized": lambda net: [net.latent(realized=True)],
    "quantizer": lambda net: [Quantizer(net, PARTS, 0.05, 0.01)],
    "both": lambda net: [net.latent(), Quantizer(net, ("clipping", "scale", "shift"), 0.05, 0.01, gaussian=True)],
}
EACH = pytest.mark.parametrize("kind", TARGETS)


@EACH
def test_a_forward_writes_nothing(kind, data):
    net = Net()
    optimizer, closure = ZO(TARGETS[kind](net), SEED), closure_of(net, data)
    before, quiet = everything(net), closure()
    plus, minus, zero, other = optimizer.losses(closure, 3, [(0, 1), (0, -1), (0, 0), (1, 0)])
    assert everything(net) == before and not any(fake.noise for fake in net.fakes().values())
    assert zero == other == quiet[0], "at a sign of 0 the weight itself is seen, to the bit"
    assert plus != minus != zero


@EACH
def test_at_eps_0_the_losses_of_a_pair_are_equal(kind, data):
    net = Net()
    optimizer, closure = ZO(TARGETS[kind](net), SEED), closure_of(net, data)
    for target in optimizer.targets:
        target.eps = 0.0
    plus, minus = optimizer.losses(closure, 0, [(0, 1), (0, -1)])
    assert bytes_of(plus) == bytes_of(minus) == bytes_of(closure()[0])


@EACH
def test_at_lr_0_nothing_changes(kind, data):
    net = Net()
    optimizer = ZO(TARGETS[kind](net), SEED)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = everything(net)
    for _ in range(3):
        optimizer.step(closure_of(net, data))
    assert everything(net) == before and optimizer.last.projected[0] != 0


@pytest.mark.parametrize("kind", ["latent", "absolute", "gaussian", "realized"])
def test_stacked_signs_equal_separate_ones(kind, data):
    states = []
    for stacked in (False, True):
        net = Net()
        optimizer = ZO(TARGETS[kind](net), SEED, stacked=stacked)
        for _ in range(4):
            optimizer.step(closure_of(net, data))
        states.append(everything(net))
    assert states[0] == states[1]


@EACH
def test_a_replay_knows_no_model_and_gives_the_same_bits(kind, data):
    net = Net()
    targets = TARGETS[kind](net)
    start = {name: value.clone() for target in targets for name, value in target.state().items()}
    optimizer = ZO(targets, SEED)
    coefs = []
    for _ in range(7):
        optimizer.step(closure_of(net, data))
        coefs.append(torch.from_numpy(optimizer.last.coefs))
    rows, at = torch.stack(coefs, 1), torch.tensor([SEED, 0])
    for target, c in zip(targets, rows, strict=True):
        settings = target.settings()
        for info in target.info():
            value = start[info.name]
            if target.name == "latent":
                move_(value, at, c, info.uid, target.units[info.name], settings["gaussian"])
            else:
                shift_quantizer_(value, at, c, info.uid, info.name, info.floor, settings["units"].get(info.name, 1.0), settings["gaussian"])
            assert bytes_of(value) == bytes_of(target.state()[info.name]), info.name
            assert not torch.equal(value, net.base[info.name.rpartition("/")[0]].view_as(value))
    # What a forward then sees is made of that alone.
    other = Net()
    fresh = TARGETS[kind](other)
    for target in fresh:
        target.load_state(start)
    assert everything(other) == everything(net)


@pytest.mark.parametrize(("kind", "rate"), [("latent", 10), ("absolute", 0.01), ("gaussian", 10), ("realized", 3), ("both", 5)])
def test_steps_lower_the_loss(kind, rate, data):
    net = Net()
    optimizer, closure = ZO(TARGETS[kind](net), SEED), closure_of(net, data)
    optimizer.param_groups[0]["lr"] = rate
    before = float(closure())
    for _ in range(60):
        optimizer.step(closure)
    assert float(closure()) < 0.97 * before


def test_steps_of_a_quantizer_approach_what_it_was_made_of(data):
    """From bounds that cut off half of each side, towards what the weights give without rounding."""
    net = Net()
    a, b = net.layer.a_proj, net.layer.b_proj
    wanted = (((data[0] - a.before.shift()) / a.before.scale()) @ a.smoothed().t() + a.offset) @ b.smoothed().t() + b.offset
    for fake in net.fakes().values():
        fake.low.data.zero_()
        fake.high.data.zero_()
        fake.refresh()
    optimizer, closure = ZO([Quantizer(net, PARTS, 0.1, 2.0)], SEED), closure_of(net, (data[0], wanted))
    before = float(closure())
    for _ in range(30):
        optimizer.step(closure)
    assert float(closure()) < 0.8 * before


def by_noise(net: Net, target: Latent, data) -> torch.Tensor:
    """What the loss without rounding gains by the first layer's noise u: its gradient times the unit, fp32 [24, 40]."""
    a, b = net.layer.a_proj, net.layer.b_proj
    x, y = data
    given = (x - a.before.shift()) / a.before.scale()
    hidden = given @ a.smoothed().t() + a.offset
    error = 2 * (hidden @ b.smoothed().t() + b.offset - y) / y.numel()
    units = next(iter(target.units.values()))
    unit = units.rows.repeat_interleave(40 if units.group_size == -1 else units.group_size, 1)[:, :40] * units.cols
    return (error @ b.smoothed()).t() @ given * a.before.scale() / a.after.scale()[:, None] * unit


def test_a_direction_is_unbiased(data):
    """Mean of d·u over many directions, elementwise within 5 standard errors of the gradient.

    The quantizer is fine (8 bits), eps large: what the loss sees of a weight is nearly linear.
    """
    net = Net(Precision(8, 16, 16))
    target = net.latent(eps=3.0)
    optimizer, closure, wanted = ZO([target], SEED), closure_of(net, data), by_noise(net, target, data)
    info, draws, total, square = target.info()[0], 500, torch.zeros(24, 40).double(), torch.zeros(24, 40).double()
    losses = optimizer.losses(closure, 0, [(i, sign) for i in range(draws) for sign in (1, -1)]).view(-1, 2)
    for i, d in enumerate((losses[:, 0] - losses[:, 1]) / (2 * target.eps)):
        estimate = (d * rademacher(info.shape, SEED, 0, i, info.uid)).double()
        total += estimate
        square += estimate**2
    error = (square / draws - (total / draws) ** 2).sqrt() / math.sqrt(draws)
    off = ((total / draws - wanted) / error).abs()
    assert float(off.max()) < 5 and float(off.mean()) < 1, "0.8 of pure noise"
    assert float((wanted / error).abs().mean()) > 0.4, "and the gradient is not lost in it"


def test_the_realized_difference_has_more_signal(data):
    """Signal-to-noise of an update at a tenth of a step, through the 3 bits of one layer: 0.25 along the noise, 0.95 along what the codes did."""
    found = {}
    for realized in (False, True):
        net = Net(Precision(3, -1, 16))
        fakes = dict(list(net.fakes().items())[:1])
        target = Latent(fakes, net.base.__getitem__, 0.1, 1.0, realized=realized)
        optimizer, closure, gradient = ZO([target], SEED), closure_of(net, data), by_noise(net, target, data)
        start, weight, dots, squares = net.base["layer.a_proj.weight"], net.layer.a_proj.weight, [], []
        for step in range(120):
            plus, minus = optimizer.losses(closure, step, [(0, 1), (0, -1)])
            target.apply(torch.tensor([SEED, step]), ((plus - minus) / 0.2)[None, None])
            units = target.units["layer.a_proj.weight/latent"]
            moved = (start - weight.data) / (units.rows * units.cols)
            dots.append((moved * gradient).sum())
            squares.append(moved.square().sum())
            target.load_state({"layer.a_proj.weight/latent": start})
        found[realized] = float(960 * torch.stack(dots).mean() ** 2 / torch.stack(squares).mean() / gradient.square().sum())
    assert found[False] == pytest.approx(0.25, rel=0.5) and found[True] == pytest.approx(0.95, rel=0.3) and found[True] > 2 * found[False]


def test_the_grid_of_a_fine_tuning_stays_that_of_the_base(data):
    net = Net()
    optimizer = ZO([net.latent(lr=0.3)], SEED)
    before = [(f.step.clone(), f.zero.clone(), f.offset.clone() if f.offset is not None else None) for f in net.fakes().values()]
    for _ in range(5):
        optimizer.step(closure_of(net, data))
    for (step, zero, offset), fake in zip(before, net.fakes().values(), strict=True):
        assert torch.equal(step, fake.step) and torch.equal(zero, fake.zero)
        assert torch.equal(fake.offset, fake.shifted()) and not torch.equal(fake.offset, offset)


def test_a_quantizer_makes_the_grid_anew_and_each_sign_has_its_own(data):
    net = Net()
    quantizer = Quantizer(net, ("clipping", "step"), 0.3, 0.01)
    fake, seen = net.layer.a_proj, []
    before = fake.step.clone()
    for sign in (1, -1):
        with quantizer.entered(variants(SEED, 0, [(0, sign)], CPU)):
            seen.append(fake.step.clone())
            assert torch.equal(fake.step, fake.grid()[0])
    assert torch.equal(fake.step, before) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], before)
    optimizer = ZO([net.latent(), quantizer], SEED)
    optimizer.step(closure_of(net, data))
    for fake in net.fakes().values():
        assert torch.equal(fake.step, fake.grid()[0]) and torch.equal(fake.offset, fake.shifted())
    with pytest.raises(ValueError, match="stacked=false"), quantizer.entered(variants(SEED, 0, [(0, 1), (0, -1)], CPU)):
        pass


def test_the_unit_of_shifts_is_the_mean_whatever_the_order_of_the_sum():
    net = Net()
    shift = net.layer.sites["first"].shift.data
    # In fp32 a sum drops what is small beside a part of it, and which parts there are is up to the device and its threads.
    shift.fill_(1.0)[0] = 2.0**25
    units = [Quantizer(net, ("shift",), 0.1, 0.1).settings()["units"]["layer.sites.first.shift/quantizer"]]
    shift.copy_(shift.flip(0).clone())
    units.append(Quantizer(net, ("shift",), 0.1, 0.1).settings()["units"]["layer.sites.first.shift/quantizer"])
    assert units == [torch.tensor((2**25 + 39) / 40).item()] * 2
    shift.zero_()
    assert Quantizer(net, ("shift",), 0.1, 0.1).settings()["units"]["layer.sites.first.shift/quantizer"] == torch.tensor(1e-8).item()


def test_what_is_divided_by_stays_positive():
    net = Net()
    quantizer = Quantizer(net, PARTS, 0.9, 1.0)
    assert set(quantizer.settings()["units"]) == {"layer.sites.first.shift/quantizer", "layer.sites.middle.shift/quantizer"}
    at = torch.tensor([SEED, 0])
    for step in range(30):
        quantizer.apply(at + torch.tensor([0, step]), torch.tensor([[1.7]]))
    for name, value in quantizer.state().items():
        assert value.isfinite().all() and (not moves_relative(name) or bool((value > 0).all())), name
    for fake in net.fakes().values():
        assert bool((fake.step > 0).all()) and bool(((fake.zero >= 0) & (fake.zero <= 15)).all())


@pytest.mark.parametrize("at_once", [1 << 21, 100])
def test_statistics_and_warnings(at_once, monkeypatch):
    monkeypatch.setattr("qzo.zo.targets.latent._AT_ONCE", at_once)
    net = Net()
    target = net.latent()
    at = torch.tensor([SEED, 0])
    assert target.statistics(at) | {"saturated": 0} == {"weights": 24 * 40 + 240, "changed": 0.0, "saturated": 0, "rms_steps": 0.0}
    target.apply(at, torch.tensor([[0.5]]))
    found = target.statistics(at)
    assert found["rms_steps"] == pytest.approx(0.5, rel=1e-4) and 0.3 < found["changed"] < 0.6 and 0 < found["saturated"] < 0.4
    fake = net.layer.a_proj
    codes, old = (grid_codes(smoothed(w, *fake.scales()), fake.step, fake.zero, 4, 16) for w in (fake.weight.data, net.base["layer.a_proj.weight"]))
    assert float((codes - old).abs().max()) == 1
    assert "Raise lr" in target.warning(1e-7, 1000) and "pile up" in target.warning(1.0, 1000) and target.warning(1e-3, 1000) is None
    assert net.latent(relative=False).warning(1e-9, 1) is None and target.warning(0.0, 1000) is None
    assert Quantizer(net, ("step", "span"), 0.1, 0.1).statistics(at)["factor"] == {"mean": 1.0, "smallest": 1.0, "largest": 1.0}


def test_a_recipe_knows_the_parts():
    assert QUANTIZER == tuple(PARTS)


def test_others_are_refused():
    net = Net()
    with pytest.raises(ValueError, match="given no layer"):
        Latent({}, net.base.__getitem__, 0.1, 0.1)
    with pytest.raises(ValueError, match="given Linear x"):
        Latent({"x": nn.Linear(2, 2)}, net.base.__getitem__, 0.1, 0.1)
    with pytest.raises(ValueError, match="realized without relative"):
        net.latent(relative=False, realized=True)
    with pytest.raises(ValueError, match="parts clip;"):
        Quantizer(net, ("clip",), 0.1, 0.1)
    with pytest.raises(ValueError, match="without span"):
        Quantizer(Net(Precision(4, 16, 16)), ("span",), 0.1, 0.1)


@pytest.mark.parametrize("kind", ["latent", "stacked", "realized", "both"])
def test_nothing_in_a_step_is_read_by_the_host(kind, monkeypatch):
    """Nor anywhere a choice made by what a tensor holds: a step can be captured as a graph."""
    monkeypatch.setattr("qzo.zo.targets.quantizer.floor_of", lambda _: 1e-3)
    with FakeTensorMode():
        net = Net()
        targets: list = [net.latent(realized=kind == "realized")]
        if kind == "both":
            targets.append(Quantizer(net, ("clipping", "step", "zero", "span", "scale"), 0.6, 0.1))
        optimizer = ZO(targets, SEED, 1 if kind == "realized" else 2, stacked=kind == "stacked")
        loss = optimizer.step(closure_of(net, (torch.randn(16, 40), torch.randn(16, 10))))
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_tensors_stay_where_a_graph_finds_them(data):
    net = Net()
    optimizer = ZO(TARGETS["both"](net), SEED)

    def places() -> list[int]:
        return [t.data_ptr() for fake in net.fakes().values() for t in (fake.weight, fake.step, fake.zero, fake.offset, fake.low)]

    before = places()
    for _ in range(2):
        optimizer.step(closure_of(net, data))
    assert places() == before
