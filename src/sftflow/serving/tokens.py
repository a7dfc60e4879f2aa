"""What a model reads, without asking it: `/v1/render`, and vLLM's `/tokenize` and `/detokenize`.

Each function takes `find`, which gives the model of a name, and a JSON object; it returns one, or raises ApiError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sftflow.serving.errors import wrong
from sftflow.serving.logprobs import token_texts
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.prompt import chat_prompt, known_ids
from sftflow.serving.schemas import DetokenizeBody, RenderBody, TokenizeChatBody, TokenizeTextBody

Find = Callable[[str], ServedModel]
MOST_TOKENS, LETTERS = 1 << 17, 8
"""tokens that a text may have where the context is smaller: how far it is too long may be asked, but not of megabytes;
and characters for each, above which it is not encoded to find out"""


def rendered(find: Find, value: dict[str, Any]) -> dict[str, Any]:
    """{"tokens": [{"id", "text", "special"}]}: the exact prompt of a chat."""
    body = RenderBody.read(value)
    model = find(body.model)
    model.thread.check_room()
    ids = chat_prompt(model, body, replied=False).ids.tolist()
    texts = token_texts(model.assistant.tokenizer, ids)
    return {
        "tokens": [{"id": i, "text": t, "special": i in model.control_ids} for i, t in zip(ids, texts, strict=True)]
    }


def tokenized(find: Find, value: dict[str, Any]) -> dict[str, Any]:
    """{"count", "max_model_len", "tokens", "token_strs"}: of the prompt that `messages` make, or of the text in
    `prompt`, whose control-token strings are text, as in /v1/completions."""
    if value.get("messages") is not None:
        if value.get("prompt") is not None:
            raise wrong("prompt", "there are messages, too; send one of them")
        body: TokenizeChatBody | TokenizeTextBody = TokenizeChatBody.read(value)
    else:
        body = TokenizeTextBody.read(value)
    model = find(body.model)
    model.thread.check_room()
    if isinstance(body, TokenizeChatBody):
        ids = chat_prompt(model, body, replied=False).ids.tolist()
    else:
        ids = _text_ids(model, body)
    strs = token_texts(model.assistant.tokenizer, ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": strs}


def _text_ids(model: ServedModel, body: TokenizeTextBody) -> list[int]:
    assistant, most = model.assistant, max(MOST_TOKENS, model.context)
    fewest = assistant.renderer.fewest_tokens(body.prompt, most + 1)
    if not fewest and len(body.prompt) > LETTERS * most:
        raise wrong("prompt", f"{len(body.prompt)} characters; at most {LETTERS * most} are read", "too_many_tokens")
    ids: list[int] = []
    if not fewest and body.add_special_tokens is False:
        ids = assistant.renderer.encode_plain(body.prompt)
    elif not fewest:
        ids = list(assistant.plain_ids(body.prompt))
    if fewest or len(ids) > most:
        raise wrong("prompt", f"at least {fewest or len(ids)} tokens; at most {most} are counted", "too_many_tokens")
    return ids


def detokenized(find: Find, value: dict[str, Any]) -> dict[str, Any]:
    """{"prompt"}: the text of the ids, control tokens included."""
    body = DetokenizeBody.read(value)
    model = find(body.model)
    if len(body.tokens) > max(MOST_TOKENS, model.context):
        raise wrong("tokens", f"{len(body.tokens)} of them; at most {max(MOST_TOKENS, model.context)} are read")
    return {"prompt": model.assistant.renderer.decode(known_ids(model.assistant, body.tokens, "tokens"))}
