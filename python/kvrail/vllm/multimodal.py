"""What a model's KV cache depends on where prompts have images, sound or video.

vLLM's block hashes name such an item by its content, and by the arguments that came with the
request. They leave out what the engine makes of it, by its settings and the model's files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# How images are cut, resized and turned into placeholders; beside the weights.
_PROCESSOR_FILES = "*processor_config.json"
_SETTINGS = (
    "mm_processor_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_encoder_attn_dtype",
)


def processing(model: ModelConfig, folder: Path) -> dict[str, Any] | None:
    """What becomes of images and the like; None for models that take text only.

    ``folder`` is where the model's files are.
    """
    config = getattr(model, "multimodal_config", None)
    if config is None:
        return None
    files = sorted(folder.glob(_PROCESSOR_FILES)) if folder.is_dir() else []
    return {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "settings": {name: repr(getattr(config, name, None)) for name in _SETTINGS},
        "image_processor": repr(
            sorted(getattr(model, "hf_image_processor_config", {}).items(), key=str)
        ),
    }


def items_are_named(vllm_config: VllmConfig) -> bool:
    """Whether the block hashes name images by their content.

    With vLLM's prefix cache and its processor cache both off they do by a number that starts again
    with each process (``_process_mm_uuids`` of vLLM's renderers).
    """
    config = getattr(vllm_config.model_config, "multimodal_config", None)
    return (
        config is None
        or config.mm_processor_cache_gb > 0
        or bool(vllm_config.cache_config.enable_prefix_caching)
    )
