"""`sf.serve` and `sf.export`: to people and programs, and to files that run elsewhere."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sftflow.api.assistant import base_beside, load
from sftflow.api.rows import read
from sftflow.api.shared import ModelLike, model_id, name_of, parts_of, watching
from sftflow.chat.columns import Columns
from sftflow.checkpoint import Assistant
from sftflow.exporting.merge import merge, told
from sftflow.exporting.to_gguf import export_gguf, require_passed, summary
from sftflow.exporting.to_nanochat import export_nanochat
from sftflow.foundation.errors import RecipeError, ServeError
from sftflow.generation.engine import Engine
from sftflow.replies.reply_file import ReplyCount, require_output

if TYPE_CHECKING:
    from sftflow.serving.service import Service

__all__ = ["ask_rows", "export", "require_passed", "serve", "summary", "talk"]


def serve(
    model: ModelLike,
    base: ModelLike | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8008,
    api_key: str | None = None,
    insecure: bool = False,
    name: str | None = None,
    allow_origin: str | Iterable[str] = (),
    allow_hosts: Iterable[str] = (),
    root_path: str = "",
    background: bool = False,
) -> Service | None:
    """An OpenAI-compatible server and a chat page, until Ctrl-C.   base: one that is served beside the model.

    background: return once it answers, which it does until its `.stop()` or the end of a `with`; it has `.url` and
    `.models`. Port 0 is a free one.

    name: what clients call the model by; else its directory's name, or its hub id.   api_key: what clients are asked
    for; else the environment's SFTFLOW_API_KEY.   allow_origin: web origins whose pages may call, or `*`.   root_path:
    the path below which a proxy shows the server, such as `/llm`.   Raises ServeError where the port is in use or the
    host is not safe, before a model is loaded.
    """
    from sftflow.serving.service import Service
    from sftflow.serving.service import serve as run

    names = _served_names(model, base, name)

    def models() -> dict[str, Assistant]:
        trained = load(model)
        served = [trained] if base is None else [trained, base_beside(base, trained)]
        return dict(zip(names, map(_apart, served) if background else served, strict=True))

    how: dict[str, Any] = {"host": host, "port": port, "insecure": insecure, "root_path": root_path}
    how |= {"allow_origin": allow_origin, "allow_hosts": allow_hosts}
    how["api_key"] = os.environ.get("SFTFLOW_API_KEY") if api_key is None else api_key
    with watching() as shown:
        if not background:
            run(models, say=shown.say, **how)
            return None
        service = Service(models, **how)
        service.start()
        return service


def _apart(assistant: Assistant) -> Assistant:
    """The same model for another thread: the weights are shared, the modules and the engine, which is not re-entrant,
    are not."""
    shared = {id(weight): weight for weight in (*assistant.model.parameters(), *assistant.model.buffers())}
    model = copy.deepcopy(assistant.model, shared)
    engine = Engine(model, assistant.renderer, assistant.engine.runtime)
    return Assistant(**{**parts_of(assistant), "model": model, "engine": engine})


def _served_names(model: ModelLike, base: ModelLike | None, name: str | None) -> list[str]:
    """What clients call the model by, and the base beside it. Raises ServeError.

    >>> _served_names("a/one", "a/one", None), _served_names("a/one", "builtin:tiny", "mine")
    (['a/one', 'a/one-base'], ['mine', 'builtin:tiny'])
    """
    if name is not None and (not name.strip() or name != name.strip() or not name.isprintable() or len(name) > 200):
        raise ServeError(
            "--name", f"{name[:40]!r} is no name", "write one to 200 characters, with no blank around them"
        )
    first = model_id(name_of(model)) if name is None else name
    if base is None:
        return [first]
    second = model_id(name_of(base))
    if second == first and name is not None:
        raise ServeError("--name", f"the base beside it is served as {second!r}, too", "choose another name")
    return [first, f"{second}-base" if second == first else second]


def talk(
    model: ModelLike,
    *,
    prompt: str | None = None,
    system: str | None = None,
    base: ModelLike | None = None,
    **sampling: Any,
) -> None:
    """The chat in the terminal; with `prompt`, one question and its reply.

    base: what `/base` asks; else the checkpoint that the model was trained from.
    sampling: temperature, top_p, max_tokens, seed; what is None is as the checkpoint asks.
    """
    from sftflow.terminal.repl import chat

    trained = load(model)
    other = None if base is None else base_beside(base, trained)
    given = {key: value for key, value in sampling.items() if value is not None}
    chat(trained, prompt=prompt, system=system, base=other, sampling=given)


def ask_rows(
    model: ModelLike, rows: str | Path, out: str | Path, *, columns: Columns | None = None, **how: Any
) -> ReplyCount:
    """`Assistant.write_replies`, with what can be said of the files said before the model is loaded.
    columns: as of `sf.read`."""
    named = read(rows, columns=columns)
    require_output(Path(out), named.place)
    next(iter(named.numbered()), None)
    return load(model).write_replies(named, out, **how)


def export(
    model: ModelLike,
    to: Literal["gguf", "merged", "nanochat"],
    out: str | Path,
    *,
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
    base: str | None = None,
    prompts: int = 50,
) -> dict[str, Any]:
    """Write a .gguf file for llama.cpp, proven by a parity certificate beside it, which is returned; or merge an
    adapter into its base, and return how far its logits are from those of the two side by side; or write a base
    directory that picollm and nanochat read, and return where in it the checkpoint is.

    type: how weights are stored (gguf: f16).   base: of an adapter whose own is not at hand.   prompts: of the
    certificate.   Raises CheckpointError or FormatError where llama.cpp would compute or read something else.
    """
    with watching() as shown:
        if to == "merged":
            if type == "q8_0":
                raise RecipeError("--type", "a checkpoint directory holds no q8_0", "use f32, f16 or bf16")
            merged = merge(name_of(model), Path(out), base=base, kind=type)
            shown.say(f"export: {told(merged)}")
            shown.say(f"export: wrote {out}; it loads like any checkpoint: sftflow chat {out}")
            return merged
        if base is not None:
            raise RecipeError("--base", "only --to merged has one", "leave it out")
        if to == "nanochat":
            if type not in (None, "f32"):
                raise RecipeError("--type", "a base directory of picollm or nanochat is written in f32", "leave it out")
            folder = export_nanochat(name_of(model), Path(out))
            home = Path(out).absolute()
            shown.say(f"export: wrote {folder}, and the tokenizer")
            shown.say(
                f"export: PICOLLM_BASE_DIR={home} is where picollm looks for it, NANOCHAT_BASE_DIR where nanochat"
            )
            return {"checkpoint": str(folder)}
        return export_gguf(name_of(model), Path(out), type or "f16", prompts=prompts, say=shown.say)
