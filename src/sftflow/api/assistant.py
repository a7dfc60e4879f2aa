"""`sf.load`: a model that renders, talks, and says how likely each token is to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sftflow import checkpoint
from sftflow.api.rows import Chat, Rendering, conversation_of_chat, read, rendering_of
from sftflow.api.shared import ModelLike, name_of, parts_of, quiet, watching
from sftflow.evaluation.heldout_loss import HeldOutLoss, held_out_loss
from sftflow.foundation.errors import RecipeError, SftflowError
from sftflow.generation.request import Delta, GenerationRequest, Reply, TokenLogprob
from sftflow.replies.asking import RowSource, replies, survey
from sftflow.replies.questions import Asker
from sftflow.replies.reply_file import ReplyCount, require_output, write_replies
from sftflow.terminal.repl import LONGEST_REPLY


class Assistant(checkpoint.Assistant):
    """A loaded checkpoint.

    model, tokenizer: of transformers.   renderer: its chat format.   engine: what generates.   info: its sftflow.json.
    """

    def render(self, row: Chat) -> Rendering:
        """A conversation as the model sees it, with the tokens that training would supervise."""
        return rendering_of([conversation_of_chat(row)], self.renderer)

    def chat(self, messages: Chat, *, system: str | None = None, **sampling: Any) -> Reply:
        """The reply to a question or a conversation: `.text`, `.ids`, `.finish_reason` and more.

        sampling: max_tokens, temperature, top_p, seed and the other fields of a `GenerationRequest`; what is left out
        is as the checkpoint's generation_config.json asks, which for most is greedy decoding.
        """
        (reply,) = self.engine.generate([self.request(conversation_of_chat(messages, system), **sampling)])
        return reply

    def stream(self, messages: Chat, *, system: str | None = None, **sampling: Any) -> Iterator[Delta]:
        """The same reply piece by piece: `.text` of each piece; the last one has `.reply`."""
        return self.engine.stream(self.request(conversation_of_chat(messages, system), **sampling))

    def replies(
        self, rows: Any, *, system: str | None = None, on_bad_row: str = "stop", seed: int = 0, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        """The reply to each row, in order, asked side by side: rows to train on, with `source` and `finish_reason`.

        rows: as `sf.read` takes them, or rows that only ask. A reply that a row has itself is asked anew, and stands
        under `reference`.   on_bad_row: `skip` leaves out what cannot be asked.   seed: each row's is derived from it.
        sampling: as for `chat`; max_tokens is 1,024 where it is left out.
        Raises what is wrong with a row before the first is asked.
        """
        source, asker, skip = self._row_by_row(rows, system, on_bad_row, seed, sampling)
        known = survey(source, asker, skip=skip)
        return (asker.row(question, reply) for question, reply in replies(source, asker, known, skip=skip))

    def write_replies(
        self,
        rows: Any,
        out: str | Path,
        *,
        system: str | None = None,
        on_bad_row: str = "stop",
        overwrite: bool = False,
        seed: int = 0,
        **sampling: Any,
    ) -> ReplyCount:
        """The same into a JSON lines file, as they come: `sftflow chat --input`. It goes on from those that are there
        already; DataError where they are of other settings, unless `overwrite`."""
        source, asker, skip = self._row_by_row(rows, system, on_bad_row, seed, sampling)
        require_output(Path(out), source.name)
        with watching() as shown:

            def progress(done: int, total: int, before: int, rate: float) -> None:
                shown.counted("chat", done, total, f"{rate:,.0f} tokens/s" if rate else "", before=before)

            return write_replies(
                source,
                asker,
                Path(out),
                skip=skip,
                overwrite=overwrite,
                looked=partial(shown.rendering, source.name),
                progress=progress,
            )

    def _row_by_row(
        self, rows: Any, system: str | None, on_bad_row: str, seed: int, sampling: dict[str, Any]
    ) -> tuple[RowSource, Asker, bool]:
        if on_bad_row not in ("stop", "skip"):
            raise RecipeError("on_bad_row", f"it should be 'stop' or 'skip' (given: {on_bad_row!r})", "correct it")
        named = read(rows)
        asker = Asker(self, system, seed, **{"max_tokens": LONGEST_REPLY, **sampling})
        return RowSource(named.place, named.numbered), asker, on_bad_row == "skip"

    def logprobs(self, row: Chat, *, top: int = 0) -> list[TokenLogprob | None]:
        """How likely the model finds each token of a rendered conversation (natural logarithms), aligned with the ids
        of `render(row)`; None for the first, which follows nothing.   top: so many of the likeliest beside each."""
        ids = tuple(self.renderer.render(conversation_of_chat(row)).ids.tolist())
        request = GenerationRequest(prompt_ids=ids, max_new_tokens=0, prompt_logprobs=top, use_python=False)
        return list(self.engine.generate([request])[0].prompt_logprobs)

    def loss(self, rows: Any) -> HeldOutLoss:
        """The loss on conversations, in nats per token: of replies (`.all`), of the tokens that end them
        (`.end_of_turn`), and of what each role says (`.roles["user"]`).   rows: as `sf.read` takes them."""
        named = read(rows)
        found = []
        for conversation in named.conversations():
            if isinstance(conversation, SftflowError):
                raise conversation
            found.append((named.name, conversation))
        return held_out_loss(self, found)

    def __repr__(self) -> str:
        millions = self.model.num_parameters() / 1e6
        return f"Assistant({self.name!r}, {millions:.1f}M parameters, format {self.renderer.format.name})"


def load(model: ModelLike, *, format: str = "auto", precision: str = "fp32") -> Assistant:
    """Load a directory (a checkpoint, a run, one of picollm or nanochat), a hub id, a .gguf file or `builtin:tiny`.

    format: the chat format; `auto` is the checkpoint's own, else `sftflow`.   Raises CheckpointError or FormatError.
    """
    if isinstance(model, Assistant):
        return model
    quiet()
    if not isinstance(model, checkpoint.Assistant):
        model = checkpoint.load_assistant(name_of(model), format=format, precision=precision)
    return Assistant(**parts_of(model))


def base_beside(base: ModelLike, trained: checkpoint.Assistant) -> checkpoint.Assistant:
    """The base of a trained model; where it has no chat format of its own, it is asked in that of the trained one."""
    if isinstance(base, checkpoint.Assistant):
        return base
    return checkpoint.load_assistant(name_of(base), fallback=checkpoint.base_format(trained))
