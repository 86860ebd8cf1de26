"""A live transformers model, asked for the likelihood of a continuation."""

import torch


class HFLM:
    def __init__(self, pretrained: torch.nn.Module, tokenizer: object, batch_size: int, max_length: int | None):
        assert isinstance(pretrained, torch.nn.Module) and batch_size > 0
        self.model, self.tokenizer, self.max_length = pretrained, tokenizer, max_length

    @torch.no_grad()
    def loglikelihood(self, prompt: str, continuation: str) -> float:
        start = len(self.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([self.tokenizer(prompt + continuation)["input_ids"]])
        logits = self.model(ids).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
