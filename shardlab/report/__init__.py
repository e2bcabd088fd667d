"""What happened: facts of a compiled step and of a run, as plain numbers and text.

``shardlab.report(step)`` is the audit of a compiled step.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab.report.audit import Audit
    from shardlab.step.compile import CompiledStep


class _Report(types.ModuleType):
    """The package, which may be called."""

    def __call__(self, step: "CompiledStep", **options: Any) -> "Audit":
        """See `shardlab.report.audit.audit_step`."""
        from shardlab.report.audit import audit_step

        return audit_step(step, **options)


sys.modules[__name__].__class__ = _Report
