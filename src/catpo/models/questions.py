"""Yes/no questions about pictures: asked beside a pair's responses in its row, and answered by two logits.

The question stands in the chat template as any prompt does; the tokens it shares with the pair's prompt, system message and
pictures among them, are read once. Knows nothing of rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import SIDES, Picture, PreferencePair, Sample
from catpo.models import memory
from catpo.models.attention.last_layer import read_at_responses
from catpo.models.family import Encoded, Family, Question
from catpo.models.family_check import check_family
from catpo.models.memory import pass_tokens
from catpo.models.output_head import OutputHead, token_probabilities
from catpo.models.packing import Batch, Prefix, pack, run_backbone
from catpo.models.tensors import common_length
from catpo.models.transfer import to_device
from catpo.runtime.launcher import is_main_process

YES = ("Yes", "yes", " Yes", " yes")
NO = ("No", "no", " No", " no")
UNDERSTOOD = 0.1
"""Probability of yes and no together below which a model's answers are none."""
Asked = tuple[Sequence[Picture], Sequence[str]]
"""Pictures, and the questions about them."""


@dataclass(frozen=True)
class YesNo:
    """The tokens that begin the answer yes, and those that begin no."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def of(cls, family: Family, yes: Sequence[str] = YES, no: Sequence[str] = NO) -> YesNo:
        """First tokens of the words, alone and as the chat template's answer; those that begin a yes and a no count as neither,
        nor do spaces.

        Raises:
            UserError: nothing is left of one of the two.
        """
        begins = []
        for words in (yes, no):
            alone = {family.token_ids(word)[0] for word in words}
            tokens = alone | _as_answers(family, words)
            begins.append({token for token in tokens if family.tokenizer.decode([token]).strip()})
        both = begins[0] & begins[1]
        ours = cls(*(tuple(sorted(tokens - both)) for tokens in begins))
        if not ours.yes or not ours.no:
            raise UserError(
                f"{family.model_id}: no token tells yes={list(yes)} from no={list(no)} as an answer starts. Give other words."
            )
        return ours

    def margins(self, hidden: Float[Tensor, "questions width"], head: OutputHead) -> Float[Tensor, " questions"]:
        """The largest logit of a yes less the largest of a no, at the states that predict an answer."""
        chosen = torch.tensor([*self.yes, *self.no], device=hidden.device)
        logits = head.map(lambda values: values[chosen]).logits(hidden)
        yes, no = logits.split([len(self.yes), len(self.no)], dim=-1)
        return yes.amax(-1) - no.amax(-1)

    def share(self, hidden: Float[Tensor, "questions width"], head: OutputHead) -> float:
        """Mean probability of an answer that begins with yes or no, from 0 to 1."""
        chosen = torch.tensor([*self.yes, *self.no], device=hidden.device)
        return token_probabilities(hidden, head, chosen).sum(-1).mean().item()


_heard: WeakSet[Family] = WeakSet()
"""Models whose first answers have been looked at."""


def say_if_misunderstood(
    family: Family, hidden: Float[Tensor, "questions width"], words: YesNo, questions: Sequence[Question]
) -> None:
    """Print, once for each model, that it answers the first questions with neither yes nor no: its logits then tell nothing."""
    if family in _heard or not questions:
        return
    _heard.add(family)
    share = words.share(hidden, family.head)
    if share < UNDERSTOOD and is_main_process():
        print(
            f"catpo: asked '{questions[0].text}', {family.model_id} begins its answer with neither yes nor no (together "
            f"{share:.2g} of the probability), so its answers say little. Ask in words that it was trained on: "
            "detect --question 'Can you see {} here?', words(question='…') or self_question(wordings={'objects': '…'}); or "
            "give its words for yes and no: self_question(yes=['Sure'], no=['Never']).",
            file=sys.stderr,
        )


def _as_answers(family: Family, words: Sequence[str]) -> set[int]:
    """The first token of each word as an answer."""
    asked = family.prompt_text("Is it?", 1)
    return {family.response_ids(asked, word)[0] for word in words}


def ask(
    family: Family,
    items: Sequence[PreferencePair | Sample],
    questions: Sequence[Sequence[str]],
    *,
    words: YesNo | None = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
) -> list[Float[Tensor, " questions"]]:
    """logit(yes) - logit(no) of each item's questions about its pictures, which are read once for all of them.

    Args:
        family: the model.
        items: pairs, or samples; their prompts and responses play no part.
        questions: of each item.
        words: what counts as yes and as no; by default `YesNo.of(family)`.
        batch_size: items per forward pass.
        batch_tokens: tokens per forward pass, padding included; by default as many as fit (`pass_tokens`).

    Raises:
        UserError: a question holds a special token, or is longer than what the model reads; names the item.
    """
    family.check_packable()
    if not items:
        return []
    if questions[0]:
        check_family(family, PreferencePair(items[0].id, items[0].images, questions[0][0], "Yes", "No"))
    words = words or YesNo.of(family)
    prefix: Prefix = "shared" if family.shares_prefix else "separate"
    margins: list[Float[Tensor, " questions"]] = []
    encoded = (_asked(family, item, texts) for item, texts in zip(items, questions, strict=True))
    for group in in_passes(encoded, batch_size, batch_tokens or pass_tokens(family, family.device)):
        counts = [len(item.questions) for item in group]
        doing = f"asking {sum(counts)} questions at once"
        explained = memory.explained(doing, family.model, advice=memory.ANSWERING)
        with explained, family.answering(), torch.inference_mode():
            batch = to_device(pack(family, group, prefix=prefix), family.device)
            with family.recordable_attention(), read_at_responses(family.decoder):
                hidden = run_backbone(family.unwrapped, batch).last_hidden_state
            answering = asked_hidden(hidden, batch)
            say_if_misunderstood(family, answering, words, group[0].questions)
            margins += words.margins(answering, family.head).cpu().split(counts)
    return margins


def yes_less_no(
    family: Family, asked: Sequence[Asked], *, batch_size: int = 32, batch_tokens: int | None = None
) -> list[list[float]]:
    """For each question about some pictures the logit of yes less that of no; see `ask`."""
    samples = [Sample("pictures", tuple(pictures), "") for pictures, questions in asked if questions]
    texts = [questions for _, questions in asked if questions]
    margins = iter(ask(family, samples, texts, batch_size=batch_size, batch_tokens=batch_tokens))
    return [next(margins).tolist() if questions else [] for _, questions in asked]


def asked_hidden(last_hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "questions width"]:
    """Final hidden states that predict the answers to a batch's questions, in the order (pair, question)."""
    return last_hidden.flatten(0, 1)[batch["asked_at"]]


