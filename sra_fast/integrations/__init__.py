"""The operators in other people's models, without an edit of their code.

``model.compile(backend="sra_fast")`` or ``compile(model)``; ``report(model)`` says what was done,
``undo(model)`` takes it back. Without a compiler: ``patch(model)``, for the blocks of DiT, SiT,
REPA and SRA.
"""

from sra_fast.integrations.backend import backend, compile, undo
from sra_fast.integrations.patches import Patch, patch
from sra_fast.integrations.report import NearMiss, Report, Rewrite, report

__all__ = [
    "NearMiss",
    "Patch",
    "Report",
    "Rewrite",
    "backend",
    "compile",
    "patch",
    "report",
    "undo",
]
