// Uses every primitive once, so that nvcc sees all of the inline PTX. Compiled, never run.
#include "cuda/primitives.h"

namespace frnn::cuda {

template <class T>
__device__ void Access(T* p) {
  StoreRelaxed(p, LoadRelaxed(p + 1));
}

__global__ void All(uint4* data, float* out, uint32_t* counter) {
  FRNN_SHARED(shared, uint4[64]);
  FRNN_SHARED(tail, __nv_bfloat16[2][8]);
  uint4* dynamic = DynamicShared<uint4>();
  Access(reinterpret_cast<__half*>(data));
  Access(reinterpret_cast<float*>(data));
  Access(reinterpret_cast<double*>(data));
  Access(reinterpret_cast<float2*>(data));
  Access(data);
  StoreRelease(counter, LoadAcquire(counter + 1));
  uint64_t* wide = reinterpret_cast<uint64_t*>(data);
  StoreRelease(wide, LoadAcquire(wide + 1));
  ReduceAddRelease(counter, 1);
  SpinPause();

  CopyAsync<4>(shared, data);
  CopyAsync<8>(shared + 1, data);
  CopyAsync<16>(shared + 2, data);
  CopyAsyncCommit();
  CopyAsyncWait<1>();
  CopyAsyncWait<0>();
  tail[threadIdx.x % 2][0] = __float2bfloat16_rn(1.f);
  NamedBarrierArrive(2, 64);
  NamedBarrier(1, 64);

  uint32_t a[4], b[4];
  LoadMatrix4(a, shared + threadIdx.x % 32);
  LoadMatrix4Transposed(b, shared + threadIdx.x % 32);
  float d[4] = {__bfloat162float(tail[0][0])};
  MmaBf16(d, a, b[0], b[1]);
  MmaF16(d, a, b[2], b[3]);
  MmaTf32(d, a, ToTf32(d[0]), ToTf32(d[1]));
  dynamic[threadIdx.x].x = PackBf16(d[0], d[1]) + PackF16(d[2], d[3]);
  GridSync();
  out[threadIdx.x] = d[threadIdx.x % 4] + __uint_as_float(dynamic[0].x);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__global__ void Sm90(const uint4* data, uint4* out) {
  FRNN_SHARED(bar, uint64_t[2]);
  FRNN_SHARED(box, uint4[64]);
  if (threadIdx.x < 2) MbarrierInit(bar + threadIdx.x, 1 + threadIdx.x);
  MbarrierInitFence();
  ClusterSync();
  const unsigned peer = (ClusterRank() + 1) % ClusterSize();
  if (threadIdx.x == 0) {
    MbarrierExpectTx(bar, 4 + 8 + 16 + 64);
    CopyBulk(box + 4, data, 64, bar);
    StoreAsync(reinterpret_cast<float*>(box), 1.f, bar, peer);
    StoreAsync(reinterpret_cast<uint64_t*>(box + 1), 1, bar, peer);
    StoreAsync(box + 2, data[0], bar, peer);
    MbarrierArrive(bar + 1);
    MbarrierArriveRemote(bar + 1, peer);
  }
  MbarrierWait(bar, 0);
  while (!MbarrierTryWait(bar + 1, 0)) SpinPause();
  out[threadIdx.x] = MapShared(box, peer)[threadIdx.x];
  ClusterArrive();
  ClusterWait();
}
#endif
}  // namespace frnn::cuda
