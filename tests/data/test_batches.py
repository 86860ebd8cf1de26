from collections import Counter

import pytest
import torch

from qzo.data.batches import batch_indices, bucket, collate, order
from qzo.data.encode import Encoded, Option, encode_examples
from qzo.data.tasks import Example


def test_frozen_first_batch():
    """Computed once with Philox4x32-10 in plain Python integers."""
    assert batch_indices(seed=0, step=0, batch_size=8, n=1000) == [996, 786, 197, 895, 366, 400, 818, 631]
    assert batch_indices(seed=-(2**40) - 1, step=0, batch_size=4, n=100) == [67, 96, 91, 41]
    assert batch_indices(seed=42, step=3, batch_size=4, n=5) == [0, 3, 4, 3]


@pytest.mark.parametrize("n, batch_size", [(63, 16), (16, 16), (5, 8), (1, 3)])
def test_every_epoch_is_a_permutation(n, batch_size):
    stream = [i for step in range(2 * n + 1) for i in batch_indices(7, step, batch_size, n)]
    epochs = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
    assert all(Counter(epoch) == Counter(range(n)) for epoch in epochs)
    assert epochs[:2] == [order(7, 0, n), order(7, 1, n)]


def test_order_depends_on_seed_and_epoch_only():
    assert order(1, 0, 100) == order(1, 0, 100)
    assert len({tuple(order(seed, epoch, 100)) for seed in (0, 1, 2**62) for epoch in range(3)}) == 9
    backwards = [batch_indices(3, step, 4, 10) for step in reversed(range(10))]
    assert backwards[::-1] == [batch_indices(3, step, 4, 10) for step in range(10)]


def test_order_is_uniform():
    first = Counter(order(seed, 0, 10)[0] for seed in range(2000))
    # chi-squared with 9 degrees of freedom: 27.9 at p = 0.001; the seeds are fixed, so this cannot flicker
    assert sum((first[i] - 200) ** 2 / 200 for i in range(10)) < 27.9


def test_bucket():
    sizes = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert sorted({bucket(length) for length in range(1, 4097)}) == sizes
    assert all(bucket(size) == size < bucket(size + 1) for size in sizes)


def test_collate_by_hand():
    shared_row = Encoded(((5, 6, 7),), (Option(0, 2, (8,)), Option(0, 2, (9,))), 1)
    own_rows = Encoded(((5, 6), (5, 7, 3)), (Option(0, 1, (4,)), Option(1, 0, (7, 3, 2))), 0)
    batch = collate([shared_row, own_rows], pad_id=99)
    assert (batch.examples, batch.rows, batch.tokens) == (2, 3, 8)
    assert batch.input_ids.shape == (3, 16)
    assert batch.input_ids[:, :4].tolist() == [[5, 6, 7, 99], [5, 6, 99, 99], [5, 7, 3, 99]]
    assert (batch.input_ids[:, 4:] == 99).all()
    assert batch.positions.tolist() == [2, 17, 32, 33, 34]
    assert batch.option_mask.tolist() == [[True, True], [True, True]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.pair_mask.sum(2).tolist() == [[1, 1], [1, 3]]
    assert batch.pair_position[batch.pair_mask].tolist() == [0, 0, 1, 2, 3, 4]
    assert batch.pair_token[batch.pair_mask].tolist() == [8, 9, 4, 7, 3, 2]


def test_examples_with_fewer_options():
    one = Encoded(((5, 6),), (Option(0, 1, (8,)),), 0)
    two = Encoded(((5, 6, 7),), (Option(0, 2, (8,)), Option(0, 2, (9,))), 1)
    assert collate([one, two], 0).option_mask.tolist() == [[True, False], [True, True]]


def test_tokens_and_device(tokenizer):
    encoded, _ = encode_examples([Example("It was", (" great", " a film"), 0)] * 3, tokenizer, 32)
    batch = collate(encoded, 0).to(torch.device("cpu"))
    assert batch.tokens == sum(len(row) for e in encoded for row in e.rows)
    assert (batch.input_ids.device.type, batch.rows, batch.examples) == ("cpu", 6, 3)
    rows = [row for e in encoded for row in e.rows]
    for b, c, i in batch.pair_mask.nonzero().tolist():
        row, column = divmod(int(batch.positions[batch.pair_position[b, c, i]]), batch.input_ids.shape[1])
        if column + 1 < len(rows[row]):
            assert rows[row][column + 1] == batch.pair_token[b, c, i]


def test_rounded_sizes_count_nothing():
    long = Encoded(((*range(12),), (*range(20),)), (Option(0, 5, (6, 7, 8, 9, 10)), Option(1, 4, (*range(5, 18),))), 1)
    batch = collate([long, Encoded(((1, 2),), (Option(0, 1, (3,)),), 0)], 0)
    wide, places, options = batch.rounded(), len(batch.positions), batch.pair_token.shape[2]
    assert (places, options) == (19, 13) and (len(wide.positions), wide.pair_token.shape[2]) == (32, 16)
    assert wide.positions[:places].equal(batch.positions) and not wide.positions[places:].any()
    for name in ("pair_position", "pair_token", "pair_mask"):
        kept, added = getattr(wide, name).tensor_split([options], dim=2)
        assert kept.equal(getattr(batch, name)) and not added.any()
    for name in ("input_ids", "option_mask", "labels"):
        assert getattr(wide, name).equal(getattr(batch, name))
    assert wide.tokens == batch.tokens and wide.rounded().positions.equal(wide.positions)


@pytest.mark.parametrize("count, expected", [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (33, 48)])
def test_rounded_places(count, expected):
    row = Encoded((tuple(range(count)),), (Option(0, 0, tuple(range(1, count + 1))),), 0)
    assert len(collate([row], 0).rounded().positions) == expected
