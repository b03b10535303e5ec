"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``).

It makes ``KvrailConnector`` known by name and takes the name ``LMCacheConnectorV1`` over where the
package ``lmcache`` is absent, so that a command written for LMCache runs on kvrail unchanged.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import sys
from typing import Any

logger = logging.getLogger(f"vllm.{__name__}")

NAME = "KvrailConnector"
LMCACHE_NAME = "LMCacheConnectorV1"
TAKEOVER_VARIABLE = "KVRAIL_TAKEOVER"


def load_connector() -> Any:
    """The connector class; imported here because vLLM asks for it only when it is configured."""
    from kvrail.vllm.connector import KvrailConnector

    return KvrailConnector


def wants_takeover() -> bool:
    """Whether ``LMCacheConnectorV1`` shall mean kvrail in this process."""
    setting = os.environ.get(TAKEOVER_VARIABLE, "").strip().lower()
    if setting in ("1", "true", "yes", "on"):
        return True
    if setting in ("0", "false", "no", "off"):
        return False
    return importlib.util.find_spec("lmcache") is None


def register() -> None:
    """Registers the connector with vLLM; may be called any number of times.

    Never raises: a plugin that fails would take vLLM's start with it, also for users who did not
    ask for kvrail.
    """
    try:
        _register()
    except Exception as error:
        logger.warning("kvrail: the connector could not be registered: %r", error)


def make_name_known() -> None:
    """Registers the connector's own name where no plugin has; never raises, as `register`.

    ``MultiConnector`` asks for the classes of its connectors by name, in every process that reads
    their statistics, also for those that were configured by the path of a module.
    """
    try:
        _registry().setdefault(NAME, load_connector)
    except Exception as error:
        logger.warning("kvrail: the name %s could not be registered: %r", NAME, error)


def _registry() -> dict[str, Any]:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # The factory has no call that replaces a name, and `register_connector` refuses one it knows.
    return KVConnectorFactory._registry


def _register() -> None:
    registry = _registry()
    registry[NAME] = load_connector
    if wants_takeover():
        if registry.get(LMCACHE_NAME) is not load_connector:
            registry[LMCACHE_NAME] = load_connector
            if _in_first_process() and _may_mean_lmcache():
                logger.info("kvrail: the connector name %s means kvrail here", LMCACHE_NAME)
    elif _in_first_process() and _may_mean_lmcache():
        # A warning, since vLLM sets up its logging after the plugins: Python itself prints those.
        logger.warning(
            "kvrail: the package lmcache is installed, so the connector name %s means LMCache; set "
            "%s=1 or configure the connector %s to use kvrail",
            LMCACHE_NAME,
            TAKEOVER_VARIABLE,
            NAME,
        )


def _in_first_process() -> bool:
    return multiprocessing.parent_process() is None


def _may_mean_lmcache() -> bool:
    """Whether the command line or the environment speaks of LMCache at all."""
    return "LMCACHE_CONFIG_FILE" in os.environ or any(
        LMCACHE_NAME in argument for argument in sys.argv
    )
