"""`sf.read`, `sf.task`, `sf.render`: conversations from anywhere, and what the model sees of them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.text import Text

from sftflow import checkpoint
from sftflow.api.shared import ModelLike, name_of, quiet
from sftflow.chat import prefill, template_options
from sftflow.chat.columns import Columned, Columns, fault_of, require_columns
from sftflow.chat.data_files import numbered_rows, read_rows
from sftflow.chat.exchanges import CANONICAL, OTHERS
from sftflow.chat.files.columns import check_columns
from sftflow.chat.files.names import Places, stem_of
from sftflow.chat.files.sets import set_name
from sftflow.chat.plain_text import PlainText
from sftflow.chat.render import Renderer
from sftflow.chat.row_keys import CONVERSATIONS, IDS, READ, REFUSED
from sftflow.chat.schema import Conversation, conversation_of, parse_row, text_message
from sftflow.chat.token_rows import TokenRow, token_row
from sftflow.data.sources import REPLAY_FILE, check_source, rows_of_entry
from sftflow.foundation.atomic_io import write_file, write_text
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.errors import DataError, RecipeError, SftflowError
from sftflow.foundation.json_values import kind_of, without_nulls
from sftflow.recipe import REPLAY, Recipe, SourceEntry, parse_recipe, resolve_paths
from sftflow.recipe_words import Origin
from sftflow.report.tables import as_text
from sftflow.report.token_page import token_html, token_page
from sftflow.report.token_view import TerminalRow
from sftflow.tasks import Task, TaskSource
from sftflow.tasks.own import given

Chat = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Conversation
"""one question, a row of any dialect, a list of messages, or a Conversation"""
SETTLE_ROWS = 200
"""the first rows, by which the template's arguments are chosen where no recipe does"""


class Rows(Sequence[Any]):
    """Conversations from a file or from memory.

    Rows in memory are trained on exactly as the same rows in a JSONL file of that name: they are written to one, by the
    hash of what is in it, when they are first needed.   name: a file's stem; it names the source in the ledger, and
    seeds the choice of the rows that are held out.   columns: the names of its columns by ours, where they are others.
    text: whether they are plain text, as of the source `text`.
    """

    def __init__(
        self, data: Any, name: str | None = None, columns: Columns | None = None, *, text: bool = False
    ) -> None:
        if fault := fault_of(columns or {}):
            fact, _, remedy = fault.partition("; ")
            raise RecipeError("columns", fact, remedy)
        self.columns = dict(columns) if columns else None
        of_pandas = hasattr(data, "iloc") and hasattr(data, "columns")
        check_columns(list(data.columns if of_pandas else getattr(data, "column_names", None) or ()), name or "rows")
        if of_pandas:
            import datasets

            data = datasets.Dataset.from_pandas(data, preserve_index=False)
        self.text = text or data == REPLAY
        self._file = os.path.expanduser(data) if isinstance(data, str | Path) else None
        self._file = str(REPLAY_FILE) if self._file == REPLAY else self._file
        of_arrow = type(data).__module__.partition(".")[0] in ("datasets", "pyarrow")
        if not (self._file or isinstance(data, Iterable) or hasattr(data, "to_pylist")):
            raise DataError(name or "rows", f"no rows, but {kind_of(data)}", "give a file, or a list of rows")
        rows = data.to_pylist(maps_as_pydicts="strict") if hasattr(data, "to_pylist") else data
        self._rows = None if self._file else [without_nulls(row) for row in rows] if of_arrow else _dicts(rows)
        self.given_name = name or ("replay" if self._file == str(REPLAY_FILE) else None)
        self.name = self.given_name or (stem_of(self._file) if self._file else "rows")

    @cached_property
    def path(self) -> str:
        """The file that is read. Raises DataError where a row cannot be written as JSON."""
        if self._file is not None:
            return self._file
        lines = []
        for number, row in enumerate(self._rows or (), 1):
            try:
                lines.append(_as_json(row, self.columns or {}).encode() + b"\n")
            except UnicodeEncodeError as error:
                half = f"half a character ({ascii(error.object[error.start])[1:-1]})"
                raise DataError(f"{self.name}:{number}", half, "mend the text") from None
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.name}:{number}", f"not JSON ({error})", "give texts, numbers, lists and mappings"
                ) from None
        data = b"".join(lines)
        folder = cache_folder("memory") or Path(tempfile.mkdtemp(prefix="sftflow-memory-"))
        file = folder / hashlib.sha256(data).hexdigest()[:16] / f"{self.name}.jsonl"
        if not file.is_file():
            write_file(file, lambda f: f.write(data))
        return str(file)

    @property
    def place(self) -> str:
        """What errors call it: the file, or the name of rows from memory."""
        return self._file or self.name

    def numbered(self, places: Places | None = None) -> Iterable[tuple[int, Any]]:
        """(number, row) from 1: lines of a file of JSON lines as bytes, see `chat.data_files.numbered_rows`; each with
        the names of its columns where they are others. Raises DataError where no row has one of these.

        places: told where each file begins."""
        rows, columns = self._numbered(places), self.columns
        if columns is not None:
            require_columns((row for _, row in self._numbered()), columns, self.place)
            rows = ((number, Columned(row, columns)) for number, row in rows)
        return ((number, PlainText(row)) for number, row in rows) if self.text else rows

    def _numbered(self, places: Places | None = None) -> Iterable[tuple[int, Any]]:
        if self._rows is None:
            return numbered_rows(self.path, places=places, plain=self.text)
        if places is not None:
            places.begin(0, self.place)
        return enumerate(self._rows, 1)

    def conversations(self) -> Iterator[Conversation | SftflowError]:
        """Each row in the canonical shape, or what is wrong with it; the last may be what is wrong with the file.
        Raises DataError where nothing of it can be read."""
        number, places = 0, Places()
        try:
            for number, row in self.numbered(places):
                try:
                    yield conversation_of(row, places[number])
                except SftflowError as error:
                    yield error
        except SftflowError as error:
            if not number:
                raise
            yield error
        if not number:
            raise DataError(self.place, "no rows in it", "give a file with conversations")

    def __iter__(self) -> Iterator[Any]:
        if self._rows is not None:
            return iter(self._rows)
        return (row for _, row in read_rows(self.path, plain=self.text))

    def __len__(self) -> int:
        return len(self._rows) if self._rows is not None else sum(1 for _ in self)

    def __getitem__(self, index: int | slice) -> Any:
        if self._rows is not None or isinstance(index, slice) or index < 0:
            return list(self)[index]
        for row in islice(self, index, None):
            return row
        raise IndexError(index)

    def __repr__(self) -> str:
        return f"Rows({self._file!r})" if self._file else f"Rows({len(self)} in memory, name={self.name!r})"


