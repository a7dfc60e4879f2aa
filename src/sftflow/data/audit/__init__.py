"""The audit of a rendered mixture: numbers only; report.audit_page and report.tables draw them."""

from sftflow.data.audit.audit import Audit, audit
from sftflow.data.audit.overlap import item_parts

__all__ = ["Audit", "audit", "item_parts"]
