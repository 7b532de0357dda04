// One PTX instruction, one named function: matrix products, asynchronous copies, barriers, clusters, conversions.
//
// Kernels are written in CUDA C++ and these names; no other file holds inline assembly. 16-bit floats travel as bits,
// two in a uint32_t, the first in the low half; Half says which format they are. tests/cuda_emulator has a file of the
// same name and the same functions in plain C++, with which every kernel runs on a CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// What the target can do. A kernel of a target that cannot keeps its name and loses its body.
#if defined(__CUDA_ARCH__)
#define M3_SM90 (__CUDA_ARCH__ >= 900)  // mbarriers, bulk copies, clusters
#else
#define M3_SM90 1
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define M3_WGMMA 1
#else
#define M3_WGMMA 0
#endif

#define M3_DEVICE static __device__ __forceinline__

namespace m3 {

enum class Half { kBf16 = 1, kF16 = 2 };  // numbers as in each family's Type

namespace ptx {

// -- bits -------------------------------------------------------------------------------------------------------------
// Any function of three bits: kTable is that function of 0xF0, 0xCC, 0xAA.
template <int kTable>
M3_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Bytes of (b, a), a the low four, chosen by the nibbles of selector.
M3_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// -- 16-bit floats ----------------------------------------------------------------------------------------------------
template <Half kHalf>
M3_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (kHalf == Half::kF16)
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else  // a - b as fma(b, -1, a), rounded once; sub.bf16x2 needs sm_90
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80u), "r"(a));
  return d;
}

template <Half kHalf>
M3_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (kHalf == Half::kF16)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <Half kHalf>
M3_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
  return fma2<kHalf>(a, b, 0x80008000u);  // + -0 changes nothing
}

