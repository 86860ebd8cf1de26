"""Which examples a step sees, a pure function of (seed, step), and their tensors."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from qzo.data.encode import Encoded
from qzo.data.permutation import permutation


def order(seed: int, epoch: int, n: int) -> list[int]:
    """The order of the n training examples in an epoch. Frozen: changing it changes every run."""
    return list(permutation(seed, epoch, n, "data/order"))


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """The examples of a step (from 0): consecutive slices of the epochs' orders, one after another."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [permutation(seed, place // n, n, "data/order")[place % n] for place in places]


def bucket(length: int) -> int:
    """The padded length of rows of up to `length` tokens: 16, 32, then times 3/2 and 4/3 in turn (48, 64, 96, ...)."""
    size, factor = 16, (2, 1)
    while size < length:
        size = size * factor[0] // factor[1]
        factor = (4, 3) if factor == (3, 2) else (3, 2)
    return size


@dataclass(frozen=True)
class Batch:
    """B examples of up to C options of up to L tokens, in R rows of T tokens, P of whose predictions are needed."""

    input_ids: torch.Tensor  # i64 [R, T], padded on the right: a causal model needs no mask
    positions: torch.Tensor  # i64 [P], row·T + column, unique and ascending (`rounded` adds zeros)
    pair_position: torch.Tensor  # i64 [B, C, L], index into positions
    pair_token: torch.Tensor  # i64 [B, C, L], the token predicted there
    pair_mask: torch.Tensor  # bool [B, C, L]
    option_mask: torch.Tensor  # bool [B, C]
    labels: torch.Tensor  # i64 [B]
    tokens: int  # without padding
    embedded: torch.Tensor | None = None  # [R, T, H], where the embeddings are looked up on the host

    @property
    def examples(self) -> int:
        return self.labels.shape[0]

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """On `device`; to a GPU without waiting for it."""
        cuda = torch.device(device).type == "cuda"
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = (value.pin_memory() if cuda and not value.is_cuda else value).to(device, non_blocking=cuda)
        return Batch(**values)

    def rounded(self) -> "Batch":
        """The same with P and L rounded up, so that few shapes occur; what is added counts nowhere."""
        longer = _rounded(self.pair_token.shape[2]) - self.pair_token.shape[2]
        more = _rounded(len(self.positions)) - len(self.positions)
        pairs = {name: pad(getattr(self, name), (0, longer)) for name in ("pair_position", "pair_token", "pair_mask")}
        return dataclasses.replace(self, positions=pad(self.positions, (0, more)), **pairs)


def _rounded(size: int) -> int:
    return bucket(size) if size > 16 else 1 << (size - 1).bit_length()


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch of the examples, rows in their order, padded with `pad_id` to bucket(longest row)."""
    rows = [row for example in encoded for row in example.rows]
    width = bucket(max(map(len, rows)))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)

    pairs = []  # (example, option, place in the option, flat position, token)
    first_row = 0
    for b, example in enumerate(encoded):
        for c, option in enumerate(example.options):
            flat = (first_row + option.row) * width
            pairs += [(b, c, i, flat + place, token) for i, (place, token) in enumerate(zip(option.places, option.tokens, strict=True))]
        first_row += len(example.rows)
    b, c, i, flat, token = torch.tensor(pairs).unbind(1)
    positions, place = flat.unique(return_inverse=True)

    shape = (len(encoded), int(c.max()) + 1, int(i.max()) + 1)
    pair_position, pair_token = torch.zeros(2, *shape, dtype=torch.int64)
    pair_mask = torch.zeros(shape, dtype=torch.bool)
    pair_position[b, c, i], pair_token[b, c, i], pair_mask[b, c, i] = place, token, True
    labels = torch.tensor([example.label for example in encoded])
    tokens = sum(map(len, rows))
    return Batch(input_ids, positions, pair_position, pair_token, pair_mask, pair_mask.any(2), labels, tokens)
