"""The eager QuZO that benchmarks compare with does what its equations say."""

import pytest
import torch
from tiny_scripts import script

models, quzo = map(script, ("bench_models", "bench_quzo"))


@pytest.fixture
def made():
    """A tiny model, its batch, and the 16-bit loss before the linears were replaced."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = models.dense_model("tiny", device, torch.float32)
    batch = models.batch_of(4, 16, 64, device)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return models.eager_loss(model, batch)

    return model, loss, loss()


def codes_of(optimizer) -> list[torch.Tensor]:
    return [layer.codes.clone() for layer in optimizer.layers]


def test_w8a8_is_near_the_dense_model(made):
    model, loss, dense = made
    old = {name: module.weight for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    optimizer = quzo.EagerQuZO(model)
    assert len(optimizer.layers) == 14
    for name, weight in old.items():
        layer = model.model.get_submodule(name)
        assert ((layer.codes * layer.scales - weight).abs() <= 0.5001 * layer.scales).all()
        x = torch.randn(3, 2, weight.shape[1])
        assert 0 < (layer(x) - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
    assert loss() == pytest.approx(float(dense), rel=0.01)


@pytest.mark.parametrize("noise_bits,gain", [(8, 1.0), (4, 1.0543), (2, 3.1915)])
def test_noise(made, noise_bits, gain):
    """The gain and the agreement of the closed forms (qzo/zo/quantized.py), within 5 sigma."""
    optimizer = quzo.EagerQuZO(made[0], noise_bits=noise_bits)
    one, two, again = (torch.cat([optimizer.noise(i, stream).flatten() for i in range(14)]) for stream in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)
    for product, expected in ((one * one, gain), (two * two, gain), (one * two, 0.99988)):
        assert abs(product.mean() - expected) < 5 * product.std() / len(one) ** 0.5
    levels = one * ((2 ** (noise_bits - 1) - 1) / 4)
    assert (levels - levels.round()).abs().max() < 1e-4 and one.max() == -one.min() == 4


def test_a_step_is_the_equation(made):
    _, loss, _ = made
    optimizer = quzo.EagerQuZO(made[0], eps=0.5, lr=0.0)
    before = codes_of(optimizer)
    mu = optimizer.step(loss)
    assert all(map(torch.equal, before, codes_of(optimizer)))
    sides = []
    for sign in (1, -1):
        for i, layer in enumerate(optimizer.layers):
            layer.noise = lambda i=i, sign=sign: sign * 0.5 * optimizer.noise(i, 1)
        sides.append(float(loss()))
    for layer in optimizer.layers:
        layer.noise = None
    assert mu != 0 and mu == pytest.approx(sides[0] - sides[1], rel=1e-6)
    optimizer.steps, optimizer.lr = 0, 2.3 / abs(mu)
    assert optimizer.step(loss) == mu
    error, spread = 0.0, 0.0
    for i, (layer, old) in enumerate(zip(optimizer.layers, before, strict=True)):
        wanted = optimizer.lr * mu * optimizer.noise(i, 2).double()
        free = (old.abs() < 100).logical_and(layer.codes.abs() < 127)
        distance = (old.double() - layer.codes - wanted)[free]
        assert distance.abs().max() < 1
        error, spread = error + float(distance.sum()), spread + float(distance.square().sum())
    assert abs(error) < 5 * spread**0.5


def test_steps_lower_the_loss(made):
    _, loss, _ = made
    optimizer = quzo.EagerQuZO(made[0], eps=1.0)
    before = loss()
    slope = max(abs(optimizer.step(loss)) for _ in range(3))
    optimizer.lr = 0.3 / slope
    for _ in range(40):
        optimizer.step(loss)
    assert loss() < before - 0.01
