"""The loss that a step measures: one number per example, from the predictions that count and no others."""

import torch
from transformers import PreTrainedModel

from qzo.data.batches import Batch
from qzo.model.decoder import decode

HEAD_POSITIONS = 2048  # positions per call of the head: bounds the logits at 2048 x vocabulary


def per_example_loss(model: PreTrainedModel, batch: Batch, variants: int = 1) -> torch.Tensor:
    """The loss of every example, fp32 [variants, B], in nats.

    The decoder sees input_ids `variants` times along dim 0 (all rows of variant 0 first), so that a layer may use
    other weights for each variant. An option's score is the mean log-probability of its tokens; the loss is the
    cross-entropy over the options' scores, or minus the score where there is one option (MeZO, arXiv 2305.17333).
    Deterministic. Gradients are up to the caller: wrap it in torch.no_grad() to keep no activations.
    """
    scores = _scores(model, batch, variants)
    labels = batch.labels.expand(variants, -1).unsqueeze(2)
    right = scores.gather(2, labels).squeeze(2)
    choice = torch.logsumexp(scores, 2) - right
    return torch.where(batch.option_mask.sum(1) > 1, choice, -right)


def per_example_error(model: PreTrainedModel, batch: Batch, variants: int = 1) -> torch.Tensor:
    """-1 where the highest score is the right option's (the first of equals wins), else 0: fp32 [variants, B]; NaN where a score is.

    Its mean is minus the accuracy, MeZO's non-differentiable objective (section 3.3). The model is seen as in `per_example_loss`.
    """
    scores = _scores(model, batch, variants)
    wrong = (scores.argmax(2) != batch.labels).float() - 1
    return torch.where(scores.isnan().any(2), torch.nan, wrong)


def option_scores(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The mean log-probability of every option's tokens, fp32 [B, C]; -inf where an example has fewer options."""
    return _scores(model, batch, 1)[0]


def _scores(model: PreTrainedModel, batch: Batch, variants: int) -> torch.Tensor:
    embedded = None if batch.embedded is None else batch.embedded.repeat(variants, 1, 1)
    hidden = decode(model, batch.input_ids.repeat(variants, 1), embedded)
    hidden = hidden.reshape(variants, -1, hidden.shape[-1]).index_select(1, batch.positions)  # [V, P, width]
    head = model.get_output_embeddings()
    log_probs = torch.zeros(variants, *batch.pair_token.shape, device=hidden.device)  # [V, B, C, L]
    size = max(1, HEAD_POSITIONS // variants)
    for start in range(0, hidden.shape[1], size):
        logits = head(hidden[:, start : start + size]).float()  # [V, at most size, vocabulary]
        place = batch.pair_position - start
        inside = batch.pair_mask & (place >= 0) & (place < logits.shape[1])
        place = torch.where(inside, place, 0)
        found = logits[:, place, batch.pair_token] - torch.logsumexp(logits, 2)[:, place]
        log_probs = torch.where(inside, found, log_probs)
    scores = log_probs.sum(3) / batch.pair_mask.sum(2).clamp(min=1)
    return scores.masked_fill(~batch.option_mask, float("-inf"))
