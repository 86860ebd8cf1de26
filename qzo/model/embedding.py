"""Token embeddings in host memory: a batch needs a few rows of them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class HostEmbedding(nn.Module):
    """Looks tokens up in a table [vocabulary, H] of the host, and gives their rows on `device`.

    The table is no parameter: it neither moves with the model nor tells where the model is. In a step, `rows` is called before
    the forward (`Batch.embedded`), for a captured graph cannot ask the host.
    """

    def __init__(self, table: Tensor, device: torch.device):
        super().__init__()
        self.table, self.device = table, device

    def rows(self, ids: Tensor) -> Tensor:
        """[..., H] on the device for int64 ids on the host, without waiting for the copy."""
        found = embedding(ids, self.table)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.cpu())
