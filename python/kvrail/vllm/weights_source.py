"""Where vLLM takes weights from, and what identifies them there.

Only files can be identified. vLLM and its plugins also load weights from object stores, daemons and
other engines, and of a folder's files not all may be used: what is not known to be in the files
that are looked at has no identity.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrail.vllm.fingerprint import FingerprintError, fingerprint_path, resolve_model_path
from kvrail.vllm.layout import UnsupportedModelError

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

# Set where an engine joins others that run: it loads dummy weights and is sent theirs.
_SCALED_UP_VARIABLE = "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"

# Formats that read the same files of a folder, which has some in Mistral's form or has none.
_WITH_CONSOLIDATED = frozenset({"auto", "mistral"})
_WITHOUT_CONSOLIDATED = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor"})
_SHARDED = frozenset({"sharded_state", "runai_streamer_sharded"})
# Formats whose weights are files of the model's folder, and nothing else. Not among them:
# `npcache`, which goes on with its copies of files that were replaced since, and `ipc_cache`, whose
# daemon has weights of files of which only the heads are compared.
_OF_FOLDER = _WITH_CONSOLIDATED | _WITHOUT_CONSOLIDATED | _SHARDED | {"pt", "runai_streamer"}

# Other models that Ultravox takes weights from, its language model's, too (`secondary_weights`).
_TOWERS = ("text_model_id", "audio_model_id")


def check_source(vllm_config: VllmConfig) -> None:
    """Raises ``UnsupportedModelError`` where the weights are not those of files."""
    if vllm_config.weight_transfer_config is not None:
        raise UnsupportedModelError("the weights change while vLLM runs (weight transfer)")
    # Parsed as vLLM does.
    if int(os.environ.get(_SCALED_UP_VARIABLE, "0")):
        raise UnsupportedModelError(
            "the weights come from other engines (elastic expert parallelism), so they cannot be "
            "identified"
        )


def weights(model: ModelConfig, load: LoadConfig) -> dict[str, Any]:
    """What identifies the weights that a model was loaded with.

    Raises ``UnsupportedModelError`` when they are not local files.
    """
    if load.load_format == "dummy":
        return {"load_format": "dummy", "seed": model.seed}
    if load.load_format not in _OF_FOLDER:
        raise UnsupportedModelError(
            f"with the load format {load.load_format} weights may come from elsewhere than the "
            "files in the model's folder, so they cannot be identified"
        )
    if model.model_weights and not Path(model.model_weights).exists():
        # vLLM keeps the address of remote weights here and only the configuration in `model`.
        raise UnsupportedModelError(
            f"the weights at {model.model_weights} are not local files and cannot be identified"
        )
    path, fingerprint = _fingerprint(
        model.model_weights or model.model, model.revision, load.download_dir
    )
    return {"fingerprint": fingerprint} | _choice_of_files(path, load)


def draft_weights(vllm_config: VllmConfig) -> str | dict[str, Any] | None:
    """What identifies a draft model's own weights: its layers share the target's blocks."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft.model == vllm_config.model_config.model:
        return None
    load = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
    found = weights(draft, load)
    # Namespaces that exist have the fingerprint alone.
    return found["fingerprint"] if found.keys() == {"fingerprint"} else found


def tower_weights(vllm_config: VllmConfig) -> dict[str, str] | None:
    """Fingerprints of what comes from other models than the model itself and its draft model."""
    load = vllm_config.load_config
    config = vllm_config.model_config.hf_config
    towers = {name: tower for name in _TOWERS if (tower := getattr(config, name, None))}
    if not towers or load.load_format == "dummy":
        return None
    return {name: _fingerprint(tower, None, load.download_dir)[1] for name, tower in towers.items()}


def _choice_of_files(path: Path, load: LoadConfig) -> dict[str, str]:
    """Which files of the folder were chosen, where vLLM left alone would choose others.

    A folder may hold weights in several forms, and training may have replaced one of them.
    """
    consolidated = path.is_dir() and any(path.glob("consolidated*.safetensors"))
    if load.load_format in (_WITH_CONSOLIDATED if consolidated else _WITHOUT_CONSOLIDATED):
        return {}
    pattern = (load.model_loader_extra_config or {}).get("pattern")
    if load.load_format not in _SHARDED or pattern is None:
        return {"files": load.load_format}
    if "/" in pattern:
        raise UnsupportedModelError(
            f"the weights {pattern} may be in another folder than the model's, so they cannot be "
            "identified"
        )
    return {"files": f"{load.load_format} {pattern}"}


def _fingerprint(model: str, revision: str | None, download_dir: str | None) -> tuple[Path, str]:
    """Where a model's files are, and what identifies its weights."""
    try:
        path = resolve_model_path(model, revision, download_dir)
        return path, fingerprint_path(path)
    except FingerprintError as error:
        raise UnsupportedModelError(str(error)) from error
