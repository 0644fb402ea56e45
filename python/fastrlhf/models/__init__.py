"""MODELS: the decoder of the Llama family, scalar heads, LoRA, and Hugging Face directories."""

from .checkpoint import has_scalar_head, load_decoder, load_scalar_model, read_config, save_decoder, save_scalar_model
from .config import DecoderConfig
from .decoder import Decoder
from .heads import ScalarModel, TokenLogprobs, token_logprobs
from .lora import adapters_off, add_lora
from .packed import Packed

__all__ = [
    "Decoder", "DecoderConfig", "Packed", "ScalarModel", "TokenLogprobs", "adapters_off", "add_lora", "has_scalar_head",
    "load_decoder",
    "load_scalar_model", "read_config", "save_decoder", "save_scalar_model", "token_logprobs",
]  # fmt: skip