def in_passes(encoded: Iterator[Encoded], batch_size: int, batch_tokens: int) -> Iterator[list[Encoded]]:
    """Parts of at most `batch_size` pairs, and of as many tokens, padding included."""
    batch: list[Encoded] = []
    for item in encoded:
        longest = max(each.length for each in [*batch, item])
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > batch_tokens):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _asked(family: Family, item: PreferencePair | Sample, questions: Sequence[str]) -> Encoded:
    """The questions alone, on the prompt of the first."""
    if not questions:
        raise UserError(f"{item.id} has no question. Leave it out.")
    about = PreferencePair(item.id, item.images, questions[0], "", "", history=_before(item))
    text = family.prompt_text(about.prompt, len(item.images), history=about.history, name=item.id)
    prompt = family.encode_prompt(text, [picture.open() for picture in item.images], name=item.id)
    return with_questions(family, about, replace(prompt, response_ids={side: [] for side in SIDES}), questions)


def _before(item: PreferencePair | Sample) -> tuple[Turn, ...]:
    """What is said before the question: the system message of a pair."""
    return tuple(turn for turn in item.history if turn.role == "system")


def with_questions(family: Family, pair: PreferencePair, encoded: Encoded, questions: Sequence[str]) -> Encoded:
    """A pair with questions about its pictures beside its responses; after its system message, but none of its other turns.

    Raises:
        UserError: a question holds a special token, or is longer than what the model reads; names the pair.
    """
    text = family.prompt_text(pair.prompt, len(pair.images), history=pair.history, name=f"pair {pair.id}")
    asked = []
    for number, question in enumerate(questions):
        name = f"pair {pair.id}, question {number}"
        own = family.prompt_text(question, len(pair.images), history=_before(pair), name=name)
        beside = _beside(family, encoded, text, own, question)
        if beside is None:
            alone = family.encode_prompt(own, [picture.open() for picture in pair.images], name=name)
            beside = Question([], 0, question, alone)
        family.check_positions(beside.length, name)
        asked.append(beside)
    return replace(encoded, questions=tuple(asked))


def _beside(family: Family, encoded: Encoded, text: str, own: str, question: str) -> Question | None:
    """What of a question's prompt `own` follows its common beginning with the pair's, `text`; None if that lacks a picture.

    The processor writes its image tokens into the beginning, in place of the template's; behind them both prompts must be as
    they are without it, and none of their tokens may see a later one.
    """
    if not family.shares_prefix or family.needs_check:
        return None
    of_pair, of_question = family.token_ids(text), family.token_ids(own)
    common = common_length(of_pair, of_question[:-1])
    tail = of_pair[common:]
    hangs_at = len(encoded.prompt_ids) - len(tail)
    is_tail = encoded.prompt_ids[hangs_at:] == tail
    is_behind_pictures = hangs_at > max(encoded.patches, default=0) and family.image_token_id not in of_question[common:]
    if not is_tail or not is_behind_pictures or max(family.prompt_blocks(encoded)[hangs_at:], default=-1) >= 0:
        return None
    return Question(of_question[common:], hangs_at, question)
