"""The fake-quantized Linear: what a forward computes, what it leaves alone, and when its grid moves."""

import pytest
import torch
from torch import nn

from qzo.errors import BadInput
from qzo.model.qat import LWC, FakeQuantLinear, Precision, load_quantizer_state, prepare_layer, quantize_operands, quantizer_state, refresh_layer
from qzo.model.smoothing import Channels, Site
from qzo_kernels.ops_qat import LatentNoise
from qzo_kernels.reference_qat import clipped_grid, fake_quantize, fake_quantize_rows


def linear(precision: Precision, own: bool = True, dtype: torch.dtype = torch.float32) -> FakeQuantLinear:
    torch.manual_seed(0)
    before, after = Site(24, True, torch.device("cpu")), Site(16, True, torch.device("cpu"))
    for site in before, after:
        site.scale.data = torch.rand(len(site.scale)) + 0.5
        site.shift.data = torch.randn(len(site.shift))
    return FakeQuantLinear(nn.Linear(24, 16).to(dtype).requires_grad_(False), precision, Channels(before), Channels(after), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision(4, -1, 4), Precision(2, 8, 16), Precision(6, 16, 6), Precision(16, -1, 8)], ids=str)
def test_forward_is_the_equation_of_the_head(precision, dtype):
    layer = linear(precision, dtype=dtype)
    x = torch.randn(3, 5, 24).to(dtype)
    s, d = layer.before.scale(), layer.before.shift()
    out_s, out_d = layer.after.scale(), layer.after.shift()
    w, b = layer.weight.float(), layer.bias.float()
    weight = w * s / out_s[:, None]
    if precision.bits < 16:
        bounds = torch.full(layer.low.shape, LWC)
        weight = fake_quantize(weight, *clipped_grid(weight, precision.bits, precision.group_size, bounds, bounds), precision.bits, precision.group_size)
    given = fake_quantize_rows(((x - d) / s).to(dtype), precision.activations)
    expected = (given.float() @ weight.t() + (b + w @ d - out_d) / out_s).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    assert layer(x).dtype == dtype


def test_a_forward_stores_nothing_and_the_grid_stays_until_refresh():
    layer = linear(Precision(4, 8, 8))
    before = {name: value.clone() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    assert set(before) == {"step", "zero", "offset"}
    x = torch.randn(2, 24)
    first = layer(x)
    assert {name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)} == set(before)
    assert all(torch.equal(getattr(layer, name), value) for name, value in before.items())
    assert torch.equal(layer(x), first)
    layer.low.data.fill_(0.0)
    layer.weight.data[0, 0] = 5.0
    layer(x)
    assert all(torch.equal(getattr(layer, name), value) for name, value in before.items())
    layer.refresh()
    assert not torch.equal(layer.step, before["step"]) and float(layer.step[0, 0]) > 2 * float(before["step"][0, 0])


def test_quantizer_state_goes_in_and_out():
    def layer() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        made = LlamaForCausalLM(config).requires_grad_(False).model.layers[0]
        prepare_layer(made, Precision(4, 8, 4), smoothing=True)
        return made

    one, other = layer(), layer()
    for tensor in quantizer_state(one).values():
        tensor.copy_(torch.rand_like(tensor) + 0.5)
    load_quantizer_state(other, quantizer_state(one))
    assert quantizer_state(one).keys() == quantizer_state(other).keys()
    assert all(torch.equal(a, b) for a, b in zip(quantizer_state(one).values(), quantizer_state(other).values(), strict=True))
    grids = [[m.step for m in made.modules() if isinstance(m, FakeQuantLinear)] for made in (other, layer())]
    assert not any(torch.equal(a, b) for a, b in zip(*grids, strict=True))


