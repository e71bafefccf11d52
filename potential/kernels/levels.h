// Which instruction sets were the kernels compiled for? One table per level: 0 plain, 1 AVX2 with FMA, 2 AVX-512,
// 3 AVX-512 with AMX tiles for the networks, if the compiler had them.
#pragma once
#include "aev.h"
#include "motion.h"
#include "networks.h"
#include "training.h"

extern const AevKernel smelt_plain_aev[2];
extern const NetworksKernel smelt_plain_networks[2];
extern const MotionKernel smelt_plain_motion;
extern const TrainingKernel smelt_plain_training[2];
#if defined(__x86_64__)
extern const AevKernel smelt_avx2_aev[2], smelt_avx512_aev[2];
extern const NetworksKernel smelt_avx2_networks[2], smelt_avx512_networks[2];
extern const MotionKernel smelt_avx2_motion, smelt_avx512_motion;
extern const TrainingKernel smelt_avx2_training[2], smelt_avx512_training[2];
#endif
#if defined(SMELT_AMX)
extern const NetworksKernel smelt_amx_networks[2];
extern const TrainingKernel smelt_amx_training[2];
#else
#define smelt_amx_networks smelt_avx512_networks
#define smelt_amx_training smelt_avx512_training
#endif

namespace {

#if defined(__x86_64__)
constexpr const AevKernel* AEV[] = {smelt_plain_aev, smelt_avx2_aev, smelt_avx512_aev, smelt_avx512_aev};
constexpr const NetworksKernel* NETWORKS[] = {smelt_plain_networks, smelt_avx2_networks, smelt_avx512_networks,
                                              smelt_amx_networks};
[[maybe_unused]] constexpr const MotionKernel* MOTION[] = {&smelt_plain_motion, &smelt_avx2_motion,
                                                           &smelt_avx512_motion, &smelt_avx512_motion};
[[maybe_unused]] constexpr const TrainingKernel* TRAINING[] = {smelt_plain_training, smelt_avx2_training,
                                                               smelt_avx512_training, smelt_amx_training};
#else
constexpr const AevKernel* AEV[] = {smelt_plain_aev};
constexpr const NetworksKernel* NETWORKS[] = {smelt_plain_networks};
[[maybe_unused]] constexpr const MotionKernel* MOTION[] = {&smelt_plain_motion};
[[maybe_unused]] constexpr const TrainingKernel* TRAINING[] = {smelt_plain_training};
#endif

}  // namespace
