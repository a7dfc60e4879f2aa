"""The audit of a rendered mixture. The page and the tables are loaded when first asked for, and rich with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sftflow.data.audit.audit import Audit, audit
from sftflow.data.audit.overlap import item_parts
from sftflow.data.audit.rows import SourceRows

if TYPE_CHECKING:
    from sftflow.data.audit.page import audit_page
    from sftflow.data.audit.tables import audit_tables

__all__ = ["Audit", "SourceRows", "audit", "audit_page", "audit_tables", "item_parts"]


def __getattr__(name: str) -> Any:
    if name not in ("audit_page", "audit_tables"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.removeprefix('audit_')}"), name)
