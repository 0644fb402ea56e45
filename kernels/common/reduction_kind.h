#pragma once

namespace fastrlhf {

enum class Reduction : int { token_mean = 0, token_sum = 1, seq_mean_token_mean = 2, seq_mean_token_sum = 3, seq_mean_token_sum_norm = 4 };

}  // namespace fastrlhf
