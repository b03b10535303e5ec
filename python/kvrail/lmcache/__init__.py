"""kvrail inside LMCache: an L2 adapter of its server, and a storage plugin of its engine.

``lmcache server --l2-adapter '{"type": "plugin", "module_path": "kvrail.lmcache", "class_name":
"KvrailL2Adapter", "adapter_params": {"gds_path": "/data/kv"}}'``

Needs LMCache, which kvrail does not depend on: import this only where it is installed.
"""

from __future__ import annotations

from kvrail.lmcache.l2_adapter import KvrailL2Adapter
from kvrail.lmcache.storage_plugin import KvrailStorage

__all__ = ["KvrailL2Adapter", "KvrailStorage"]
