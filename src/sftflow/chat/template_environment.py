"""The environment in which chat templates are rendered: Jinja2's sandbox, as transformers sets it up."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from sftflow.chat.watch import Watch, count_of

_DICT_ATTRIBUTES = frozenset(dir(dict))
_STR_METHODS = frozenset({"startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "replace", "lower"})
_LOOP = frozenset({"index", "index0", "first", "last", "length", "nextitem", "revindex", "revindex0"})
_BUILTIN = type("".strip)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with short ways for what templates do most and what the sandbox allows anyway: reading a key of a
    plain dict by a dot, asking the loop for its index, calling a method of a string. All else goes the sandbox's way.

    generated: where the text of each `{% generation %}` block is kept, or None.   watch: who watches a rendering.
    """

    generated: list[str] | None = None
    watch: Watch | None = None

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                try:
                    return obj[attribute]
                except KeyError:
                    return self.undefined(obj=obj, name=attribute)
        elif kind is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        elif kind is jinja2.runtime.LoopContext and attribute in _LOOP:
            if self.watch is not None:
                self.watch.look_ahead(obj, attribute)
            return getattr(obj, attribute)
        elif kind is Namespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is _BUILTIN and type(getattr(__obj, "__self__", None)) is str and __obj.__name__ in _STR_METHODS:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the template's own word for what the assistant wrote. Rendered as it
    is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_keep"), [], [], body).set_lineno(line)

    def _keep(self, caller: Any) -> str:
        text = str(caller())
        if self.environment.generated is not None:  # type: ignore[attr-defined]
            self.environment.generated.append(text)  # type: ignore[attr-defined]
        return text


class _Dict:
    """The `dict` of templates: no access to the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """The `namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as chat templates expect it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> Environment:
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _tojson
    made.filters["length"] = made.filters["count"] = count_of
    made.globals["raise_exception"] = _raise_exception
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = Namespace
    return made
