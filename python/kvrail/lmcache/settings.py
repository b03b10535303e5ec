"""The settings of kvrail inside LMCache, from a plain mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvrail._core import Config, ConfigError

NOT_OURS = (
    "chunk_size",
    "use_gds",
    "gds_backend",
    "extra_config.use_cufile",
    "extra_config.direct",
)
"""Keys that mean nothing here: LMCache cuts the chunks, and its memory is the host's."""


def resolve(params: Mapping[str, Any]) -> Config:
    """Resolves ``adapter_params``: kvrail's keys, with ``path`` as another name of ``gds_path``.

    The environment and configuration files are not read: what LMCache is told there is for LMCache.

    Raises ``ConfigError`` that names key, value and what was expected.
    """
    given = dict(params)
    if "path" in given:
        if "gds_path" in given:
            raise ConfigError("`path` and `gds_path`: expected one of the two")
        given["gds_path"] = given.pop("path")
    nested = given.get("extra_config")
    below = [f"extra_config.{key}" for key in nested] if isinstance(nested, Mapping) else []
    for key in [*given, *below]:
        if key in NOT_OURS or f"extra_config.{key}" in NOT_OURS:
            raise ConfigError(f"`{key}`: LMCache decides about this; expected no such key here")
    try:
        return Config.resolve(json.dumps(given), {}, None)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"`adapter_params`: expected plain JSON ({error})") from error