// Two floats, each rounded to nearest even.
template <Half kHalf>
M3_DEVICE uint32_t pack2(float low, float high) {
  uint32_t d;
  if constexpr (kHalf == Half::kF16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <Half kHalf>
M3_DEVICE float to_float(uint16_t bits) {
  float f;
  if constexpr (kHalf == Half::kF16)
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  else
    f = __uint_as_float((uint32_t)bits << 16);
  return f;
}

template <Half kHalf>
M3_DEVICE float2 unpack2(uint32_t bits) {
  return make_float2(to_float<kHalf>((uint16_t)(bits & 0xFFFF)), to_float<kHalf>((uint16_t)(bits >> 16)));
}

template <Half kHalf>
M3_DEVICE uint16_t from_float(float f) {
  return (uint16_t)pack2<kHalf>(f, 0.f);
}

// -- fp32 arithmetic that no compiler may contract or reassociate
// ------------------------------------------------------
M3_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
M3_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
M3_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The larger; nan if one of them is.
M3_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 2^x and log2 x, about 2 units in the last place; subnormals are flushed.
M3_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
M3_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
M3_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -- matrix products of a warp
// ------------------------------------------------------------------------------------------ d (16 x 8) += a (16 x 16)
// b (16 x 8). Lane (g, t) = (lane / 4, lane % 4) holds
//   a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b0 = B[2t, 2t+1][g]     b1 = B[2t+8, 2t+9][g]     d = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
template <Half kHalf>
M3_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kHalf == Half::kF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

M3_DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of 16-bit elements: lane i gives the 16-byte row i % 8 of matrix i / 8, and receives of each
// matrix the elements [lane / 4][2 (lane % 4), + 1]; _trans: of its transpose.
M3_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
M3_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices: the rows are those of lanes 0 to 15.
M3_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// -- loads and copies
// --------------------------------------------------------------------------------------------------- 16 bytes that are
// read once: not kept in L1, first to leave L2.
M3_DEVICE uint4 load_once(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

// 16 bytes to shared memory, asynchronously; the last 16 - valid bytes become zero (valid = 0: nothing is read).
M3_DEVICE void cp_async_16(void* shared, const void* global, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
M3_DEVICE void cp_async_4(void* shared, const void* global, int valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
M3_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
M3_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// -- order between blocks
// ------------------------------------------------------------------------------------------------- Adds to a counter
// in device memory; what this thread wrote before is seen by whoever sees the sum, and the reverse.
M3_DEVICE int add_acq_rel(int* counter, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
}
M3_DEVICE int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}
M3_DEVICE void store_release(int* pointer, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}
// A load that no other block's plain store is hidden from by L1.
M3_DEVICE float4 load_l2(const float* pointer) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
M3_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
M3_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Programmatic dependent launch: wait until the launch before has finished (or has said that dependents may start and
// its memory is visible); allow the launch after to start. Nothing where the launch did not ask for it.
M3_DEVICE void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
M3_DEVICE void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if M3_SM90
// -- mbarriers and bulk copies (sm_90)
// ----------------------------------------------------------------------------------- A phase ends when `count`
// arrivals and every expected byte have come; phases alternate between parity 0 and 1.
M3_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After mbarrier_init, before a barrier lets other threads use it.
M3_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
M3_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
M3_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
M3_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}
// `bytes` (a multiple of 16, both addresses too) to shared memory; counted by the barrier. One thread issues it.
M3_DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The same with a hint that the bytes are read once (first to leave L2).
M3_DEVICE void bulk_copy_once(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "{\n .reg .b64 policy;\n createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "policy;\n}" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to bulk copies and wgmma; before the barrier.
M3_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- clusters (sm_90)
// -----------------------------------------------------------------------------------------------------
M3_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return (int)rank;
}
M3_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
M3_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// 16 bytes at the place of `pointer` (in this block's shared memory) in the shared memory of block `rank`.
M3_DEVICE float4 load_cluster(const float* pointer, int rank) {
  float4 v;
  asm volatile(
      "{\n .reg .b32 a;\n mapa.shared::cluster.u32 a, %4, %5;\n ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(pointer)), "r"(rank)
      : "memory");
  return v;
}
#endif

#if M3_WGMMA
// -- matrix products of a warpgroup (sm_90a)
// -------------------------------------------------------------------------------
M3_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
M3_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
M3_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across this point.
template <int kRegisters>
M3_DEVICE void wgmma_hold(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a K-major operand in shared memory whose rows are 128 bytes, swizzled: byte address bits 4..6 are xored
// with bits 7..9; eight rows are 1024 bytes, aligned to that. A step of 16 elements along K adds 32 bytes to `pointer`.
M3_DEVICE uint64_t wgmma_descriptor(const void* pointer) {
  constexpr uint64_t kStride = 1024 >> 4, kLeading = 1, kSwizzle128 = 1;
  return (uint64_t)((shared_address(pointer) & 0x3FFFF) >> 4) | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

template <int kTokens>
struct Wgmma;

#define M3_WGMMA_CASE(kTokens, kRegisters, kList, kA0, kA1, kA2, kA3, kB, kP, ...)                                     \
  template <>                                                                                                          \
  struct Wgmma<kTokens> {                                                                                              \
    template <Half kHalf>                                                                                              \
    M3_DEVICE void run(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) {                   \
      if constexpr (kHalf == Half::kF16)                                                                               \
        asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " kP                                                          \
                     ", 0;\n"                                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #kTokens "k16.f32.f16.f16 {" kList "}, {" kA0 "," kA1 "," kA2 \
                     "," kA3 "}, " kB ", p, 1, 1, 0;\n}"                                                               \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                           \
      else                                                                                                             \
        asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " kP                                                          \
                     ", 0;\n"                                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #kTokens "k16.f32.bf16.bf16 {" kList "}, {" kA0 "," kA1       \
                     "," kA2 "," kA3 "}, " kB ", p, 1, 1, 0;\n}"                                                       \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                           \
    }                                                                                                                  \
  };

M3_WGMMA_CASE(64, 32,
              "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
              "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
              "%32", "%33", "%34", "%35", "%36", "%37", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
              "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),
              "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
              "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
              "+f"(d[29]), "+f"(d[30]), "+f"(d[31]))
M3_WGMMA_CASE(128, 64,
              "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
              "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
              "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
              "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
              "%64", "%65", "%66", "%67", "%68", "%69", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
              "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),
              "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
              "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
              "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
              "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),
              "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]),
              "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]),
              "+f"(d[61]), "+f"(d[62]), "+f"(d[63]))
M3_WGMMA_CASE(256, 128,
              "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
              "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
              "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
              "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
              "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
              "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
              "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
              "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127",
              "%128", "%129", "%130", "%131", "%132", "%133", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
              "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
              "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
              "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
              "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
              "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
              "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
              "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
              "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]),
              "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]),
              "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
              "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),
              "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]),
              "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]),
              "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]),
              "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]),
              "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]))
#undef M3_WGMMA_CASE

// d (64 x kTokens) = a b + (accumulate ? d : 0), asynchronously, for the 128 threads of a warpgroup. Warp w of the
// group holds rows 16w .. 16w + 15 of a and d, in the lane order of mma_16816: a as there; d[4j ..] is columns 8j .. 8j
// + 7. b: kTokens rows of 16 elements along K. `accumulate` 0 or 1.
template <Half kHalf, int kTokens>
M3_DEVICE void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  Wgmma<kTokens>::template run<kHalf>(d, a, b, accumulate);
}

// Registers a thread of this warpgroup may have from now on.
template <int kRegisters>
M3_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
M3_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

}  // namespace ptx
}  // namespace m3
