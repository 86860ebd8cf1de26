"""Token embeddings in host memory: the same numbers from another place."""

import pytest
import torch

from qzo.cli import main
from qzo.errors import BadInput
from qzo.journal import read_journal
from qzo.model.embedding import HostEmbedding
from qzo.model.load import load_model


def test_rows_are_those_of_the_table():
    table, ids = torch.randn(10, 4), torch.tensor([[3, 9], [0, 3]])
    host = HostEmbedding(table, torch.device("cpu"))
    assert torch.equal(host(ids), table[ids]) and torch.equal(host.rows(ids), table[ids])
    assert not list(host.parameters()) and not list(host.buffers())


def test_model_gives_the_same_logits(llama4):
    ids = torch.arange(40).view(2, 20)
    plain, kept = (load_model(str(llama4), "cpu", "fp32", offload) for offload in ("none", "embeddings"))
    assert isinstance(kept.model.get_input_embeddings(), HostEmbedding) and kept.embedding is not None
    assert torch.equal(plain.model(ids).logits, kept.model(ids).logits)
    assert sum(p.nbytes for p in plain.model.parameters()) - sum(p.nbytes for p in kept.model.parameters()) == kept.embedding.table.nbytes


def test_shared_embeddings_are_refused(shared):
    with pytest.raises(BadInput, match="offload: embeddings that the head of this model shares"):
        load_model(str(shared / "models/reviews-llama-32m-gptq-w4g128"), "cpu", "fp32", "embeddings")


def test_a_run_is_the_same_and_may_change_its_mind(recipe, tmp_path):
    for name, offload in (("plain", "none"), ("kept", "embeddings")):
        assert main(["tune", recipe, f"output_dir={tmp_path / name}", f"offload={offload}", "stacked=true", "micro_batch=3"]) == 0
    plain, kept = (read_journal(tmp_path / name / "journal.bin")[1] for name in ("plain", "kept"))
    assert [(r.loss, *r.projected, *r.coefs) for r in plain] == [(r.loss, *r.projected, *r.coefs) for r in kept]
    assert main(["tune", recipe, f"output_dir={tmp_path / 'kept'}", "offload=none", "stacked=true", "micro_batch=3"]) == 0
