// A GPU thread's vector of one float: what the mathematics written for vectors computes with there.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct Lane {
  using T = float;
  static constexpr int W = 1;
  float r;

  FASTRLHF_HOST_DEVICE static Lane set(float x) { return {x}; }

  friend FASTRLHF_HOST_DEVICE Lane operator+(Lane a, Lane b) { return {a.r + b.r}; }
  friend FASTRLHF_HOST_DEVICE Lane operator-(Lane a, Lane b) { return {a.r - b.r}; }
  friend FASTRLHF_HOST_DEVICE Lane operator*(Lane a, Lane b) { return {a.r * b.r}; }
  friend FASTRLHF_HOST_DEVICE Lane operator/(Lane a, Lane b) { return {a.r / b.r}; }
  friend FASTRLHF_HOST_DEVICE Lane fma(Lane a, Lane b, Lane c) { return {fmaf(a.r, b.r, c.r)}; }
  // b where either is NaN, as on the CPU
  friend FASTRLHF_HOST_DEVICE Lane max(Lane a, Lane b) { return {a.r > b.r ? a.r : b.r}; }
  friend FASTRLHF_HOST_DEVICE Lane min(Lane a, Lane b) { return {a.r < b.r ? a.r : b.r}; }
  friend FASTRLHF_HOST_DEVICE bool operator<(Lane a, Lane b) { return a.r < b.r; }
  friend FASTRLHF_HOST_DEVICE bool operator>(Lane a, Lane b) { return a.r > b.r; }
  friend FASTRLHF_HOST_DEVICE bool operator<=(Lane a, Lane b) { return a.r <= b.r; }
  friend FASTRLHF_HOST_DEVICE bool operator>=(Lane a, Lane b) { return a.r >= b.r; }
  friend FASTRLHF_HOST_DEVICE bool operator!=(Lane a, Lane b) { return a.r != b.r; }
  friend FASTRLHF_HOST_DEVICE Lane select(bool m, Lane a, Lane b) { return m ? a : b; }
  friend FASTRLHF_HOST_DEVICE Lane exp(Lane a) { return {expf(a.r)}; }
};

using F32 = Lane;

}}}  // namespace
