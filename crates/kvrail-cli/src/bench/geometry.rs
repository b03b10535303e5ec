//! The KV cache geometries that `bench` knows, and where their numbers come from.

use clap::ValueEnum;

/// Tokens of a chunk: the default of `chunk_size`.
pub(crate) const CHUNK_TOKENS: usize = 256;

/// A model whose chunks are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    /// 32 MiB per chunk
    #[value(name = "llama-3.1-8b")]
    Llama8b,
    /// 10 MiB per chunk and rank
    #[value(name = "llama-3.1-70b-tp8")]
    Llama70bTp8,
    /// 17.2 MiB per chunk (MLA)
    #[value(name = "deepseek-v3")]
    DeepseekV3,
    /// 5.6 MiB per chunk, blocks of the CPU build of vLLM
    #[value(name = "smollm2-135m")]
    Smollm2,
    /// 256 KiB per chunk: no model, but the small end of what is stored
    #[value(name = "synthetic-256k")]
    Synthetic256k,
    /// All models, one after the other
    #[value(name = "all")]
    All,
}

impl Model {
    /// Returns the geometries to measure.
    pub(crate) fn geometries(self) -> Vec<Geometry> {
        match self {
            Self::Llama8b => vec![LLAMA_8B],
            Self::Llama70bTp8 => vec![LLAMA_70B_TP8],
            Self::DeepseekV3 => vec![DEEPSEEK_V3],
            Self::Smollm2 => vec![SMOLLM2],
            Self::Synthetic256k => vec![SYNTHETIC_256K],
            Self::All => vec![LLAMA_8B, LLAMA_70B_TP8, DEEPSEEK_V3, SMOLLM2],
        }
    }
}

/// What decides the shape of a chunk's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// The model, and its parallelism where that changes the bytes.
    pub(crate) name: &'static str,
    /// Layers with a KV cache.
    pub(crate) layers: usize,
    /// Bytes of one token in one layer on one rank.
    pub(crate) token_bytes: usize,
    /// Tokens of a block of vLLM.
    pub(crate) block_tokens: usize,
}

/// Bytes of a bfloat16, the `torch_dtype` of all four models.
const BFLOAT16_BYTES: usize = 2;
/// K and V: two vectors per token, layer and head.
const KEY_AND_VALUE: usize = 2;

/// `config.json` of meta-llama/Llama-3.1-8B: `num_hidden_layers` 32, `num_key_value_heads` 8,
/// head size `hidden_size` 4096 / `num_attention_heads` 32 = 128. 131072 B per token over all
/// layers. Blocks of 16 tokens: the default of vLLM on GPUs.
const LLAMA_8B: Geometry = Geometry {
    name: "llama-3.1-8b",
    layers: 32,
    token_bytes: 8 * 128 * KEY_AND_VALUE * BFLOAT16_BYTES,
    block_tokens: 16,
};

/// `config.json` of meta-llama/Llama-3.1-70B: `num_hidden_layers` 80, `num_key_value_heads` 8, of
/// which tensor parallelism over 8 ranks leaves 1 per rank, head size 8192 / 64 = 128. 40960 B per
/// token and rank.
const LLAMA_70B_TP8: Geometry = Geometry {
    name: "llama-3.1-70b-tp8",
    layers: 80,
    token_bytes: 128 * KEY_AND_VALUE * BFLOAT16_BYTES,
    block_tokens: 16,
};

/// `config.json` of deepseek-ai/DeepSeek-V3: `num_hidden_layers` 61, and with MLA one latent vector
/// per token and layer, `kv_lora_rank` 512 + `qk_rope_head_dim` 64 = 576 numbers. 70272 B per
/// token, the same on every rank.
const DEEPSEEK_V3: Geometry = Geometry {
    name: "deepseek-v3",
    layers: 61,
    token_bytes: (512 + 64) * BFLOAT16_BYTES,
    block_tokens: 16,
};

/// `config.json` of HuggingFaceTB/SmolLM2-135M: `num_hidden_layers` 30, `num_key_value_heads` 3,
/// head size 576 / 9 = 64. 23040 B per token. Blocks of 128 tokens: the default of vLLM on CPUs.
const SMOLLM2: Geometry = Geometry {
    name: "smollm2-135m",
    layers: 30,
    token_bytes: 3 * 64 * KEY_AND_VALUE * BFLOAT16_BYTES,
    block_tokens: 128,
};

/// Two layers with one KV head of size 128: 1024 B per token.
const SYNTHETIC_256K: Geometry = Geometry {
    name: "synthetic-256k",
    layers: 2,
    token_bytes: 128 * KEY_AND_VALUE * BFLOAT16_BYTES,
    block_tokens: 16,
};

impl Geometry {
    /// Returns the blocks of a chunk.
    pub(crate) fn blocks_per_chunk(&self) -> usize {
        CHUNK_TOKENS / self.block_tokens
    }

    /// Returns the bytes of one block in one layer.
    pub(crate) fn block_bytes(&self) -> usize {
        self.token_bytes * self.block_tokens
    }

    /// Returns the bytes of a chunk's payload.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.layers * self.token_bytes * CHUNK_TOKENS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_as_large_as_the_models_say() {
        let sizes: Vec<_> = Model::All
            .geometries()
            .iter()
            .map(|found| (found.layers * found.token_bytes, found.payload_bytes()))
            .collect();
        let expected = [
            (131_072, 32 << 20),
            (40_960, 10 << 20),
            (70_272, 17_989_632),
            (23_040, 5_898_240),
        ];
        assert_eq!(sizes, expected);
    }

    #[test]
    fn a_chunk_is_a_whole_number_of_blocks() {
        for found in Model::All.geometries() {
            let chunk_bytes = found.blocks_per_chunk() * found.block_bytes() * found.layers;
            assert_eq!(chunk_bytes, found.payload_bytes(), "{}", found.name);
        }
    }
}
