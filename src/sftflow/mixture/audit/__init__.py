"""The audit of a rendered mixture. The page and the tables are loaded when first asked for, and rich with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sftflow.mixture.audit.overlap import item_parts
from sftflow.mixture.audit.rows import SourceRows
from sftflow.mixture.audit.run import Audit, audit

if TYPE_CHECKING:
    from sftflow.mixture.audit.page import audit_page
    from sftflow.mixture.audit.tables import audit_tables

__all__ = ["Audit", "SourceRows", "audit", "audit_page", "audit_tables", "item_parts"]


def __getattr__(name: str) -> Any:
    if name not in ("audit_page", "audit_tables"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.removeprefix('audit_')}"), name)