def _dicts(rows: Iterable[Any]) -> list[Any]:
    """Rows with mappings of other kinds (what a tokenizer of transformers returns) as dicts."""
    return [dict(row) if isinstance(row, Mapping) and not isinstance(row, dict) else row for row in rows]


def _as_json(row: Any, columns: Columns) -> str:
    """A row as a line of JSON; what numpy and torch have as lists and numbers, and what else JSON has not (a date) as a
    text, under keys that nothing is made of."""
    dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=_plain)
    try:
        return dumps(row)
    except (TypeError, ValueError):
        if not isinstance(row, Mapping):
            raise
        kept = {*READ, *REFUSED, *columns, *(column.partition(".")[0] for column in columns)}
        if any(row.get(key) for key in CONVERSATIONS):
            kept -= {key for pair in OTHERS for key in pair} - columns.keys()  # nothing is made of them
        return dumps({key: value if key in kept else str(value) for key, value in row.items()})


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def read(
    data: Any,
    *,
    name: str | None = None,
    columns: Columns | None = None,
    config: str | None = None,
    split: str | None = None,
    text: bool = False,
) -> Rows:
    """Conversations of any dialect: from a file (JSON lines, CSV, Parquet ..., also packed), a folder of such or a
    pattern, a data set `hub:OWNER/NAME`, or memory (a list, an iterator, a `datasets.Dataset`, a table of pyarrow, a
    pandas DataFrame), or those that a task trains on: `sf.read(sf.task("spelling", limit=3))`.

    columns: what a table with other names calls ours, as `{"question": "prompt", "answer": "completion"}`.
    config, split: of a data set, where its name does not say them.   text: they are plain text: `{"text": ...}`, or a
    file a document."""
    if config or split:
        data = set_name(str(data), config, split)
    if isinstance(data, SourceEntry):
        entry = data if columns is None else data.model_copy(update={"columns": columns})
        name, columns, text = name or entry.label, entry.columns, entry.is_text
        found = [row for _, row in rows_of_entry(entry, Recipe(mixture=(entry,)))]
        data = [row.to_row() if isinstance(row, Conversation) else _row_of(row) for row in found]
    if isinstance(data, Rows):
        if columns is None and text <= data.text:
            return data
        return Rows(data._file or data._rows, name or data.given_name, columns or data.columns, text=text or data.text)
    return Rows(data, name, columns, text=text)


