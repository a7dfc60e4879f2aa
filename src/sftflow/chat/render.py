'''The only renderer: conversation -> ids and loss mask, for training, evaluation, terminal and server.

    """user 'hi', assistant 'yo'  ->  ids  B U hi /U A yo /A
                                      mask 0 0 0  0  0 1  1 """

The text is the template's own rendering, to the letter. Where a reply begins is not guessed from marker strings:
it is the length of the template's own prompt for that turn (history + generation prompt), which must be a prefix
of the whole text. Where it ends is the control token that the template itself writes after the turn's last word. Which
words are the template's and which the row's is proven by rendering marks in place of the row's.
What cannot be proven this way is refused with MaskError.
'''

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.content_parts import Messages
from sftflow.chat.declared import has_turns_in_a_row, join_turns, only_last
from sftflow.chat.encode import encoder_of
from sftflow.chat.format import ChatFormat, tokenizer_text
from sftflow.chat.plain_text import Document, end_of_text
from sftflow.chat.pretokenized import Pretokenized
from sftflow.chat.prompts import Prompts
from sftflow.chat.proof.prover import Prover, unflagged_ends
from sftflow.chat.schema import Conversation, parse_row
from sftflow.chat.template import Template
from sftflow.foundation.errors import FormatError, MaskError, SchemaError


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids: (n,) token ids.   mask: (n,) 1 where supervised.   text: what was encoded.   weights: (n,) what each token's
    loss is multiplied by, 0 where the mask is 0; None where that is the mask.
    boundary_splits: prompt/reply boundaries that a token would have straddled, encoded on both sides separately.
    turns: (first token, role) of each turn in order, for looking at the row; () where they are not known."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int8]
    text: str
    source: str = ""
    boundary_splits: int = 0
    turns: tuple[tuple[int, str], ...] = ()
    weights: NDArray[np.float64] | None = None

    @property
    def n_supervised(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class RendererSpec:
    """What a Renderer is made of; can be sent to another process.

    tokenizer: tokenizer.json.   names: what the template calls tokens by.   eos: id of the end of text, or None.
    ends: further ids at which the checkpoint says that a reply ends.   begun_by_bos: whether documents began with BOS
    in pretraining though the tokenizer does not write it.   supervise: what is taught: "replies", or "all" tokens but
    those of messages of weight 0.   turns, join_turns: what is declared of rows (`chat.declared`).
    """

    tokenizer: str
    names: dict[str, str]
    eos: int | None
    format: ChatFormat
    ends: tuple[int, ...] = ()
    begun_by_bos: bool = False
    supervise: str = "replies"
    turns: str = "all"
    join_turns: bool = False

    @property
    def stops(self) -> list[int]:
        """Ids at which generation stops, whatever the format."""
        return [*([] if self.eos is None else [self.eos]), *self.ends]


class _Way(NamedTuple):
    """One of a format's templates, and what proves its renderings."""

    template: Template
    prover: Prover


class Renderer:
    """Renders conversations with one tokenizer and one format.

        renderer.render(conversation).ids                                a training example; .mask says what is taught
        renderer.render(conversation, add_generation_prompt=True).ids    the prompt that evaluation and server send

    special: id of each control token.   special_re: any of them, in a text.
    end_token: the token at which ordinary replies stop, or None where the format writes none.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_format: ChatFormat,
        *,
        ends: tuple[int, ...] = (),
        begun_by_bos: bool = False,
        spec: RendererSpec | None = None,
    ) -> None:
        """ends: ids at which the checkpoint says that a reply ends, beside the tokenizer's end of text.   begun_by_bos:
        see `RendererSpec`.
        spec: that of a renderer in another process: without transformers, `tokenizer` is None there."""
        if spec is None:
            names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
            text, eos = tokenizer_text(tokenizer), tokenizer.eos_token_id
            spec = RendererSpec(text, names, eos, chat_format, ends, begun_by_bos)
        self.tokenizer, self.spec, self.format = tokenizer, spec, chat_format
        encoder = encoder_of(spec.tokenizer)
        formats = [spec.format, spec.format.with_tools or spec.format]
        plain, of_tools = (Template(each, spec.names, encoder.special) for each in formats)
        unflagged = {end for each in (plain, of_tools) for end in unflagged_ends(each, encoder, spec.stops)}
        self._encoder = encoder_of(spec.tokenizer, tuple(sorted(unflagged))) if unflagged else encoder
        self.special, self.special_re = self._encoder.special, self._encoder.special_re
        plain.control = of_tools.control = self.special_re
        prover = Prover(plain, self._encoder, spec.stops)
        self._plain = self._with_tools = _Way(plain, prover)
        if spec.format.with_tools:  # each of the two stops where the other does
            self._with_tools = _Way(of_tools, Prover(of_tools, self._encoder, prover.stop_ids))
            self._plain = _Way(plain, Prover(plain, self._encoder, self._with_tools.prover.stop_ids))
        self.end_token = self._plain.prover.end_token
        self._others: dict[str, Renderer] = {}

    def with_format(self, chat_format: ChatFormat) -> Renderer:
        """The same tokenizer with another format. Made once for its templates."""
        key = "\0".join((chat_format.template, *chat_format.named.values()))
        if key not in self._others:
            spec = replace(self.spec, format=chat_format)
            self._others[key] = Renderer(self.tokenizer, chat_format, spec=spec)
        return self._others[key]

    def supervising(self, what: str, **declared: Any) -> Renderer:
        """The same tokenizer and format, with `what` ("replies" or "all") taught. Made once for each.   declared: the
        spec's `turns` and `join_turns`."""
        spec = replace(self.spec, supervise=what, **declared)
        if spec == self.spec:
            return self
        key = "\0".join(map(str, (spec.supervise, spec.turns, spec.join_turns)))
        if key not in self._others:
            self._others[key] = Renderer(self.tokenizer, self.format, spec=spec)
        return self._others[key]

    def declared(self, conversation: Conversation) -> Conversation:
        """A row as it is rendered and taught: with turns joined, and earlier ones left out, where that is asked for.
        Raises SchemaError where it cannot be."""
        if self.spec.join_turns:
            conversation = join_turns(conversation)
        return only_last(conversation) if self.spec.turns == "last" else conversation

    def _way(self, conversation: Conversation) -> _Way:
        """Which of the format's templates renders it: as transformers' `get_chat_template` chooses."""
        return self._with_tools if conversation.tools else self._plain

    # ---- prompt -> text -> ids -> mask

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        turns: bool = False,
        prompts: Prompts | None = None,
    ) -> Rendered:
        """One conversation -> ids and mask. With add_generation_prompt=True, the prompt for the next assistant turn
        (mask all 0); with continue_final_message=True, that for going on with the last one, up to the end of its text.
        With turns=True, the row also says where its turns begin.

        prompts: those of a row that begins with this conversation, so that none is rendered again.
        Raises FormatError where the template refuses the conversation (its own message quoted) and MaskError where
        the mask cannot be proven.
        """
        if conversation.tokens is not None or conversation.document is not None:
            if add_generation_prompt or continue_final_message:
                what = "tokens" if conversation.document is None else "plain text"
                fact = f"a row of {what} has no turns that could be replied to"
                raise FormatError(conversation.source, fact, "give messages")
            if conversation.document is not None:
                return self._document(conversation, conversation.document, turns=turns)
        if conversation.tokens is not None:
            return self._pretokenized(conversation, conversation.tokens)
        template, prover = self._way(conversation)
        prompts = prompts or Prompts(template, template.row(conversation))
        row = prompts.row if prompts.row.conversation is conversation else template.row(conversation)
        if add_generation_prompt:
            text = prompts.before(len(row.messages))
        else:
            text = template.text(row.messages, row.tools, False, row.source)
        is_prompt = add_generation_prompt or continue_final_message
        whole = self.spec.supervise == "all" and not is_prompt and any(m.weight != 0 for m in conversation.messages)
        supervised = [] if is_prompt else conversation.supervised
        proof = prompts.proof_behind_block(row, text, prover) if supervised == [len(row.messages) - 1] else None
        text = proof.text if proof else text
        left_out = conversation.left_out if whole else []
        fractions = [] if is_prompt else conversation.fractions
        if whole:
            told_apart = [i for i in (*left_out, *fractions) if row.messages[i]["role"] == "assistant"]
        else:
            told_apart = supervised
        starts = prompts.reply_starts(row, text, set(told_apart))
        boundaries = sorted(set(starts.values()))
        proof = proof or (prover.prove(row, text) if supervised or whole else None)
        literals = proof.literals if proof else prover.literals(row, text, add_generation_prompt)
        if continue_final_message:
            text = template.up_to_the_end(row, text)
            literals, boundaries = [x for x in literals if x[1] <= len(text)], [b for b in boundaries if b <= len(text)]
        encoded = self._encoder.encode(text, literals, boundaries, row.source)
        mask = np.full(len(encoded.ids), whole, np.int8)
        mask[:1] = 0  # nothing predicts it
        weights = np.full(len(mask), float(conversation.weight)) if fractions or conversation.weight != 1 else None
        if proof is None:
            return Rendered(encoded.ids, mask, text, row.source, encoded.splits)
        first_token = dict(zip(boundaries, encoded.cuts, strict=True))
        for turn in told_apart:
            start = starts[turn]
            last = prover.end_of_turn(proof, turn, start)
            reply = slice(first_token[start], encoded.literals[last] + 1)
            weight = conversation.messages[turn].weight or 0
            mask[reply] = weight > 0
            if weights is not None:
                weights[reply] *= weight
            for opened, closed in () if whole else prover.calculator_results(proof, start, last):
                mask[encoded.literals[opened] : encoded.literals[closed] + 1] = 0
        if left_out and not turns:
            turns = any(row.messages[i]["role"] != "assistant" for i in left_out)
        found = prover.turns(proof, encoded) if turns else ()
        for start, end in self._turns_left_out(conversation, encoded.ids, found) if left_out else ():
            mask[start:end] = 0
        weights = None if weights is None else weights * mask
        return Rendered(encoded.ids, mask, text, row.source, encoded.splits, found, weights)

    def _turns_left_out(
        self, row: Conversation, ids: NDArray[np.int64], turns: tuple[tuple[int, str], ...]
    ) -> Iterator[tuple[int, int]]:
        """The tokens, from the first to behind the last, of each turn of another's than the assistant that weight 0
        leaves out. Raises MaskError where they cannot be told from those beside them."""
        starts = [*(start for start, _ in turns), len(ids)]
        apart = len(turns) == len(row.messages) and all(a < b for a, b in pairwise(starts))
        for turn in row.left_out:
            if row.messages[turn].role == "assistant":
                continue
            ends = starts[turn : turn + 2] if apart else []
            if not ends or any(ids[at] not in self.special.values() for at in ends if 0 < at < len(ids)):
                fact = "weight 0, but the format writes nothing that tells it from the messages beside it"
                raise MaskError(f"{row.source}.messages[{turn}]", fact, "remove the weight, or the row")
            yield starts[turn], starts[turn + 1]

    def _document(self, row: Conversation, document: Document, *, turns: bool) -> Rendered:
        """Plain text, all of it taught. Raises SchemaError where it may be what a chat format has written already, and
        MaskError where the tokenizer makes control tokens of it."""
        control = None if document.declared else self.special_re.search(document.text)
        if control:
            fact = f"the control token {control[0]} stands in it, as where a chat format has written it"
            remedy = "give the messages; of plain text about such tokens say so: {source: text, path: FILE}"
            raise SchemaError(f"{row.source}.text", fact, remedy)
        ids = np.array(document.ids if document.ids is not None else self._ids_of(document, row.source), np.int64)
        mask = np.ones(len(ids), np.int8)
        mask[:1] = 0  # nothing predicts it
        weights = None if row.weight == 1 else row.weight * mask.astype(np.float64)
        found = ((0, "text"),) if turns else ()
        return Rendered(ids, mask, document.text, row.source, turns=found, weights=weights)

    def _ids_of(self, document: Document, place: str) -> list[int]:
        ids = self._encoder.encode(document.text, [], [], place).ids.tolist()
        return [*self.document_opening, *ids, *(self.document_end if document.ends else ())]

    @functools.cached_property
    def document_opening(self) -> tuple[int, ...]:
        """Ids that plain text begins with: the tokenizer's own, as in pretraining."""
        bos = self.special.get(self.spec.names.get("bos_token", ""))
        return self._encoder.opening or ((bos,) if self.spec.begun_by_bos and bos is not None else ())

    @functools.cached_property
    def document_end(self) -> tuple[int, ...]:
        """The id that ends plain text, see `plain_text.end_of_text`; () where the base has none."""
        turn_ends = [way.prover.end_token for way in (self._plain, self._with_tools)]
        token = end_of_text(self.spec.names, self.special, turn_ends)
        found = self.spec.eos if token == self.spec.names.get("eos_token") else self.special.get(str(token))
        return () if found is None else (found,)

    def _pretokenized(self, row: Conversation, tokens: Pretokenized) -> Rendered:
        """A row of tokens as it stands. Raises SchemaError where one is not in the vocabulary, or nothing is taught."""
        ids = np.array(tokens.ids, np.int64)
        unknown = np.flatnonzero(~self._encoder.knows(ids))
        if len(unknown):
            place, fact = f"{row.source}.input_ids[{unknown[0]}]", f"{tokens.ids[unknown[0]]} is not in the vocabulary"
            raise SchemaError(place, fact, "was the row made with another tokenizer? make it with the base's own")
        given = tokens.weights if self.spec.supervise == "replies" else None
        if self.spec.supervise == "all":
            if tokens.weights:
                fact = "some tokens count in part, and supervise: all teaches every token"
                raise SchemaError(f"{row.source}.weights", fact, "leave supervise out, or remove the weights")
            if len(ids) == 1:
                fact = "nothing to learn: it is one token, which nothing predicts"
                raise SchemaError(f"{row.source}.input_ids", fact, "remove the row")
            mask = np.ones(len(ids), np.int8)
        elif tokens.mask is None:
            remedy = "give mask or labels beside them, or supervise: all in the recipe"
            raise SchemaError(row.source, "input_ids that do not say what is taught", remedy)
        else:
            mask = np.array(tokens.mask, np.int8)
        mask[:1] = 0
        weights = row.weight * np.array(given or mask, np.float64) if given or row.weight != 1 else None
        return Rendered(ids, mask, self.decode(tokens.ids), row.source, weights=weights)

    def prompts(self, conversation: Conversation) -> Prompts:
        """The prompts for a conversation's turns, each rendered when it is asked for."""
        template = self._way(conversation).template
        return Prompts(template, template.row(conversation))

    def render_rows(self, conversation: Conversation, *, turns: bool = False) -> list[Rendered]:
        """Training examples of one row: one, or one per supervised assistant turn where the template rewrites
        history (so that each turn is trained after exactly the prompt that serving will send)."""
        return [rendered for _, rendered in self.render_pairs(conversation, turns=turns)]

    def render_pairs(self, conversation: Conversation, *, turns: bool = False) -> list[tuple[Conversation, Rendered]]:
        """The examples of `render_rows`, each with the conversation that it renders."""
        prompts = self.prompts(conversation) if conversation.messages else None
        try:
            return [(conversation, self.render(conversation, turns=turns, prompts=prompts))]
        except FormatError as error:
            if not has_turns_in_a_row(conversation):
                raise
            joining = "join_turns: true in the recipe joins turns in a row"
            raise FormatError(error.place, error.fact, "; ".join(filter(None, (error.remedy, joining)))) from None
        except MaskError as whole:
            supervised = conversation.supervised
            if supervised in ([], [len(conversation.messages) - 1]) or self.spec.supervise == "all":
                raise  # (examples of single replies would teach what stands before them several times)
            pairs = []
            for turn in supervised:
                messages = [
                    replace(m, weight=0) if m.role == "assistant" and i != turn else m
                    for i, m in enumerate(conversation.messages[: turn + 1])
                ]
                example = replace(conversation, messages=tuple(messages))
                try:
                    pairs.append((example, self.render(example, turns=turns, prompts=prompts)))
                except (MaskError, FormatError):
                    raise whole from None
            return pairs

    def text(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The template's rendering of a conversation, or of the prompt for its next reply."""
        template = self._way(conversation).template
        row = template.row(conversation)
        return template.text(row.messages, row.tools, add_generation_prompt, row.source)

    def as_given(self, messages: Messages) -> Messages:
        """Messages as the template takes them: contents as lists of parts where it leaves texts out."""
        return self._plain.template.as_given(messages)

    # ---- ids

    def stop_ids(self) -> list[int]:
        """Ids at which a reply ends: the end-of-turn tokens, the tokenizer's end of text, the checkpoint's own ends."""
        return list(self._plain.prover.stop_ids)

    def ends(self) -> list[tuple[int, ...]]:
        """Ids of each end of a turn, the longest first: a stop id, behind what the template writes in front of it."""
        found = {*self._plain.prover.ends, *self._with_tools.prover.ends}
        return sorted(found, key=lambda ids: (-len(ids), ids))

    def python_ids(self) -> tuple[int, int, int, int] | None:
        """(call start, call end, output start, output end) ids where the format has calculator tokens."""
        python = self._plain.template.python
        if python is None:
            return None
        a, b, c, d = (self.special[t] for t in python)
        return a, b, c, d

    @property
    def writes_prefix_spaces(self) -> bool:
        """Whether the tokenizer writes a space in front of whatever it is given."""
        return self._encoder.prepends

    def encode_plain(self, text: str) -> list[int]:
        """Text that comes from content -> ids; special-token strings stay text."""
        return self._encoder.encode_pieces([("content", text)])

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, control tokens included."""
        return self._encoder.decode(ids)

    def round_trip(self, text: str) -> str:
        """What the tokenizer makes of a text, there and back: normalisers and decoders may change it."""
        return self._encoder.round_trip(text)

    # ---- what can be said of prompts and of the format without rendering ids

    def fewest_tokens(self, text: str, most: int) -> int:
        """How many tokens a text has at least, found without encoding it, where those are `most` or more; else 0."""
        return self._encoder.fewest_tokens(text, most)

    def rough_length(self, conversation: Conversation, most: int | None = None) -> tuple[int, int]:
        """How many tokens the prompt for the next reply has: (about, at least). Linear in the conversation's length,
        where `render` grows with the square of its turns for templates that look ahead. A prompt that is sure to have
        `most` or more is not even encoded; of that many, both numbers are the lower one.

        The text is encoded as a whole, so it may be a token or two off at each boundary between prompt and reply, where
        no control tokens stand there. And the template's control tokens are sure in any case.
        """
        text = self.text(conversation, add_generation_prompt=True)
        if most is not None and (fewest := self._encoder.fewest_tokens(text, most)):
            return fewest, fewest
        about, control = self._encoder.rough_length(text)
        messages = self._way(conversation).template.row(conversation).messages
        said = json.dumps([messages, conversation.tools], ensure_ascii=False, default=str)
        as_text = sum(1 for _ in self.special_re.finditer(said))  # control tokens to the whole text, text to `render`
        replies = sum(m.role == "assistant" for m in conversation.messages) + 1
        off = 0 if self._fenced and not as_text else 4 * replies
        return about, max(about - off, control - as_text)

    @functools.cached_property
    def _fenced(self) -> bool:
        """Whether a control token stands right before and right behind every reply: nothing merges across those."""
        probe = parse_row([{"role": r, "content": f"zq{r}zq"} for r in ("user", "assistant", "user")], "probe")
        try:
            before, _, after = self.text(probe).partition("zqassistantzq")
        except FormatError:
            return False
        fences = any(before.endswith(t) for t in self.special) and any(after.startswith(t) for t in self.special)
        return fences and not self._encoder.prepends

    def missing_from_prompt(self, conversation: Conversation) -> list[str]:
        """Places of the conversation that the prompt for the next reply does not hold, as `messages[1].content`: what
        people, tools and tool definitions say, and the assistant's calls. (What a template strips of the assistant's
        own words, its earlier reasoning, is the format's way.)"""
        template, prover = self._way(conversation)
        return prover.missing_from_prompt(template.row(conversation))

    def arguments(self) -> list[str]:
        """Names of the templates' own arguments, such as `enable_thinking`."""
        return list(dict.fromkeys([*self._plain.template.arguments(), *self._with_tools.template.arguments()]))

    def disagreement(self) -> str | None:
        """Where the template has `{% generation %}` marks: in what they differ from our mask. None: in nothing."""
        probe = parse_row([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "probe")
        try:
            template = self._plain.template
            theirs = template.generated(template.row(probe).messages, (), "probe")
            rendered = self.render(probe)
        except (MaskError, FormatError):
            return None  # the format has no such plain exchange; rows will be judged one by one
        ours = self.decode(rendered.ids[rendered.mask == 1].tolist())
        if theirs is None or "".join(theirs) == ours:
            return None
        return f"the template's generation marks hold {''.join(theirs)!r}, the proven mask {ours!r}; the mask is used"
