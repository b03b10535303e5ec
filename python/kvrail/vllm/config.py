"""Reads the sources of kvrail's configuration and has the core resolve them.

The core knows the keys, their ranks and their checks; only this file reads the environment and the
configuration file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvrail._core import Config, ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

# In order of rank.
CONFIG_FILE_VARIABLES = ("KVRAIL_CONFIG_FILE", "LMCACHE_CONFIG_FILE")
PREFIXES = ("KVRAIL_", "LMCACHE_")

# The connector is made twice in one process when vLLM runs without a process of its own for the
# engine; each warning is for the user, once.
_logged_warnings: set[str] = set()


def read_config_file(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Path and text of the configuration file that the environment names, or None.

    Raises ``ConfigError`` when a file is named and cannot be read.
    """
    for variable in CONFIG_FILE_VARIABLES:
        name = environment.get(variable)
        if not name:
            continue
        try:
            return name, Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"`{variable}` = {name}: expected a readable YAML file ({error})"
            ) from error
    return None


def resolve_config(
    connector: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None
) -> Config:
    """Resolves `kv_connector_extra_config`, the environment and the configuration file.

    Raises ``ConfigError`` that names key, value and what was expected. Warnings are logged once per
    process.
    """
    environment = os.environ if environment is None else environment
    try:
        connector_json = json.dumps(dict(connector)) if connector else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`kv_connector_extra_config`: expected plain JSON ({error})") from error
    ours = {name: value for name, value in environment.items() if name.startswith(PREFIXES)}
    config = Config.resolve(connector_json, ours, read_config_file(environment))
    for warning in config.warnings:
        if warning not in _logged_warnings:
            _logged_warnings.add(warning)
            logger.warning("kvrail: %s", warning)
    return config


def with_fitting_chunks(
    config: Config,
    connector: Mapping[str, Any] | None,
    fit: Callable[[int], int],
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The configuration with the chunk size that ``fit`` makes of it, where nobody has set one."""
    if config.as_dict()["chunk_size"]["origin"] != "default":
        return config
    size = fit(config.chunk_size)
    if size == config.chunk_size:
        return config
    return resolve_config({**(connector or {}), "chunk_size": size}, environment)


def effective_value(config: Config, key: str) -> Any:
    """The effective value of a key that has no attribute of its own."""
    return config.as_dict()[key]["value"]