_SAYS = {*CONVERSATIONS, *(key for pair in (*CANONICAL, *OTHERS) for key in pair), "text", IDS}
"""keys of rows that no entry has"""


def _row_of(payload: Any) -> Any:
    payload = payload.row if isinstance(payload, PlainText) else payload
    return payload.row if isinstance(payload, Columned) else payload


def task(name: str | type[Task] | Task, path: str | Path | None = None, **keys: Any) -> SourceEntry:
    """A task as a source of the mixture: a built-in one, one in a file (`./tasks.py:riddles`), or a class of one's own
    or an instance, whose conversations are made at once (with the seed 0) and trained on as rows from memory.

    path: of its data, where it needs some.   keys: `limit`, `repeat`, `split`, `name`, as in a recipe.   Raises
    RecipeError for another key.

    >>> task("spelling", limit=2000).limit
    2000
    """
    said = None if path is None else str(path)
    if isinstance(name, str):
        return entry_of({"source": name, "path": said, **keys})
    made = given(name, TaskSource(path=said, limit=keys.pop("limit", None)))
    conversations: list[Any] = made.conversations(keys.pop("split", "train"))
    rows = [row.to_row() if isinstance(row, Conversation) else row for row in conversations]
    return entry_of({**dict(entry_of(Rows(rows, made.name))), **keys})


def entries_of(sources: Any) -> list[SourceEntry]:
    """A mixture's sources as the recipe's entries: a list of them, or one. A list of rows is one source."""
    found = sources if isinstance(sources, list | tuple) else [sources]
    return [entry_of(found)] if found and all(map(_is_row, found)) else [entry_of(source) for source in found]


def _is_row(source: Any) -> bool:
    """Whether a mapping is a row, and not an entry of a recipe: rows may have a `source`, too."""
    return isinstance(source, Mapping) and ("source" not in source or not _SAYS.isdisjoint(source))


def entry_of(source: Any) -> SourceEntry:
    """Whatever may stand in a mixture as the recipe's entry: a task, rows, a path, a row, or the entry's own keys."""
    if isinstance(source, SourceEntry):
        return source
    if isinstance(source, Mapping) and not _is_row(source):
        origin = Origin(arguments=frozenset(map(str, source)))
        (entry,) = resolve_paths(parse_recipe({"mixture": [dict(source)]}, origin), Path.cwd()).mixture
        check_source(entry)
        return entry
    rows = read([source] if isinstance(source, Mapping) else source)
    if rows.text:
        return SourceEntry(source="text", path=rows.path, name=rows.name, place=rows.place, columns=rows.columns)
    return SourceEntry(source=rows.path, name=rows.given_name, place=rows.place, columns=rows.columns)


