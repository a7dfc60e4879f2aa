"""A rendering that is watched: what the template reads of the messages, and when (for `beginnings`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jinja2.nodes as nodes
from jinja2.utils import missing

from sftflow.chat.content_parts import Messages

PLAIN = (str, int, float, bool, type(None))

State = tuple[Any, ...]


class Watched(NamedTuple):
    """A rendering, as far as it came, with what `Watch` says of it.   is_whole: whether it hangs on nothing but the
    state behind the last message, and came to its end."""

    text: str
    at: dict[int, tuple[int, State]]
    is_whole: bool


class Watch:
    """One rendering that is watched.

    at: of each message that was asked for before anything behind it was seen, how many characters had been written, and
    the state.   n_written: characters so far, told by whoever takes them.   looks_back: whether the template looked at
    messages when it had gone through them: then what it ends with hangs on more than its state.
    """

    def __init__(self, messages: Messages, namespace: type) -> None:
        self.messages = messages
        self.at: dict[int, tuple[int, State]] = {}
        self.n_written = 0
        self._namespace, self._namespaces = namespace, list[Any]()
        self._seen, self._early, self._is_over = -1, False, False
        self.looks_back = False

    def namespace(self, *args: Any, **kwargs: Any) -> Any:
        """The `namespace` of templates, remembered."""
        self._namespaces.append(self._namespace(*args, **kwargs))
        return self._namespaces[-1]

    def see(self, index: int) -> None:
        """The template knows message `index`, or that there is none."""
        self._seen = max(self._seen, index)
        self.looks_back |= self._is_over

    def see_end(self) -> None:
        self.see(len(self.messages))

    def end(self) -> None:
        """A loop has gone through all messages."""
        self.see_end()
        self._is_over = True

    def ask(self, index: int) -> None:
        """A loop asks for a message: for its next round, or in the middle of one to know what comes."""
        if self._seen < index and not self._early:
            state = self._state()
            if state is not None:
                self.at[index] = self.n_written, state
        self._early = False
        self.see(index)

    def look_ahead(self, loop: Any, attribute: str) -> None:
        """The template asks a loop for something that depends on what follows, where `attribute` is such."""
        if attribute not in ("last", "nextitem", "length", "revindex", "revindex0") or type(loop._iterable) is list:
            return
        if attribute in ("last", "nextitem") and type(loop._iterable) is View:
            self._early = loop._after is missing
        else:
            self.see_end()

    def _state(self) -> State | None:
        """All values in namespaces; None where one is more than a plain value."""
        values = [sorted(object.__getattribute__(n, "_Namespace__attrs").items()) for n in self._namespaces]
        if not all(type(value) in PLAIN for pairs in values for _, value in pairs):
            return None
        return tuple((number, name, type(v), v) for number, pairs in enumerate(values) for name, v in pairs)


class View:
    """The messages from `first` on, as a watched template sees them. Whatever else it does with them is an error, and
    ends the watching."""

    def __init__(self, watch: Watch, first: int = 0) -> None:
        self._watch, self._first = watch, first

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._first, len(self._watch.messages)):
            self._watch.ask(index)
            yield self._watch.messages[index]
        self._watch.end()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            if key.stop is None and key.step is None and type(key.start) is int and key.start >= 0:
                return View(self._watch, self._first + key.start)
            raise TypeError("a part of the messages that depends on their number")
        if type(key) is not int or key < 0:
            self._watch.see_end()
            return self._watch.messages[self._first :][key]
        self._watch.see(self._first + key)
        return self._watch.messages[self._first + key]

    def __bool__(self) -> bool:
        self._watch.see(self._first)
        return self._first < len(self._watch.messages)

    def number(self, compared_with: object) -> int:
        """How many there are, for one who asks whether there are so many."""
        if type(compared_with) is not int:
            raise TypeError("the number of messages")
        self._watch.see(self._first + max(0, compared_with))
        return max(0, len(self._watch.messages) - self._first)

    def __contains__(self, item: Any) -> bool:
        raise TypeError("a search in the messages")

    def __repr__(self) -> str:
        raise TypeError("the messages as a text")

    __str__ = __repr__
    __html__ = __repr__


@functools.total_ordering
class Count:
    """How many messages there are, as a watched template sees it: it may be compared with a number, and no more."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __eq__(self, other: object) -> bool:
        return self._view.number(other) == other

    def __lt__(self, other: object) -> bool:
        number = self._view.number(other)
        return number < other  # type: ignore[operator, no-any-return]

    __hash__ = None  # type: ignore[assignment]


def count_of(value: Any) -> Any:
    """The `length` of templates."""
    return Count(value) if type(value) is View else len(value)


# ---- what can be watched


def goes_forward(tree: nodes.Template) -> bool:
    """Whether the messages go nowhere but into loops, indices and questions of whether there are any, so that a `View`
    sees all that is asked of them; and whether nothing but namespaces keeps a state."""
    views = {"messages"}
    assigned = [a for a in tree.find_all(nodes.Assign) if isinstance(a.target, nodes.Name)]
    for _ in assigned:
        views |= {a.target.name for a in assigned if _is_view(a.node, views)}  # type: ignore[attr-defined]
    return _goes_forward(tree, views, buffered=False)


def _is_view(node: nodes.Node, views: set[str]) -> bool:
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_view(node.node, views)
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name in views


_BUFFERS = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


def _goes_forward(node: nodes.Node, views: set[str], *, buffered: bool) -> bool:
    if isinstance(node, nodes.For) and (node.recursive or (buffered and _is_view(node.iter, views))):
        return False
    if isinstance(node, nodes.Name) and node.name in ("cycler", "joiner", "lipsum"):
        return False
    for child in node.iter_child_nodes():
        if _is_loop(child) and not isinstance(node, nodes.Getattr):
            return False
        if _is_view(child, views) and not _may_hold(node, child):
            return False
        if not _goes_forward(child, views, buffered=buffered or isinstance(node, _BUFFERS)):
            return False
    return True


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _may_hold(node: nodes.Node, view: nodes.Node) -> bool:
    """Whether messages may stand at a place of the template: for item in messages, messages[0], if messages ..."""
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count") and view is node.node
    if isinstance(node, nodes.For):
        return view is node.iter
    if isinstance(node, nodes.Getitem | nodes.Assign | nodes.Test):
        return view is node.node
    return isinstance(node, nodes.And | nodes.Or | nodes.Not) or (isinstance(node, nodes.If) and view is node.test)
