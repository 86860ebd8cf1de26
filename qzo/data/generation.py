"""Answers that a model writes by greedy decoding, and their F1 as what a step measures (MeZO, arXiv 2305.17333, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qzo.data.answers import f1
from qzo.data.encode import Encoded, encode_prompts, padding_id
from qzo.data.tasks import Example
from qzo.errors import BadInput

NEW_TOKENS = 50


@dataclass(frozen=True)
class Question(Encoded):
    """A prompt, the one row, whose answer is judged against `references`; no options."""

    references: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """A batch of them, all of it on the host."""

    questions: tuple[Question, ...]

    @property
    def examples(self) -> int:
        return len(self.questions)


def answerable_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """Prompts cut on the left so that they and an answer fit into `max_length` tokens, and how many were cut."""
    if max_length <= NEW_TOKENS:
        raise BadInput("max_length", str(max_length), f"more than the {NEW_TOKENS} tokens that may be generated")
    return encode_prompts(examples, tokenizer, max_length - NEW_TOKENS)


def encode_questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Question], int]:
    """The examples of a generation task as `Question`s, and how many prompts were cut."""
    prompts, truncated = answerable_prompts(examples, tokenizer, max_length)
    pairs = zip(prompts, examples, strict=True)
    return [Question((tuple(prompt),), (), 0, example.references) for prompt, example in pairs], truncated


def per_example_f1(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Questions, variants: int = 1
) -> torch.Tensor:
    """Minus the F1 of every answer, fp32 [variants, B] in [-1, 0], on the host; NaN where the logits of an answer are.

    The model sees the prompts `variants` times along dim 0, as in `per_example_loss`, and generates under its noise.
    """
    broken = _NotANumber()
    answers = first_lines(model, tokenizer, [q.rows[0] for q in batch.questions] * variants, broken)
    scores = [f1(answer, question.references) for answer, question in zip(answers, batch.questions * variants, strict=True)]
    return torch.where(broken.rows.cpu(), torch.nan, -torch.tensor(scores)).view(variants, -1)


def first_lines(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], watch: LogitsProcessor | None = None
) -> list[str]:
    """What the model writes after each prompt, up to the first newline, without the spaces around it.

    Greedy, at most `NEW_TOKENS` tokens. `watch` sees the logits of every token.
    """
    pad_id, width = padding_id(tokenizer), max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=pad_id,
    )  # fmt: skip
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([_EndOfLine(tokenizer)]),
        logits_processor=LogitsProcessorList([watch] if watch else []),
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]


class _EndOfLine(StoppingCriteria):
    """A row is done when its newest token holds a newline, whichever of the vocabulary's tokens that is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        newest = self.tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in newest], device=input_ids.device)


class _NotANumber(LogitsProcessor):
    """`rows` bool [R]: those that ever had a logit of NaN, of which argmax would make some token."""

    rows: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = scores.isnan().any(1)
        self.rows = found if self.rows is None else self.rows | found
        return scores