def conversation_of_chat(chat: Chat, system: str | None = None) -> Conversation:
    """What somebody asks as a conversation. Raises SchemaError where it is none."""
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    found = chat if isinstance(chat, Conversation) else parse_row(chat, "row")
    return found if system is None else replace(found, messages=(text_message("system", system), *found.messages))


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Rows as the model sees them. It prints as text; in a notebook every token is a box, the supervised ones coloured.

    rows: one for each training example.   notes: what a reader must know of the template.
    refused: rows that cannot be read, that the format cannot express, or whose mask cannot be proven: {"source",
    "reason"}.   exit_code: the command line's: 2 where a row is wrong, 1 where a mask cannot be proven, else 0.
    """

    rows: tuple[TokenRow, ...]
    refused: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """What `sftflow render --json` prints."""
        rows = [
            {
                "source": row.source,
                "ids": [t.id for t in row.tokens],
                "mask": [int(t.supervised) for t in row.tokens],
                **({} if row.weights is None else {"weights": row.weights}),
                "tokens": [t.text for t in row.tokens],
            }
            for row in self.rows
        ]
        return {"rows": rows, "refused": list(self.refused)}

    @property
    def _refused(self) -> list[TokenRow]:
        return [TokenRow(r["source"], refused=r["reason"]) for r in self.refused]

    def save_html(self, path: str | Path) -> None:
        """A page with every token as a box."""
        write_text(Path(path), token_page([*self.rows, *self._refused]))

    def __str__(self) -> str:
        return as_text(*map(TerminalRow, self.rows), *(Text(f"refused: {r['reason']}") for r in self.refused))

    def _repr_html_(self) -> str:
        return token_html([*self.rows, *self._refused])


def rendering_of(conversations: Iterable[Conversation | SftflowError], renderer: Renderer) -> Rendering:
    rows: list[TokenRow] = []
    refused, code = [], 0
    for found in conversations:
        try:
            if isinstance(found, SftflowError):
                raise found
            examples = renderer.render_rows(renderer.declared(found), turns=True)
            rows += [token_row(r, renderer.tokenizer) for r in examples]
        except SftflowError as error:
            place = error.place if isinstance(found, SftflowError) else found.source
            refused.append({"source": place, "reason": str(error)})
            code = max(code, error.exit_code)
    notes = [n for n in (template_options.options_note(renderer), renderer.disagreement()) if n]
    return Rendering(rows=tuple(rows), refused=tuple(refused), notes=tuple(notes), exit_code=code)


def _declared(rows: Iterable[Conversation | SftflowError], renderer: Renderer) -> Iterator[Conversation]:
    """The rows that can be rendered, as they are."""
    for row in rows:
        with suppress(SftflowError):  # it is told of where it is rendered
            if isinstance(row, Conversation):
                yield renderer.declared(row)


def render(
    data: Any,
    model: ModelLike,
    *,
    config: str | None = None,
    format: str = "auto",
    index: int | None = None,
    append_eos: bool = False,
    drop_prefill: bool = False,
    supervise: str = "replies",
    columns: Columns | None = None,
    turns: str = "all",
    join_turns: bool = False,
    text: bool = False,
) -> Rendering:
    """What a model is trained on of some rows. The model may be a directory with a tokenizer only.

    index: only this row, counted from 0.   append_eos: put the end of text behind replies that have no end.
    drop_prefill: prompts without what the template begins every reply with.   supervise: `replies`, or `all` tokens.
    columns: what a table with other names calls ours.   config: of a data set with several.
    turns: `all` replies, or each conversation's `last`.   join_turns: join messages in a row of the user, and of the
    assistant.   text: the rows are plain text, as of the source `text`.
    Raises DataError where nothing of a file can be read; a row that cannot be shown is among `refused`.
    """
    rows = read([data] if isinstance(data, Mapping | Conversation) else data, columns=columns, config=config, text=text)
    if isinstance(model, checkpoint.Assistant):
        if format not in ("auto", model.renderer.format.name):
            fact = f"the model is loaded with the format {model.renderer.format.name}"
            raise RecipeError("--format", fact, f"load it with sf.load(MODEL, format={format!r}), or name it here")
        renderer = model.renderer
    else:
        quiet()
        renderer = checkpoint.open_renderer(checkpoint.resolve(name_of(model)), format)
    if append_eos:
        renderer = template_options.append_eos(renderer)
    if drop_prefill:
        renderer = prefill.drop_prefill(renderer)
    for option, said, known in (("supervise", supervise, ("replies", "all")), ("turns", turns, ("all", "last"))):
        if said not in known:
            fact = f"it should be {' or '.join(map(repr, known))} (given: {said!r})"
            raise RecipeError(f"--{option}", fact, "correct it")
    if turns == "last" and supervise == "all":
        raise RecipeError("--turns", "last teaches a reply, and --supervise all every token", "leave one of them out")
    renderer = renderer.supervising(supervise, turns=turns, join_turns=join_turns)
    if renderer.arguments():
        first = list(islice(_declared(rows.conversations(), renderer), SETTLE_ROWS))
        renderer = template_options.choose_arguments(renderer, first)
    chosen = islice(rows.conversations(), index, None if index is None else index + 1)
    found = rendering_of(chosen, renderer)
    if index is not None and not found.rows and not found.refused:
        raise RecipeError(f"--index {index}", f"{rows.place} has not so many rows", "give a smaller number")
    return found
