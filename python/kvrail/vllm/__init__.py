"""The vLLM connector of kvrail.

vLLM imports this package by name (``kv_connector_module_path: kvrail.vllm``) and takes
``KvrailConnector`` from it. The class is loaded on first use, so that vLLM's plugin hook, which
lives beside it, does not import torch into every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrail.vllm.connector import KvrailConnector

__all__ = ["KvrailConnector"]


def __getattr__(name: str) -> Any:
    if name == "KvrailConnector":
        from kvrail.vllm.connector import KvrailConnector

        return KvrailConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