@pytest.mark.parametrize(("given", "match"), [((5, -1, 4), "bits: 5"), ((4, -1, 5), "activations: 5"), ((4, 0, 4), "group_size: 0")])
def test_other_precisions_are_refused(given, match):
    with pytest.raises(BadInput, match=match):
        Precision(*given)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_attention_quantizes_its_operands_in_both_forwards(family):
    """Random sites and 4 bits: `decode` and transformers agree, and q, k, v are rounded in both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qzo.model.decoder import decode

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    quantize_operands(model)
    layers, ids = model.get_decoder().layers, torch.randint(0, 64, (3, 20))
    for layer in layers:
        for place in prepare_layer(layer, Precision(8, -1, 4), smoothing=True).values():
            place.site.scale.data = torch.rand(len(place.site.scale)) + 0.5
        refresh_layer(layer)
    theirs, ours = model.get_decoder()(ids, use_cache=False)[0], decode(model, ids)
    for layer in layers:
        layer.self_attn.operand_bits = 16
    for given in model.get_decoder()(ids, use_cache=False)[0], decode(model, ids):
        change = float((given - theirs).norm() / theirs.norm())
        assert change > 0.02 and float((ours - theirs).norm() / theirs.norm()) < 0.2 * change


def noisy(layer: FakeQuantLinear, *signs: float) -> LatentNoise:
    states = torch.tensor([[3, 5, 0]] * len(signs))
    return LatentNoise(states, 0.4 * torch.tensor(signs), 77, layer.step * layer.after.scale()[:, None], 1 / layer.before.scale(), False)


def test_stacked_variants_equal_separate_ones():
    layer = linear(Precision(4, 8, 8))
    x = torch.randn(3, 5, 24)
    stored = [p.clone() for p in (*layer.parameters(), layer.step, layer.zero, layer.offset)]
    layer.noise = noisy(layer, 1, -1)
    both = layer(x.repeat(2, 1, 1)).chunk(2)
    for part, sign in zip(both, (1, -1), strict=True):
        layer.noise = noisy(layer, sign)
        assert torch.equal(layer(x), part)
    layer.noise = None
    assert not torch.equal(both[0], both[1]) and not torch.equal(both[0], layer(x))
    assert all(torch.equal(a, b) for a, b in zip(stored, (*layer.parameters(), layer.step, layer.zero, layer.offset), strict=True))
    quiet = layer(x)
    layer.noise = noisy(layer, 0, -0.0)
    assert all(torch.equal(part, quiet) for part in layer(x.repeat(2, 1, 1)).chunk(2))
    layer.noise = noisy(layer, 1, -1)
    with pytest.raises(ValueError, match="multiple of the 2 variants"):
        layer(x)


def test_a_step_and_a_zero_of_their_own():
    layer = linear(Precision(4, 8, 8))
    step, zero, place = layer.step.clone(), layer.zero.clone(), layer.step.data_ptr()
    layer.factor.data.fill_(1.5)
    layer.move.data.copy_(torch.linspace(-20, 20, 48).view(16, 3))
    layer.refresh()
    assert torch.equal(layer.step, step * 1.5) and torch.equal(layer.zero, (zero + layer.move).round().clamp(0, 15))
    assert layer.step.data_ptr() == place, "a captured graph reads the grid where it was"


def test_the_offset_alone():
    layer = linear(Precision(4, 8, 8))
    before = [t.clone() for t in (layer.step, layer.zero, layer.offset)]
    layer.weight.data[0, 0] += 5.0
    layer.refresh_offset()
    assert torch.equal(layer.step, before[0]) and torch.equal(layer.zero, before[1]) and not torch.equal(layer.offset, before[2])
    assert torch.equal(layer.offset, layer.shifted())


def test_a_latent_in_host_memory_is_no_parameter():
    """transformers sends batches to where the first parameter is."""
    fake = FakeQuantLinear(nn.Linear(64, 32), Precision(4, -1, 16), None, None, own=False)
    x, weight = torch.randn(3, 64), fake.weight.data
    before = fake(x)
    fake.hold(weight)
    assert "weight" not in dict(fake.named_parameters()) and torch.equal(fake(x), before)
