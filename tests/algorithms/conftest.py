from ..trainer import model_dir, on_policy, pairs_file, prompts_file, sft_file

__all__ = ["model_dir", "on_policy", "pairs_file", "prompts_file", "sft_file"]
